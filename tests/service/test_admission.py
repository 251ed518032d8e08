"""Bounds for strangers: what they may ask, and which of their refusals get a record."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from service.admission import Admission, RateLimited, Refusals


@dataclass
class Watch:
    """A clock that a test moves (s)."""

    at: float = 1_000.0

    def __call__(self) -> float:
        return self.at

    def us(self) -> int:
        return int(self.at * 1e6)


def ask(admission: Admission, source: str, times: int) -> int:
    admitted = 0
    for _ in range(times):
        try:
            with admission.admitted(source):
                admitted += 1
        except RateLimited as limited:
            assert limited.retry_after >= 1
    return admitted


def test_each_source_has_a_bucket_and_an_ipv6_network_is_one_source() -> None:
    watch = Watch()
    admission = Admission(rate=10, burst=20, monotonic=watch)
    assert ask(admission, "192.0.2.1", 30) == 20
    assert ask(admission, "192.0.2.2", 30) == 20
    assert [ask(admission, f"2001:db8::{n}", 15) for n in (1, 2)] == [15, 5]
    watch.at += 0.5
    assert ask(admission, "192.0.2.1", 30) == 5


def test_no_more_than_the_places_are_held_at_once() -> None:
    admission = Admission(at_once=1)
    with admission.admitted("192.0.2.1"):
        assert ask(admission, "192.0.2.2", 1) == 0
    assert ask(admission, "192.0.2.2", 1) == 1


def refusals_of(watch: Watch, *, sources: int = 4_096) -> Refusals:
    return Refusals(clock=watch.us, rate=1, burst=5, together=8, sources=sources, monotonic=watch)


def test_of_a_flood_the_first_are_recorded_and_the_others_counted_exactly() -> None:
    watch = Watch()
    refusals = refusals_of(watch)
    assert sum(not refusals.only_counted("192.0.2.1", "not_found") for _ in range(1_000)) == 5
    since = watch.us()
    watch.at += 0.5
    assert refusals.only_counted("192.0.2.1", "not_found")
    [counted] = refusals.taken()
    assert (counted.source, counted.why, counted.count) == ("192.0.2.1", "not_found", 996)
    assert (counted.since, counted.until) == (since, watch.us())
    assert refusals.taken() == []


def test_many_sources_together_make_no_more_records_than_the_bound_and_use_bounded_memory() -> None:
    watch = Watch()
    refusals = refusals_of(watch, sources=10)
    own = sum(not refusals.only_counted(f"10.0.{n >> 8}.{n & 255}", "not_found") for n in range(1_000))
    counted = refusals.taken()
    assert own == 8
    assert len(counted) == 11
    assert own + sum(c.count for c in counted) == 1_000
    assert Counter(c.source for c in counted)[""] == 1


@pytest.mark.parametrize("later", [0, 3])
def test_a_count_that_could_not_be_recorded_is_part_of_the_next(later: int) -> None:
    watch = Watch()
    refusals = refusals_of(watch)
    for _ in range(25):
        refusals.only_counted("192.0.2.1", "not_found")
    lost = refusals.taken()
    watch.at += 0.1
    for _ in range(later):
        refusals.only_counted("192.0.2.1", "not_found")
    refusals.give_back(lost)
    [counted] = refusals.taken()
    assert (counted.count, counted.since) == (20 + later, lost[0].since)
    assert counted.until == (watch.us() if later else lost[0].until)
