"""Where a start may begin to read the root log: subtree roots stored with each entry that lists every chain.

A stored frontier is trusted by nobody: the entries after it must lead from it to the root of a signed checkpoint. Only
the frontier of that very tree does. Whoever finds none that fits reads from the first entry on.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from audit.chain import Frontier
from audit.tables import frontier_table


def store(connection: Connection, frontier: Frontier) -> None:
    """Keep the frontier that stands before an entry which lists every chain; what stood there is replaced."""
    connection.execute(sa.delete(frontier_table).where(frontier_table.c.size == frontier.n))
    connection.execute(sa.insert(frontier_table), [{"size": frontier.n, "roots": b"".join(frontier.roots)}])


def stored_before(connection: Connection, size: int) -> Frontier | None:
    """The newest stored frontier of fewer than `size` entries, unverified; None if there is none of a possible form."""
    chosen = sa.select(frontier_table).where(frontier_table.c.size > 0, frontier_table.c.size < size)
    row = connection.execute(chosen.order_by(frontier_table.c.size.desc()).limit(1)).first()
    if row is None or len(row.roots) != 32 * row.size.bit_count():
        return None
    return Frontier(row.size, [bytes(row.roots[i : i + 32]) for i in range(0, len(row.roots), 32)])
