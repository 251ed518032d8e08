"""What the nodes' role may do on PostgreSQL: what they need, and nothing that could change or take away a record."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import sqlalchemy as sa

from databases import OWNER, SERVICE
from harness import Files, skms
from postgres import Cluster
from service.database import SCHEMA, DatabaseUnusable, migrate, open_engine
from service.dbroles import SERVICE as NEEDED
from service.dbroles import beyond, grant, missing

READER = "skms_reader"


@pytest.fixture(scope="module")
def roles(postgres: Cluster) -> Cluster:
    engine = sa.create_engine(postgres.url(), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for role in (OWNER, SERVICE, READER):
            connection.execute(sa.text(f"CREATE ROLE {role} LOGIN"))
    engine.dispose()
    return postgres


@pytest.fixture
def database(roles: Cluster, tmp_path: Path) -> str:
    """The name of a database with this release's schema, in which the roles have what they get."""
    name = "roles"
    engine = open_engine(roles.fresh(name, owner=OWNER))
    migrate(engine, lock_dir=tmp_path)
    with engine.begin() as connection:
        grant(connection, service=SERVICE, reading=READER)
    engine.dispose()
    return name


def ran(url: str, statement: str) -> str:
    """How the statement was refused; empty if it was not. Nothing of it stays."""
    engine = open_engine(url)
    try:
        with engine.connect() as connection:
            connection.execute(sa.text(statement))
            connection.rollback()
    except sa.exc.DBAPIError as error:
        return str(error.orig)
    finally:
        engine.dispose()
    return ""


def test_every_table_of_the_schema_has_its_line(database: str, roles: Cluster) -> None:
    engine = open_engine(roles.url(database, OWNER))
    assert set(sa.inspect(engine).get_table_names()) == set(NEEDED)
    engine.dispose()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_batch SET n = n + 1",
        "DELETE FROM audit_batch",
        "TRUNCATE audit_batch",
        "UPDATE audit_snapshot SET at_seq = 0",
        "DELETE FROM audit_root",
        "UPDATE audit_checkpoint SET note = ''",
        "DELETE FROM audit_checkpoint",
        "DELETE FROM audit_archive",
        "UPDATE audit_archive SET to_seq = 0",
        "INSERT INTO audit_past_root SELECT 'x', seq, entry, leaf FROM audit_root",
        "DELETE FROM keystore_audit_key",
        "DELETE FROM keystore_key",
        "UPDATE policy_freeze SET epoch = 0",
        "DELETE FROM policy_freeze",
        "UPDATE alembic_version SET version_num = '0001'",
        "ALTER TABLE audit_batch DISABLE TRIGGER USER",
        "DROP TABLE audit_batch",
        "CREATE TABLE mine (a int)",
        "CREATE OR REPLACE FUNCTION audit_append_only() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$",
        f"SET ROLE {OWNER}",
    ],
)
def test_the_service_cannot(database: str, roles: Cluster, statement: str) -> None:
    told = ran(roles.url(database, SERVICE), statement)
    assert re.match("permission denied|must be owner", told), told


def test_saying_that_one_prunes_opens_nothing_and_the_function_lets_only_archived_records_go(
    database: str, roles: Cluster
) -> None:
    url = roles.url(database, SERVICE)
    assert "permission denied" in ran(url, "SET LOCAL skms.pruning = 'on'; DELETE FROM audit_batch")
    engine = open_engine(roles.url(database))
    with engine.begin() as connection:
        for statement in (
            "INSERT INTO audit_shard VALUES (7, 'log', 'n0', 0, 1, 300, '')",
            "INSERT INTO audit_batch SELECT 0, 7, n, 100, 1, 1, '', '', '' FROM generate_series(0, 200, 100) n",
            "INSERT INTO audit_archive VALUES ('log', 0, 99, 100, '', '', '', '')",
        ):
            connection.execute(sa.text(statement))
    for call in ("7, 200, 200", "7, 101, 100", "8, 100, 100", "7, 100, NULL", "NULL, 100, 100"):
        assert "no archived segment covers this" in ran(url, f"SELECT audit_prune({call})"), call
    assert "permission denied" in ran(roles.url(database, READER), "SELECT audit_prune(7, 100, 100)")
    # What a session puts before the owner's tables is not what the function reads.
    shadow = "CREATE TEMP TABLE audit_archive AS SELECT 'log' AS log, 300 AS at_seq; SELECT audit_prune(7, 300, 300)"
    assert "no archived segment covers this" in ran(url, shadow)
    service = open_engine(url)
    with service.begin() as connection:
        assert connection.execute(sa.text("SELECT audit_prune(7, 100, 100)")).scalar() == 1
        assert connection.execute(sa.text("SELECT min(first_seq) FROM audit_batch")).scalar() == 100
        with pytest.raises(sa.exc.DBAPIError, match="permission denied"):
            connection.execute(sa.text("DELETE FROM audit_batch"))  # the door is shut behind it
    service.dispose()
    engine.dispose()


