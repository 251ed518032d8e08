"""Archiving by command: as the job does it, on a host of the node, as one more writer of the audit log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from audit.segments import Segment
from service.config import Config, ConfigInvalid
from service.database import open_engine
from service.jobs import archive_once
from service.rows import Lease
from service.wiring import archiver_of, now, wire


async def archive(config: Config, *, before: int | None, to: Path | None, owner: str) -> Sequence[Segment]:
    """Archive and prune what retention lets go, of days before a time (us).

    ConfigInvalid if no retention or no place is configured; ArchiveFailed or Bad with the reason.
    """
    nothing = ConfigInvalid("[audit]", 0, "nothing may go: set retention_days, and archive_dir or --to DIR")
    if not config.audit.retention_days:  # said before an HSM is opened
        raise nothing
    engine = open_engine(config.database.url)
    try:
        async with wire(config) as node:
            archiver = archiver_of(config, engine, node.kms.fleet, to=to)
            if archiver is None:
                raise nothing
            kms = node.kms
            return await archive_once(
                archiver, Lease(engine, clock=now), kms.log, owner=owner, node=kms.node, by="cli", before=before
            )
    finally:
        engine.dispose()
