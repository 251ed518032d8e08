"""A keystore on a real database over a small HSM in memory, for the tests of this folder."""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import (
    InvalidUnwrap,
    aes_key_unwrap_with_padding,
    aes_key_wrap_with_padding,
)

from keystore import (
    EXTERNAL,
    Catalog,
    HsmStatus,
    HsmUnavailable,
    Import,
    Imports,
    InputRefused,
    InvalidCiphertext,
    Key,
    KeySpec,
    Keystore,
    NewKey,
    Parameters,
    Plan,
    Rotation,
    RowDamaged,
    Sealed,
    Wrapping,
)
from keystore.catalog import tables
from keystore.hsm import Material, OaepHash, SignScheme, StoredKey, Wrapped
from vectors import wrap_import

INSTALLATION = uuid.UUID(int=7)
ROOT_KEK = uuid.uuid5(INSTALLATION, "skms/root-kek/1")  # as real tokens: one name in every region
_SIZES = {
    Material.KDK_512: 64,
    Material.KDK_256: 32,
    Material.AES_256: 32,
    Material.HMAC_256: 32,
    Material.HMAC_512: 64,
}
_CURVES = {Material.EC_P256: ec.SECP256R1(), Material.EC_P384: ec.SECP384R1()}


def _private_numbers(private: Any) -> list[bytes]:
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return [private.private_bytes_raw()]
    numbers = private.private_numbers()
    elliptic = isinstance(private, ec.EllipticCurvePrivateKey)
    found = [numbers.private_value] if elliptic else [numbers.p, numbers.q, numbers.d]
    return [n.to_bytes((n.bit_length() + 7) // 8, "big") for n in found]


@dataclass
class TestHsm:
    """The contract of `keystore.hsm.Hsm` with real cryptography, and with everything a test wants to see.

    `secrets` holds every clear key it ever made, `hidden` what of these must be nowhere else (no public half);
    `calls` counts; `cached` is what a token would hold unwrapped.
    """

    __test__ = False
    region: str = "eu-de-1"
    online: bool = True
    fast: bool = True
    iv: bytes | None = None  # what the token writes as IV; None = random
    oaep: frozenset[OaepHash] = frozenset(OaepHash)
    lacks: dict[Material, str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    secrets: list[bytes] = field(default_factory=list)
    hidden: list[bytes] = field(default_factory=list)
    cached: dict[uuid.UUID, bytes] = field(default_factory=dict)
    forgotten: list[uuid.UUID] = field(default_factory=list)
    checked: set[tuple[bytes, bytes]] = field(default_factory=set)
    next_secret: bytes | None = None
    pairs: dict[Material, bytes] = field(default_factory=dict)  # transport keys, made once: they take seconds

    def __post_init__(self) -> None:
        self.root, self.row_key, self.kek = os.urandom(32), os.urandom(32), ROOT_KEK
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return f"hsm-{self.region}"

    @property
    def state(self) -> str:
        return "UP" if self.online else "DOWN"

    def _called(self, what: str) -> None:
        if not self.online:
            raise HsmUnavailable("offline")
        with self._lock:
            self.calls[what] += 1

    def missing(self, material: Material) -> str | None:
        return self.lacks.get(material)

    def use_root(self, version: int) -> None:
        self._called("use_root")

    def generate(self, material: Material, object_id: uuid.UUID) -> Wrapped:
        self._called("generate")
        public = b""
        if material in _SIZES:
            clear = self.next_secret or os.urandom(_SIZES[material])
            self.hidden.append(clear)
        else:
            known = self.pairs.get(material)
            private = self._pair(material) if known is None else serialization.load_der_private_key(known, None)
            self.hidden += _private_numbers(private)
            clear = private.private_bytes(
                serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            public = private.public_key().public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        self.secrets.append(clear)
        return Wrapped(aes_key_wrap_with_padding(self.root, clear), "AES_KEY_WRAP_KWP", self.kek, public)

    def _pair(self, material: Material) -> Any:
        if material in _CURVES:
            return ec.generate_private_key(_CURVES[material])
        if material is Material.ED25519:
            return ed25519.Ed25519PrivateKey.generate()
        return rsa.generate_private_key(
            65_537, 3_072 if material in {Material.RSA_3072, Material.TRANSPORT_RSA_3072} else 4_096
        )

    def opens(self, oaep: OaepHash) -> bool:
        return oaep in self.oaep

    def admit_wrapped(
        self,
        transport: StoredKey,
        oaep: OaepHash,
        wrapped: bytes,
        material: Material,
        object_id: uuid.UUID,
        *,
        inner: bytes | None,
        public: bytes,
    ) -> Wrapped:
        self._called("admit_wrapped")
        algorithm = hashes.SHA1() if oaep is OaepHash.SHA_1 else hashes.SHA256()
        private = serialization.load_der_private_key(self._clear(transport), None)
        assert isinstance(private, rsa.RSAPrivateKey)
        try:
            clear = private.decrypt(wrapped, padding.OAEP(padding.MGF1(algorithm), algorithm, None))
            clear = clear if inner is None else aes_key_unwrap_with_padding(clear, inner)
        except (ValueError, InvalidUnwrap):
            raise InvalidCiphertext from None
        return self._admitted(material, clear)

    def admit_clear(self, material: Material, clear: bytes, object_id: uuid.UUID, *, public: bytes) -> Wrapped:
        self._called("admit_clear")
        return self._admitted(material, clear)

    def _admitted(self, material: Material, clear: bytes) -> Wrapped:
        if material in _SIZES and len(clear) != _SIZES[material]:
            raise InputRefused("/wrapped_key", "wrong_length", "")
        self.hidden.append(clear)
        return Wrapped(aes_key_wrap_with_padding(self.root, clear), "AES_KEY_WRAP_KWP", self.kek)

    def row_mac(self, data: bytes) -> bytes:
        self._called("row_mac")
        return hmac.digest(self.row_key, data, "sha256")

    def check_row(self, binding: bytes, mac: bytes) -> None:
        if (binding, mac) in self.checked:
            return
        self._called("check_row")
        if not hmac.compare_digest(hmac.digest(self.row_key, binding, "sha256"), mac):
            raise RowDamaged("row MAC")
        self.checked.add((binding, mac))

    def _clear(self, key: StoredKey) -> bytes:
        if key.object_id not in self.cached:
            self.check_row(key.binding, key.mac)
            self._called("unwrap")
            self.cached[key.object_id] = aes_key_unwrap_with_padding(self.root, key.blob)
        return self.cached[key.object_id]

    def hmac(self, key: StoredKey, algorithm: str, data: bytes) -> bytes:
        self._called("hmac")
        return hmac.digest(self._clear(key), data, algorithm)

    def gcm_seal(self, key: StoredKey, aad: bytes, data: bytes) -> tuple[bytes, bytes]:
        self._called("gcm_seal")
        iv = os.urandom(12) if self.iv is None else self.iv
        return iv, AESGCM(self._clear(key)).encrypt(iv, data, aad)

    def gcm_open(self, key: StoredKey, iv: bytes, aad: bytes, data: bytes) -> bytes:
        self._called("gcm_open")
        try:
            return AESGCM(self._clear(key)).decrypt(iv, data, aad)
        except InvalidTag:
            raise InvalidCiphertext from None

    def sign(self, key: StoredKey, scheme: SignScheme, data: bytes) -> bytes:
        self._called("sign")
        private = serialization.load_der_private_key(self._clear(key), None)
        if isinstance(private, ed25519.Ed25519PrivateKey):
            return private.sign(data)
        algorithm = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}[scheme[-3:]]
        if isinstance(private, ec.EllipticCurvePrivateKey):
            half = (private.key_size + 7) // 8
            r, s = utils.decode_dss_signature(private.sign(data, ec.ECDSA(utils.Prehashed(algorithm))))
            return r.to_bytes(half, "big") + s.to_bytes(half, "big")
        assert isinstance(private, rsa.RSAPrivateKey)
        pss = padding.PSS(padding.MGF1(algorithm), algorithm.digest_size)
        return private.sign(data, pss if "PSS" in scheme else padding.PKCS1v15(), utils.Prehashed(algorithm))

    def random(self, length: int) -> bytes:
        self._called("random")
        return os.urandom(length)

    def audit_public_key(self) -> bytes:
        raise NotImplementedError

    def audit_sign(self, statement: bytes) -> bytes:
        raise NotImplementedError

    def forget(self, object_id: uuid.UUID) -> None:
        self.forgotten.append(object_id)
        self.cached.pop(object_id, None)

    def canary(self) -> None:
        self._called("canary")

    def status(self) -> HsmStatus:
        up = "UP" if self.online else "DOWN"
        return HsmStatus(self.name, self.region, "memory", up, "", "", "", self.kek, 1, 0, 0, 0, (), (), ())

    def close(self) -> None: ...


@dataclass
class Clock:
    """Microseconds, moved by the test."""

    at: int = 1_800_000_000_000_000

    def __call__(self) -> int:
        self.at += 1
        return self.at

    def days(self, days: float) -> None:
        self.at += int(days * 86_400_000_000)


class Lab:
    """One database; keystores of several workers over it; what a test does with them."""

    def __init__(self, url: str, *, regions: tuple[str, ...] = ("eu-de-1",)) -> None:
        self.url = url
        self.hsms = {region: TestHsm(region) for region in regions}
        self.clock = Clock()
        self.random: Callable[[int], bytes] = os.urandom
        self.engines: list[sa.Engine] = []
        self.engine = self._open()
        tables.create_all(self.engine)
        self.catalog = Catalog(self.engine)
        self.reopen()

    def reopen(self) -> None:
        """The first worker anew, over the HSMs as they are now."""
        self.store = self.worker()
        self.imports = Imports(self.store, self.catalog)

    def _draw(self, length: int) -> bytes:
        return self.random(length)  # a test may exchange it later

    def _open(self) -> sa.Engine:
        waits = {"timeout": 60} if self.url.startswith("sqlite") else {}  # for a lock, on a busy machine
        engine = sa.create_engine(self.url, connect_args=waits)
        if engine.dialect.name == "sqlite":

            @sa.event.listens_for(engine, "connect")
            def _wal(connection: Any, _: Any) -> None:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = OFF")  # a test's disk may forget; the product's may not

        self.engines.append(engine)
        return engine

    @property
    def hsm(self) -> TestHsm:
        return next(iter(self.hsms.values()))

    def worker(self, *, hsms: dict[str, TestHsm] | None = None) -> Keystore:
        """Another process: its own connections and caches, and its own sessions at the same tokens."""
        return Keystore(
            Catalog(self._open()),
            self.hsms if hsms is None else hsms,
            installation=INSTALLATION,
            clock=self.clock,
            random=self._draw,
        )

    def apply(self, plan: Plan, *, told: bool = True) -> Key:
        """Commit a plan as the log's commit thread does; `told` = this process hears of it."""
        with self.engine.begin() as connection:
            plan.write(connection)
        if told:
            plan.applied()
        assert plan.key is not None
        return plan.key

    def new(self, spec: KeySpec = KeySpec.AES_256, *, alias: str | None = None, **facts: Any) -> Key:
        return self.apply(self.store.plan_create(new_key(spec, **facts), alias=alias))

    def wrapped(
        self, key: Key, material: bytes, wrapping: str = "RSA_AES_KEY_WRAP_SHA_256", **facts: Any
    ) -> tuple[Parameters, Import]:
        """Import parameters of a key, and the import that a customer makes of them."""
        parameters, plan = self.imports.plan_parameters(key, Wrapping(wrapping), facts.pop("rsa", None))
        self.apply(plan)
        info = wrap_import.info(key.tenant, key.id.bytes, str(key.spec), parameters.expires_at // 1_000_000)
        sent = {
            "token": parameters.token,
            "wrapped": wrap_import.wrap(wrapping, parameters.public, material, info=info),
            "check_value": wrap_import.check_value(material),
        }
        if facts.get("public") is not None:
            sent["check_value"] = wrap_import.public_check_value(facts["public"])
        return parameters, Import(**{**sent, **facts})

    def import_into(self, key: Key, material: bytes, wrapping: str = "RSA_AES_KEY_WRAP_SHA_256", **facts: Any) -> Key:
        """Import material into a key."""
        return self.apply(self.imports.plan_import(key, self.wrapped(key, material, wrapping, **facts)[1]))

    def imported(
        self,
        spec: KeySpec = KeySpec.AES_256,
        material: bytes | None = None,
        *,
        expires_at: int | None = None,
        **facts: Any,
    ) -> Key:
        """A new key of imported material."""
        size = 64 if spec is KeySpec.HMAC_512 or facts.get("suite") == 1 else 32
        key = self.new(spec, origin=EXTERNAL, **facts)
        return self.import_into(key, material or os.urandom(size), expires_at=expires_at)

    def seal(self, key: Key, data: bytes = b"hello", context: dict[str, str] | None = None) -> Sealed:
        return self.store.seal(key, data, context or {})

    def sql(self, text: str, **values: Any) -> list[Any]:
        """What a database owner does behind the service's back; the epoch rises so that everyone reads again."""
        with self.engine.begin() as c:
            result = c.execute(sa.text(text), values)
            rows = list(result.all()) if result.returns_rows else []
            if not result.returns_rows:
                c.execute(sa.text("UPDATE keystore_epoch SET epoch = epoch + 1"))
        return rows

    def close(self) -> None:
        for engine in self.engines:
            engine.dispose()


def new_key(spec: KeySpec = KeySpec.AES_256, **facts: Any) -> NewKey:
    """A key that asks for nothing special."""
    home = facts.pop("home", "eu-de-1")
    places = frozenset({home})
    known: dict[str, Any] = {
        "tenant": "acme",
        "usage": None,
        "suite": None,
        "tier": 2,
        "home": home,
        "residency": places,
        "execution": places,
        "reach": places,
        "egress": places,
        "failover": frozenset(),
        "purposes": ("default",),
        "description": "",
        "tags": {},
        "rotation": Rotation(),
    }
    return NewKey.of(spec=spec, **(known | facts))


@contextmanager
def sqlite_lab(directory: Path, **options: Any) -> Iterator[Lab]:
    lab = Lab(f"sqlite:///{directory}/skms.db", **options)
    try:
        yield lab
    finally:
        lab.close()


def fingerprint(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
