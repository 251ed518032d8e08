"""The key tables, and the class that owns them. Nothing else reads or writes them.

Rows hold wrapped blobs and metadata, each under an HSM-keyed MAC (`keystore.rowmac`); a row changed here behind the
service's back is found before its blob reaches an HSM. One counter row, `keystore_epoch`, rises with every change, so
that other workers notice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError, OperationalError

from keystore.hsm import HsmUnavailable, Material, RowDamaged
from keystore.key import (
    API_STATE,
    EXTERNAL,
    AliasInUse,
    Imported,
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
_PLACED: Final = 100  # kinds of places in one statement

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
    sa.Column("import_path", sa.String(16)),  # of imported material only
    sa.Column("import_expires_at", sa.BigInteger),
)

sa.Index("keystore_version_kek", _version.c.kek)

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

_hsm: Final = sa.Table(
    "keystore_hsm",
    tables,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("region", sa.String(64), nullable=False),
    sa.Column("admin", sa.String(16), nullable=False),  # active, fallback, drained
    sa.Column("changed_at", sa.BigInteger, nullable=False),
    sa.Column("mac", sa.LargeBinary, nullable=False),
)

_audit_key: Final = sa.Table(
    "keystore_audit_key",
    tables,
    sa.Column("fingerprint", sa.String(64), primary_key=True),  # SHA-256 of region and public key
    sa.Column("region", sa.String(64), nullable=False),
    sa.Column("hsm", sa.String(64), nullable=False),
    sa.Column("public", sa.LargeBinary, nullable=False),
    sa.Column("since", sa.BigInteger, nullable=False),
    sa.Column("mac", sa.LargeBinary, nullable=False),
)

_root: Final = sa.Table(
    "keystore_root",
    tables,
    sa.Column("region", sa.String(64), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("changed_at", sa.BigInteger, nullable=False),
    sa.Column("mac", sa.LargeBinary, nullable=False),
)

# What a destroyed root KEK wrapped is lost: from its retirement on no transaction writes a row under it.
_retired_root: Final = sa.Table(
    "keystore_retired_root",
    tables,
    sa.Column("kek", sa.String(36), primary_key=True),
    sa.Column("retired_at", sa.BigInteger, nullable=False),
)

_import: Final = sa.Table(
    "keystore_import",
    tables,
    sa.Column("import_id", sa.String(36), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("key_id", sa.String(36), nullable=False),
    sa.Column("wrapping", sa.String(64), nullable=False),
    sa.Column("path", sa.String(16), nullable=False),
    sa.Column("expires_at", sa.BigInteger, nullable=False),
    sa.Column("object_id", sa.String(36), nullable=False),
    sa.Column("material", sa.String(32), nullable=False),
    sa.Column("mechanism", sa.String(64), nullable=False),
    sa.Column("kek", sa.String(36), nullable=False),
    sa.Column("blob", sa.LargeBinary, nullable=False),  # the private half, or the key that seals it; empty once spent
    sa.Column("sealed", sa.LargeBinary, nullable=False),  # the private half of a software key; empty once spent
    sa.Column("public", sa.LargeBinary, nullable=False),
    sa.Column("mac", sa.LargeBinary, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("spent_at", sa.BigInteger),
)
sa.Index("keystore_import_key", _import.c.key_id)
sa.Index("keystore_import_expires", _import.c.expires_at)

_material: Final = sa.Table(
    "keystore_material",
    tables,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("fingerprint", sa.LargeBinary(32), primary_key=True),  # HSM-keyed: tells nothing about the material
    sa.Column("key_id", sa.String(36), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
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
class Placed:
    """What the bar of a tier looks at: many keys have it in common. `stored` is how the rows hold its sets."""

    tenant: str
    tier: int
    home: str
    residency: frozenset[str]
    execution: frozenset[str]
    reach: frozenset[str]
    egress: frozenset[str]
    failover: frozenset[str]
    stored: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Located:
    """A key by its id, with the state that the API shows."""

    id: uuid.UUID
    placed: Placed
    state: str


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


@dataclass(frozen=True, slots=True)
class HsmRow:
    """What operators want of an HSM, as stored."""

    name: str
    region: str
    admin: str
    changed_at: int
    mac: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class RootRow:
    """Which version of a region's root KEK is current, as stored. No row: the first."""

    region: str
    version: int
    changed_at: int
    mac: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class AuditKeyRow:
    """An audit key of an HSM, as stored. It stays when the HSM has left: what it signed must still verify."""

    region: str
    hsm: str
    public: bytes
    since: int
    mac: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ImportRow:
    """What one import token stands for: the key it is for, and the wrapping key, itself wrapped."""

    import_id: uuid.UUID
    tenant: str
    key_id: uuid.UUID
    wrapping: str
    path: str  # "hsm" or "software": where what the customer wrapped is opened
    expires_at: int  # microseconds since the epoch, whole seconds
    object_id: uuid.UUID
    material: Material
    mechanism: str
    kek: uuid.UUID
    blob: bytes = field(repr=False)
    sealed: bytes = field(repr=False)
    public: bytes
    mac: bytes = field(default=b"", repr=False)
    spent: bool = False  # not under the MAC, as `attempts` in the table: a spent row holds no key any more