def test_the_reader_reads_every_table_and_writes_none(database: str, roles: Cluster) -> None:
    url = roles.url(database, READER)
    for table in NEEDED:
        assert ran(url, f"SELECT count(*) FROM {table}") == ""
        assert "permission denied" in ran(url, f"DELETE FROM {table}")


def test_what_is_missing_or_beyond_need_is_told_and_granting_anew_mends_it(database: str, roles: Cluster) -> None:
    owner, service = open_engine(roles.url(database, OWNER)), open_engine(roles.url(database, SERVICE))
    with owner.begin() as connection:
        assert "DELETE, TRUNCATE, UPDATE on audit_batch" in beyond(connection)
        connection.execute(sa.text(f"GRANT DELETE ON audit_root TO {SERVICE}"))
        connection.execute(sa.text(f"REVOKE INSERT ON audit_batch FROM {SERVICE}"))
    with service.connect() as connection:
        assert (missing(connection), beyond(connection)) == (["INSERT on audit_batch"], ["DELETE on audit_root"])
    with owner.begin() as connection:
        grant(connection, service=SERVICE)
    with service.connect() as connection:
        assert (missing(connection), beyond(connection)) == ([], [])
    with owner.begin() as connection:
        for role, why in ("nobody_there", "no role"), (OWNER, "name another role"):
            with pytest.raises(DatabaseUnusable, match=why):
                grant(connection, service=role)
    owner.dispose()
    service.dispose()


def test_the_commands_migrate_as_the_owner_and_say_what_a_node_lacks(
    roles: Cluster, dev_files: Files, tmp_path: Path
) -> None:
    owner = {
        **os.environ,
        "SKMS_DATABASE_URL": roles.fresh("commands", owner=OWNER),
        "SKMS_NODE_STATE_DIR": f"{tmp_path}",
    }
    service = owner | {"SKMS_DATABASE_URL": roles.url("commands", SERVICE)}
    config = ("--config", str(dev_files.config_file))
    early = skms("db", "migrate", *config, env=service)
    assert early.returncode == 2
    assert b"run `skms db migrate`" in early.stderr
    assert b"the address of the schema's owner" in early.stderr
    assert json.loads((empty := skms("-o", "json", "db", "check", *config, env=service)).stdout)["schema"] == "none"
    assert empty.returncode == 8
    granted = ("--service-role", SERVICE, "--reader-role", READER)
    done = skms("-o", "json", "db", "migrate", *config, *granted, env=owner)
    assert json.loads(done.stdout) == {"schema": SCHEMA, "before": "none", "service role": SERVICE}
    refused = skms("db", "migrate", *config, "--reader-role", READER, env=service)
    assert refused.returncode == 2
    assert b"does not own the tables" in refused.stderr
    reader = owner | {"SKMS_DATABASE_URL": roles.url("commands", READER)}
    denied = skms("audit", "reindex", *config, env=reader)
    assert denied.returncode == 3
    assert b"may not do this (permission denied for table audit_index)" in denied.stderr
    assert b"the address of the schema's owner" in denied.stderr
    good = skms("-o", "json", "db", "check", *config, env=service)
    assert good.returncode == 0, good.stdout
    assert json.loads(good.stdout) == {"schema": SCHEMA, "this release": SCHEMA, "missing": [], "beyond need": []}
    assert skms("db", "check", *config, env=owner).returncode == 8
    away = skms("db", "check", *config, env=owner | {"SKMS_DATABASE_URL": "postgresql+psycopg://skms@/x?host=/nowhere"})
    assert away.returncode == 7
    assert b"/nowhere" in away.stderr
