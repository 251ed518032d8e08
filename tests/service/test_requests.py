"""Log lines: one JSON object each, nothing a client sent can forge a second one (W-10)."""

from __future__ import annotations

import json
import logging
import re

from service.protocols.problems import ERRORS, OWN
from service.requests import JsonLines, uuid7, where


def line(message: str, **facts: object) -> str:
    record = logging.LogRecord("skms", logging.INFO, "x.py", 1, message, (), None)
    record.facts = facts
    return JsonLines().format(record)


def test_W_10_control_characters_and_escapes_are_encoded() -> None:
    hostile = 'a\r\n{"level":"info","event":"forged"}\x1b[31m\u2028\x00'
    shown = line(hostile, caller=hostile, status=200)
    assert "\n" not in shown
    assert "\x1b" not in shown
    assert "\u2028" not in shown
    assert json.loads(shown)["caller"] == hostile


def test_an_exception_shows_its_place_and_not_its_text() -> None:
    try:
        raise ValueError("SECRET text")
    except ValueError as error:
        shown = where(error)
    assert "ValueError" in shown
    assert any("test_requests.py" in part for part in shown)
    assert "SECRET" not in " ".join(shown)


def test_request_ids_are_uuid7_and_rise_with_time() -> None:
    ids = [uuid7(1_800_000_000_000_000 + n * 1_000) for n in range(50)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 50
    for made in ids:
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", made)


def test_every_exported_exception_has_a_row_in_the_error_tables() -> None:
    import audit.log
    import keystore
    import policy
    from service.outcome import OUTCOMES, outcome_of

    made_elsewhere = {policy.Denied, audit.log.ChangeFailed}  # they carry their code
    for package in (keystore, policy):
        for name in package.__all__:
            kind = getattr(package, name)
            if isinstance(kind, type) and issubclass(kind, Exception) and kind not in made_elsewhere:
                assert any(base in OUTCOMES for base in kind.__mro__), name
    assert {code for _, code in OUTCOMES.values()} | {code for _, code in OWN.values()} <= set(ERRORS)
    assert outcome_of(RuntimeError("x")) == ("error", "internal")
