"""Calls to a slow HSM: inline or not, in time or refused, and what the caller is told (R7)."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from sqlalchemy.exc import InterfaceError, OperationalError, ProgrammingError

from harness import until
from keystore import HsmFault, HsmLocked, HsmTimeout, HsmUnavailable
from service.database import DatabaseUnavailable
from service.hsmcalls import HsmCalls
from service.protocols.problems import problem_of


class Token:
    """What `HsmCalls` looks at."""

    def __init__(self, *, fast: bool) -> None:
        self.fast = fast


def calls(*, fast: bool = False, **options: Any) -> HsmCalls:
    return HsmCalls({"eu-de-1": Token(fast=fast)}, **{"deadline_s": 30.0, "threads": 2, "queue": 3, **options})


@pytest.mark.anyio
async def test_a_fast_token_is_called_on_the_event_loop_and_a_slow_one_is_not() -> None:
    here = threading.get_ident()
    assert await calls(fast=True).run("eu-de-1", threading.get_ident) == here
    assert await calls().run("eu-de-1", threading.get_ident) != here
    assert await calls().run("eu-fr-1", threading.get_ident) == here  # no HSM here: the keystore says so itself


@pytest.mark.anyio
async def test_a_call_that_is_late_is_a_timeout_and_its_result_is_dropped() -> None:
    some = calls(deadline_s=1.0)
    go = threading.Event()
    with pytest.raises(HsmTimeout):
        await some.run("eu-de-1", go.wait)  # would never come back by itself
    assert some.waiting("eu-de-1") == 1
    go.set()
    assert await some.run("eu-de-1", lambda: "others go on") == "others go on"
    await until(lambda: some.waiting("eu-de-1") == 0, "the late call still waits")


@pytest.mark.anyio
async def test_key_generation_has_a_deadline_of_its_own() -> None:
    assert await calls(deadline_s=0.2).run("eu-de-1", lambda: time.sleep(0.4) or "made", slow=True) == "made"


@pytest.mark.anyio
async def test_R7_when_too_many_wait_for_a_slow_HSM_the_next_is_refused_at_once() -> None:
    some, go = calls(threads=3), threading.Event()  # two for one tenant
    waiting = [asyncio.create_task(some.run("eu-de-1", go.wait)) for _ in range(5)]
    await asyncio.sleep(0.05)
    with pytest.raises(HsmUnavailable, match="too many"):
        some.run("eu-de-1", lambda: None).send(None)  # in its first step: it waits for nothing at all
    assert not any(task.done() for task in waiting)
    go.set()
    await asyncio.gather(*waiting)
    assert await some.run("eu-de-1", lambda: "again") == "again"


@pytest.mark.anyio
async def test_tenants_take_turns_at_a_slow_HSM_and_one_of_them_never_has_every_thread() -> None:
    some, go, done = calls(threads=3, queue=100), threading.Event(), list[str]()

    async def call(who: str) -> None:
        await some.run("eu-de-1", go.wait, who=who)
        done.append(who)

    crowd = [asyncio.create_task(call("a")) for _ in range(60)]
    await asyncio.sleep(0)
    assert await some.run("eu-de-1", lambda: "at once", who="b") == "at once"  # while all that `a` may have hang
    few = [asyncio.create_task(call(who)) for who in ("b", "c") for _ in range(5)]
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(*crowd, *few)
    assert max(n for n, who in enumerate(done) if who != "a") < 30, done


@pytest.mark.anyio
async def test_a_full_queue_refuses_the_tenant_that_fills_it() -> None:
    some, go = calls(), threading.Event()
    crowd = [asyncio.create_task(some.run("eu-de-1", go.wait, who="a")) for _ in range(4)]
    await asyncio.sleep(0)
    other = [asyncio.create_task(some.run("eu-de-1", lambda: "done", who="b")) for _ in range(1)]
    assert await other[0] == "done"
    behind = [asyncio.create_task(some.run("eu-de-1", go.wait, who="b")) for _ in range(2)]
    await asyncio.wait({crowd[3]}, timeout=60)
    with pytest.raises(HsmUnavailable, match="too many"):
        crowd[3].result()
    go.set()
    await asyncio.gather(*crowd[:3], *behind)


@pytest.mark.anyio
async def test_heavy_calls_of_a_fast_token_leave_the_event_loop_free() -> None:
    some, go = calls(fast=True), threading.Event()
    heavy = [asyncio.create_task(some.run("eu-de-1", go.wait, who="a", heavy=True)) for _ in range(200)]
    await asyncio.sleep(0)
    assert await some.run("eu-de-1", threading.get_ident, who="b") == threading.get_ident()
    other = asyncio.create_task(some.run("eu-de-1", lambda: "turn", who="b", heavy=True))
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(other, *heavy)
    assert some.waiting("eu-de-1") == 0


@pytest.mark.anyio
async def test_a_call_whose_turn_does_not_come_was_not_executed() -> None:
    some, go = calls(deadline_s=0.3, threads=1), threading.Event()
    first = asyncio.create_task(some.run("eu-de-1", go.wait))
    await asyncio.sleep(0)
    with pytest.raises(HsmUnavailable):
        await some.run("eu-de-1", lambda: pytest.fail("its turn never came"))
    with pytest.raises(HsmTimeout):
        await first
    go.set()
    await until(lambda: some.waiting("eu-de-1") == 0, "the late call still waits")


@pytest.mark.anyio
async def test_an_error_of_the_call_is_the_callers() -> None:
    def fail() -> None:
        raise HsmFault("CKR_DEVICE_ERROR")

    some = calls()
    with pytest.raises(HsmFault):
        await some.run("eu-de-1", fail)
    assert some.waiting("eu-de-1") == 0


@pytest.mark.parametrize(
    ("error", "status", "code", "executed", "wait", "ckr"),
    [
        (HsmUnavailable("down", ckr="CKR_DEVICE_ERROR"), 503, "hsm_unavailable", False, "1", "CKR_DEVICE_ERROR"),
        (HsmUnavailable("busy"), 503, "hsm_unavailable", False, "1", None),
        (HsmLocked("refused", ckr="CKR_PIN_INCORRECT"), 503, "hsm_unavailable", False, "60", "CKR_PIN_INCORRECT"),
        (HsmTimeout("late"), 504, "hsm_timeout", True, "1", None),
        (HsmFault("CKR_KEY_SIZE_RANGE"), 502, "hsm_error", False, "1", "CKR_KEY_SIZE_RANGE"),
    ],
)
def test_a_fault_of_the_device_is_a_5xx_that_says_what_happened(
    error: Exception, status: int, code: str, executed: bool, wait: str, ckr: str | None
) -> None:
    told = problem_of(error, request_id="r")
    assert (told.status, told.body["code"], told.body["executed"], told.body["retryable"]) == (
        *(status, code, executed),
        True,
    )
    assert dict(told.headers)["retry-after"] == wait
    assert told.body.get("ckr") == ckr
    assert "down" not in str(told.body)  # never the text of an exception


@pytest.mark.parametrize(
    "error", [HsmUnavailable("away"), DatabaseUnavailable("away"), OperationalError("", {}, Exception())]
)
def test_what_failed_after_a_change_was_committed_says_so_and_asks_for_no_second_one(error: Exception) -> None:
    told = {done: problem_of(error, request_id="r", executed=done) for done in (False, True)}
    assert [(told[done].status, told[done].body["executed"], told[done].body["retryable"]) for done in told] == [
        (503, False, True),
        (503, True, False),
    ]
    assert [name for done in told for name, _ in told[done].headers if name == "retry-after"] == ["retry-after"]


def test_a_bug_in_a_statement_is_not_taken_for_a_database_that_is_away() -> None:
    for error in ProgrammingError("", {}, Exception()), InterfaceError("", {}, Exception()):
        assert problem_of(error, request_id="r").body["code"] == "internal"
    lost = InterfaceError("", {}, Exception(), connection_invalidated=True)
    assert problem_of(lost, request_id="r").body["code"] == "database_unavailable"
