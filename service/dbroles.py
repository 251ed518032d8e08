"""Least privilege on PostgreSQL: the owner of the schema migrates, the service's own role does what a node does, no more.

What the service may do to each table stands in `SERVICE`, in the letters of PostgreSQL's access lists. It can neither change nor
delete a record by itself: pruning is a function of the owner's (`audit_prune`), which lets go what an archived segment covers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from service.database import SCHEMA, DatabaseUnusable, reader, revision

_VERBS: Final = {"r": "SELECT", "a": "INSERT", "w": "UPDATE", "d": "DELETE", "D": "TRUNCATE"}
SERVICE: Final = {
    "alembic_version": "r",
    "audit_archive": "ra",
    "audit_batch": "ra",
    "audit_checkpoint": "ra",  # and _COLUMNS
    "audit_frontier": "rad",
    "audit_index": "rad",
    "audit_intent": "rad",
    "audit_past_checkpoint": "r",
    "audit_past_root": "r",
    "audit_root": "ra",
    "audit_shard": "raw",
    "audit_sink": "raw",
    "audit_snapshot": "ra",
    "audit_tenant": "rad",
    "audit_tile": "rawd",
    "audit_witness": "raw",
    "keystore_alias": "rawd",
    "keystore_audit_key": "ra",
    "keystore_epoch": "raw",
    "keystore_hsm": "rawd",
    "keystore_import": "rawd",
    "keystore_key": "raw",
    "keystore_material": "raw",
    "keystore_retired_root": "ra",
    "keystore_root": "rawd",
    "keystore_tenant_secret": "raw",
    "keystore_version": "raw",
    "policy_freeze": "ra",
    "policy_freeze_ack": "rad",
    "policy_freeze_worker": "rawd",
    "policy_grant_use": "rawd",
    "policy_signed": "rawd",
    "policy_signed_head": "raw",
    "service_api_token": "raw",
    "service_approval": "raw",
    "service_idempotency": "rawd",
    "service_lease": "raw",
    "service_operation": "raw",
    "service_setting": "rawd",
}
_COLUMNS: Final = {"audit_checkpoint": ("cosigs", "tst")}  # that the service may change: what others signed comes later
_PRUNE: Final = "audit_prune(integer, bigint, bigint)"


@dataclass(frozen=True, slots=True)
class Look:
    """The schema that is there (none: ""), and where it is this release's, what the connected role lacks and has to spare."""

    schema: str
    missing: list[str]
    beyond: list[str]

    @property
    def good(self) -> bool:
        """Whether a node would start, and with no right to spare."""
        return self.schema == SCHEMA and not self.missing and not self.beyond


def look(engine: Engine) -> Look:
    """Compare schema and rights with what this release needs."""
    if (found := revision(engine)) != SCHEMA:
        return Look(found, [], [])
    with reader(engine).connect() as connection:
        return Look(found, missing(connection), beyond(connection))


def grant(connection: Connection, *, service: str | None = None, reading: str | None = None) -> None:
    """Give a role what the service needs, and another every table to read (audit, backup); take what they had beyond it.

    Both must exist. DatabaseUnusable if one does not, or owns the tables, or if the connected role does not own them.
    """
    if connection.dialect.name != "postgresql":
        raise DatabaseUnusable("SQLite has no roles: leave out --service-role and --reader-role")
    owner = connection.execute(sa.text("SELECT current_user")).scalar_one()
    schema = connection.execute(sa.text("SELECT current_schema()")).scalar_one()
    quote = connection.dialect.identifier_preparer.quote_identifier
    # PostgreSQL only warns of a grant that gives nothing.
    ask = sa.text(
        "SELECT FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p') "
        "AND NOT pg_has_role(relowner, 'USAGE')"
    )
    if connection.execute(ask).first() is not None:
        raise DatabaseUnusable(f"{owner} does not own the tables: give the owner's address in SKMS_DATABASE_URL")
    for role, allowed in (service, SERVICE), (reading, dict.fromkeys(SERVICE, "r")):
        if role is None:
            continue
        if role == owner:
            raise DatabaseUnusable(f"{role} is who migrates: it owns the tables, so name another role")
        if connection.execute(sa.text("SELECT FROM pg_roles WHERE rolname = :role"), {"role": role}).first() is None:
            raise DatabaseUnusable(f"there is no role {role}: make it first, as in CREATE ROLE {role} LOGIN")
        to, spaces = quote(role), quote(schema)
        run = [
            f"REVOKE ALL ON ALL TABLES IN SCHEMA {spaces} FROM {to}",
            f"REVOKE ALL ON ALL FUNCTIONS IN SCHEMA {spaces} FROM {to}",
            f"REVOKE CREATE ON SCHEMA {spaces} FROM {to}",
            f"GRANT USAGE ON SCHEMA {spaces} TO {to}",
        ]
        for table, letters in allowed.items():
            run.append(f"GRANT {', '.join(_VERBS[letter] for letter in letters)} ON {quote(table)} TO {to}")
        if role == service:
            run += [f"GRANT UPDATE ({', '.join(columns)}) ON {quote(t)} TO {to}" for t, columns in _COLUMNS.items()]
            run.append(f"GRANT EXECUTE ON FUNCTION {_PRUNE} TO {to}")
        for statement in run:
            connection.exec_driver_sql(statement)


def beyond(connection: Connection) -> list[str]:
    """What the connected role may do that a node does not need; empty on SQLite."""
    if connection.dialect.name != "postgresql":
        return []
    ask = sa.text(
        "SELECT c.relname, v.verb FROM pg_class c, unnest(CAST(:verbs AS text[])) AS v(verb) "
        "WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p') "
        "AND has_table_privilege(c.oid, v.verb) ORDER BY 1, 2"
    )
    spare: dict[str, list[str]] = {}
    letters = {verb: letter for letter, verb in _VERBS.items()}
    for table, verb in connection.execute(ask, {"verbs": list(letters)}):
        if letters[verb] not in SERVICE.get(table, ""):
            spare.setdefault(table, []).append(verb)
    return [f"{', '.join(verbs)} on {table}" for table, verbs in spare.items()]


def missing(connection: Connection) -> list[str]:
    """What a node needs and the connected role may not do; empty on SQLite."""
    if connection.dialect.name != "postgresql":
        return []
    needed = [(table, _VERBS[letter]) for table, letters in SERVICE.items() for letter in letters]
    ask = sa.text("SELECT has_table_privilege(CAST(:table AS text), :verb)")
    return [f"{v} on {t}" for t, v in needed if not connection.execute(ask, {"table": t, "verb": v}).scalar()]
