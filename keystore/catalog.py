"""The key tables, and the class that owns them. Nothing else reads or writes them.

Rows hold wrapped blobs and metadata, each under an HSM-keyed MAC (`keystore.rowmac`); a row changed here behind the
service's back is found before its blob reaches an HSM. One counter row, `keystore_epoch`, rises with every change, so
that other workers notice.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError

from keystore.hsm import RowDamaged
from keystore.key import (
    API_STATE,
    AliasInUse,
    Key,
    KeyNotFound,
    KeySpec,
    KeyState,
    KeyUsage,
    KeyVersion,
    Rotation,
    StaleKey,
)

tables: Final = sa.MetaData()
_PAGE: Final = 200  # rows read at a time where a filter is applied here and not in SQL
_CHUNK: Final = 500  # ids in one IN (...)

_key: Final = sa.Table(
    "keystore_key",
    tables,
    sa.Column("key_id", sa.String(36), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("spec", sa.String(16), nullable=False),
    sa.Column("usage", sa.String(16), nullable=False),
    sa.Column("suite", sa.Integer, nullable=False),
    sa.Column("tier", sa.Integer, nullable=False),
    sa.Column("home", sa.String(64), nullable=False),
    sa.Column("places", sa.Text, nullable=False),  # JSON: the six place and tenant sets
    sa.Column("purposes", sa.Text, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("kv", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
    sa.Column("origin", sa.String(16), nullable=False),
    sa.Column("non_exportable", sa.Boolean, nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("tags", sa.Text, nullable=False),
    sa.Column("max_age", sa.BigInteger),
    sa.Column("max_uses", sa.BigInteger),
    sa.Column("min_decrypt_version", sa.Integer, nullable=False),
    sa.Column("min_encrypt_version", sa.Integer, nullable=False),
    sa.Column("delete_at", sa.BigInteger),
    sa.Column("mac", sa.LargeBinary, nullable=False),
    sa.Column("changed", sa.BigInteger, nullable=False),  # keystore_epoch of the last change; no meaning, no MAC
)
sa.Index("keystore_key_tenant", _key.c.tenant, _key.c.key_id)
sa.Index("keystore_key_changed", _key.c.changed)
sa.Index("keystore_key_delete_at", _key.c.delete_at)

_version: Final = sa.Table(
    "keystore_version",
    tables,
    sa.Column("key_id", sa.String(36), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("object_id", sa.String(36), nullable=False, unique=True),
    sa.Column("mechanism", sa.String(64), nullable=False),
    sa.Column("kek", sa.String(36), nullable=False),
    sa.Column("blob", sa.LargeBinary, nullable=False),
    sa.Column("public", sa.LargeBinary, nullable=False),
    sa.Column("mac", sa.LargeBinary, nullable=False),
    sa.Column("uses", sa.BigInteger, nullable=False, server_default="0"),
)

_alias: Final = sa.Table(
    "keystore_alias",
    tables,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("alias", sa.String(128), primary_key=True),
    sa.Column("key_id", sa.String(36), nullable=False),
)

_epoch: Final = sa.Table(
    "keystore_epoch",
    tables,
    sa.Column("one", sa.Integer, primary_key=True),
    sa.Column("epoch", sa.BigInteger, nullable=False),
)

_secret: Final = sa.Table(
    "keystore_tenant_secret",
    tables,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("generation", sa.Integer, primary_key=True),
    sa.Column("region", sa.String(64), nullable=False),  # whose HSM wrapped it: a root KEK has one id in all regions
    sa.Column("object_id", sa.String(36), nullable=False),
    sa.Column("mechanism", sa.String(64), nullable=False),
    sa.Column("kek", sa.String(36), nullable=False),
    sa.Column("blob", sa.LargeBinary, nullable=False),
    sa.Column("mac", sa.LargeBinary, nullable=False),
)

_SETS: Final = ("residency", "execution", "reach", "egress", "failover", "shared_with")


@dataclass(frozen=True, slots=True)
class ListFilter:
    """Which keys of a tenant to list; None means any."""

    state: str | None = None  # as the API names it
    tier: int | None = None
    usage: str | None = None
    region: str | None = None
    tags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class SecretRow:
    """A tenant's wrapped audit key as stored."""

    tenant: str
    generation: int
    region: str
    object_id: uuid.UUID
    mechanism: str
    kek: uuid.UUID
    blob: bytes = field(repr=False)
    mac: bytes = field(repr=False)


