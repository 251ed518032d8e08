"""A keystore's keys for an event loop: what has to be asked of the database is asked on threads, so that others go on.

A worker has its keys in memory. The first use of each, and one use in a thousand, which counts the next thousand ahead, are a
matter for the database: it may be slow, or away.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from keystore import Key, Keystore
from service.database import DatabaseUnavailable

T = TypeVar("T")

THREADS: Final = 4
DEADLINE_S: Final = 2.0


class _Waiting:
    """Uses of one version that wait to be counted."""

    def __init__(self, key: Key, number: int) -> None:
        self.key, self.number, self.uses = key, number, 0
        self.told: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self, error: Exception | None) -> None:
        if error is None:
            self.told.set_result(None)
        else:
            self.told.set_exception(error)
            self.told.exception()  # nobody may wait any more


class KeysAtHand:
    """For one event loop. DatabaseUnavailable from each method if the database does not answer within the deadline."""

    def __init__(self, keystore: Keystore) -> None:
        self._keystore = keystore
        self._readers = ThreadPoolExecutor(THREADS, thread_name_prefix="keys")
        self._counter = ThreadPoolExecutor(1, thread_name_prefix="uses")
        self._waiting: dict[tuple[uuid.UUID, int], _Waiting] = {}
        self._counting: asyncio.Task[None] | None = None

    async def find(self, tenant: str, name: str) -> Key:
        """As `Keystore.find`."""
        found = self._keystore.at_hand(tenant, name)
        return found if found is not None else await self._read(lambda: self._keystore.find(tenant, name))

    async def by_id(self, key_id: uuid.UUID) -> Key:
        """As `Keystore.by_id`."""
        found = self._keystore.by_id_at_hand(key_id)
        return found if found is not None else await self._read(lambda: self._keystore.by_id(key_id))

    async def countable(self, key: Key, version: int | None = None) -> None:
        """Return once a use of a version (the latest one) can be counted. KeyLimitReached, KeyNotFound.

        Those that wait at the same time share a transaction. Whoever waited finds the key's row in memory as it is now, so that
        the keystore refuses what was stopped meanwhile.
        """
        if self._keystore.counted(key, version):
            return
        until = asyncio.get_running_loop().time() + DEADLINE_S
        number = key.latest_number if version is None else version
        while not self._keystore.counted(key, version):
            mine = self._waiting.get((key.id, number))
            if mine is None:
                mine = self._waiting[key.id, number] = _Waiting(key, number)
            mine.uses += 1
            if self._counting is None:
                self._counting = asyncio.create_task(self._count())
            await _until(mine.told, until)
            while self._keystore.by_id_at_hand(key.id) is None:
                await self._read(lambda: self._keystore.by_id(key.id), until=until)

    async def _count(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                these, self._waiting = list(self._waiting.values()), {}
                for one in these:
                    if self._keystore.counted(one.key, one.number):  # the round before was in time for it
                        one.end(None)
                if not (these := [one for one in these if not one.told.done()]):
                    continue
                wanted = [(one.key, one.number, one.uses) for one in these]
                wrong: Sequence[Exception | None]
                try:
                    wrong = await loop.run_in_executor(self._counter, self._keystore.count_ahead, wanted)
                except Exception as error:  # the database's: it is every waiter's
                    wrong = [error] * len(these)
                for one, refused in zip(these, wrong, strict=True):
                    one.end(refused)
        finally:
            self._counting = None

    async def _read(self, ask: Callable[[], T], *, until: float | None = None) -> T:
        loop = asyncio.get_running_loop()
        asked = loop.run_in_executor(self._readers, ask)
        try:
            return await _until(asked, loop.time() + DEADLINE_S if until is None else until)
        except DatabaseUnavailable:
            asked.cancel()  # if its turn has not come, nobody waits for it any more
            raise

    def close(self) -> None:
        """Take nothing new. A thread that hangs ends with the database's own timeouts."""
        for pool in (self._readers, self._counter):
            pool.shutdown(wait=False, cancel_futures=True)


async def _until(asked: asyncio.Future[T], until: float) -> T:
    """Its result, if it comes in time. It may have other waiters, so that it is not cancelled."""
    done, _ = await asyncio.wait({asked}, timeout=max(0.0, until - asyncio.get_running_loop().time()))
    if not done:
        asked.add_done_callback(lambda late: late.cancelled() or late.exception())
        raise DatabaseUnavailable("the database did not answer in time")
    return asked.result()
