"""One Alembic environment over the tables of every package; each package owns its own."""

from __future__ import annotations

from alembic import context

import audit.tables
import keystore.catalog
import policy.rows
import service.rows

target_metadata = [keystore.catalog.tables, policy.rows.tables, audit.tables.tables, service.rows.tables]


def run() -> None:
    """Run the migrations on the connection that `service.database.migrate` hands over."""
    connection = context.config.attributes["connection"]
    context.configure(connection=connection, target_metadata=target_metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


run()
