"""Generations: when anchors prove that the database lost part of the log, a new one begins and says so.

Nothing is repaired. What stood of the earlier generation is kept as it stood and stays verifiable; the first entry of the
new root log embeds the checkpoint that the database lacks, names the entries that nobody can vouch for, and carries the
approvals.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from audit.anchors import checkpoint_in
from audit.chain import Bad
from audit.event import Recovery, encode_recovery
from audit.rollback import Findings
from audit.rootlog import RootLog, next_origin
from audit.tables import (
    APPEND_ONLY,
    checkpoint_table,
    frontier_table,
    past_checkpoint_table,
    past_root_table,
    root_table,
    tenant_table,
)

KIND: Final = "audit-recover"  # of the approvals
NEEDED: Final = 2
LIFE_US: Final = 3_600_000_000  # a recovery is asked for, approved and done within an hour

_EMPTY: Final = hashlib.sha256(b"").hexdigest()  # RFC 6962: the root of the empty tree
Fence = Callable[[Connection], None]


@contextlib.contextmanager
def _writable(connection: Connection) -> Iterator[None]:
    """Without the triggers that stop accidents, in this transaction: they come back with it, whatever becomes of it."""
    if connection.dialect.name != "sqlite":
        connection.execute(sa.text("ALTER TABLE audit_root DISABLE TRIGGER USER"))
        yield
        connection.execute(sa.text("ALTER TABLE audit_root ENABLE TRIGGER USER"))
        return
    mine = [statement for statement in APPEND_ONLY if "ON audit_root " in statement]
    for statement in mine:
        connection.execute(sa.text(f"DROP TRIGGER IF EXISTS {statement.split()[2]}"))
    yield
    for statement in mine:
        connection.execute(sa.text(statement))


class RecoveryRefused(Exception):
    """There is nothing to recover from, or the request is not what the database and the anchors say now."""


def digest_of(recovery: Recovery) -> str:
    """What the officers approve: SHA-256 of the canonical bytes, in hex."""
    return hashlib.sha256(encode_recovery(recovery)).hexdigest()


def recovery_of(found: Findings, *, installation: str, asked: int) -> Recovery:
    """The one recovery that these findings call for; RecoveryRefused if nothing is wrong.

    What an anchor holds goes before what a witness said, whose size nobody signed.
    """
    worst, seen = found.worst(), found.observed
    if worst is not None:
        where, note, predecessor = worst.where, worst.note, worst.checkpoint.origin
        size, agreed = worst.checkpoint.size, found.agreed
    elif seen is not None:
        where, note, predecessor = str(seen), seen.note.encode(), checkpoint_in(seen.note.encode()).origin
        size = max(seen.size, found.size) if seen.forked else seen.size
        agreed = 0 if seen.forked else min(found.agreed, seen.size)
    else:
        told = (
            ""
            if found.broken is None
            else f" The root log itself is damaged, before what any anchor holds: {found.broken}"
        )
        raise RecoveryRefused(f"nothing to recover from: no anchor holds what the database lacks.{told}")
    same = predecessor == found.origin
    return Recovery(
        anchor=where,
        anchored=note.decode(),
        asked=asked,
        installation=installation,
        lost=(agreed if same else 0, size),
        origin=next_origin(predecessor),
        predecessor=predecessor,
        stands=(found.size, found.root.hex()) if same else (0, _EMPTY),
    )


def opened(connection: Connection, recovery: Recovery) -> bool:
    """Whether the stored root log is the generation that this recovery opens: an earlier try came so far."""
    entry = connection.execute(sa.select(root_table.c.entry).where(root_table.c.seq == 0)).scalar()
    if entry is None:
        return False
    root = RootLog(recovery.origin)
    try:
        root.check(entry)
    except Bad:
        return False
    return root.recovers == recovery


def open_generation(
    engine: Engine,
    recovery: Recovery,
    approvals: Sequence[tuple[str, str]],
    *,
    stored: str,
    epoch: int,
    fence: Fence,
    now: int,
) -> None:
    """Put the stored root log, named `stored` (empty: it has no entry), aside and begin the new one; all or nothing.

    Needs the rights of the schema's owner: the service itself cannot take an entry away.
    """
    root = RootLog(recovery.origin)
    entry = root.open(recovery, approvals, epoch=epoch, t=now)
    with engine.begin() as connection:
        fence(connection)
        with _writable(connection):
            for table, past in ((root_table, past_root_table), (checkpoint_table, past_checkpoint_table)):
                names = [c.name for c in table.columns]
                chosen = sa.select(sa.literal(stored or recovery.predecessor), *table.columns)
                connection.execute(sa.insert(past).from_select(["origin", *names], chosen))
                connection.execute(sa.delete(table))
        connection.execute(sa.delete(frontier_table))
        connection.execute(sa.delete(tenant_table))  # derived: the heads that the new root log commits begin empty
        row = {"seq": 0, "entry": entry, "leaf": bytes.fromhex(root.chain.previous)}
        connection.execute(sa.insert(root_table), [row])
