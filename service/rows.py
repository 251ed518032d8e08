"""The service's own tables: API tokens, idempotent answers, leases. Each class owns one."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import os
import secrets
import string
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError

from service.mark import Mark, MarkDamaged

tables: Final = sa.MetaData()

_token: Final = sa.Table(
    "service_api_token",
    tables,
    sa.Column("token_id", sa.String(8), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("scopes", sa.Text, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger, nullable=False),
    sa.Column("created_by", sa.String(600), nullable=False),
    sa.Column("revoked_at", sa.BigInteger),
)
_answer: Final = sa.Table(
    "service_idempotency",
    tables,
    sa.Column("claim", sa.LargeBinary, primary_key=True),  # SHA-256 of tenant, caller, Idempotency-Key
    sa.Column("request", sa.LargeBinary, nullable=False),
    sa.Column("state", sa.String(8), nullable=False),
    sa.Column("status", sa.Integer),
    sa.Column("body", sa.LargeBinary),
    sa.Column("headers", sa.Text),
    sa.Column("created_at", sa.BigInteger, nullable=False),
)
_lease: Final = sa.Table(
    "service_lease",
    tables,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("owner", sa.String(128), nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("until", sa.BigInteger, nullable=False),
)

_setting: Final = sa.Table(
    "service_setting",
    tables,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

_approval: Final = sa.Table(
    "service_approval",
    tables,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("tenant", sa.String(64)),
    sa.Column("content", sa.Text, nullable=False),  # the request as it is approved
    sa.Column("state", sa.String(16), nullable=False),  # open, executed, cancelled
    sa.Column("approvals", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("region", sa.String(64), nullable=False),  # whose HSMs know the key of the MAC
    sa.Column("mac", sa.LargeBinary, nullable=False),
)

_operation: Final = sa.Table(
    "service_operation",
    tables,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),  # running, succeeded, failed, cancelled
    sa.Column("step", sa.String(16), nullable=False),
    sa.Column("parameters", sa.Text, nullable=False),
    sa.Column("position", sa.Text, nullable=False),  # where a new owner goes on
    sa.Column("done", sa.BigInteger, nullable=False),
    sa.Column("total", sa.BigInteger, nullable=False),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
)

BASE62: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
NEVER_FOR_TOKENS: Final = frozenset(
    {
        "destroy",
        "completeDeletion",
        "scheduleDeletion",
        "setPolicy",
        "grant",
        "requestException",
        "reloadPolicy",
        "changePolicy",
        "export",
        "escrow",
        "replicate",
        "hsmDrain",
        "hsmUndrain",
        "hsmDrill",
        "liftFreeze",
        "approve",
    }
)
KEPT_US: Final = 24 * 3_600 * 1_000_000
ABANDONED_US: Final = 120 * 1_000_000  # a request ends long before: its process died


class _Hidden:
    """Neither shown nor pickled."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds a secret and is not pickled")


class LeaseLost(Exception):
    """Another process holds the lease by now."""


@dataclass(frozen=True, slots=True)
class NewToken:
    """An API token that is to be made. `scopes` are Cedar action names."""

    tenant: str
    role: str
    scopes: frozenset[str]
    lifetime_s: int
    created_by: str


@dataclass(frozen=True, slots=True)
class ApiToken:
    """An API token without its secret."""

    id: str
    tenant: str
    role: str
    scopes: frozenset[str]
    created_at: int
    expires_at: int


def base62(number: int, width: int) -> str:
    """`width` digits of a number in base 62."""
    digits = []
    for _ in range(width):
        number, rest = divmod(number, 62)
        digits.append(BASE62[rest])
    return "".join(reversed(digits))


def checksum(text: str) -> str:
    """Six base-62 digits of the CRC32 of everything before: typos and scanners' false hits cost no look-up."""
    return base62(zlib.crc32(text.encode()), 6)


