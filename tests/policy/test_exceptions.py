"""Exceptions as values: what can be waived at all, for how long, and when it counts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from policy import Caller, KeyFacts, Policy, Request, TenantFacts
from policy.bundle import SHIPPED
from policy.exceptions import AHEAD_US, DAY_US, MOST, ExceptionRefused, Exceptions, Waiver, named, told, waived
from policy.signed import LEASE_S, Instant, RowsDamaged, SignedRow

S = 1_000_000
NOW = 1_800_000_000 * S
DAY = 86_400
HOME, FRANCE = frozenset({"eu-de-1"}), frozenset({"eu-fr-1"})
KEY = "00000000-0000-4000-8000-000000000001"
ID = "11111111-2222-4333-8444-555555555555"
WAIVER = Waiver(
    id=ID,
    tenant="health",
    keys=(KEY,),
    kind="reach",
    places=("eu-fr-1",),
    purpose="default",
    legal_basis="eu-law",
    legal_ref="Regulation (EU) 2016/679, Article 49",
    begins=NOW - 10 * DAY_US,
    ends=NOW + 10 * DAY_US,
    tier=2,
)
ABROAD = Caller("mtls:x:/health/a", "workload", "health", frozenset({"workload"}), FRANCE, 4, "mtls")


def facts(**other: Any) -> KeyFacts:
    given: dict[str, Any] = {"id": KEY, "tenant": "health", "tier": 2, "purposes": ("default", "other")}
    given |= dict.fromkeys(("residency", "execution", "reach", "egress"), HOME)
    return KeyFacts(**{**given, "failover": frozenset(), "shared_with": frozenset(), "state": "active", **other})


def asked(**other: Any) -> Request:
    given: dict[str, Any] = {"caller": ABROAD, "action": "encrypt", "resource": facts(), "now": NOW // S}
    given |= {"hsm": "eu-de-1", "via": HOME, "purpose": "default", "reason": "customer-initiated"}
    return Request(**{**given, **other})


EXACT = Instant(NOW, 0)


def known(*waivers: Waiver, at: Instant = EXACT) -> Exceptions:
    made = Exceptions(lambda: 0.0, lambda: at)
    made.confirm(0.0, 1, waivers)
    return made


def of(days: float, **other: Any) -> Waiver:
    return dataclasses.replace(WAIVER, begins=NOW, ends=NOW + int(days * DAY_US), **other)


# ---- what can be -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waiver", "tiers"),
    [
        (of(20), [2]),
        (of(45), [3]),
        (of(30), [2]),
        (of(90), [3]),
        (of(20), [2, 3]),
        (of(20, kind="egress"), [3]),
        (dataclasses.replace(WAIVER, ends=NOW + 1), [2]),
        (dataclasses.replace(WAIVER, begins=NOW + AHEAD_US, ends=NOW + AHEAD_US + DAY_US), [2]),
    ],
)
def test_what_the_tier_allows_can_be(waiver: Waiver, tiers: list[int]) -> None:
    waiver.refuse(tiers, now=NOW)


@pytest.mark.parametrize(
    ("pointer", "waiver", "tiers"),
    [
        ("/keys", of(1), [1]),
        ("/keys", of(1), [3, 1]),
        ("/keys", of(1), []),
        ("/keys", of(1), [4]),
        ("/kind", of(20, kind="residency"), [2]),
        ("/kind", of(20, kind="execution"), [2]),
        ("/kind", of(20, kind=""), [2]),
        ("/not_after", of(45), [2]),
        ("/not_after", of(45), [3, 2]),
        ("/not_after", of(30.00001), [2]),
        ("/not_after", of(91), [3]),
        ("/not_after", of(0), [2]),
        ("/not_after", of(-1), [2]),
        ("/not_after", dataclasses.replace(WAIVER, ends=NOW), [2]),
        ("/not_before", dataclasses.replace(WAIVER, begins=NOW + AHEAD_US + 1, ends=NOW + AHEAD_US + DAY_US), [2]),
        ("/places", of(1, places=()), [2]),
        ("/legal_ref", of(1, legal_ref="  "), [2]),
    ],
)
def test_what_can_never_be_is_refused_with_its_field(pointer: str, waiver: Waiver, tiers: list[int]) -> None:
    with pytest.raises(ExceptionRefused) as refused:
        waiver.refuse(tiers, now=NOW)
    assert refused.value.pointer == pointer
    assert str(refused.value)


@pytest.mark.parametrize(
    ("waiver", "tiers", "code", "detail"),
    [
        (of(1, kind="residency"), [2], "not_allowed", "reach or egress"),
        (of(1, places=()), [2], "empty", "at least one place"),
        (of(1), [1], "tier_not_allowed", "tier 1"),
        (of(45), [3, 2], "out_of_range", "at most 30 days"),
        (of(91), [3], "out_of_range", "at most 90 days"),
        (
            dataclasses.replace(WAIVER, begins=NOW + AHEAD_US + 1, ends=NOW + AHEAD_US + DAY_US),
            [2],
            "out_of_range",
            "at most 90 days from now",
        ),
    ],
)
def test_a_refusal_says_which_limit_was_passed(waiver: Waiver, tiers: list[int], code: str, detail: str) -> None:
    with pytest.raises(ExceptionRefused, match=detail) as refused:
        waiver.refuse(tiers, now=NOW)
    assert refused.value.code == code


# ---- when it counts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "now", "error", "live"),
    [
        ("inside", 0, 0, True),
        ("inside, a clock that may be 30 s off", 0, 30, True),
        ("1 s before the end, clock +-1 s", 10 * DAY - 1, 1, False),
        ("2 s before the end, clock +-1 s", 10 * DAY - 2, 1, True),
        ("after the end", 10 * DAY + 1, 0, False),
        ("at the end", 10 * DAY, 0, False),
        ("before the beginning", -10 * DAY - 1, 0, False),
        ("1 s after the beginning, clock +-2 s", -10 * DAY + 1, 2, False),
        ("clock +-60 s", 0, 60, False),
        ("clock +-31 s", 0, 31, False),
    ],
)
def test_it_is_live_within_its_time_by_every_clock_that_may_be_right(
    case: str, now: int, error: int, live: bool
) -> None:
    at = Instant(NOW + now * S, error * S)
    assert bool(known(WAIVER, at=at).needed(asked())) is live, case


def test_revoked_or_for_another_purpose_key_or_tenant_it_is_not_live() -> None:
    assert known(WAIVER).needed(asked()) == (WAIVER,)
    assert not known(dataclasses.replace(WAIVER, revoked_at=NOW)).needed(asked())
    assert not known(WAIVER).needed(asked(purpose="other"))
    assert not known(WAIVER).needed(asked(purpose=""))
    assert not known(WAIVER).needed(asked(resource=facts(id=KEY.replace("1", "2"))))
    assert not known(WAIVER).needed(asked(resource=facts(tenant="defence")))


def test_a_key_that_came_to_a_stricter_tier_is_held_to_that_ones_limit() -> None:
    long = of(45, tier=3)
    assert known(long).needed(asked(resource=facts(tier=3))) == (long,)
    assert not known(long).needed(asked(resource=facts(tier=2)))
    assert not known(WAIVER).needed(asked(resource=facts(tier=1)))
    longest = of(30)
    assert known(longest).needed(asked(resource=facts(tier=2))) == (longest,)
    assert not known(dataclasses.replace(longest, ends=longest.ends + 1)).needed(asked(resource=facts(tier=2)))


def test_one_of_several_keys_is_waived_as_every_other_of_them() -> None:
    other = KEY.replace("1", "2")
    several = dataclasses.replace(WAIVER, keys=(other, KEY))
    both = known(several, dataclasses.replace(WAIVER, id=ID.replace("1", "2")))
    assert len(both.needed(asked())) == 2
    assert both.needed(asked(resource=facts(id=other))) == (several,)
    assert both.needed(asked(resource=TenantFacts(KEY))) == ()


def test_what_ended_was_revoked_or_left_the_rows_is_not_still_in_force() -> None:
    ticks = [0.0]
    now = [EXACT]
    held = Exceptions(lambda: ticks[0], lambda: now[0])
    held.confirm(0.0, 1, [WAIVER])
    assert held.still(WAIVER)
    held.revoke(WAIVER.id)
    assert not held.still(WAIVER)
    held = known(WAIVER, at=Instant(WAIVER.ends, 0))
    assert not held.still(WAIVER)
    assert not known().still(WAIVER)


def test_the_next_end_is_that_of_the_live_exception_that_ends_first() -> None:
    sooner = dataclasses.replace(WAIVER, id=ID.replace("1", "2"), ends=NOW + 90 * S)
    egress = dataclasses.replace(WAIVER, id=ID.replace("1", "3"), kind="egress", ends=NOW + 60 * S)
    over = dataclasses.replace(WAIVER, id=ID.replace("1", "4"), ends=NOW - 1)
    held = known(WAIVER, sooner, egress, over)
    assert (held.next_end_s("reach"), held.next_end_s("egress")) == (90.0, 60.0)
    assert {w.id for w in held.live_now("reach")} == {WAIVER.id, sooner.id}
    assert known(over).next_end_s("reach") == float("inf")


# ---- why one does not count, as an explanation tells it --------------------------------------------------------------


EGRESS = dataclasses.replace(WAIVER, kind="egress")


@pytest.mark.parametrize(
    ("waiver", "request_", "lacks"),
    [
        (WAIVER, asked(), ()),
        (WAIVER, asked(purpose="other"), ("another purpose",)),
        (WAIVER, asked(now=WAIVER.begins // S), ()),
        (WAIVER, asked(now=WAIVER.begins // S - 1), ("not yet begun",)),
        (WAIVER, asked(now=WAIVER.ends // S - 1), ()),
        (WAIVER, asked(now=WAIVER.ends // S), ("ended",)),
        (dataclasses.replace(WAIVER, revoked_at=NOW), asked(), ("revoked",)),
        (dataclasses.replace(WAIVER, revoked_at=NOW), asked(now=NOW // S - 1), ()),  # as it was before
        (WAIVER, asked(caller=dataclasses.replace(ABROAD, places=HOME | FRANCE)), ("other places",)),
        (WAIVER, asked(dest=HOME), ()),
        (EGRESS, asked(dest=FRANCE), ()),
        (EGRESS, asked(dest=HOME), ("other places",)),
        (WAIVER, asked(resource=facts(tier=1)), ("longer than the tier allows",)),
        (of(30), asked(), ()),
        (of(31), asked(), ("longer than the tier allows",)),
        (of(31), asked(resource=TenantFacts("health")), ()),
        (
            dataclasses.replace(WAIVER, revoked_at=NOW),
            asked(purpose="", now=WAIVER.ends // S),
            ("another purpose", "ended", "revoked"),
        ),
    ],
)
def test_an_explanation_tells_all_that_an_exception_lacks(
    waiver: Waiver, request_: Request, lacks: tuple[str, ...]
) -> None:
    assert waiver.lacks(request_) == lacks


def test_what_is_damaged_or_was_not_read_for_the_lease_counts_not() -> None:
    ticks = [0.0]
    held = Exceptions(lambda: ticks[0], lambda: EXACT)
    assert not held.needed(asked())
    held.confirm(0.0, 1, [WAIVER])
    assert held.still(WAIVER)
    ticks[0] = LEASE_S + 0.1
    assert not held.needed(asked())
    held.confirm(ticks[0])
    held.distrust("a row was changed")
    assert not held.needed(asked())
    assert not held.still(WAIVER)
    assert held.live_now("reach") == []


def test_only_what_a_request_needs_is_counted_and_no_more_than_a_record_tells() -> None:
    egress = dataclasses.replace(WAIVER, id=ID.replace("1", "2"), kind="egress")
    both = known(WAIVER, egress)
    at_home = dataclasses.replace(ABROAD, places=HOME)
    assert both.needed(asked(caller=at_home)) == ()
    assert both.needed(asked()) == (WAIVER,)
    assert both.needed(asked(caller=at_home, action="decrypt", dest=FRANCE)) == (egress,)
    assert set(both.needed(asked(action="decrypt", dest=FRANCE))) == {WAIVER, egress}
    many = [dataclasses.replace(WAIVER, id=f"{n}{ID[1:]}", ends=WAIVER.ends - n * S) for n in range(MOST + 3)]
    assert known(*many).needed(asked()) == tuple(many[:MOST])


def test_the_charter_lets_in_what_is_waived_and_nothing_else() -> None:
    shipped = Policy.load(SHIPPED, sample=5)
    assert shipped.decide(asked()).rule_code == "SOV-CALLER-PLACE"
    let_in = asked(waived_reach=waived([WAIVER], "reach"))
    assert shipped.decide(let_in).allowed
    out = asked(action="decrypt", dest=FRANCE, waived_reach=FRANCE)
    assert shipped.decide(out).rule_code == "SOV-DESTINATION"
    assert shipped.decide(dataclasses.replace(out, waived_egress=FRANCE)).allowed
    for bound in ("residency", "execution"):
        moved = dataclasses.replace(let_in, resource=facts(**{bound: FRANCE}), waived_egress=FRANCE)
        assert not shipped.decide(moved).allowed, bound
    assert not shipped.decide(dataclasses.replace(let_in, resource=facts(tier=1))).allowed


# ---- as rows and records ---------------------------------------------------------------------------------------------


def test_a_row_gives_the_exception_back_and_any_other_content_is_damage() -> None:
    full = dataclasses.replace(WAIVER, request="{}", approvals={"a": "00"}, at=NOW)
    assert Waiver.of(full.row()) == full
    revoked = dataclasses.replace(full.row(), revoked_at=NOW, revoked_by="officer")
    assert Waiver.of(revoked) == dataclasses.replace(full, revoked_at=NOW, revoked_by="officer")
    for content in ("[]", "{}", "null", "x", json.dumps({**json.loads(full.row().content), "hsm": 1})):
        with pytest.raises(RowsDamaged):
            Waiver.of(SignedRow("w", "health", content, NOW, NOW))


def test_a_record_names_one_by_its_id_and_several_by_how_they_begin() -> None:
    several = [dataclasses.replace(WAIVER, id=f"{n}{ID[1:]}") for n in range(MOST)]
    assert told([WAIVER]) == ID
    for some in ([WAIVER], several, several[:2]):
        assert len(told(some)) <= 64
        assert set(named(told(some), [WAIVER, *several])) >= set(some)
    assert told(several[:2]) == "01111111-2222.11111111-2222"
    assert named(told(several[:2]), several) == tuple(several[:2])
    assert named("", [WAIVER]) == ()


def test_only_the_places_of_the_kind_that_is_asked_for_are_let_in() -> None:
    egress = dataclasses.replace(WAIVER, kind="egress", places=("no-1",))
    assert waived([WAIVER, egress], "reach") == FRANCE
    assert waived([WAIVER, egress], "egress") == {"no-1"}
    assert waived([], "reach") == frozenset()
