"""Freezes as values: what each stops, who obeys it since when, and that whoever cannot tell serves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from policy.freeze import LEASES, LONGEST_LEASE_S, Freeze, Freezes, FreezeUnconfirmed, Frozen, InForce, Scope, Touched

USE, RELEASE, MOVE = frozenset({"encrypt", "use"}), frozenset({"decrypt", "use", "release"}), frozenset({"move"})
ADMIN = frozenset({"rotate", "admin"})
TOUCHED = Touched(
    tenant="health",
    caller="mtls:x:/health/a",
    region="eu-de-1",
    places=frozenset({"eu-fr-1"}),
    groups=USE,
    key="k1",
    tags={"case": "7", "team": "ml"},
    tier=2,
)


def of(kind: str, value: str = "", *, tenant: str | None = None, epoch: int = 1, **other: Any) -> Freeze:
    given = {"id": f"f{epoch}", "reason": "incident", "officer": "o", "at": 0, **other}
    return Freeze(epoch=epoch, scope=Scope(kind, value), tenant=tenant, **given)


def around(places: frozenset[str]) -> frozenset[str]:
    return places | {{"eu-de-1": "DE", "eu-fr-1": "FR"}.get(place, "?") for place in places}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def known(*freezes: Freeze, clock: Callable[[], float] | None = None) -> Freezes:
    made = Freezes(serving=lambda region: frozenset({f"hsm-{region}"}), monotonic=clock or Clock())
    made.confirm(100.0, InForce.of(len(freezes), freezes))
    return made


def stopped_by(freezes: Freezes, touched: Touched = TOUCHED) -> str | None:
    try:
        freezes.check(touched, around=around)
    except Frozen as frozen:
        return frozen.freeze.id
    return None


# ---- what is stopped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("everything", ""),
        ("key", "k1"),
        ("tag", "case=7"),
        ("tag", "team=ml"),
        ("tenant", "health"),
        ("region", "eu-de-1"),  # where the HSM is
        ("region", "DE"),
        ("region", "eu-fr-1"),  # where the caller is
        ("region", "FR"),
        ("tier", "2"),
        ("caller", "mtls:x:/health/a"),
        ("hsm", "hsm-eu-de-1"),
    ],
)
def test_a_scope_that_is_touched_stops_and_another_of_its_kind_does_not(kind: str, value: str) -> None:
    assert stopped_by(known(of(kind, value))) == "f1"
    assert stopped_by(known(of(kind, value, tenant="health"))) == "f1"
    assert stopped_by(known(of(kind, value, tenant="defence"))) is None
    if value:
        assert stopped_by(known(of(kind, value + "x"))) is None


def test_what_belongs_to_no_tenant_is_stopped_by_what_stops_all_alone() -> None:
    installation = TOUCHED._replace(tenant=None)
    assert stopped_by(known(of("everything")), installation) == "f1"
    assert stopped_by(known(of("everything", tenant="health")), installation) is None
    assert stopped_by(known(of("tenant", "health")), installation) is None
    assert stopped_by(known(of("tenant", "None")), installation) is None


@pytest.mark.parametrize(
    ("mode", "stopped"),
    [("halt", [USE, RELEASE, MOVE, ADMIN]), ("no-release", [RELEASE, MOVE]), ("admin-only", [USE, RELEASE])],
)
def test_a_mode_stops_the_groups_it_names_and_what_is_in_no_group(mode: str, stopped: list[frozenset[str]]) -> None:
    freeze = of("everything", mode=mode)
    for groups in (USE, RELEASE, MOVE, ADMIN):
        assert stopped_by(known(freeze), TOUCHED._replace(groups=groups)) == ("f1" if groups in stopped else None)
    assert freeze.stops(frozenset())


def test_the_earliest_that_stops_is_told_and_a_narrower_mode_hides_no_later_one() -> None:
    later, earlier = of("key", "k1", epoch=5), of("tenant", "health", epoch=3, tenant="health")
    assert stopped_by(known(later, earlier)) == "f3"
    assert [f.epoch for f in known(later, earlier).now.freezes] == [3, 5]
    narrow = of("key", "k1", epoch=2, mode="no-release")
    assert stopped_by(known(later, earlier, narrow)) == "f3"
    assert stopped_by(known(later, narrow)) == "f5"
    assert stopped_by(known(later, narrow), TOUCHED._replace(groups=RELEASE)) == "f2"


def test_the_refusal_names_the_freeze() -> None:
    with pytest.raises(Frozen, match="frozen by f1") as frozen:
        known(of("everything")).check(TOUCHED, around=around)
    assert frozen.value.freeze == of("everything")


# ---- what is known ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tier", "lease"), [*LEASES.items(), (0, 3.0), (4, 3.0)])
def test_who_could_not_read_for_the_lease_of_the_tier_serves_nothing(tier: int, lease: float) -> None:
    clock = Clock()
    freezes, touched = known(clock=clock), TOUCHED._replace(tier=tier)
    clock.now = 100.0 + lease
    freezes.check(touched, around=around)
    clock.now += 0.001
    with pytest.raises(FreezeUnconfirmed, match="longer than the lease"):
        freezes.check(touched, around=around)
    freezes.confirm(clock.now)  # nothing was changed meanwhile
    freezes.check(touched, around=around)
    assert lease <= LONGEST_LEASE_S == 60.0


def test_who_has_read_nothing_or_something_that_was_changed_serves_nothing_and_says_why() -> None:
    clock = Clock()
    new = Freezes(serving=lambda _: frozenset(), monotonic=clock)
    assert new.age_s is None
    with pytest.raises(FreezeUnconfirmed, match="could not be read"):
        new.check(TOUCHED, around=around)
    freezes = known(clock=clock)
    clock.now = 101.5
    assert freezes.age_s == 1.5
    freezes.distrust("freeze 3 was changed")
    assert freezes.age_s is None
    with pytest.raises(FreezeUnconfirmed, match="freeze 3 was changed"):
        freezes.check(TOUCHED, around=around)
    freezes.confirm(101.0, InForce())
    assert (freezes.age_s, freezes.damaged) == (0.5, "")
    freezes.check(TOUCHED, around=around)


def test_a_freeze_that_is_known_stops_even_where_others_cannot_be_told() -> None:
    freezes = known(of("key", "k1"))
    freezes.distrust("freeze 3 was changed")
    assert stopped_by(freezes) == "f1"


def test_a_freeze_of_this_process_is_obeyed_at_once_and_survives_a_reading_that_began_before() -> None:
    clock = Clock()
    freezes = known(of("key", "k2"), clock=clock)
    clock.now = 101.0
    freezes.add(of("key", "k1", epoch=2))
    assert stopped_by(freezes) == "f2"
    assert stopped_by(freezes, TOUCHED._replace(key="k2")) == "f1"
    assert freezes.now.epoch == 1  # the stored ones are read up to there
    for begun in (100.5, 101.0):
        freezes.confirm(begun, InForce.of(1, [of("key", "k2")]))
        assert stopped_by(freezes) == "f2"
    freezes.confirm(101.5, InForce.of(3, []))  # it was lifted: the reading began after it was made
    assert stopped_by(freezes) is None
    assert freezes.now.epoch == 3


def test_a_scope_of_a_kind_is_looked_for_only_where_such_a_freeze_is_in_force() -> None:
    asked: list[str] = []

    def serving(region: str) -> frozenset[str]:
        asked.append(region)
        return frozenset({"h"})

    freezes = Freezes(serving=serving, monotonic=Clock())
    freezes.confirm(100.0, InForce.of(1, [of("key", "other")]))
    freezes.check(TOUCHED, around=lambda _: pytest.fail("no region is frozen"))
    assert asked == []
    freezes.confirm(100.0, InForce.of(2, [of("hsm", "other")]))
    freezes.check(TOUCHED, around=around)
    assert asked == ["eu-de-1"]