class ApiTokens(_Hidden):
    """API tokens at rest: only an HMAC under a pepper that the HSM derives; a stolen database opens nothing."""

    def __init__(self, engine: Engine, *, pepper: bytes, installation: str, clock: Callable[[], int]) -> None:
        self._engine, self._pepper, self._clock = engine, pepper, clock
        self.installation = installation
        self._cache: dict[str, tuple[ApiToken, bytes]] = {}
        self._lock = threading.Lock()

    def plan_create(self, new: NewToken) -> tuple[ApiToken, str, Callable[[Connection], None]]:
        """(token, its text, what writes it). The text exists this once."""
        now = self._clock()
        token_id = "".join(secrets.choice(BASE62) for _ in range(8))
        head = f"skms_api_{token_id}_{base62(int.from_bytes(os.urandom(32), 'big'), 43)}"
        text = head + checksum(head)
        token = ApiToken(token_id, new.tenant, new.role, new.scopes, now, now + new.lifetime_s * 1_000_000)

        def write(connection: Connection) -> None:
            connection.execute(
                sa.insert(_token),
                [
                    {
                        "token_id": token.id,
                        "tenant": token.tenant,
                        "role": token.role,
                        "scopes": json.dumps(sorted(token.scopes)),
                        "digest": self.digest(text),
                        "created_at": token.created_at,
                        "expires_at": token.expires_at,
                        "created_by": new.created_by,
                    }
                ],
            )

        return token, text, write

    def digest(self, text: str) -> bytes:
        """What is stored of a token."""
        return hmac.digest(self._pepper, text.encode(), "sha256")

    def known(self, token_id: str) -> ApiToken | None:
        """A token, live or not: who held it."""
        with self._engine.execution_options(reading=True).connect() as connection:
            row = connection.execute(sa.select(_token).where(_token.c.token_id == token_id)).mappings().first()
        return None if row is None else _token_of(row)

    def find(self, token_id: str) -> tuple[ApiToken, bytes] | None:
        """A live token and its stored digest."""
        with self._lock:
            known = self._cache.get(token_id)
        if known is None:
            wanted = sa.select(_token).where(_token.c.token_id == token_id, _token.c.revoked_at.is_(None))
            with self._engine.execution_options(reading=True).connect() as connection:
                row = connection.execute(wanted).mappings().first()
            if row is None:
                return None
            known = (_token_of(row), row["digest"])
            with self._lock:
                self._cache[token_id] = known
        return known if known[0].expires_at > self._clock() else None

    def list(self, tenant: str) -> list[ApiToken]:
        """A tenant's live tokens."""
        wanted = sa.select(_token).where(
            _token.c.tenant == tenant, _token.c.revoked_at.is_(None), _token.c.expires_at > self._clock()
        )
        with self._engine.execution_options(reading=True).connect() as connection:
            return [_token_of(r) for r in connection.execute(wanted.order_by(_token.c.created_at)).mappings()]

    def plan_revoke(self, tenant: str, token_id: str) -> Callable[[Connection], None]:
        """What revokes a token; KeyError if the tenant has no such live token."""

        def write(connection: Connection) -> None:
            there = (_token.c.token_id == token_id) & (_token.c.tenant == tenant) & _token.c.revoked_at.is_(None)
            if connection.execute(sa.update(_token).where(there).values(revoked_at=self._clock())).rowcount != 1:
                raise NoSuchToken("no such token")

        return write

    def forget(self, token_id: str) -> None:
        """This process refuses the token from now on."""
        with self._lock:
            self._cache.pop(token_id, None)

    def poll(self) -> None:
        """Look again at every token in use: another worker may have revoked it."""
        with self._lock:
            known = list(self._cache)
        if not known:
            return
        wanted = sa.select(_token.c.token_id).where(_token.c.token_id.in_(known), _token.c.revoked_at.is_(None))
        with self._engine.execution_options(reading=True).connect() as connection:
            live = set(connection.execute(wanted).scalars())
        for token_id in set(known) - live:
            self.forget(token_id)


class NoSuchToken(Exception):
    """No such token in this tenant."""


def _token_of(row: Any) -> ApiToken:
    return ApiToken(
        row["token_id"],
        row["tenant"],
        row["role"],
        frozenset(json.loads(row["scopes"])),
        row["created_at"],
        row["expires_at"],
    )


