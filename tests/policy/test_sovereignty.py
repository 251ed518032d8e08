"""The figures by hand-made cases: nothing gives no figure, missing evidence counts against."""

from __future__ import annotations

import pytest

from policy.sovereignty import (
    CRITERIA,
    QUARTER_US,
    YEAR_US,
    Drill,
    Held,
    Stop,
    System,
    Times,
    containment,
    control,
    diversity,
    exits,
)

NOW = 2 * YEAR_US
S = 1_000_000


def test_a_critical_system_counts_if_it_meets_every_criterion() -> None:
    systems = [
        System("records", "health", True, ()),
        System("radar", "defence", True, ("residency", "verified")),
        System("canteen", "health", False, ("mapped",)),
    ]
    found = control(systems)
    assert (found.critical, found.sovereign, found.share) == (2, 1, 0.5)
    assert found.gaps == {name: int(name in {"residency", "verified"}) for name in CRITERIA}
    assert control([]).share is None
    assert control([systems[1]]).share == 0.0


@pytest.mark.parametrize(
    ("held", "approved", "index", "loss"),
    [
        # The two examples of the definition, of four approved suppliers.
        ([Held(2, 50, ("a",)), Held(2, 50, ("b",))], "abcd", 0.667, {"a": 0.5, "b": 0.5}),
        ([Held(2, 90, ("a", "b")), Held(2, 10, ("b", "a"))], "abcd", 0.24, {"a": 0.0, "b": 0.0}),
        ([Held(2, 10, ("a",))], "ab", 0.0, {"a": 1.0, "b": 0.0}),
        ([Held(2, 10, ("a",))], "a", None, {"a": 1.0}),  # with one supplier there is nothing to spread over
        ([Held(1, 10, ("a",)), Held(3, 30, ("b",))], "ab", 1.0, {"a": 0.25, "b": 0.75}),  # tier 1 weighs three times
        ([], "ab", None, {"a": 0.0, "b": 0.0}),
        ([Held(2, 0, ("a",)), Held(2, 4, ())], "ab", None, {"a": 0.0, "b": 0.0}),
    ],
)
def test_diversity_and_what_is_lost_with_a_supplier(
    held: list[Held], approved: str, index: float | None, loss: dict[str, float]
) -> None:
    found = diversity(held, approved=approved)
    assert found.index == (None if index is None else pytest.approx(index, abs=0.001))
    assert {s: found.loss[s] for s in loss} == pytest.approx(loss)
    assert sum(found.share.values()) == pytest.approx(1.0 if found.keys else 0.0)


def test_a_supplier_that_is_not_approved_is_counted_all_the_same() -> None:
    found = diversity([Held(2, 1, ("stranger",))], approved=["a"])
    assert (found.approved, found.share["stranger"], found.loss["stranger"], found.index) == (2, 1.0, 1.0, 0.0)


def test_an_exit_counts_if_it_was_confirmed_without_a_refused_request() -> None:
    drills = [
        Drill("a", True, 100.0, 0, NOW - S),
        Drill("a", True, 300.0, 0, NOW - 2 * S),
        Drill("a", True, 1.0, 7, NOW - S),  # quick, and it cost requests
        Drill("a", False, 2.0, 0, NOW - S),
        Drill("a", True, 5.0, 0, NOW - YEAR_US - S),  # too long ago
    ]
    a, b = exits(drills, vendors=["b"], now=NOW)
    assert (a.succeeded, a.failed, a.mean_s, a.max_s, a.refused) == (2, 2, 200.0, 300.0, 7)
    assert (b.vendor, b.succeeded, b.mean_s, b.max_s) == ("b", 0, None, None)


def test_times_to_contain_are_told_apart_and_open_ones_do_not_count_as_quick() -> None:
    stops = [Stop(NOW - 10 * S, NOW - 9 * S, False), Stop(NOW - S, None, False), Stop(NOW - 50 * S, NOW - 46 * S, True)]
    found = containment(stops, now=NOW)
    assert (found.real, found.drills) == (Times(1, 1.0, 1.0, 1.0), Times(1, 4.0, 4.0, 4.0))
    assert (found.open, found.drilled) == (1, True)
    old = [Stop(NOW - QUARTER_US - S, NOW - QUARTER_US, True), Stop(NOW - YEAR_US - S, NOW - YEAR_US, False)]
    assert containment(old, now=NOW).drilled is False
    assert containment(old, now=NOW).real.max_s is None
    assert containment([Stop(NOW - S, None, True)], now=NOW).drilled is False


def test_time_to_detect_counts_incidents_of_which_it_was_said_when_they_began() -> None:
    stops = [
        Stop(NOW - 10 * S, NOW - 9 * S, False, began=NOW - 70 * S),
        Stop(NOW - 5 * S, None, False, began=NOW - 35 * S),  # detected, though not contained yet
        Stop(NOW - S, NOW, False),
        Stop(NOW - S, NOW, True, began=NOW - 100 * S),  # a drill has no incident
    ]
    assert containment(stops, now=NOW).detected == Times(2, 30.0, 60.0, 60.0)


def test_quantiles_are_times_that_were_measured() -> None:
    assert Times.of([]) == Times(0, None, None, None)
    assert Times.of([3.0]) == Times(1, 3.0, 3.0, 3.0)
    assert Times.of(float(n) for n in range(10, 0, -1)) == Times(10, 5.0, 9.0, 10.0)