_LOCKED: Final = frozenset({"55P03", "40P01"})  # PostgreSQL: lock_not_available, deadlock_detected


@dataclass(frozen=True, slots=True)
class Uses:
    """Up to `count` more uses of a key's version, of `limit` in all."""

    key_id: uuid.UUID
    number: int
    count: int
    limit: int | None = None


def _leased(c: Connection, wanted: Uses) -> int | None:
    there = (_version.c.key_id == str(wanted.key_id)) & (_version.c.number == wanted.number)
    # The update comes first and locks the row, so that two workers never count the same uses.
    counting = sa.update(_version).where(there).values(uses=_version.c.uses + wanted.count).returning(_version.c.uses)
    total = c.execute(counting).scalar()
    if total is None or wanted.limit is None or total <= wanted.limit:
        return None if total is None else wanted.count
    granted = max(0, wanted.count - (int(total) - wanted.limit))
    c.execute(sa.update(_version).where(there).values(uses=total - wanted.count + granted))
    return granted


class Catalog:
    """Reads on connections of its own; writes only on the connection it is given, inside the caller's transaction."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading = engine.execution_options(reading=True)  # on SQLite a read waits for no writer

    # ---- reading ---------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the counter row if there is none, so that the first two changes ever do not both try to."""
        with contextlib.suppress(IntegrityError), self._engine.begin() as c:
            if c.execute(sa.select(_epoch.c.epoch)).scalar() is None:
                c.execute(sa.insert(_epoch), [{"one": 1, "epoch": 0}])

    def epoch(self) -> int:
        """The number of changes so far."""
        with self._reading.connect() as c:
            return int(c.execute(sa.select(_epoch.c.epoch)).scalar() or 0)

    def key(self, key_id: uuid.UUID) -> Key:
        """The key with this id, whoever owns it; KeyNotFound if there is none."""
        with self._reading.connect() as c:
            found = self._keys(c, sa.select(_key).where(_key.c.key_id == str(key_id)))
        if not found:
            raise KeyNotFound("no such key")
        return found[0]

    def alias(self, tenant: str, alias: str) -> uuid.UUID:
        """The key an alias points to; KeyNotFound if there is none."""
        wanted = sa.select(_alias.c.key_id).where(_alias.c.tenant == tenant, _alias.c.alias == alias)
        with self._reading.connect() as c:
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
        with self._reading.connect() as c:
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

    def placed(self, tenant: str | None) -> list[tuple[Placed, int]]:
        """The different places of keys that are not destroyed, a tenant's or (None) everybody's, and how many have them.

        RowDamaged for a row that cannot be read.
        """
        kind = (_key.c.tenant, _key.c.tier, _key.c.home, _key.c.places)
        wanted = sa.select(*kind, sa.func.count()).where(_key.c.state != str(KeyState.DESTROYED)).group_by(*kind)
        if tenant is not None:
            wanted = wanted.where(_key.c.tenant == tenant)
        with self._reading.connect() as c:
            rows = c.execute(wanted).all()
        return [(_to_placed(*row[:4]), int(row[4])) for row in rows]

    def located(self, wanted: Sequence[Placed], *, after: str | None, limit: int) -> list[Located]:
        """Up to `limit` keys after an id that are not destroyed and have one of these places, in the order of ids."""
        found: list[Located] = []
        chosen = (
            sa.select(
                _key.c.key_id, _key.c.tenant, _key.c.tier, _key.c.home, _key.c.places, _key.c.state, _key.c.delete_at
            )
            .where(_key.c.state != str(KeyState.DESTROYED), _key.c.key_id > (after or ""))
            .order_by(_key.c.key_id)
            .limit(limit)
        )
        with self._reading.connect() as c:
            for at in range(0, len(wanted), _PLACED):
                some = {(p.tenant, p.tier, p.home, p.stored): p for p in wanted[at : at + _PLACED]}
                one_of = sa.or_(*(_has(p) for p in some.values()))
                for key_id, tenant, tier, home, places, state, delete_at in c.execute(chosen.where(one_of)):
                    shown = "pending_deletion" if delete_at is not None else API_STATE[KeyState(state)]
                    found.append(Located(uuid.UUID(key_id), some[tenant, tier, home, places], shown))
        return sorted(found, key=lambda k: str(k.id))[:limit]

    def aliases(self, tenant: str, *, after: str | None, limit: int) -> list[tuple[str, uuid.UUID]]:
        """Up to `limit` aliases of a tenant after a name, in the order of names."""
        chosen = sa.select(_alias.c.alias, _alias.c.key_id).where(_alias.c.tenant == tenant)
        if after is not None:
            chosen = chosen.where(_alias.c.alias > after)
        with self._reading.connect() as c:
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
                # Most keys rotate by hand: they must not cost a look at their versions.
                _key.c.max_age.is_not(None) | _key.c.max_uses.is_not(None) | (_key.c.suite == suite),
                _version.c.number == newest.correlate(_key).scalar_subquery(),
                _key.c.state == str(KeyState.ACTIVE),
                _key.c.delete_at.is_(None),
                _key.c.home.in_(list(homes)),
                (_version.c.created_at + _key.c.max_age * 1_000_000 <= now)
                | (_version.c.uses >= _key.c.max_uses)
                | ((_key.c.suite == suite) & (_version.c.uses >= uses)),
            )
        )
        with self._reading.connect() as c:
            return self._keys(c, wanted)

    def deletions_due(self, now: int, *, homes: Iterable[str]) -> list[Key]:
        """Keys of these regions whose waiting time is over."""
        wanted = sa.select(_key).where(
            _key.c.delete_at <= now, _key.c.state != str(KeyState.DESTROYED), _key.c.home.in_(list(homes))
        )
        with self._reading.connect() as c:
            return self._keys(c, wanted)

    def expiries_due(self, now: int, *, homes: Iterable[str]) -> list[Key]:
        """Enabled keys of these regions whose newest version holds imported material that has expired."""
        each = _version.alias()
        newest = sa.select(sa.func.max(each.c.number)).where(each.c.key_id == _key.c.key_id)
        wanted = (
            sa.select(_key)
            .select_from(_key.join(_version, _version.c.key_id == _key.c.key_id))
            .where(
                _version.c.number == newest.correlate(_key).scalar_subquery(),
                _version.c.import_expires_at <= now,
                _key.c.state == str(KeyState.ACTIVE),
                _key.c.delete_at.is_(None),
                _key.c.home.in_(list(homes)),
            )
        )
        with self._reading.connect() as c:
            return self._keys(c, wanted)

    def changed_since(self, epoch: int) -> list[Key]:
        """Keys that changed after an epoch, whoever owns them. A row that cannot be read is left out."""
        with self._reading.connect() as c:
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
        with self._reading.connect() as c:
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

    def hsms(self, c: Connection | None = None) -> list[HsmRow]:
        """What operators want of each HSM that was ever drained or exchanged; on `c` as its transaction sees it."""
        wanted = sa.select(_hsm).order_by(_hsm.c.name)
        with contextlib.nullcontext(c) if c is not None else self._reading.connect() as connection:
            return [HsmRow(**row) for row in connection.execute(wanted).mappings()]

    def audit_keys(self) -> list[AuditKeyRow]:
        """Every audit key that was ever remembered, oldest first."""
        wanted = sa.select(*(c for c in _audit_key.columns if c.name != "fingerprint")).order_by(_audit_key.c.since)
        with self._reading.connect() as c:
            return [AuditKeyRow(**row) for row in c.execute(wanted).mappings()]

    def roots(self) -> list[RootRow]:
        """The current root KEK of each region that ever rotated it."""
        with self._reading.connect() as c:
            return [RootRow(**row) for row in c.execute(sa.select(_root)).mappings()]

    def put_root(self, c: Connection, row: RootRow) -> None:
        """Make a version of a region's root KEK the current one."""
        self._bump(c)
        c.execute(sa.delete(_root).where(_root.c.region == row.region))
        c.execute(sa.insert(_root), [dataclasses.asdict(row)])

    def keys_under(self, kek: uuid.UUID, *, after: uuid.UUID | None, limit: int) -> list[Key]:
        """Up to `limit` keys with a version that is wrapped under this root KEK, whoever owns them, in the order of ids."""
        under = sa.select(_version.c.key_id).where(_version.c.kek == str(kek), sa.func.length(_version.c.blob) > 0)
        chosen = sa.select(_key).where(_key.c.key_id.in_(under))
        if after is not None:
            chosen = chosen.where(_key.c.key_id > str(after))
        with self._reading.connect() as c:
            return self._keys(c, chosen.order_by(_key.c.key_id).limit(limit))

    def secrets_under(self, kek: uuid.UUID) -> list[SecretRow]:
        """Tenants' audit keys that are wrapped under this root KEK."""
        wanted = sa.select(_secret.c.tenant).where(_secret.c.kek == str(kek)).distinct()
        with self._reading.connect() as c:
            tenants = list(c.execute(wanted).scalars())
        return [row for tenant in tenants for row in self.secrets(tenant) if row.kek == kek]

    def put_secret(self, c: Connection, row: SecretRow, *, was: uuid.UUID) -> None:
        """A tenant's audit key, wrapped anew; StaleKey if it is no longer under the root KEK `was`."""
        self._writing_under(c, [row.kek])
        there = (
            (_secret.c.tenant == row.tenant) & (_secret.c.generation == row.generation) & (_secret.c.kek == str(was))
        )
        values = {"mechanism": row.mechanism, "kek": str(row.kek), "blob": row.blob, "mac": row.mac}
        if c.execute(sa.update(_secret).where(there).values(values)).rowcount != 1:
            raise StaleKey(f"the audit key of tenant {row.tenant} changed meanwhile")

    def count_under(self, kek: uuid.UUID) -> dict[str, int]:
        """What is still wrapped under a root KEK: key versions, tenants' audit keys, open import tokens."""
        with self._reading.connect() as c:
            return self._count_under(c, kek)

    def _count_under(self, c: Connection, kek: uuid.UUID) -> dict[str, int]:
        wanted = {
            "key versions": sa.select(sa.func.count()).where(
                _version.c.kek == str(kek), sa.func.length(_version.c.blob) > 0
            ),
            "tenants' audit keys": sa.select(sa.func.count()).where(_secret.c.kek == str(kek)),
            "open import tokens": sa.select(sa.func.count()).where(
                _import.c.kek == str(kek), sa.func.length(_import.c.blob) > 0
            ),
        }
        return {name: int(c.execute(chosen).scalar() or 0) for name, chosen in wanted.items()}

    def retire_root(self, c: Connection, kek: uuid.UUID, *, now: int) -> dict[str, int]:
        """What is still wrapped under a root KEK, by kind; if nothing is, nothing will be once this commits.

        A worker that has not heard of the newer root KEK, however late, fails in its transaction instead of writing a
        row that nobody could open. `now` is in microseconds.
        """
        self._bump(c)
        left = {kind: count for kind, count in self._count_under(c, kek).items() if count}
        known = c.execute(sa.select(_retired_root.c.kek).where(_retired_root.c.kek == str(kek))).first()
        if not left and known is None:
            c.execute(sa.insert(_retired_root), [{"kek": str(kek), "retired_at": now}])
        return left

    def _writing_under(self, c: Connection, keks: Iterable[uuid.UUID]) -> int:
        """Count a change that writes blobs under these root KEKs; HsmUnavailable if one of them is retired."""
        epoch = self._bump(c)  # first: its lock orders this after a retirement, or before
        wanted = sa.select(_retired_root.c.kek).where(_retired_root.c.kek.in_([str(kek) for kek in keks]))
        if (gone := c.execute(wanted).scalar()) is not None:
            raise HsmUnavailable(f"root KEK {gone} is retired and this worker has not followed yet: try again")
        return epoch

    def region_keys(self, region: str, *, after: uuid.UUID | None, limit: int) -> list[Key]:
        """Up to `limit` keys of a region that are not destroyed, whoever owns them, in the order of ids."""
        chosen = sa.select(_key).where(_key.c.home == region, _key.c.state != str(KeyState.DESTROYED))
        if after is not None:
            chosen = chosen.where(_key.c.key_id > str(after))
        with self._reading.connect() as c:
            return self._keys(c, chosen.order_by(_key.c.key_id).limit(limit))

    def region_secrets(self, region: str) -> list[str]:
        """Tenants whose audit key an HSM of the region wrapped."""
        wanted = sa.select(_secret.c.tenant).where(_secret.c.region == region).distinct().order_by(_secret.c.tenant)
        with self._reading.connect() as c:
            return list(c.execute(wanted).scalars())

    def changes_of(self, c: Connection, region: str, epoch: int) -> int:
        """How many keys of a region changed after an epoch, as a transaction sees it."""
        wanted = sa.select(sa.func.count()).where(_key.c.home == region, _key.c.changed > epoch)
        return int(c.execute(wanted).scalar() or 0)

    def region_inventory(self, region: str) -> list[tuple[KeySpec, int, uuid.UUID, int]]:
        """(spec, suite, root KEK, key versions) of a region's keys: what an HSM needs to serve them all."""
        wanted = (
            sa.select(_key.c.spec, _key.c.suite, _version.c.kek, sa.func.count())
            .select_from(_version.join(_key, _version.c.key_id == _key.c.key_id))
            .where(_key.c.home == region, _key.c.state != str(KeyState.DESTROYED))
            .group_by(_key.c.spec, _key.c.suite, _version.c.kek)
        )
        with self._reading.connect() as c:
            return [(KeySpec(s), suite, uuid.UUID(kek), n) for s, suite, kek, n in c.execute(wanted).all()]

    # ---- writing ---------------------------------------------------------------------------------------------

    def put_hsms(self, c: Connection, rows: Iterable[HsmRow]) -> None:
        """Change what operators want of HSMs."""
        for row in rows:
            c.execute(sa.delete(_hsm).where(_hsm.c.name == row.name))
            c.execute(sa.insert(_hsm), [dataclasses.asdict(row)])

    def hold(self, c: Connection) -> int:
        """Let no other change commit before this transaction ends; the number of changes so far."""
        return self._bump(c) - 1

    def insert_audit_key(self, row: AuditKeyRow) -> None:
        """Remember an audit key, in a transaction of its own; nothing if it is known."""
        fingerprint = hashlib.sha256(row.region.encode() + b"\0" + row.public).hexdigest()
        with contextlib.suppress(IntegrityError), self._engine.begin() as c:
            c.execute(sa.insert(_audit_key), [{"fingerprint": fingerprint, **dataclasses.asdict(row)}])

    def insert(self, c: Connection, key: Key) -> None:
        """A new key with its versions."""
        epoch = self._writing_under(c, {v.kek for v in key.versions})
        c.execute(sa.insert(_key), [{**_key_values(key), "changed": epoch}])
        if key.versions:
            c.execute(sa.insert(_version), [_version_values(key.id, v) for v in key.versions])

    def update(self, c: Connection, key: Key, *, was: int, versions: Iterable[KeyVersion] = ()) -> None:
        """The key's new row and changed or added versions; StaleKey if the row is no longer at `was`."""
        versions = list(versions)
        values = {**_key_values(key), "changed": self._writing_under(c, {v.kek for v in versions if v.blob})}
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
        self._spend(c, _import.c.key_id == str(key_id), now=0)

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
            self._writing_under(c, [row.kek])
            c.execute(sa.insert(_secret), [values])

    @staticmethod
    def raise_uses(c: Connection, suite: int, uses: int) -> None:
        """Count every version of the keys of a suite as used so often at least."""
        keys = sa.select(_key.c.key_id).where(_key.c.suite == suite)
        c.execute(sa.update(_version).where(_version.c.key_id.in_(keys), _version.c.uses < uses).values(uses=uses))

    def lease_uses(self, wanted: Sequence[Uses]) -> list[int | None]:
        """Count more uses of versions before they happen; how many of each, 0 once its limit is reached, None if it is gone.

        Committed when this returns, in a transaction of its own: a crash after it counts too many, never too few.
        """
        granted = dict[Uses, int | None]()
        with self._engine.begin() as c:
            if c.dialect.name == "postgresql":  # somebody's open transaction must not stop the counting of all keys
                c.execute(sa.text("SET LOCAL lock_timeout = '1s'"))
            # In one order, or two workers block each other.
            for one in sorted(wanted, key=lambda w: (w.key_id, w.number)):
                granted[one] = _leased(c, one)
        return [granted[one] for one in wanted]

    def lease_each(self, wanted: Sequence[Uses]) -> list[int | Exception | None]:
        """As `lease_uses`; if a row is locked, or workers block each other, each by itself, with an error where it cannot be."""
        try:
            return list(self.lease_uses(wanted))
        except OperationalError as error:
            if len(wanted) < 2 or getattr(error.orig, "sqlstate", None) not in _LOCKED:
                raise
        found = list[int | Exception | None]()
        for one in wanted:
            try:
                found += self.lease_uses([one])
            except OperationalError as error:
                found.append(error)
        return found

    # ---- imports ---------------------------------------------------------------------------------------------

    def import_row(self, import_id: uuid.UUID) -> ImportRow | None:
        """What a token stands for, spent or not; None if there is none. RowDamaged for one that cannot be read."""
        with self._reading.connect() as c:
            r = c.execute(sa.select(_import).where(_import.c.import_id == str(import_id))).mappings().first()
        if r is None:
            return None
        values = {f.name: r[f.name] for f in dataclasses.fields(ImportRow) if f.name != "spent"}
        try:
            ids = {name: uuid.UUID(values[name]) for name in ("import_id", "key_id", "object_id", "kek")}
            values |= {**ids, "material": Material(values["material"])}
        except ValueError:
            raise RowDamaged("the row of an import was changed outside the service") from None
        return ImportRow(**values, spent=r["spent_at"] is not None)

    def insert_import(self, c: Connection, row: ImportRow, *, now: int) -> None:
        """A new import of a key. Earlier ones of the key are spent: at most one is open."""
        self._writing_under(c, [row.kek])
        self._spend(c, _import.c.key_id == str(row.key_id), now=now)
        ids = {name: str(getattr(row, name)) for name in ("import_id", "key_id", "object_id", "kek", "material")}
        values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "spent"}
        c.execute(sa.insert(_import), [{**values, **ids, "attempts": 0}])

    def try_import(self, import_id: uuid.UUID, *, limit: int) -> bool:
        """Count an attempt before it is made, in a transaction of its own; False if the token is spent."""
        there = (_import.c.import_id == str(import_id)) & _import.c.spent_at.is_(None) & (_import.c.attempts < limit)
        with self._engine.begin() as c:
            return c.execute(sa.update(_import).where(there).values(attempts=_import.c.attempts + 1)).rowcount == 1

    def end_attempt(self, import_id: uuid.UUID, *, counts: bool, limit: int, now: int) -> None:
        """After an attempt that failed: spend the token if it was the last, or take the attempt back."""
        there = _import.c.import_id == str(import_id)
        with self._engine.begin() as c:
            if counts:
                self._spend(c, there & (_import.c.attempts >= limit), now=now)
            else:
                c.execute(sa.update(_import).where(there).values(attempts=_import.c.attempts - 1))

    def spend_import(self, c: Connection, import_id: uuid.UUID, *, now: int) -> bool:
        """Use a token up and erase its wrapping key; False if somebody else was first."""
        return self._spend(c, _import.c.import_id == str(import_id), now=now) == 1

    def spend_expired_imports(self, now: int, *, kept_us: int) -> int:
        """Erase the wrapping keys of expired tokens, forget tokens that ended `kept_us` ago; how many were erased."""
        with self._engine.begin() as c:
            c.execute(sa.delete(_import).where(_import.c.expires_at <= now - kept_us))
            return self._spend(c, _import.c.expires_at <= now, now=now)

    def _spend(self, c: Connection, there: sa.ColumnElement[bool], *, now: int) -> int:
        """Overwrite the wrapping keys of open imports, then empty them, as `erase` does."""
        if c.dialect.name == "sqlite":
            c.exec_driver_sql("PRAGMA secure_delete = ON")
        open_ = c.execute(
            sa.select(_import.c.import_id, sa.func.length(_import.c.blob), sa.func.length(_import.c.sealed)).where(
                there, _import.c.spent_at.is_(None)
            )
        ).all()
        spent = 0
        for import_id, blob, sealed in open_:
            this = (_import.c.import_id == import_id) & _import.c.spent_at.is_(None)
            c.execute(sa.update(_import).where(this).values(blob=bytes(blob), sealed=bytes(sealed)))
            spent += c.execute(sa.update(_import).where(this).values(blob=b"", sealed=b"", spent_at=now)).rowcount
        return spent

    def material_known(self, tenant: str, fingerprint: bytes) -> bool:
        """Whether the tenant ever imported this material."""
        wanted = sa.select(_material.c.number).where(
            _material.c.tenant == tenant, _material.c.fingerprint == fingerprint
        )
        with self._reading.connect() as c:
            return c.execute(wanted).first() is not None

    def put_material(self, c: Connection, tenant: str, fingerprint: bytes, key_id: uuid.UUID, number: int) -> bool:
        """Remember imported material for ever; False if the tenant has imported it before."""
        self._bump(c)  # first: it holds other writers off until the commit, so nobody inserts between look and write
        there = (_material.c.tenant == tenant) & (_material.c.fingerprint == fingerprint)
        if c.execute(sa.select(_material.c.number).where(there)).first() is not None:
            return False
        values = {"tenant": tenant, "fingerprint": fingerprint, "key_id": str(key_id), "number": number}
        c.execute(sa.insert(_material), [values])
        return True

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