class Catalog:
    """Reads on connections of its own; writes only on the connection it is given, inside the caller's transaction."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # ---- reading ---------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the counter row if there is none, so that the first two changes ever do not both try to."""
        with contextlib.suppress(IntegrityError), self._engine.begin() as c:
            if c.execute(sa.select(_epoch.c.epoch)).scalar() is None:
                c.execute(sa.insert(_epoch), [{"one": 1, "epoch": 0}])

    def epoch(self) -> int:
        """The number of changes so far."""
        with self._engine.connect() as c:
            return int(c.execute(sa.select(_epoch.c.epoch)).scalar() or 0)

    def key(self, key_id: uuid.UUID) -> Key:
        """The key with this id, whoever owns it; KeyNotFound if there is none."""
        with self._engine.connect() as c:
            found = self._keys(c, sa.select(_key).where(_key.c.key_id == str(key_id)))
        if not found:
            raise KeyNotFound("no such key")
        return found[0]

    def alias(self, tenant: str, alias: str) -> uuid.UUID:
        """The key an alias points to; KeyNotFound if there is none."""
        wanted = sa.select(_alias.c.key_id).where(_alias.c.tenant == tenant, _alias.c.alias == alias)
        with self._engine.connect() as c:
            found = c.execute(wanted).scalar()
        if found is None:
            raise KeyNotFound("no such key")
        try:
            return uuid.UUID(found)
        except ValueError:
            raise RowDamaged("the row of an alias was changed outside the service") from None

    def keys(self, tenant: str, wanted: ListFilter, *, after: uuid.UUID | None, limit: int) -> list[Key]:
        """Up to `limit` keys of a tenant after an id, in the order of ids."""
        chosen = sa.select(_key).where(_key.c.tenant == tenant).order_by(_key.c.key_id)
        if wanted.tier is not None:
            chosen = chosen.where(_key.c.tier == wanted.tier)
        if wanted.usage is not None:
            chosen = chosen.where(_key.c.usage == wanted.usage)
        if wanted.region is not None:
            chosen = chosen.where(_key.c.home == wanted.region)
        if wanted.state is not None:
            chosen = chosen.where(_in_state(wanted.state))
        found: list[Key] = []
        size = limit if not wanted.tags else max(limit, _PAGE)
        with self._engine.connect() as c:
            # Tags stand in the row's JSON, so they are filtered here, page by page.
            position = after
            while len(found) < limit:
                page = chosen if position is None else chosen.where(_key.c.key_id > str(position))
                rows = self._keys(c, page.limit(size))
                found += [k for k in rows if all(k.tags.get(n) == v for n, v in wanted.tags.items())]
                if len(rows) < size:
                    break
                position = rows[-1].id
        return found[:limit]

    def aliases(self, tenant: str, *, after: str | None, limit: int) -> list[tuple[str, uuid.UUID]]:
        """Up to `limit` aliases of a tenant after a name, in the order of names."""
        chosen = sa.select(_alias.c.alias, _alias.c.key_id).where(_alias.c.tenant == tenant)
        if after is not None:
            chosen = chosen.where(_alias.c.alias > after)
        with self._engine.connect() as c:
            rows = c.execute(chosen.order_by(_alias.c.alias).limit(limit)).all()
        return [(name, uuid.UUID(key)) for name, key in rows]

    def rotations_due(self, now: int, *, homes: Iterable[str], strict: tuple[int, int]) -> list[Key]:
        """Enabled keys of these regions whose newest version is too old or used too often.

        `strict` is (suite, uses): a suite that counts its nonces, and where its keys must rotate whatever they say.
        """
        each = _version.alias()
        newest = sa.select(sa.func.max(each.c.number)).where(each.c.key_id == _key.c.key_id)
        suite, uses = strict
        wanted = (
            sa.select(_key)
            .select_from(_key.join(_version, _version.c.key_id == _key.c.key_id))
            .where(
                _version.c.number == newest.correlate(_key).scalar_subquery(),
                _key.c.state == str(KeyState.ACTIVE),
                _key.c.delete_at.is_(None),
                _key.c.home.in_(list(homes)),
                (_version.c.created_at + _key.c.max_age * 1_000_000 <= now)
                | (_version.c.uses >= _key.c.max_uses)
                | ((_key.c.suite == suite) & (_version.c.uses >= uses)),
            )
        )
        with self._engine.connect() as c:
            return self._keys(c, wanted)

    def deletions_due(self, now: int, *, homes: Iterable[str]) -> list[Key]:
        """Keys of these regions whose waiting time is over."""
        wanted = sa.select(_key).where(
            _key.c.delete_at <= now, _key.c.state != str(KeyState.DESTROYED), _key.c.home.in_(list(homes))
        )
        with self._engine.connect() as c:
            return self._keys(c, wanted)

    def changed_since(self, epoch: int) -> list[Key]:
        """Keys that changed after an epoch, whoever owns them. A row that cannot be read is left out."""
        with self._engine.connect() as c:
            wanted = sa.select(_key.c.key_id).where(_key.c.changed > epoch)
            ids = list(c.execute(wanted).scalars())
            found: list[Key] = []
            for at in range(0, len(ids), _CHUNK):
                found += self._keys(
                    c, sa.select(_key).where(_key.c.key_id.in_(ids[at : at + _CHUNK])), leave_out_damaged=True
                )
        return found

    def secrets(self, tenant: str) -> list[SecretRow]:
        """A tenant's audit keys, newest first; RowDamaged for a row that cannot be read."""
        wanted = sa.select(_secret).where(_secret.c.tenant == tenant).order_by(_secret.c.generation.desc())
        with self._engine.connect() as c:
            rows = c.execute(wanted).mappings().all()
        try:
            return [
                SecretRow(
                    tenant=row["tenant"],
                    generation=row["generation"],
                    region=row["region"],
                    object_id=uuid.UUID(row["object_id"]),
                    mechanism=row["mechanism"],
                    kek=uuid.UUID(row["kek"]),
                    blob=row["blob"],
                    mac=row["mac"],
                )
                for row in rows
            ]
        except ValueError:
            raise RowDamaged("a tenant's audit key row was changed outside the service") from None

    # ---- writing ---------------------------------------------------------------------------------------------

    def insert(self, c: Connection, key: Key) -> None:
        """A new key with its versions."""
        epoch = self._bump(c)
        c.execute(sa.insert(_key), [{**_key_values(key), "changed": epoch}])
        c.execute(sa.insert(_version), [_version_values(key.id, v) for v in key.versions])

    def update(self, c: Connection, key: Key, *, was: int, versions: Iterable[KeyVersion] = ()) -> None:
        """The key's new row and changed or added versions; StaleKey if the row is no longer at `was`."""
        values = {**_key_values(key), "changed": self._bump(c)}
        changed = c.execute(
            sa.update(_key).where(_key.c.key_id == values.pop("key_id"), _key.c.kv == was).values(values)
        )
        if changed.rowcount != 1:
            raise StaleKey(f"key {key.id} changed meanwhile; read it again")
        for version in versions:
            row = _version_values(key.id, version)
            there = (_version.c.key_id == row["key_id"]) & (_version.c.number == row["number"])
            keep = {k: v for k, v in row.items() if k not in {"key_id", "number", "uses"}}
            if c.execute(sa.update(_version).where(there).values(keep)).rowcount != 1:
                c.execute(sa.insert(_version), [row])

    def erase(self, c: Connection, key_id: uuid.UUID) -> None:
        """Overwrite every blob of a key before its rows are emptied, so that no page keeps the old bytes.

        What a write-ahead log, a replica or a backup still holds is wrapped under the root KEK.
        """
        if c.dialect.name == "sqlite":
            c.exec_driver_sql("PRAGMA secure_delete = ON")  # freed cells are zeroed, not only unlinked
        rows = c.execute(
            sa.select(_version.c.number, sa.func.length(_version.c.blob)).where(_version.c.key_id == str(key_id))
        ).all()
        for number, length in rows:
            there = (_version.c.key_id == str(key_id)) & (_version.c.number == number)
            c.execute(sa.update(_version).where(there).values(blob=bytes(length)))

    def put_alias(self, c: Connection, tenant: str, alias: str, key_id: uuid.UUID, *, fresh: bool) -> None:
        """Point an alias to a key; AliasInUse if it must be a new one and is not."""
        self._bump(c)  # first: it holds other writers off until the commit, so nobody inserts between look and write
        there = (_alias.c.tenant == tenant) & (_alias.c.alias == alias)
        if c.execute(sa.select(_alias.c.key_id).where(there)).scalar() is not None:
            if fresh:
                raise AliasInUse("the alias exists already")
            c.execute(sa.update(_alias).where(there).values(key_id=str(key_id)))
        else:
            c.execute(sa.insert(_alias), [{"tenant": tenant, "alias": alias, "key_id": str(key_id)}])

    def delete_alias(self, c: Connection, tenant: str, alias: str, key_id: uuid.UUID) -> None:
        """Remove an alias; StaleKey if it no longer points to the key that the caller was allowed to change."""
        self._bump(c)
        there = (_alias.c.tenant == tenant) & (_alias.c.alias == alias) & (_alias.c.key_id == str(key_id))
        if c.execute(sa.delete(_alias).where(there)).rowcount != 1:
            raise StaleKey("the alias was moved or removed meanwhile")

    def insert_secret(self, row: SecretRow) -> None:
        """A tenant's new audit key, in a transaction of its own; an equal generation of another worker wins."""
        values = {
            "tenant": row.tenant,
            "generation": row.generation,
            "region": row.region,
            "object_id": str(row.object_id),
            "mechanism": row.mechanism,
            "kek": str(row.kek),
            "blob": row.blob,
            "mac": row.mac,
        }
        with contextlib.suppress(IntegrityError), self._engine.begin() as c:
            c.execute(sa.insert(_secret), [values])

    def lease_uses(self, key_id: uuid.UUID, number: int, count: int, *, limit: int | None = None) -> int:
        """Count up to `count` more uses of a version before they happen; how many, 0 once `limit` is reached.

        Committed when this returns, in a transaction of its own: a crash after it counts too many, never too few.
        KeyNotFound if there is no such version.
        """
        there = (_version.c.key_id == str(key_id)) & (_version.c.number == number)
        with self._engine.begin() as c:
            # The update comes first and locks the row, so that two workers never count the same uses.
            c.execute(sa.update(_version).where(there).values(uses=_version.c.uses + count))
            total = c.execute(sa.select(_version.c.uses).where(there)).scalar()
            if total is None:
                raise KeyNotFound("no such key")
            if limit is None or total <= limit:
                return count
            granted = max(0, count - (int(total) - limit))
            c.execute(sa.update(_version).where(there).values(uses=total - count + granted))
            return granted

    # ---- rows ------------------------------------------------------------------------------------------------

    def _bump(self, c: Connection) -> int:
        """Count a change: the first statement of every one. Its row lock makes epochs rise in the order of commits."""
        c.execute(sa.update(_epoch).values(epoch=_epoch.c.epoch + 1))
        return int(c.execute(sa.select(_epoch.c.epoch)).scalar_one())

    def _keys(self, c: Connection, chosen: sa.Select[Any], *, leave_out_damaged: bool = False) -> list[Key]:
        """The keys of the chosen rows, in the order of ids.

        Rows and versions come by one statement, so from one snapshot: read one after the other, a rotation that
        commits in between would look like a row changed outside the service.
        """
        keys = chosen.subquery()
        versions = [column.label(f"v_{column.name}") for column in _version.columns]
        together = (
            sa.select(keys, *versions)
            .select_from(keys.outerjoin(_version, _version.c.key_id == keys.c.key_id))
            .order_by(keys.c.key_id, _version.c.number)
        )
        found: list[Key] = []
        for _, group in itertools.groupby(c.execute(together).mappings(), key=lambda row: row["key_id"]):
            rows = list(group)
            try:
                found.append(_to_key(rows))
            except RowDamaged:
                if not leave_out_damaged:
                    raise
        return found


