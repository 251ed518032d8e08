"""The key graph on this installation, computed every night: what leaves its residency is frozen.

A key whose material is usable outside its residency is refused by every use at once (`service.compliance`). The job makes
that last: it freezes such keys, so that only a quorum lets them go, whatever the registry says by then.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from sqlalchemy import Connection

from audit.log import Change, ChangeFailed
from policy import Scope
from service.compliance import Below
from service.containment import Containment
from service.kms import Kms
from service.rows import Settings

log: Final = logging.getLogger("skms.keygraph")
alarm: Final = logging.getLogger("skms.alarm")
CHECKED: Final = "key-graph"  # the setting: when the graph was computed last (us)
REASON: Final = "key-graph"  # of the freezes
NIGHT_US: Final = 24 * 3_600 * 1_000_000
SINGLY: Final = 100  # keys of a tenant and a region that are frozen one by one; more of them are frozen together
_PAGE: Final = 500


@dataclass(frozen=True, slots=True)
class Checked:
    """What a run found: keys usable outside their residency, and the freezes that it made."""

    leaking: int
    frozen: tuple[Scope, ...]


class Wanted(NamedTuple):
    """What is to be frozen, and how its material, or that of the first of its keys, leaves the residency."""

    tenant: str
    scope: Scope
    path: str


class GraphWatch:
    """Computes the graph when it is due, on whichever worker holds the scheduler's lease."""

    def __init__(self, kms: Kms, settings: Settings, containment: Containment, *, clock: Callable[[], int]) -> None:
        self._kms, self._settings, self._containment, self._clock = kms, settings, containment, clock

    async def due(self) -> Checked | None:
        """Run if a day has gone by since the last run; None if not.

        Not with every bundle: what a mistake in the charter stops can be used again once that is mended, until the night.
        """
        last = await asyncio.to_thread(self._settings.get, CHECKED)
        if last is not None and self._clock() < int(last) + NIGHT_US:
            return None
        return await self.run()

    async def run(self) -> Checked:
        """Freeze every key that is usable outside its residency, then record that this was looked at.

        What fails on the way leaves it due.
        """
        now = self._clock()
        total, found = await asyncio.to_thread(self._leaking)
        frozen = [wanted.scope for wanted in to_freeze(found) if await self._freeze(wanted)]
        if total:
            facts = {"keys": total, "frozen": len(frozen), "path": found[0].gaps[0].what, "key": str(found[0].key.id)}
            alarm.critical("material of keys is usable outside their residency", extra={"facts": facts})
        record = self._kms.admin_record(
            "check_key_graph", out="ok", why=f"leaking:{total}" if total else "clean", frz=len(frozen) or None
        )

        def write(connection: Connection) -> None:
            Settings.put(connection, CHECKED, str(now))

        try:
            await self._kms.log.append(record, change=Change(write, lambda: None))
        except ChangeFailed as failed:
            raise failed.__cause__ or failed from None
        return Checked(total, tuple(frozen))

    def _leaking(self) -> tuple[int, list[Below]]:
        registry, after = self._kms.policy.registry, None
        found: list[Below] = []
        while True:
            total, page = self._kms.compliance.leaking(registry, after=after, limit=_PAGE)
            found += page
            if len(page) < _PAGE:
                return total, found
            after = str(page[-1].key.id)

    async def _freeze(self, wanted: Wanted) -> bool:
        """Whether this had to be frozen: it was not yet."""
        tenant, scope, path = wanted
        if any(f.scope == scope and f.tenant in {None, tenant} for f in self._kms.freezes.now.freezes):
            return False
        await self._containment.stop(tenant, scope, reason=REASON)
        log.error(
            "frozen by the key graph", extra={"facts": {"scope": ":".join(scope), "tenant": tenant, "path": path}}
        )
        return True


def to_freeze(found: Sequence[Below]) -> list[Wanted]:
    """What is to be frozen of these keys: each by itself, or a tenant's keys of a region together where they are many."""
    many = Counter((below.key.placed.tenant, below.key.placed.home) for below in found)
    wanted: dict[tuple[str, Scope], str] = {}
    for below in found:
        tenant, home = below.key.placed.tenant, below.key.placed.home
        together = many[tenant, home] > SINGLY
        scope = Scope("region", home) if together else Scope("key", str(below.key.id))
        wanted.setdefault((tenant, scope), below.gaps[0].what)
    return [Wanted(tenant, scope, path) for (tenant, scope), path in wanted.items()]
