"""What a database owner can do to the rows: read no key, move none, change none unseen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from keystore_lab import ROOT_KEK, Lab, new_key
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

import keystore
from keystore import (
    Envelope,
    HsmUnavailable,
    Imported,
    InputRefused,
    Key,
    KeyNotFound,
    KeySpec,
    KeyState,
    Purpose,
    Rotation,
    RowDamaged,
    VersionFenced,
    WrongState,
    rowmac,
)
from keystore.catalog import tables
from keystore.hsm import Material

KEY, VERSION = tables.tables["keystore_key"], tables.tables["keystore_version"]
FREE = {"changed", "uses"}  # what has no meaning for what a key is or may do


def forged(column: sa.Column[Any], value: Any) -> Any:
    """Another value of a column that the service could have written."""
    other = {
        "spec": "HMAC_512",
        "usage": "sign",
        "suite": 2,
        "tier": 3,
        "home": "eu-fr-1",
        "state": "suspended" if value == "active" else "active",
        "purposes": json.dumps(["other"]),
        "tags": json.dumps({"team": "evil"}),
        "origin": "external",
        "mechanism": "AES_KEY_WRAP",
        "max_age": None if value else 1,
        "max_uses": None if value else 1,
        "delete_at": 1,
        "import_path": "software",
        "import_expires_at": 4_000_000_000_000_000,
        "tenant": "evil",
        "description": "changed",
    }
    if column.name in other:
        return other[column.name]
    if isinstance(value, bytes):
        return bytes([value[0] ^ 1]) + value[1:] if value else b"x"
    if isinstance(value, bool | int):
        return not value if column.name == "non_exportable" else value + 1
    return value[:-1] + ("0" if value[-1] != "0" else "1")


def touch(lab: Lab, table: sa.Table, column: str, value: Any, where: str, **names: Any) -> None:
    lab.sql(f"UPDATE {table.name} SET {column} = :v WHERE {where}", v=value, **names)


def refused_use(lab: Lab, name: str, tenant: str, blob: bytes) -> type[Exception]:
    """What a fresh worker answers; nothing may be unwrapped for it."""
    lab.hsm.cached.clear()
    lab.hsm.checked.clear()
    lab.hsm.calls.clear()
    store = lab.worker()
    answers: set[type[Exception]] = set()
    acts: list[Callable[[Key], object]] = [
        lambda k: store.open(k, Envelope.parse(blob), {}, purpose=Purpose.ENCRYPT),
        lambda k: store.seal(k, b"x", {}, version=1),
    ]
    for act in acts:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - the class is what is returned
            act(store.find(tenant, name))
        answers.add(caught.type)
    assert not lab.hsm.calls["unwrap"]
    return answers.pop() if len(answers) == 1 else Exception


CLOSED = {"spec", "usage", "suite", "home"}  # refused for what they say, before their MAC is looked at


@pytest.mark.parametrize("column", [c.name for c in KEY.columns if c.name not in FREE | {"places", "key_id"}])
def test_every_changed_field_of_a_key_row_is_found_before_an_unwrap(lab: Lab, column: str) -> None:
    key = lab.apply(lab.store.plan_rotate(lab.new(tags={"team": "a"}, rotation=Rotation(86_400, None))))
    blob = lab.store.seal(key, b"x", {}, version=1).ciphertext
    assert refused_use_is_none(lab, key, blob)
    value = lab.sql(f"SELECT {column} FROM keystore_key WHERE key_id = :k", k=str(key.id))[0][0]
    changed = forged(KEY.c[column], value)
    assert changed != value
    touch(lab, KEY, column, changed, "key_id = :k", k=str(key.id))
    tenant = "evil" if column == "tenant" else "acme"
    answer = refused_use(lab, str(key.id), tenant, blob)
    if column in {"state", "delete_at"}:  # stopped by a forger: refused for the state it tells
        assert answer is WrongState
    elif column == "min_decrypt_version":
        assert answer is VersionFenced
    elif column in CLOSED:
        assert issubclass(answer, Exception)
    elif column == "min_encrypt_version":
        assert answer is Exception  # sealing: fenced; opening: damaged
    else:
        assert answer is RowDamaged


def refused_use_is_none(lab: Lab, key: Key, blob: bytes) -> bool:
    """The row is good as it stands: whatever is refused later is refused for the change."""
    store = lab.worker()
    return store.open(store.find("acme", str(key.id)), Envelope.parse(blob), {}, purpose=Purpose.ENCRYPT) == b"x"


@pytest.mark.parametrize("name", ["residency", "execution", "reach", "egress", "failover", "shared_with"])
def test_every_changed_place_set_is_found(lab: Lab, name: str) -> None:
    key = lab.new()
    blob = lab.seal(key, b"x").ciphertext
    places = json.loads(lab.sql("SELECT places FROM keystore_key")[0][0])
    places[name] = [*places[name], "us-mkt-1"]
    touch(lab, KEY, "places", json.dumps(places), "key_id = :k", k=str(key.id))
    assert refused_use(lab, str(key.id), "acme", blob) is RowDamaged


@pytest.mark.parametrize("column", [c.name for c in VERSION.columns if c.name not in FREE | {"key_id"}])
def test_every_changed_field_of_a_version_row_is_found_before_an_unwrap(lab: Lab, column: str) -> None:
    end = lab.clock.at + 10**12
    key = lab.imported(expires_at=end) if column.startswith("import") else lab.new()
    blob = lab.seal(key, b"x").ciphertext
    value = lab.sql(f"SELECT {column} FROM keystore_version")[0][0]
    changed = forged(VERSION.c[column], value)
    assert changed != value
    touch(lab, VERSION, column, changed, "key_id = :k", k=str(key.id))
    answer = refused_use(lab, str(key.id), "acme", blob)
    assert answer is (VersionFenced if column == "state" else RowDamaged)


def test_making_a_stopped_key_or_a_revoked_version_usable_again_is_found(lab: Lab) -> None:
    key = lab.apply(lab.store.plan_rotate(lab.new()))
    blob = lab.store.seal(key, b"x", {}, version=1).ciphertext
    old_row = lab.sql("SELECT state, mac FROM keystore_version WHERE number = 1")[0]
    key = lab.apply(lab.store.plan_revoke_version(key, 1))
    touch(lab, VERSION, "state", "active", "number = 1")
    assert refused_use(lab, str(key.id), "acme", blob) is RowDamaged
    # The whole old row with its once right MAC: only the key row, which covers the MACs of its versions, can tell.
    touch(lab, VERSION, "mac", old_row[1], "number = 1")
    assert refused_use(lab, str(key.id), "acme", blob) is RowDamaged
    stopped = lab.new()
    made = lab.seal(stopped, b"x").ciphertext
    stopped = lab.apply(lab.store.plan_transition(stopped, KeyState.COMPROMISED))
    touch(lab, KEY, "state", "active", "key_id = :k", k=str(stopped.id))
    assert refused_use(lab, str(stopped.id), "acme", made) is RowDamaged


def test_a_forged_row_is_found_even_while_its_handle_is_in_the_hsms_cache(lab: Lab) -> None:
    key = lab.apply(lab.store.plan_rotate(lab.new()))
    blob = lab.store.seal(key, b"x", {}, version=1).ciphertext
    touch(lab, KEY, "tier", 3, "key_id = :k", k=str(key.id))
    lab.store.poll()
    assert lab.hsm.cached
    with pytest.raises(RowDamaged):
        lab.store.open(lab.store.find("acme", str(key.id)), Envelope.parse(blob), {}, purpose=Purpose.ENCRYPT)


@pytest.mark.parametrize("columns", [("blob",), ("blob", "mac"), ("blob", "mac", "object_id", "kek", "created_at")])
def test_swapped_rows_are_found(lab: Lab, columns: tuple[str, ...]) -> None:
    one, two = lab.new(), lab.new(tenant="evil")
    blob = lab.seal(one, b"x").ciphertext
    rows = {
        key.id: lab.sql(f"SELECT {', '.join(columns)} FROM keystore_version WHERE key_id = :k", k=str(key.id))[0]
        for key in (one, two)
    }
    for column in columns:  # object_id is unique: out of the way first
        if column == "object_id":
            touch(lab, VERSION, column, "x", "key_id = :k", k=str(one.id))
    for target, source in ((two, one), (one, two)):
        for column, value in zip(columns, rows[source.id], strict=True):
            touch(lab, VERSION, column, value, "key_id = :k", k=str(target.id))
    assert refused_use(lab, str(one.id), "acme", blob) is RowDamaged


def test_versions_cannot_be_removed_reordered_or_added(lab: Lab) -> None:
    key = lab.apply(lab.store.plan_rotate(lab.apply(lab.store.plan_rotate(lab.new()))))
    blob = lab.store.seal(key, b"x", {}, version=1).ciphertext
    lab.sql("DELETE FROM keystore_version WHERE number = 3")
    assert refused_use(lab, str(key.id), "acme", blob) is RowDamaged
    lab.sql("DELETE FROM keystore_version WHERE number = 1")
    assert refused_use(lab, str(key.id), "acme", blob) is RowDamaged
    lab.sql("DELETE FROM keystore_version")
    assert refused_use(lab, str(key.id), "acme", blob) is RowDamaged


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("spec", "DES"),
        ("state", ""),
        ("places", "[]"),
        ("places", "{"),
        ("tags", "1"),
        ("purposes", "x"),
        ("usage", "?"),
    ],
)
def test_a_row_that_cannot_be_read_is_damaged_and_nothing_else(lab: Lab, column: str, value: str) -> None:
    key = lab.new(alias="a")
    blob = lab.seal(key, b"x").ciphertext
    touch(lab, KEY, column, value, "key_id = :k", k=str(key.id))
    assert refused_use(lab, "alias/a", "acme", blob) is RowDamaged


def test_an_alias_row_that_cannot_be_read_is_damaged(lab: Lab) -> None:
    lab.new(alias="a")
    lab.sql("UPDATE keystore_alias SET key_id = 'x'")
    with pytest.raises(RowDamaged):
        lab.worker().find("acme", "alias/a")


def test_rows_of_another_installation_are_damaged(lab: Lab) -> None:
    key = lab.new()
    blob = lab.seal(key, b"x").ciphertext
    lab.hsm.row_key = bytes(32)
    assert refused_use(lab, str(key.id), "acme", blob) is RowDamaged


def test_no_plan_gives_a_damaged_row_a_right_mac(lab: Lab) -> None:
    key = lab.apply(lab.store.plan_rotate(lab.new()))
    waiting = lab.apply(lab.store.plan_schedule_deletion(lab.new(), wait_s=7 * 86_400))
    lab.sql("UPDATE keystore_key SET tier = 3")
    lab.clock.days(8)
    store = lab.worker()
    damaged, due = store.by_id(key.id), store.by_id(waiting.id)
    plans: list[Callable[[], object]] = [
        lambda: store.plan_rotate(damaged),
        lambda: store.plan_transition(damaged, KeyState.SUSPENDED),
        lambda: store.plan_update(damaged, description="x"),
        lambda: store.plan_revoke_version(damaged, 1),
        lambda: store.plan_schedule_deletion(damaged, wait_s=7 * 86_400),
        lambda: store.plan_cancel_deletion(due),
        lambda: store.plan_destroy(due),
    ]
    for plan in plans:
        with pytest.raises(RowDamaged):
            plan()


def test_a_damaged_version_is_not_given_a_right_mac_by_revoking_it(lab: Lab) -> None:
    key = lab.apply(lab.store.plan_rotate(lab.new(KeySpec.EC_P256)))
    touch(lab, VERSION, "public", b"x", "number = 1")
    store = lab.worker()
    with pytest.raises(RowDamaged):
        store.plan_revoke_version(store.by_id(key.id), 1)


def test_a_forged_public_key_verifies_nothing(lab: Lab) -> None:
    mine, theirs = lab.new(KeySpec.EC_P256), lab.new(KeySpec.EC_P256, tenant="evil")
    signature, _ = lab.store.sign(theirs, "ECDSA_SHA_256", message=b"m")
    touch(lab, VERSION, "public", theirs.latest.public, "key_id = :k", k=str(mine.id))
    store = lab.worker()
    with pytest.raises(RowDamaged):
        store.verify(store.by_id(mine.id), signature, "ECDSA_SHA_256", message=b"m")
    with pytest.raises(RowDamaged):
        store.public_key(store.by_id(mine.id))


@pytest.mark.parametrize("column", ["blob", "mac", "mechanism", "object_id", "kek", "generation"])
def test_a_changed_audit_key_row_is_found(lab: Lab, column: str) -> None:
    lab.store.tenant_secret("acme")
    lab.hsm.cached.clear()
    value = lab.sql(f"SELECT {column} FROM keystore_tenant_secret")[0][0]
    table = tables.tables["keystore_tenant_secret"]
    touch(lab, table, column, forged(table.c[column], value), "tenant = 'acme'")
    with pytest.raises(RowDamaged):
        lab.worker().tenant_secret("acme")


def test_one_tenants_audit_key_row_is_not_anothers(lab: Lab) -> None:
    lab.store.tenant_secret("acme")
    lab.sql("UPDATE keystore_tenant_secret SET tenant = 'evil'")
    lab.hsm.cached.clear()
    with pytest.raises(RowDamaged):
        lab.worker().tenant_secret("evil")


# ---- encodings -------------------------------------------------------------------------------------------------------


def with_field(value: Any, name: str, changed: object) -> Any:
    return dataclasses.replace(value, **{name: changed})


def test_every_field_of_key_and_version_is_in_its_encoding(lab: Lab) -> None:
    key = lab.new(KeySpec.EC_P256, tags={"a": "b"})
    rows = {rowmac.key_row(key, Material.EC_P256)}
    other: dict[str, Any] = {
        "spec": KeySpec.EC_P384,
        "usage": keystore.KeyUsage.MAC,
        "state": KeyState.SUSPENDED,
        "tags": {"a": "c"},
        "rotation": Rotation(1, None),
        "versions": (key.latest, key.latest),
        "purposes": ("default", "x"),
        "id": lab.new().id,
        "delete_at": 1,
        "non_exportable": False,
    }
    fields = [f.name for f in dataclasses.fields(Key) if f.name != "mac"]
    for name in fields:
        value = getattr(key, name)
        changed = other.get(name)
        if changed is None:
            changed = value | {"x"} if isinstance(value, frozenset) else value + (1 if isinstance(value, int) else "x")
        rows.add(rowmac.key_row(with_field(key, name, changed), Material.EC_P256))
    rows.add(rowmac.key_row(dataclasses.replace(key, rotation=Rotation(None, 1)), Material.EC_P256))
    rows.add(
        rowmac.key_row(
            dataclasses.replace(key, versions=(dataclasses.replace(key.latest, mac=b"x"),)), Material.EC_P256
        )
    )
    assert len(rows) == len(fields) + 3

    version = key.latest
    other["imported"] = Imported("hsm", None)
    made = {rowmac.version_row("acme", key.id, Material.EC_P256, key.usage, version)}
    made.add(rowmac.version_row("acmf", key.id, Material.EC_P256, key.usage, version))
    made.add(rowmac.version_row("acme", other["id"], Material.EC_P256, key.usage, version))
    made.add(rowmac.version_row("acme", key.id, Material.EC_P384, key.usage, version))
    made.add(rowmac.version_row("acme", key.id, Material.EC_P256, keystore.KeyUsage.MAC, version))
    bound = [f.name for f in dataclasses.fields(version) if f.name not in {"mac", "uses"}]
    for name in bound:
        value = getattr(version, name)
        match value:
            case bytes():
                changed = value + b"x"
            case KeyState():
                changed = KeyState.SUSPENDED
            case int():
                changed = value + 1
            case str():
                changed = value + "x"
            case None:
                changed = other["imported"]
            case _:
                changed = other["id"]
        made.add(rowmac.version_row("acme", key.id, Material.EC_P256, key.usage, with_field(version, name, changed)))
    for imported in (Imported("software", None), Imported("hsm", 1)):
        changed = with_field(version, "imported", imported)
        made.add(rowmac.version_row("acme", key.id, Material.EC_P256, key.usage, changed))
    assert len(made) == len(bound) + 7


def test_where_a_field_ends_is_in_the_encoding(lab: Lab) -> None:
    key = lab.new()
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"tenant": "a", "spec": "bc"}, {"tenant": "ab", "spec": "c"}),
        ({"description": "", "origin": "x"}, {"description": "x", "origin": ""}),
        ({"residency": frozenset({"a", "b"})}, {"residency": frozenset({"a,b"})}),
        (
            {"residency": frozenset({"a"}), "execution": frozenset()},
            {"residency": frozenset(), "execution": frozenset({"a"})},
        ),
        ({"purposes": ("a", "b")}, {"purposes": ('a", "b',)}),
        ({"tags": {"a": "b", "c": "d"}}, {"tags": {"a": 'b", "c": "d'}}),
        ({"delete_at": None}, {"delete_at": 0}),
        ({"rotation": Rotation(1, None)}, {"rotation": Rotation(None, 1)}),
    ]
    for one, two in pairs:
        assert rowmac.key_row(dataclasses.replace(key, **one), Material.EC_P256) != rowmac.key_row(
            dataclasses.replace(key, **two), Material.EC_P256
        )


# ---- what the database holds -----------------------------------------------------------------------------------------


def stored_bytes(lab: Lab) -> bytes:
    """Everything on disk: database, write-ahead log, shared memory."""
    path = Path(lab.url.removeprefix("sqlite:///"))
    return b"".join(p.read_bytes() for p in path.parent.iterdir() if p.is_file())


def test_L_08_keys_are_wrapped_in_the_database_after_every_kind_of_change(lab: Lab) -> None:
    store = lab.store
    store.tenant_secret("acme")
    keys = {spec: lab.new(spec, alias=str(spec).lower()) for spec in KeySpec if not spec.startswith("RSA_4096")}
    strict = lab.new(suite=2)

    def clean() -> None:
        on_disk = stored_bytes(lab)
        assert b"keystore_version" in on_disk
        for hidden in lab.hsm.hidden:
            assert len(hidden) >= 16
            assert hidden not in on_disk
            assert hidden.hex().encode() not in on_disk

    clean()
    for key in [*keys.values(), strict]:
        if key.usage is keystore.KeyUsage.ENCRYPT:
            lab.seal(key, b"marked plaintext 4711", {"marked": "context 4711"})
        key = lab.apply(store.plan_rotate(key))  # noqa: PLW2901 - the same key, one change further
        clean()
        plans: list[Callable[[Key], keystore.Plan]] = [
            lambda k: store.plan_update(k, description="d", tags={"a": "b"}, rotation=Rotation(1, 1)),
            lambda k: store.plan_revoke_version(k, 1),
            lambda k: store.plan_put_alias("acme", "other", k),
            lambda k: store.plan_transition(k, KeyState.SUSPENDED),
            lambda k: store.plan_schedule_deletion(k, wait_s=7 * 86_400),
        ]
        for plan in plans:
            key = lab.apply(plan(key))  # noqa: PLW2901 - the same key, one change further
            clean()
        lab.clock.days(8)
        lab.apply(store.plan_destroy(key))
        clean()
    on_disk = stored_bytes(lab)
    assert b"marked plaintext" not in on_disk
    assert b"context 4711" not in on_disk


def test_L_07_keys_show_no_material(lab: Lab) -> None:
    key = lab.new()
    shown = repr(key) + repr(lab.store.tenant_secret) + repr(lab.store)
    for hidden in (key.latest.blob, key.mac, *lab.hsm.secrets):
        assert hidden.hex() not in shown
        assert repr(hidden)[2:-1] not in shown


def test_the_tables_exist_on_postgresql_too() -> None:
    dialect = postgresql.dialect()
    made = [str(CreateTable(t).compile(dialect=dialect)) for t in tables.sorted_tables]
    assert all(text.strip().startswith("CREATE TABLE keystore_") for text in made)
    assert all(t.name.startswith("keystore_") for t in tables.sorted_tables)


def test_every_exported_exception_says_what_happened_without_a_value() -> None:
    found = [e for n in keystore.__all__ if isinstance(e := getattr(keystore, n), type) and issubclass(e, Exception)]
    assert {e.__name__ for e in found} >= {"AlgorithmMismatch", "DigestLength", "UsageMismatch", "InputRefused"}
    assert {e.__module__.split(".")[0] for e in found} == {"keystore"}
    assert all(e.__doc__ for e in found)
    assert issubclass(keystore.ContextRefused, InputRefused)
    assert not issubclass(KeyNotFound, InputRefused)


def test_the_exported_names_are_complete_and_sorted_as_they_stand() -> None:
    assert len(set(keystore.__all__)) == len(keystore.__all__)
    assert all(hasattr(keystore, name) for name in keystore.__all__)
    for module in ("key", "hsm", "envelope", "store"):
        space = vars(__import__(f"keystore.{module}", fromlist=["x"]))
        raised = {
            n
            for n, e in space.items()
            if isinstance(e, type) and issubclass(e, Exception) and "keystore" in e.__module__
        }
        assert raised <= set(keystore.__all__), module


def stored_in_format_1(lab: Lab, key: Key) -> None:
    """Store a key's rows as the first release did: a MAC on each version, and the key's MAC over those."""
    material = Material.KDK_512
    versions = tuple(
        dataclasses.replace(v, mac=lab.hsm.row_mac(rowmac.version_row(key.tenant, key.id, material, key.usage, v)))
        for v in key.versions
    )
    old = dataclasses.replace(key, versions=versions)
    for v in versions:
        lab.sql(
            "UPDATE keystore_version SET mac = :m WHERE key_id = :k AND number = :n", m=v.mac, k=str(key.id), n=v.number
        )
    mac = lab.hsm.row_mac(rowmac.key_row(old, material))
    lab.sql("UPDATE keystore_key SET mac = :m WHERE key_id = :k", m=mac, k=str(key.id))
    assert mac != key.mac


def test_a_retired_root_kek_wraps_no_version_no_secret_and_no_import(lab: Lab) -> None:
    key = lab.new()
    late = {"create": lab.store.plan_create(new_key()), "rotate": lab.store.plan_rotate(key)}
    lab.sql("DELETE FROM keystore_version")
    with lab.engine.begin() as c:
        assert lab.catalog.retire_root(c, ROOT_KEK, now=1) == {}
        assert lab.catalog.retire_root(c, ROOT_KEK, now=2) == {}
    for plan in late.values():
        with pytest.raises(HsmUnavailable, match="retired"), lab.engine.begin() as c:
            plan.write(c)
    with pytest.raises(HsmUnavailable, match="retired"):
        lab.store.tenant_secret("acme")
    assert lab.catalog.count_under(ROOT_KEK) == {"key versions": 0, "tenants' audit keys": 0, "open import tokens": 0}


def test_rows_of_the_first_format_are_read_and_become_the_second_with_their_next_change(lab: Lab) -> None:
    key = lab.apply(lab.store.plan_rotate(lab.new()))
    blob = lab.store.seal(key, b"x", {}, version=1).ciphertext
    stored_in_format_1(lab, key)
    lab.store = lab.worker()
    old = lab.store.find("acme", str(key.id))
    assert all(v.mac for v in old.versions)
    assert refused_use_is_none(lab, old, blob)
    new = lab.apply(lab.store.plan_rotate(old))
    again = lab.worker().find("acme", str(key.id))
    assert again == new
    assert not any(v.mac for v in again.versions)
    assert refused_use_is_none(lab, again, blob)


@pytest.mark.parametrize("column", ["blob", "state", "kek", "public", "mac"])
def test_a_changed_version_of_the_first_format_is_found_and_never_written_again_as_genuine(
    lab: Lab, column: str
) -> None:
    key = lab.apply(lab.store.plan_rotate(lab.new()))
    blob = lab.store.seal(key, b"x", {}, version=1).ciphertext
    stored_in_format_1(lab, key)
    value = lab.sql(f"SELECT {column} FROM keystore_version WHERE key_id = :k AND number = 1", k=str(key.id))[0][0]
    touch(lab, VERSION, column, forged(VERSION.c[column], value), "key_id = :k AND number = 1", k=str(key.id))
    assert refused_use(lab, str(key.id), "acme", blob) in {RowDamaged, VersionFenced}
    fresh = lab.worker()
    with pytest.raises(RowDamaged):
        fresh.plan_rotate(fresh.find("acme", str(key.id)))


def test_a_version_without_its_mac_beside_one_with_it_is_damaged(lab: Lab) -> None:
    key = lab.apply(lab.store.plan_rotate(lab.new()))
    stored_in_format_1(lab, key)
    lab.sql("UPDATE keystore_version SET mac = x'' WHERE key_id = :k AND number = 1", k=str(key.id))
    fresh = lab.worker()
    with pytest.raises(RowDamaged):
        fresh.seal(fresh.find("acme", str(key.id)), b"x", {})
    lab.sql("UPDATE keystore_version SET mac = x'' WHERE key_id = :k", k=str(key.id))
    fresh = lab.worker()
    with pytest.raises(RowDamaged):  # stripped of all MACs it claims to be of format 2, whose MAC is another
        fresh.seal(fresh.find("acme", str(key.id)), b"x", {})


def test_a_cold_key_costs_one_mac_and_one_unwrap_before_its_operation(lab: Lab) -> None:
    key = lab.new()
    for _ in range(3):
        key = lab.apply(lab.store.plan_rotate(key))
    lab.hsm.cached.clear()
    lab.hsm.checked.clear()
    lab.hsm.calls.clear()
    cold = lab.worker()
    cold.seal(cold.find("acme", str(key.id)), b"x", {})
    assert lab.hsm.calls == {"check_row": 1, "unwrap": 1, "hmac": 1}
