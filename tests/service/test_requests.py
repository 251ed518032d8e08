"""Log lines: one JSON object each, nothing a client sent can forge a second one (W-10)."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.ids import uuid4, uuid7
from service.loglines import JsonLines, where
from service.protocols.problems import ERRORS, OWN
from service.requests import RequestLines


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


def test_ids_do_not_repeat_over_threads_and_forks_and_are_uuid4() -> None:
    with ThreadPoolExecutor(8) as pool:
        made = [i for found in pool.map(lambda _: [uuid4() for _ in range(2_000)], range(16)) for i in found]
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writing, " ".join(uuid4() for _ in range(50)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    made += os.read(reading, 4_096).decode().split() + [uuid4() for _ in range(300)]
    assert len(set(made)) == len(made) == 32_350
    assert all(str(uuid.UUID(one)) == one and uuid.UUID(one).version == 4 for one in made)


def test_lines_of_requests_are_whole_ascii_and_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    async def lines() -> None:
        written = RequestLines()
        for number in range(40):
            written.add(1_800_000_000_123_456, {"n": number, "caller": "x" * 300 if number else "a\u2028b"})
        await asyncio.sleep(0)

    asyncio.run(lines())
    shown = capfd.readouterr().err
    assert shown.isascii()
    found = [json.loads(line) for line in shown.splitlines()]
    assert [line["n"] for line in found] == list(range(40))
    assert found[0] | {"n": 0} == {
        "time": "2027-01-15T08:00:00.123Z",
        "level": "info",
        "logger": "skms.request",
        "event": "request",
        "n": 0,
        "caller": "a\u2028b",
    }


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