@dataclass(frozen=True, slots=True)
class New:
    """The first request with its Idempotency-Key."""


@dataclass(frozen=True, slots=True)
class Replay:
    """The stored answer of the same request."""

    status: int
    body: bytes = field(repr=False)
    headers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class InProgress:
    """The first request has not ended."""


@dataclass(frozen=True, slots=True)
class Reused:
    """The key stands for another request."""


class Idempotency:
    """Answers of control-plane requests, kept for 24 hours per tenant and caller. Never one with key material."""

    def __init__(self, engine: Engine, *, clock: Callable[[], int]) -> None:
        self._engine, self._clock = engine, clock

    def begin(self, tenant: str, caller: str, key: str, request: bytes) -> New | Replay | InProgress | Reused:
        """Claim a key for a request, or tell what became of its first one."""
        claim, now = _claim(tenant, caller, key), self._clock()
        with self._engine.begin() as connection:
            connection.execute(sa.delete(_answer).where(_answer.c.created_at < now - KEPT_US))
            row = connection.execute(sa.select(_answer).where(_answer.c.claim == claim)).mappings().first()
            if row is not None and row["state"] == "running" and row["created_at"] < now - ABANDONED_US:
                connection.execute(sa.delete(_answer).where(_answer.c.claim == claim))
                row = None
            if row is None:
                values = {"claim": claim, "request": request, "state": "running", "created_at": now}
                try:
                    connection.execute(sa.insert(_answer), [values])
                except IntegrityError:
                    return InProgress()
                return New()
        if not hmac.compare_digest(row["request"], request):
            return Reused()
        if row["state"] == "running":
            return InProgress()
        headers = tuple((str(k), str(v)) for k, v in json.loads(row["headers"]))
        return Replay(row["status"], row["body"], headers)

    def once(self, names: Sequence[str], *, keep_us: int) -> bool:
        """Whether none of these names was used before, on any worker; all of them count as used for `keep_us` from now on."""
        at = self._clock() - KEPT_US + keep_us
        rows = [
            {"claim": _claim("once", n), "request": b"", "state": "done", "status": 0, "created_at": at} for n in names
        ]
        with self._engine.begin() as connection:
            connection.execute(sa.delete(_answer).where(_answer.c.created_at < self._clock() - KEPT_US))
            try:
                connection.execute(sa.insert(_answer), rows)
            except IntegrityError:
                connection.rollback()
                return False
        return True

    def finish(
        self,
        connection: Connection,
        tenant: str,
        caller: str,
        key: str,
        status: int,
        body: bytes,
        headers: tuple[tuple[str, str], ...],
    ) -> None:
        """Store the answer, in the transaction of the change it reports."""
        connection.execute(
            sa.update(_answer)
            .where(_answer.c.claim == _claim(tenant, caller, key))
            .values(state="done", status=status, body=body, headers=json.dumps(headers))
        )

    def abandon(self, tenant: str, caller: str, key: str) -> None:
        """The request failed and changed nothing: the key may be used again."""
        there = (_answer.c.claim == _claim(tenant, caller, key)) & (_answer.c.state == "running")
        with self._engine.begin() as connection:
            connection.execute(sa.delete(_answer).where(there))


def _claim(*parts: str) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part.encode()).to_bytes(4, "big") + part.encode())
    return digest.digest()