def _in_state(state: str) -> sa.ColumnElement[bool]:
    """The rows whose key has this state of the API."""
    if state == "pending_deletion":
        return _key.c.delete_at.is_not(None)
    named = [str(s) for s, shown in API_STATE.items() if shown == state]
    return _key.c.delete_at.is_(None) & _key.c.state.in_(named)


def _key_values(key: Key) -> dict[str, Any]:
    return {
        "key_id": str(key.id),
        "tenant": key.tenant,
        "spec": str(key.spec),
        "usage": str(key.usage),
        "suite": key.suite,
        "tier": key.tier,
        "home": key.home,
        "places": json.dumps({name: sorted(getattr(key, name)) for name in _SETS}),
        "purposes": json.dumps(list(key.purposes)),
        "state": str(key.state),
        "kv": key.kv,
        "created_at": key.created_at,
        "updated_at": key.updated_at,
        "origin": key.origin,
        "non_exportable": key.non_exportable,
        "description": key.description,
        "tags": json.dumps(dict(key.tags)),
        "max_age": key.rotation.max_age,
        "max_uses": key.rotation.max_uses,
        "min_decrypt_version": key.min_decrypt_version,
        "min_encrypt_version": key.min_encrypt_version,
        "delete_at": key.delete_at,
        "mac": key.mac,
    }


