"""Hourly RFC 3161 timestamps of the newest checkpoint: asked over HTTP, verified on receipt, stored beside it.

A timestamp is evidence for later, not a condition of service: an authority that is away is an alarm, never an outage.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from sqlalchemy import Engine

from audit.checkpoint import parse_note
from audit.notary import Signed, newest
from audit.tables import checkpoint_table
from service.config import TimestampSection
from service.rows import Lease

log: Final = logging.getLogger("skms.timestamps")
LEASE: Final = "timestamps"
LEASE_S: Final = 60
PERIOD_S: Final = 30.0
TIMEOUT_S: Final = 10.0
SKEW_S: Final = 5.0
QUERY: Final = {"content-type": "application/timestamp-query"}


class NoTimestamp(Exception):
    """No authority gave a right timestamp; the message names each and why."""


@dataclass(frozen=True, slots=True)
class Stamped:
    """A stored timestamp: of which checkpoint, and when the authority saw it."""

    size: int
    time: datetime


class Timestamps:
    """Asks the configured authorities in their order, whenever the newest timestamp is older than `every_s`."""

    def __init__(
        self,
        engine: Engine,
        lease: Lease,
        sections: Sequence[TimestampSection],
        *,
        owner: str,
        clock: Callable[[], int],
    ) -> None:
        self._engine, self._lease, self._sections = engine, lease, tuple(sections)
        self._owner, self._clock = owner, clock
        self._every_us = min((s.every_s for s in sections), default=0.0) * 1e6

    async def run(self, *, period_s: float = PERIOD_S) -> None:
        """For ever, on whichever worker holds the lease; a failure is logged and tried again."""
        while self._sections:
            await asyncio.sleep(period_s)
            try:
                await asyncio.to_thread(self.once)
            except Exception as error:  # the database may be away, or every authority
                log.error("no timestamp", extra={"facts": {"error": type(error).__name__, "reason": str(error)[:500]}})

    def once(self) -> Stamped | None:
        """Have the newest checkpoint stamped if that is due; None if it is not. NoTimestamp if nobody answers rightly."""
        epoch = self._lease.acquire(LEASE, self._owner, LEASE_S)
        if epoch is None:
            return None
        signed = self._due()
        if signed is None:
            return None
        token, time = self._ask(parse_note(signed.note).text)
        skew = time.timestamp() - self._clock() / 1e6
        if abs(skew) > SKEW_S:
            log.error("clock differs from the time-stamping authority's", extra={"facts": {"seconds": round(skew)}})
        with self._engine.begin() as connection:
            Lease.fence(connection, LEASE, epoch)
            there = (checkpoint_table.c.size == signed.checkpoint.size) & (checkpoint_table.c.note == signed.note)
            connection.execute(sa.update(checkpoint_table).where(there).values(tst=token))
        return Stamped(signed.checkpoint.size, time)

    def _due(self) -> Signed | None:
        stamped = sa.select(sa.func.max(checkpoint_table.c.at)).where(checkpoint_table.c.tst.is_not(None))
        with self._engine.execution_options(reading=True).connect() as connection:
            last = connection.execute(stamped).scalar()
            signed = newest(connection)
        if signed is None or (last is not None and signed.at - int(last) < max(1, self._every_us)):
            return None
        return signed

    def _ask(self, text: bytes) -> tuple[bytes, datetime]:
        """The first right answer."""
        from audit.timestamp import BadTimestamp

        failures = []
        for section in self._sections:
            try:
                return _asked(section.url, section.authority, text)
            except (OSError, BadTimestamp) as error:
                failures.append(f"{section.url}: {error}")
        raise NoTimestamp("; ".join(failures))


def _asked(url: str, authority_file: Path, text: bytes) -> tuple[bytes, datetime]:
    """Ask one authority; OSError if it cannot be reached, BadTimestamp if its answer is not right."""
    # A fifth of a worker's imports, and needed once an hour.
    import httpx

    from audit.timestamp import MAX_TOKEN, BadTimestamp, load_authority, question, token_in

    authority, asked = load_authority(authority_file), question(text)
    try:
        with httpx.stream("POST", url, content=asked.as_bytes(), headers=QUERY, timeout=TIMEOUT_S) as answer:
            answer.raise_for_status()
            body = b""
            for part in answer.iter_bytes():
                body += part
                if len(body) > MAX_TOKEN:
                    raise BadTimestamp(f"an answer of more than {MAX_TOKEN} bytes")
    except httpx.HTTPError as error:
        raise OSError(f"{type(error).__name__} {error}") from None
    return token_in(body, asked, text, authority)