class Settings:
    """What all workers of an installation shall agree on, by name."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def get(self, name: str) -> str | None:
        """The value, if one was ever put."""
        with self._engine.execution_options(reading=True).connect() as connection:
            return self.value(connection, name)

    @staticmethod
    def value(connection: Connection, name: str) -> str | None:
        """The value, in the transaction of the caller."""
        found = connection.execute(sa.select(_setting.c.value).where(_setting.c.name == name)).scalar()
        return None if found is None else str(found)

    @staticmethod
    def put(connection: Connection, name: str, value: str) -> None:
        """Set a value, in the transaction of the caller."""
        if connection.execute(sa.update(_setting).where(_setting.c.name == name).values(value=value)).rowcount == 0:
            Settings.add(connection, name, value)

    @staticmethod
    def add(connection: Connection, name: str, value: str) -> None:
        """Set a value for the first time, in the transaction of the caller; IntegrityError if there is one."""
        connection.execute(sa.insert(_setting), [{"name": name, "value": value}])

    @staticmethod
    def drop(connection: Connection, name: str) -> None:
        """Forget a value, in the transaction of the caller."""
        connection.execute(sa.delete(_setting).where(_setting.c.name == name))

    def names(self, prefix: str) -> list[str]:
        """The names that begin so."""
        chosen = sa.select(_setting.c.name).where(_setting.c.name.startswith(prefix, autoescape=True))
        with self._engine.execution_options(reading=True).connect() as connection:
            return [str(name) for name in connection.execute(chosen).scalars()]


class Lease:
    """Roles that one process holds at a time, with a fencing epoch."""

    def __init__(self, engine: Engine, *, clock: Callable[[], int]) -> None:
        self._engine, self._clock = engine, clock

    def acquire(self, name: str, owner: str, ttl_s: int) -> int | None:
        """Take or renew a lease: its epoch, or None while another owner holds it."""
        now = self._clock()
        until = now + ttl_s * 1_000_000
        with self._engine.begin() as connection:
            row = connection.execute(sa.select(_lease).where(_lease.c.name == name)).mappings().first()
            if row is None:
                values = {"name": name, "owner": owner, "epoch": 1, "until": until}
                try:
                    with connection.begin_nested():
                        connection.execute(sa.insert(_lease), [values])
                except IntegrityError:  # another process was first
                    return None
                return 1
            held = row["owner"] == owner
            if not held and row["until"] > now:
                return None
            epoch = int(row["epoch"]) + (0 if held else 1)
            # Compare and swap: on PostgreSQL two processes may have read the same expired row, and an epoch has one owner.
            taken = connection.execute(
                sa.update(_lease)
                .where(_lease.c.name == name, _lease.c.owner == row["owner"], _lease.c.epoch == row["epoch"])
                .values(owner=owner, epoch=epoch, until=until)
            )
            return epoch if taken.rowcount == 1 else None

    def release(self, name: str, owner: str) -> None:
        """Give a lease back before it ends, if this owner still holds it; the next holder gets the next epoch."""
        with self._engine.begin() as connection:
            mine = sa.update(_lease).where(_lease.c.name == name, _lease.c.owner == owner)
            connection.execute(mine.values(owner="", until=self._clock()))

    @staticmethod
    def end_all(connection: Connection) -> None:
        """Nobody holds any lease of this database: it was restored. The next holders get the next epochs."""
        connection.execute(sa.update(_lease).values(owner="", until=0))

    @staticmethod
    def fence(connection: Connection, name: str, epoch: int) -> None:
        """LeaseLost unless the lease still has this epoch, in the transaction of the caller, until that ends.

        The row is locked where the database locks rows: nobody takes the lease over between this look and COMMIT.
        """
        chosen = sa.select(_lease.c.epoch).where(_lease.c.name == name).with_for_update(read=True)
        current = connection.execute(chosen).scalar()
        if current != epoch:
            raise LeaseLost(f"lease {name} moved on to epoch {current}")


class ApprovalDamaged(Exception):
    """The row of an approval request was changed outside the service."""


class CounterMoved(Exception):
    """Another transaction began the counter of the same authenticator first."""


@dataclass(frozen=True, slots=True)
class StoredApproval:
    """A request that waits for approvals, and those it has: name -> signature (hex)."""

    id: str
    tenant: str | None
    content: str
    state: str
    approvals: Mapping[str, str]
    created_at: int


class ApprovalRows:
    """Requests for approval. Each row is under a MAC; `key` gives a region's MAC key, `region` is that of this node."""

    _LABEL: Final = b"skms/row/approval/1\0"

    def __init__(self, engine: Engine, *, key: Callable[[str], bytes], region: str) -> None:
        self._engine, self._key, self._region = engine, key, region

    def get(self, approval_id: str) -> StoredApproval | None:
        """One request; ApprovalDamaged."""
        with self._engine.execution_options(reading=True).connect() as connection:
            row = connection.execute(sa.select(_approval).where(_approval.c.id == approval_id)).mappings().first()
        return None if row is None else self._checked(row)

    def list(self, tenant: str | None, *, limit: int = 200) -> list[StoredApproval]:
        """Those of a tenant, or all (None), newest first; ApprovalDamaged."""
        chosen = sa.select(_approval).order_by(_approval.c.created_at.desc(), _approval.c.id).limit(limit)
        if tenant is not None:
            chosen = chosen.where(_approval.c.tenant == tenant)
        with self._engine.execution_options(reading=True).connect() as connection:
            return [self._checked(row) for row in connection.execute(chosen).mappings()]

    def executed(self, about: str) -> Sequence[StoredApproval]:
        """Executed requests whose content has this piece of JSON; ApprovalDamaged."""
        chosen = sa.select(_approval).where(_approval.c.state == "executed", _approval.c.content.contains(about))
        with self._engine.execution_options(reading=True).connect() as connection:
            return [self._checked(row) for row in connection.execute(chosen).mappings()]

    def held(self, connection: Connection, approval_id: str) -> StoredApproval | None:
        """One request, which nobody else changes before the transaction of the caller ends; ApprovalDamaged."""
        chosen = sa.select(_approval).where(_approval.c.id == approval_id).with_for_update()
        row = connection.execute(chosen).mappings().first()
        return None if row is None else self._checked(row)

    def insert(self, connection: Connection, new: StoredApproval) -> None:
        """A new request, in the transaction of the caller."""
        connection.execute(sa.insert(_approval), [self._values(new)])

    def update(self, connection: Connection, changed: StoredApproval) -> None:
        """A request that the caller holds, in the same transaction."""
        connection.execute(sa.update(_approval).where(_approval.c.id == changed.id).values(self._values(changed)))

    def counter(self, connection: Connection | None, name: str) -> int:
        """How far an authenticator has counted, 0 at first; held for the transaction of the caller. ApprovalDamaged."""
        chosen = sa.select(_setting.c.value).where(_setting.c.name == name)
        if connection is None:
            with self._engine.execution_options(reading=True).connect() as reading:
                found = reading.execute(chosen).scalar()
        else:
            found = connection.execute(chosen.with_for_update()).scalar()
        if found is None:
            return 0
        try:
            region, count, mac = str(found).split(" ")
            right = hmac.compare_digest(self._counter_mac(region, name, count), mac)
        except ValueError:
            right = False
        if not right:
            raise ApprovalDamaged(f"the counter {name} was changed outside the service")
        return int(count)

    def count(self, connection: Connection, name: str, value: int, *, before: int) -> None:
        """How far it has counted now, in the transaction that read `before`; CounterMoved if another one came first."""
        text = f"{self._region} {value} {self._counter_mac(self._region, name, str(value))}"
        if before:  # its row is held
            Settings.put(connection, name, text)
            return
        try:  # there was no row to hold, so whoever else counts first must be noticed
            Settings.add(connection, name, text)
        except IntegrityError:
            raise CounterMoved(name) from None

    def _counter_mac(self, region: str, name: str, count: str) -> str:
        return hmac.digest(self._key(region), b"skms/row/counter/1\0" + f"{name} {count}".encode(), "sha256").hex()

    def _values(self, stored: StoredApproval) -> dict[str, Any]:
        values = dataclasses.asdict(stored) | {
            "approvals": json.dumps(dict(stored.approvals), sort_keys=True),
            "region": self._region,
        }
        return values | {"mac": self._mac(values)}

    def _mac(self, values: Mapping[str, Any]) -> bytes:
        text = json.dumps(dict(values), sort_keys=True)
        return hmac.digest(self._key(values["region"]), self._LABEL + text.encode(), "sha256")

    def _checked(self, row: sa.RowMapping) -> StoredApproval:
        values = {str(n): v for n, v in row.items() if n != "mac"}
        if not hmac.compare_digest(self._mac(values), row["mac"]):
            raise ApprovalDamaged(f"approval {row['id']} was changed outside the service")
        del values["region"]
        return StoredApproval(**values | {"approvals": json.loads(row["approvals"])})


