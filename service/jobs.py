"""What the service does by itself: rotation by age and by count, destruction after the waiting time.

Jobs run on whichever worker holds the `scheduler` lease; a job that is killed midway leaves nothing behind, because a
change commits with its record or not at all. Each job asks the policy like everybody else, as the tenant's scheduler.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from keystore import Key
from policy import Caller
from service.kms import Ask, Kms
from service.requests import uuid7
from service.rows import Lease

log: Final = logging.getLogger("skms.jobs")
LEASE_S: Final = 30


def scheduler_of(tenant: str, region: str, node: str) -> Caller:
    """The scheduler as the policy sees it: an operator of the tenant that may only rotate and complete deletions."""
    return Caller(
        id=f"internal:{node}:scheduler",
        kind="operator",
        tenant=tenant,
        roles=frozenset({"scheduler"}),
        places=frozenset({region}),
        proof=5,
        authn="internal",
    )


class Scheduler:
    """Runs what is due, every `period_s` seconds, if this worker holds the lease."""

    def __init__(self, kms: Kms, lease: Lease, *, owner: str, clock: Callable[[], int], period_s: float = 5.0) -> None:
        self._kms, self._lease, self._owner, self._clock, self._period = kms, lease, owner, clock, period_s

    async def run(self) -> None:
        """For ever; one failing job is logged and does not stop the others."""
        while True:
            await asyncio.sleep(self._period)
            try:
                if await asyncio.to_thread(self._lease.acquire, "scheduler", self._owner, LEASE_S) is not None:
                    await self.once()
            except Exception as error:  # the database may be away; the next round tries again
                log.warning("scheduler round failed", extra={"facts": {"error": type(error).__name__}})

    async def once(self) -> int:
        """Do all that is due now; how many jobs succeeded."""
        now = self._clock()
        done = 0
        for key in await asyncio.to_thread(self._kms.keystore.due_rotations, now):
            done += await self._job(key, self._kms.rotate_key)
        for key in await asyncio.to_thread(self._kms.keystore.due_deletions, now):
            done += await self._job(key, self._kms.complete_deletion)
        return done

    async def _job(self, key: Key, act: Callable[[Ask, str], Awaitable[Key]]) -> bool:
        now = self._clock()
        caller = scheduler_of(key.tenant, self._kms.region, self._kms.node)
        ask = Ask(caller=caller, request_id=uuid7(now), arrived=now, if_match=key.kv)
        with contextlib.suppress(asyncio.CancelledError):
            try:
                await act(ask, str(key.id))
            except Exception as error:  # it stands in its record; the next round tries again
                facts = {"key": str(key.id), "error": type(error).__name__, "code": ask.facts.get("why")}
                log.warning("job failed", extra={"facts": facts})
                return False
            return True
        return False
