"""What a ceremony did, step by step, so that people who were not there can check it. Nothing in it is secret.

Each step's hash covers the step and the hash before it; the first covers the head. The last one is the transcript's own
hash: whoever keeps these 64 characters (the audit log, paper) can tell a changed transcript.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

FORMAT: Final = "skms/ceremony/1"
Fact = str | int | bool | list[str] | Mapping[str, "Fact"]


class TranscriptDamaged(Exception):
    """Not a transcript, or changed since it was written; the message says where."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was done, and what was seen then."""

    number: int
    time: str  # RFC 3339, UTC
    name: str
    facts: Mapping[str, Fact]
    hash: str


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _link(before: str, number: int, time: str, name: str, facts: Mapping[str, Fact]) -> str:
    body = {"n": number, "time": time, "step": name, "facts": facts}
    return hashlib.sha256(bytes.fromhex(before) + _canonical(body)).hexdigest()


@dataclass(slots=True)
class Transcript:
    """A transcript in the making. `clock` gives microseconds; `told` hears of each step as it ends."""

    kind: str
    facts: Mapping[str, Fact]  # installation, region: what the ceremony is about
    clock: Callable[[], int]
    told: Callable[[Step], None] = lambda _: None
    steps: list[Step] = field(default_factory=list)

    def add(self, name: str, **facts: Fact) -> None:
        """Note a step that has ended."""
        number = len(self.steps) + 1
        moment = datetime.fromtimestamp(self.clock() / 1e6, UTC).isoformat(timespec="milliseconds")
        time = moment.replace("+00:00", "Z")
        step = Step(number, time, name, facts, _link(self.sha256, number, time, name, facts))
        self.steps.append(step)
        self.told(step)

    @property
    def sha256(self) -> str:
        """The hash of everything so far."""
        return self.steps[-1].hash if self.steps else _head(self.kind, self.facts)

    def to_json(self) -> bytes:
        """The canonical JSON of the whole transcript."""
        steps = [{"n": s.number, "time": s.time, "step": s.name, "facts": s.facts, "hash": s.hash} for s in self.steps]
        whole = {"format": FORMAT, "kind": self.kind, "about": self.facts, "steps": steps, "sha256": self.sha256}
        return _canonical(whole) + b"\n"

    def to_text(self) -> str:
        """The transcript for people to read and sign."""
        lines = [f"Ceremony: {self.kind}", *(f"  {name}: {_shown(value)}" for name, value in self.facts.items()), ""]
        for step in self.steps:
            lines.append(f"{step.number:>3}. {step.time}  {step.name}")
            lines += [f"       {name}: {_shown(value)}" for name, value in step.facts.items()]
        return "\n".join([*lines, "", f"SHA-256 of this transcript: {self.sha256}", ""])


def _head(kind: str, facts: Mapping[str, Fact]) -> str:
    return hashlib.sha256(_canonical({"format": FORMAT, "kind": kind, "about": facts})).hexdigest()


def _shown(value: Fact) -> str:
    match value:
        case Mapping():
            return ", ".join(f"{name}={_shown(v)}" for name, v in value.items())
        case list():
            return ", ".join(value) or "none"
        case bool():
            return "yes" if value else "no"
    return str(value)


def verify(body: bytes) -> Transcript:
    """The transcript that these bytes are; TranscriptDamaged unless every hash of it is right."""
    try:
        whole: dict[str, Any] = json.loads(body)
        if _canonical(whole) + b"\n" != body or whole["format"] != FORMAT:
            raise TranscriptDamaged("not the canonical form of a ceremony transcript")
        made = Transcript(whole["kind"], whole["about"], lambda: 0)
        for number, step in enumerate(whole["steps"], start=1):
            right = _link(made.sha256, number, step["time"], step["step"], step["facts"])
            if (step["n"], step["hash"]) != (number, right):
                raise TranscriptDamaged(f"step {number} was changed, or one before it was added or removed")
            made.steps.append(Step(number, step["time"], step["step"], step["facts"], right))
        if whole["sha256"] != made.sha256:
            raise TranscriptDamaged("the hash of the whole does not fit its last step: steps are missing at the end")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TranscriptDamaged(f"not a ceremony transcript: {type(error).__name__}") from None
    return made
