"""Steps of the machine's clock: found against the monotonic clock, and far forward only with an operator's word.

A chain's time cannot go back, so a clock that is wrong by hours would spoil it for as long.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

STEP_US: Final = 1_000_000  # what counts as a step
FORWARD_US: Final = 600_000_000  # a step forward beyond this needs an operator
CONFIRMED: Final = "clock-confirmed"  # in the node's state directory


@dataclass(frozen=True, slots=True)
class Confirmation:
    """An operator's word that this machine's clock was right: when (us), and the operator's numeric user id."""

    at: int
    uid: int


@dataclass(frozen=True, slots=True)
class Step:
    """The clock should have read `was` and reads `now` (us), at `tick` of the monotonic clock (s)."""

    was: int
    now: int
    tick: float
    confirmed: Confirmation | None = None


class StepRefused(Exception):
    """The clock jumped too far forward, and nobody has confirmed it."""


class ClockWatch:
    """The clock of one process, held against its monotonic clock since the last step that was recorded."""

    def __init__(self, clock: Callable[[], int], monotonic: Callable[[], float], *, state_dir: Path) -> None:
        self._clock, self._monotonic, self._state_dir = clock, monotonic, state_dir
        self._base, self._base_tick = clock(), monotonic()
        self._behind = 0  # how far the clock is behind the furthest it has been (us): so far it may come forward again

    def believed(self) -> int:
        """What the clock would read had it never stepped since the last recorded step (us)."""
        return self._base + int((self._monotonic() - self._base_tick) * 1e6)

    def step(self) -> Step | None:
        """The step that is not recorded yet, if there is one; StepRefused if it goes far forward unconfirmed."""
        now, tick = self._clock(), self._monotonic()
        was = self._base + int((tick - self._base_tick) * 1e6)
        if abs(now - was) <= STEP_US:
            return None
        if now - was - self._behind <= FORWARD_US:
            return Step(was, now, tick)
        said = confirmation(self._state_dir)
        if said is None or abs(now - said.at) > FORWARD_US:
            raise StepRefused(
                f"the clock jumped forward by {round((now - was) / 60e6)} minutes: set it right, or, if it is right now, "
                "run `skms audit confirm-clock` on this node"
            )
        return Step(was, now, tick, said)

    def recorded(self, step: Step) -> None:
        """The step stands in the log: from here on the clock is held against its new reading."""
        self._behind = max(0, self._behind - (step.now - step.was))
        self._base, self._base_tick = step.now, step.tick


def confirm(state_dir: Path, confirmation: Confirmation) -> None:
    """Leave an operator's word for every worker of the node: it holds for clock readings within ten minutes of it."""
    temporary = state_dir / f"{CONFIRMED}.{os.getpid()}"
    descriptor = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"at": confirmation.at, "uid": confirmation.uid}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(state_dir / CONFIRMED)


def confirmation(state_dir: Path) -> Confirmation | None:
    """The newest word of an operator; None if there is none, or it cannot be read."""
    try:
        found = json.loads((state_dir / CONFIRMED).read_text())
        return Confirmation(int(found["at"]), int(found["uid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