def _to_key(rows: Sequence[sa.RowMapping]) -> Key:
    """The key of its row, joined with each of its versions.

    RowDamaged for rows the service cannot have written; the MACs are checked before their first use.
    """
    try:
        if [row["v_number"] for row in rows] != list(range(1, len(rows) + 1)):
            raise ValueError("versions are not 1, 2, 3, ...")
        return _decoded(rows[0], tuple(_to_version(row) for row in rows))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise RowDamaged(f"row of key {rows[0]['key_id']} was changed outside the service") from None


def _decoded(r: sa.RowMapping, versions: tuple[KeyVersion, ...]) -> Key:
    sets = {name: frozenset(values) for name, values in json.loads(r["places"]).items()}
    return Key(
        id=uuid.UUID(r["key_id"]),
        tenant=r["tenant"],
        spec=KeySpec(r["spec"]),
        usage=KeyUsage(r["usage"]),
        suite=r["suite"],
        tier=r["tier"],
        home=r["home"],
        purposes=tuple(json.loads(r["purposes"])),
        state=KeyState(r["state"]),
        kv=r["kv"],
        created_at=r["created_at"],
        updated_at=r["updated_at"],
        versions=versions,
        origin=r["origin"],
        non_exportable=bool(r["non_exportable"]),
        description=r["description"],
        tags=MappingProxyType(json.loads(r["tags"])),
        rotation=Rotation(r["max_age"], r["max_uses"]),
        min_decrypt_version=r["min_decrypt_version"],
        min_encrypt_version=r["min_encrypt_version"],
        delete_at=r["delete_at"],
        mac=r["mac"],
        **sets,
    )


def _version_values(key_id: uuid.UUID, v: KeyVersion) -> dict[str, Any]:
    return {
        "key_id": str(key_id),
        "number": v.number,
        "state": str(v.state),
        "created_at": v.created_at,
        "object_id": str(v.object_id),
        "mechanism": v.mechanism,
        "kek": str(v.kek),
        "blob": v.blob,
        "public": v.public,
        "mac": v.mac,
        "uses": v.uses,
    }


def _to_version(r: sa.RowMapping) -> KeyVersion:
    return KeyVersion(
        number=r["v_number"],
        state=KeyState(r["v_state"]),
        created_at=r["v_created_at"],
        object_id=uuid.UUID(r["v_object_id"]),
        mechanism=r["v_mechanism"],
        kek=uuid.UUID(r["v_kek"]),
        blob=r["v_blob"],
        public=r["v_public"],
        mac=r["v_mac"],
        uses=r["v_uses"],
    )
