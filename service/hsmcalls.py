"""How a call that may reach an HSM is run: inline where that is quick, else on the HSM's own threads with a deadline.

A thread hop costs as much as an operation on a token in this process, so those run on the event loop. A token behind a
network may be slow or hang: its calls take threads of their own, a bounded queue and a deadline. When the queue is full
a call is refused at once; what waits behind a hanging HSM would only be late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from keystore import Hsm, HsmTimeout, HsmUnavailable

T = TypeVar("T")

THREADS: Final = 8
QUEUE: Final = 64
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
        self._hsms, self._deadline, self._slow, self._most = hsms, deadline_s, slow_s, threads + queue
        self._pools = {r: ThreadPoolExecutor(threads, thread_name_prefix=f"hsm-{r}") for r in hsms}
        self._inside = dict.fromkeys(hsms, 0)

    async def run(self, region: str, call: Callable[[], T], *, slow: bool = False) -> T:
        """The result of `call`, which reaches at most the HSM of `region`. `slow` calls make keys: never inline.

        HsmUnavailable at once when too many calls wait already; HsmTimeout after the deadline. A call that is late goes
        on in its thread, and its result is dropped.
        """
        hsm = self._hsms.get(region)
        if hsm is None or (hsm.fast and not slow):
            return call()
        if self._inside[region] >= self._most:
            raise HsmUnavailable(f"too many calls wait for the HSM of region {region}")
        self._inside[region] += 1
        running = asyncio.get_running_loop().run_in_executor(self._pools[region], call)
        running.add_done_callback(lambda _: self._left(region))
        done, _ = await asyncio.wait({running}, timeout=self._slow if slow else self._deadline)
        if not done:
            running.add_done_callback(_drop)
            raise HsmTimeout(f"the HSM of region {region} did not answer in time")
        return running.result()

    def _left(self, region: str) -> None:
        self._inside[region] -= 1

    def waiting(self, region: str) -> int:
        """Calls of a region that have not ended."""
        return self._inside.get(region, 0)

    def close(self) -> None:
        """Take no new calls; end those that wait. One that hangs ends with the process."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)


def _drop(late: asyncio.Future[T]) -> None:
    """Look at the late call's error, so that nobody reports it as lost."""
    if not late.cancelled():
        late.exception()
