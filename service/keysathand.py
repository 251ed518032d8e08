"""A keystore's keys for an event loop: what has to be asked of the database is asked on threads, and holds up who asks alone.

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


class KeysAtHand:
    """For one event loop. DatabaseUnavailable from each method if the database does not answer within the deadline."""

    def __init__(self, keystore: Keystore) -> None:
        self._keystore = keystore
        self._readers = ThreadPoolExecutor(THREADS, thread_name_prefix="keys")
        self._counter = ThreadPoolExecutor(1, thread_name_prefix="uses")
        self._waiting: dict[tuple[uuid.UUID, int], tuple[Key, asyncio.Future[None]]] = {}
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
        """Return once a use of a version (the latest one) can be counted. As `Keystore.count_ahead`.

        Those that wait for the same transaction share the next one.
        """
        if self._keystore.counted(key, version):
            return
        slot = key.id, key.latest_number if version is None else version
        if slot not in self._waiting:
            self._waiting[slot] = key, asyncio.get_running_loop().create_future()
        _, told = self._waiting[slot]
        if self._counting is None:
            self._counting = asyncio.create_task(self._count())
        await _in_time(told)

    async def _count(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                these, self._waiting = self._waiting, {}
                wanted = [(key, number) for (_, number), (key, _) in these.items()]
                wrong: Sequence[Exception | None]
                try:
                    wrong = await loop.run_in_executor(self._counter, self._keystore.count_ahead, wanted)
                except Exception as error:  # the database's: it is every waiter's
                    wrong = [error] * len(these)
                for (_, told), refused in zip(these.values(), wrong, strict=True):
                    if refused is None:
                        told.set_result(None)
                    else:
                        told.set_exception(refused)
                        told.exception()  # nobody may wait any more
        finally:
            self._counting = None

    async def _read(self, ask: Callable[[], T]) -> T:
        return await _in_time(asyncio.get_running_loop().run_in_executor(self._readers, ask))

    def close(self) -> None:
        """End the threads; one that hangs ends with the process."""
        for pool in (self._readers, self._counter):
            pool.shutdown(wait=False, cancel_futures=True)


async def _in_time(asked: asyncio.Future[T]) -> T:
    """Its result. It may have other waiters, so that it is never cancelled."""
    done, _ = await asyncio.wait({asked}, timeout=DEADLINE_S)
    if not done:
        asked.add_done_callback(lambda late: late.cancelled() or late.exception())
        raise DatabaseUnavailable("the database did not answer in time")
    return asked.result()
