"""Transcripts of ceremonies: any change shows."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from keystore.pkcs11 import Transcript, TranscriptDamaged, verify_transcript


def written() -> bytes:
    moments = itertools.count(1_700_000_000_000_000, 1_000)
    made = Transcript("join", {"region": "eu-de-1"}, lambda: next(moments))
    made.add("sender", hsm="a", waivers=[])
    made.add("transferred", object="root-kek/1", attributes={"SENSITIVE": True})
    made.add("joined", hsm="b")
    return made.to_json()


def test_an_untouched_transcript_is_intact() -> None:
    found = verify_transcript(written())
    assert [s.name for s in found.steps] == ["sender", "transferred", "joined"]
    assert found.to_json() == written()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(kind="init"),
        lambda t: t["about"].update(region="eu-fr-1"),
        lambda t: t["steps"][1]["facts"]["attributes"].update(SENSITIVE=False),
        lambda t: t["steps"][1].update(time="2020-01-01T00:00:00.000Z"),
        lambda t: t["steps"].pop(1),
        lambda t: t["steps"].pop(),
        lambda t: t["steps"].insert(0, t["steps"][0]),
        lambda t: t.update(sha256="0" * 64),
        lambda t: t.pop("steps"),
    ],
)
def test_any_change_shows(change: Any) -> None:
    whole = json.loads(written())
    change(whole)
    body = json.dumps(whole, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    with pytest.raises(TranscriptDamaged):
        verify_transcript(body)


def test_another_spelling_is_no_transcript() -> None:
    with pytest.raises(TranscriptDamaged):
        verify_transcript(json.dumps(json.loads(written()), indent=1).encode())