class AppliedDamaged(Exception):
    """What is stored about the applied bundle was changed outside the service, or went missing; the message says what."""


class AppliedMoved(Exception):
    """Another bundle was applied meanwhile."""


@dataclass(frozen=True, slots=True)
class Applied:
    """A bundle that a quorum put in force: `digest` names it and `content` its files, `replaces` what was in force before.

    A release with another schema gives the same files another digest; `content` stays.
    """

    digest: str
    version: int
    content: str
    replaces: str
    approval: str  # id of the request
    request: str  # digest of the request: what was signed
    signers: tuple[str, ...]
    at: int


class AppliedRows:
    """Which bundle a quorum put in force last: one setting under a MAC. `key` gives a region's MAC key.

    The file `mark` remembers the newest version outside the database, where nobody takes the setting away unnoticed.
    """

    _LABEL: Final = b"skms/row/policy/1\0"
    _NAME: Final = "policy-applied"

    def __init__(self, engine: Engine, *, key: Callable[[str], bytes], region: str, mark: Path) -> None:
        self._settings, self._key, self._region, self._mark = Settings(engine), key, region, Mark(mark)

    @classmethod
    def named(cls, engine: Engine) -> Applied | None:
        """What the setting says, not verified: no HSM has given a key yet. AppliedDamaged if it says nothing sensible."""
        text = Settings(engine).get(cls._NAME)
        return None if text is None else cls._parsed(text)[0]

    def get(self) -> Applied | None:
        """The applied bundle, None as long as none was; AppliedDamaged."""
        text = self._settings.get(self._NAME)
        applied = None if text is None else self._checked(text)
        named = 0 if applied is None else applied.version
        if named < (marked := self._marked()):
            raise AppliedDamaged(
                f"version {marked} was applied here, and the database names {named or 'none'}: restore the database, or "
                f"remove {self._mark.path} if it was set back on purpose"
            )
        return applied

    def remember(self, applied: Applied) -> None:
        """From now on an earlier version, or none, is AppliedDamaged on this node."""
        self._mark.rise(applied.version)

    def _marked(self) -> int:
        try:
            return self._mark.value()
        except MarkDamaged as damaged:
            raise AppliedDamaged(str(damaged)) from None

    def put(self, connection: Connection, new: Applied, *, after: Applied | None) -> None:
        """The next one, in the transaction of the caller; AppliedMoved unless `after` is what stands there."""
        text = self._written(new)
        if after is None:
            try:
                Settings.add(connection, self._NAME, text)
            except IntegrityError:
                raise AppliedMoved("another bundle was applied meanwhile") from None
            return
        stands = Settings.value(connection, self._NAME)
        if stands is None or self._checked(stands) != after:
            raise AppliedMoved("another bundle was applied meanwhile")
        same = sa.and_(_setting.c.name == self._NAME, _setting.c.value == stands)
        if connection.execute(sa.update(_setting).where(same).values(value=text)).rowcount != 1:
            raise AppliedMoved("another bundle was applied meanwhile")

    def stands(self, connection: Connection) -> bool:
        """Whether one was applied, in the transaction of the caller."""
        return Settings.value(connection, self._NAME) is not None

    def _written(self, applied: Applied) -> str:
        values = {**dataclasses.asdict(applied), "signers": list(applied.signers), "region": self._region}
        return json.dumps(values | {"mac": self._mac(values)}, sort_keys=True)

    def _mac(self, values: Mapping[str, Any]) -> str:
        text = json.dumps(dict(values), sort_keys=True)
        return hmac.digest(self._key(values["region"]), self._LABEL + text.encode(), "sha256").hex()

    def _checked(self, text: str) -> Applied:
        applied, values, mac = self._parsed(text)
        if not hmac.compare_digest(self._mac(values), mac):
            raise AppliedDamaged("the setting policy-applied was changed outside the service")
        return applied

    @staticmethod
    def _parsed(text: str) -> tuple[Applied, dict[str, Any], str]:
        try:
            values = json.loads(text)
            mac = str(values.pop("mac"))
            facts = {n: v for n, v in values.items() if n != "region"}
            return Applied(**{**facts, "signers": tuple(facts["signers"])}), values, mac
        except (ValueError, TypeError, KeyError, AttributeError):
            raise AppliedDamaged("the setting policy-applied is not what the service wrote") from None


