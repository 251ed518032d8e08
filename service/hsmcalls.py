"""How a call that may reach an HSM is run: inline where that is quick, else on the HSM's own threads with a deadline.

A thread hop costs as much as an operation on a token in this process, so those run on the event loop, but for the heavy
ones: an RSA signature there would hold up everybody. A token behind a network may be slow or hang. Calls off the loop
take threads of their own, a bounded queue in which tenants take turns, and a deadline. When the queue is full a call is
refused at once; what waits behind a hanging HSM would only be late.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from keystore import Hsm, HsmTimeout, HsmUnavailable
from service.turns import Overloaded, Turns

T = TypeVar("T")

THREADS: Final = 8
QUEUE: Final = 64
HEAVY_QUEUE: Final = 1_024  # calls of milliseconds: the requests at once are the bound
SLOW_S: Final = 60.0  # key generation; RSA-4096 took 4.8 s at worst in software


class HsmCalls:
    """The calls of one process to its HSMs. `deadline_s` bounds every call but key generation."""

    def __init__(
        self,
        hsms: Mapping[str, Hsm],
        *,
        deadline_s: float,
        slow_s: float = SLOW_S,
        threads: int = THREADS,
        queue: int = QUEUE,
    ) -> None:
        self._hsms, self._deadline, self._slow = hsms, deadline_s, slow_s
        self._pools = {r: ThreadPoolExecutor(threads, thread_name_prefix=f"hsm-{r}") for r in hsms}
        # The last thread is for another tenant than has all others: a call may take seconds.
        self._turns = {r: Turns(places=threads, most=max(1, threads - 1), queue=queue, wait_s=deadline_s) for r in hsms}
        # They compute in this process: as many at once as leave the event loop a core.
        heavy = max(1, min(threads, (os.cpu_count() or 1) // 2))
        self._heavy = {r: Turns(places=heavy, most=heavy, queue=HEAVY_QUEUE, wait_s=deadline_s) for r in hsms}

    async def run(
        self, region: str, call: Callable[[], T], *, who: str = "", slow: bool = False, heavy: bool = False
    ) -> T:
        """The result of `call`, which reaches at most the HSM of `region`, for the tenant `who`.

        `slow` calls make keys, `heavy` ones compute for milliseconds where others take microseconds: never inline.
        HsmUnavailable at once when too many calls wait already, or if its turn does not come; HsmTimeout after the
        deadline. A call that is late goes on in its thread, and its result is dropped.
        """
        hsm = self._hsms.get(region)
        if hsm is None or (hsm.fast and not slow and not heavy):
            return call()
        loop, deadline = asyncio.get_running_loop(), self._slow if slow else self._deadline
        turns = self._heavy[region] if hsm.fast and not slow else self._turns[region]
        begun = loop.time()
        if not turns.enter(who):
            try:
                await turns.wait(who, deadline)
            except Overloaded:
                raise HsmUnavailable(f"too many calls wait for the HSM of region {region}") from None
        try:
            running = loop.run_in_executor(self._pools[region], call)
        except BaseException:
            turns.leave(who)
            raise
        running.add_done_callback(lambda _: turns.leave(who))
        done, _ = await asyncio.wait({running}, timeout=max(0.0, begun + deadline - loop.time()))
        if not done:
            running.add_done_callback(_drop)
            raise HsmTimeout(f"the HSM of region {region} did not answer in time")
        return running.result()

    def waiting(self, region: str) -> int:
        """Calls of a region that have not ended."""
        turns = self._turns.get(region), self._heavy.get(region)
        return sum(t.inside + t.waiting for t in turns if t is not None)

    def close(self) -> None:
        """Take no new calls; end those that wait. One that hangs ends with the process."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)


def _drop(late: asyncio.Future[T]) -> None:
    """Look at the late call's error, so that nobody reports it as lost."""
    if not late.cancelled():
        late.exception()
