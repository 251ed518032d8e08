"""Five times more than a worker can do, by an open loop over TLS (R8); `make bench-overload` does it for longer."""

from __future__ import annotations

import os

import pytest

from bench.overload import CROWDS, flooded

SECONDS = float(os.environ.get("OVERLOAD_SECONDS", "4"))


@pytest.mark.alone
def test_R8_five_times_the_capacity_is_refused_typed_and_nothing_hangs() -> None:
    found = flooded(SECONDS, CROWDS[-1])
    assert found["hung"] == 0, found
    assert found["broken"] <= 5, found  # connections that gave way as their next request came
    assert set(found["refused"]) <= {"503 overloaded"}, found
    assert found["done"] > 0
    assert found["goodput_cpu"] > 0.5, found  # a second of the worker's CPU: what other processes take is not its fault
    assert found["memory"] < 2.5, found  # a worker that has just begun; over a minute it is 1.5 (docs/limits.md)