class NoSuchOperation(Exception):
    """No long-running operation has this id."""


class OperationMoved(Exception):
    """The operation is no longer at the step it was seen at: somebody ended it, or another worker went on with it."""


@dataclass(frozen=True, slots=True)
class Operation:
    """A long-running operation and where it stands. `parameters` never change, `position` is its job's own."""

    id: str
    kind: str
    state: str
    step: str
    parameters: Mapping[str, Any]
    position: Mapping[str, Any]
    done: int
    total: int
    outcome: Mapping[str, Any]
    created_at: int
    updated_at: int


class Operations:
    """Long-running operations: each is moved on by one worker at a time, and by any after that one died."""

    def __init__(self, engine: Engine, *, clock: Callable[[], int]) -> None:
        self._engine, self._clock = engine, clock

    def get(self, operation_id: str) -> Operation:
        """One operation; NoSuchOperation."""
        found = self._select(_operation.c.id == operation_id)
        if not found:
            raise NoSuchOperation(f"no operation {operation_id}")
        return found[0]

    def find(self, *, kind: str, state: str | None = None, limit: int = 100) -> list[Operation]:
        """Operations of a kind, newest first."""
        wanted = _operation.c.kind == kind
        return self._select(wanted if state is None else wanted & (_operation.c.state == state), limit=limit)

    def running(self, connection: Connection, kind: str) -> list[Operation]:
        """Those that run, as a transaction sees them."""
        wanted = sa.select(_operation).where(_operation.c.kind == kind, _operation.c.state == "running")
        return [_operation_of(row) for row in connection.execute(wanted).mappings()]

    def _select(self, wanted: sa.ColumnElement[bool], *, limit: int = 1) -> list[Operation]:
        chosen = sa.select(_operation).where(wanted).order_by(_operation.c.created_at.desc()).limit(limit)
        with self._engine.execution_options(reading=True).connect() as connection:
            return [_operation_of(row) for row in connection.execute(chosen).mappings()]

    def insert(self, connection: Connection, operation: Operation) -> None:
        """A new operation."""
        connection.execute(sa.insert(_operation), [_operation_values(operation)])

    def move(self, connection: Connection, seen: Operation, **changes: Any) -> Operation:
        """The operation with changes, if it still runs at the step and position it was seen at; else OperationMoved."""
        moved = dataclasses.replace(seen, updated_at=self._clock(), **changes)
        there = (_operation.c.id == seen.id) & (_operation.c.state == seen.state) & (_operation.c.step == seen.step)
        values = {k: v for k, v in _operation_values(moved).items() if k not in {"id", "parameters", "created_at"}}
        if connection.execute(sa.update(_operation).where(there).values(values)).rowcount != 1:
            raise OperationMoved(f"operation {seen.id} is not at step {seen.step} any more")
        return moved

    def save(self, seen: Operation, lease: tuple[str, int], **changes: Any) -> Operation:
        """As `move`, in a transaction of its own, by the holder of a lease; LeaseLost if that is another by now."""
        with self._engine.begin() as connection:
            Lease.fence(connection, *lease)
            return self.move(connection, seen, **changes)


def _operation_values(operation: Operation) -> dict[str, Any]:
    values = {f.name: getattr(operation, f.name) for f in dataclasses.fields(operation)}
    return values | {n: json.dumps(dict(values[n])) for n in ("parameters", "position", "outcome")}


def _operation_of(row: Any) -> Operation:
    return Operation(**{**row, **{n: json.loads(row[n]) for n in ("parameters", "position", "outcome")}})
