"""Places and turns: who waits, who is refused, and that one tenant's crowd does not keep another out."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from harness import until
from service.turns import Overloaded, Turns


async def queued(turns: Turns, who: str, done: list[str]) -> None:
    """Take a place in turn, tell so, and give it back a step later."""
    if not turns.enter(who):
        await turns.wait(who)
    done.append(who)
    await asyncio.sleep(0)
    turns.leave(who)


@pytest.mark.anyio
async def test_free_places_are_taken_at_once_and_never_all_of_them_by_one() -> None:
    turns = Turns(places=8, queue=10, wait_s=60)
    assert [turns.enter("a") for _ in range(8)] == [True] * 6 + [False] * 2
    assert [turns.enter("b") for _ in range(3)] == [True, True, False]
    assert turns.inside == 8


@pytest.mark.anyio
async def test_tenants_take_turns_however_many_one_of_them_has_waiting() -> None:
    turns, done = Turns(places=1, queue=200, wait_s=60), list[str]()
    assert turns.enter("x")
    crowd = [asyncio.create_task(queued(turns, "a", done)) for _ in range(100)]
    few = [asyncio.create_task(queued(turns, who, done)) for who in ("b", "c") for _ in range(5)]
    await asyncio.sleep(0)
    assert turns.waiting == 110
    turns.leave("x")
    await asyncio.gather(*crowd, *few)
    assert done[:15] == ["a", "b", "c"] * 5
    assert turns.inside == turns.waiting == 0


@pytest.mark.anyio
async def test_a_full_queue_refuses_whoever_has_most_waiting() -> None:
    turns = Turns(places=1, queue=4, wait_s=60)
    turns.enter("x")
    crowd = [asyncio.create_task(turns.wait("a")) for _ in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        turns.wait("a").send(None)  # at once: it waits for nothing
    few = [asyncio.create_task(turns.wait("b")) for _ in range(2)]
    await asyncio.sleep(0)
    assert turns.waiting == 4
    for newest in crowd[2:]:
        with pytest.raises(Overloaded) as told:
            await newest
        assert told.value.retry_after == 1
    with pytest.raises(Overloaded):
        turns.wait("b").send(None)  # two each: neither gives way
    assert turns.refused == {"queue": 4, "wait": 0, "connections": 0}
    for task in (*crowd[:2], *few):
        task.cancel()
    await asyncio.gather(*crowd, *few, return_exceptions=True)
    assert turns.waiting == 0


@pytest.mark.anyio
async def test_who_waits_for_too_long_is_refused_and_leaves_nothing_behind() -> None:
    turns = Turns(places=1, queue=4, wait_s=0.01)
    turns.enter("x")
    with pytest.raises(Overloaded, match="wait"):
        await turns.wait("a")
    assert turns.refused == {"queue": 0, "wait": 1, "connections": 0}
    turns.leave("x")
    assert turns.inside == turns.waiting == 0
    assert turns.enter("a")


@pytest.mark.anyio
async def test_a_tenant_at_its_most_does_not_hold_up_the_turns_of_others() -> None:
    turns, done = Turns(places=4, queue=20, wait_s=60), list[str]()
    assert [turns.enter("a") for _ in range(4)] == [True, True, True, False]
    assert turns.enter("b")
    crowd = [asyncio.create_task(queued(turns, "a", done)) for _ in range(5)]
    one = asyncio.create_task(queued(turns, "c", done))
    await asyncio.sleep(0)
    turns.leave("b")  # the free place is not for `a`, which has three
    await one
    assert done == ["c"]
    turns.leave("a")
    await asyncio.gather(*crowd)
    assert done == ["c", *"aaaaa"]


@pytest.mark.anyio
async def test_one_that_is_cancelled_as_its_turn_comes_gives_the_place_back() -> None:
    turns = Turns(places=1, queue=4, wait_s=60)
    turns.enter("x")
    waiting = asyncio.create_task(turns.wait("a"))
    await asyncio.sleep(0)
    turns.leave("x")  # it is its turn now, and it does not know yet
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until(lambda: turns.inside == 0, "the place is lost")
    assert turns.enter("b")


@pytest.mark.anyio
async def test_no_place_is_lost_or_given_twice_whatever_happens() -> None:
    chance = random.Random(7)
    turns = Turns(places=5, queue=12, wait_s=0.02)
    counts, most = Counter[str](), 0

    async def one(who: str) -> None:
        nonlocal most
        try:
            if not turns.enter(who):
                await turns.wait(who)
        except Overloaded:
            counts["refused"] += 1
            return
        try:
            most = max(most, turns.inside)
            assert turns.inside <= 5
            await asyncio.sleep(chance.choice((0, 0, 0.001, 0.01)))
            counts[who] += 1
        finally:
            turns.leave(who)

    tasks = []
    for number in range(3_000):
        tasks.append(asyncio.create_task(one(chance.choice("aaaaaaabc"))))
        if number % 7 == 0:
            chance.choice(tasks).cancel()
        if number % 5 == 0:
            await asyncio.sleep(chance.choice((0, 0.001)))
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not [t for t in tasks if not t.cancelled() and t.exception()]
    assert most == 5
    assert turns.inside == turns.waiting == 0
    assert not turns._held
    assert not turns._lines
    assert not turns._next
    assert min(counts[who] for who in ("a", "b", "c", "refused")) > 50