def _has(placed: Placed) -> sa.ColumnElement[bool]:
    """The rows of keys with these places."""
    p = placed
    return (_key.c.tenant == p.tenant) & (_key.c.tier == p.tier) & (_key.c.home == p.home) & (_key.c.places == p.stored)


def _to_placed(tenant: str, tier: int, home: str, places: str) -> Placed:
    try:
        sets = json.loads(places)
        residency, execution, reach, egress, failover = (frozenset(sets[name]) for name in _SETS[:5])
    except (ValueError, TypeError, KeyError):
        raise RowDamaged(f"a key row of tenant {tenant} was changed outside the service") from None
    return Placed(tenant, tier, home, residency, execution, reach, egress, failover, places)


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
        if len(rows) == 1 and rows[0]["v_number"] is None and _may_be_empty(rows[0]):
            return _decoded(rows[0], ())
        if [row["v_number"] for row in rows] != list(range(1, len(rows) + 1)):
            raise ValueError("versions are not 1, 2, 3, ...")
        return _decoded(rows[0], tuple(_to_version(row) for row in rows))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise RowDamaged(f"row of key {rows[0]['key_id']} was changed outside the service") from None


def _may_be_empty(r: sa.RowMapping) -> bool:
    """Only a key whose material is imported may be without versions, and only unusable."""
    unusable = {str(KeyState.PREACTIVE), str(KeyState.COMPROMISED), str(KeyState.DESTROYED)}
    return r["origin"] == EXTERNAL and r["state"] in unusable


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
        "import_path": None if v.imported is None else v.imported.path,
        "import_expires_at": None if v.imported is None else v.imported.expires_at,
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
        imported=_to_imported(r["v_import_path"], r["v_import_expires_at"]),
    )


def _to_imported(path: str | None, expires_at: int | None) -> Imported | None:
    if path is None and expires_at is not None:
        raise ValueError("an end of imported material without its path")
    return None if path is None else Imported(path, expires_at)
