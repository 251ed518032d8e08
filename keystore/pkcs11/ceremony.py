"""The ceremony that makes a token fit for an installation: root KEK, row-MAC key, audit key, self-test.

Idempotent: what is there is reported and left alone; what a crash left out is added.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import hmac
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keystore.hsm import HsmUnavailable, Material, RowDamaged
from keystore.pkcs11.binding import Module, Session, mechanism
from keystore.pkcs11.errors import CkError
from keystore.pkcs11.mechanisms import CKK, CKM, CKO, A, pair_at_birth, root_kek, row_mac_key, unused
from keystore.pkcs11.officer import CeremonyRefused
from keystore.pkcs11.sessions import TokenSessions
from keystore.pkcs11.token import AUDIT, MAX_ROOTS, ROOT, ROW_MAC, Pkcs11Hsm, TokenConfig, connect
from keystore.pkcs11.transcript import Fact, Transcript
from keystore.pkcs11.vendors import Vendor

_CLASS_OF: Final = {ROOT: CKO.SECRET_KEY, ROW_MAC: CKO.SECRET_KEY, AUDIT: CKO.PRIVATE_KEY}
_SHOWN: Final = (
    *("TOKEN", "PRIVATE", "SENSITIVE", "EXTRACTABLE", "WRAP_WITH_TRUSTED", "MODIFIABLE"),
    *("ENCRYPT", "DECRYPT", "WRAP", "UNWRAP", "SIGN", "VERIFY", "DERIVE"),
)


@dataclass(frozen=True, slots=True)
class CeremonyReport:
    """What stands on the token now. Nothing in it is secret."""

    hsm: str
    region: str
    token_label: str
    token_serial: str
    installation: str
    root_kek: str
    audit_algorithm: str
    audit_public_key: str  # hex of the SubjectPublicKeyInfo
    created: tuple[str, ...]
    existing: tuple[str, ...]
    specs: tuple[str, ...]
    missing: tuple[tuple[str, str], ...]


@contextlib.contextmanager
def one_ceremony(directory: Path) -> Iterator[None]:
    """Exclusive among the ceremonies of a node; CeremonyRefused while another runs."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (directory / "ceremony.lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CeremonyRefused("another ceremony runs on this node: wait until it has ended") from None
        yield


@dataclass(frozen=True, slots=True)
class Station:
    """One token in a ceremony: what may be asked and done there."""

    config: TokenConfig
    sessions: TokenSessions

    @classmethod
    def at(cls, config: TokenConfig, loaded: Module | None = None) -> Station:
        """Connect to the token; HsmUnavailable with the reason."""
        return cls(config, connect(config, loaded))

    @property
    def session(self) -> Session:
        """The logged-in session; ceremonies are done by one thread."""
        return self.sessions.home

    @property
    def vendor(self) -> Vendor:
        """The token's profile."""
        return self.config.profile()

    def describe(self) -> dict[str, Fact]:
        """The token as a transcript names it."""
        return {
            "hsm": self.config.name,
            "region": self.config.region,
            "vendor": self.config.vendor,
            "label": self.config.token_label,
            "serial": self.sessions.serial,
            "firmware": self.sessions.firmware,
            "waivers": list(self.vendor.waivers),
        }

    def all_with(self, object_id: uuid.UUID, object_class: int | None = None) -> list[int]:
        """Every token object with this CKA_ID."""
        wanted: dict[int, Any] = {A.ID: object_id.bytes, A.TOKEN: True}
        if object_class is not None:
            wanted[A.CLASS] = object_class
        return self.session.find(wanted, 16)

    def find(self, role: str, version: int = 1) -> int | None:
        """The installation's key of a role; HsmUnavailable if there is more than one."""
        found = self.all_with(self.config.object_id(role, version), _CLASS_OF[role])
        if len(found) > 1:
            raise HsmUnavailable(
                f"token {self.config.token_label!r} holds more than one {role} key of this installation: "
                "remove all but one"
            )
        return found[0] if found else None

    def roots(self) -> dict[int, int]:
        """(version -> handle) of the region's root KEKs on the token."""
        wanted = {A.CLASS: CKO.SECRET_KEY, A.KEY_TYPE: CKK.AES, A.TOKEN: True, A.WRAP: True, A.UNWRAP: True}
        found: dict[int, int] = {}
        for handle in self.session.find(wanted, MAX_ROOTS):
            with contextlib.suppress(ValueError, RowDamaged):  # another installation's, or no id of ours at all
                version = self.config.root_version(uuid.UUID(bytes=self.session.get(handle, A.ID, 256)))
                if version in found:
                    raise HsmUnavailable(
                        f"token {self.config.token_label!r} holds root KEK version {version} twice: remove one"
                    )
                found[version] = handle
        return dict(sorted(found.items()))

    def flag(self, handle: int, number: int) -> bool | None:
        """A boolean attribute; None if the token does not show it."""
        try:
            return self.session.get(handle, number, 8) == b"\1"
        except CkError:
            return None

    def attributes(self, handle: int) -> dict[str, Fact]:
        """The object's flags as the token reads them back."""
        shown = {name: self.flag(handle, getattr(A, name)) for name in _SHOWN}
        return {name: value for name, value in shown.items() if value is not None}

    def check_value(self, role: str, handle: int) -> str:
        """Sixteen hex digits that are equal exactly for equal keys, and say nothing else about them.

        Of the row-MAC key, an HMAC of a fixed text; of a root KEK, a hash of a published key wrapped under it.
        """
        if role == ROW_MAC:
            made = self.session.sign(handle, mechanism(CKM.SHA256_HMAC), b"skms/check-value/1", 64)
            return made[:8].hex()
        known: dict[int, Any] = {
            A.CLASS: CKO.SECRET_KEY,
            A.KEY_TYPE: CKK.AES,
            A.TOKEN: False,
            A.PRIVATE: True,
            A.SENSITIVE: False,
            A.EXTRACTABLE: True,
            **unused(Material.AES_256),
            A.VALUE: bytes(range(32)),
        }
        published = self.session.create(known)
        try:
            wrapped = self.session.wrap(mechanism(self.vendor.kwp), handle, published)
        finally:
            self.session.destroy(published)
        return hashlib.sha256(wrapped).hexdigest()[:16]

    def shown(self, role: str, handle: int, version: int = 1) -> dict[str, Fact]:
        """One of the installation's secret keys as a transcript names it."""
        return {
            "object": f"{role}/{version}",
            "cka_id": str(self.config.object_id(role, version)),
            "check_value": self.check_value(role, handle),
            "attributes": self.attributes(handle),
        }


def make_root(station: Station, version: int, *, sealed: bool = False) -> int:
    """A new root KEK of the region."""
    config = station.config
    wanted = root_kek(config.object_id(ROOT, version), config.label(ROOT, version), sealed=sealed)
    return station.session.generate(mechanism(CKM.AES_KEY_GEN), wanted)


def make_row_mac(station: Station, *, sealed: bool = False) -> int:
    """The installation's row-MAC key."""
    config = station.config
    wanted = row_mac_key(config.object_id(ROW_MAC), config.label(ROW_MAC), sealed=sealed)
    return station.session.generate(mechanism(CKM.GENERIC_SECRET_KEY_GEN), wanted)


def make_audit(station: Station, hsm: Pkcs11Hsm) -> int:
    """The token's own audit key: Ed25519 where the token has it, else P-256."""
    config = station.config
    edwards = hsm.lists(CKM.EC_EDWARDS_KEY_PAIR_GEN, CKM.EDDSA)
    material = Material.ED25519 if edwards else Material.EC_P256
    how = mechanism(CKM.EC_EDWARDS_KEY_PAIR_GEN if edwards else CKM.EC_KEY_PAIR_GEN)
    templates = pair_at_birth(material, config.object_id(AUDIT), station.vendor, token=True, label=config.label(AUDIT))
    return station.session.generate_pair(how, *templates)[1]


def trust_line(public: bytes) -> str:
    """An audit key as a line of `trust.txt`, which `skms-verify` reads."""
    return f"key {base64.b64encode(public).decode()}"


def about(config: TokenConfig) -> dict[str, Fact]:
    """What a transcript says of the installation."""
    return {"installation": str(config.installation), "region": config.region}


def initialise(
    config: TokenConfig,
    loaded: Module | None = None,
    *,
    sealed: bool = False,
    transcript: Transcript | None = None,
) -> CeremonyReport:
    """Create what is missing, run the self-test, report. HsmUnavailable or SelfTestFailed with the reason.

    `sealed` makes a root KEK and a row-MAC key that can never be transferred: no second token, no backup token, no
    change of vendor; what is wrapped under them is lost with the token.
    """
    if transcript is None:
        transcript = Transcript("init", about(config), lambda: time.time_ns() // 1_000)
    with one_ceremony(config.lock_dir):
        station = Station.at(config, loaded)
        hsm = Pkcs11Hsm(config, station.sessions)
        created, existing = [], []
        transcript.add("token", **station.describe())
        try:
            roots = station.roots()
            for role in (ROOT, ROW_MAC, AUDIT):
                if roots if role == ROOT else station.find(role) is not None:
                    existing.append(role)
                    continue
                if role == ROOT:
                    make_root(station, 1, sealed=sealed)
                elif role == ROW_MAC:
                    make_row_mac(station, sealed=sealed)
                else:
                    make_audit(station, hsm)
                created.append(role)
            note_keys(station, transcript, [f"{role}/1" for role in created])
            hsm.use_root(max(station.roots()))
            public = tested(hsm, transcript)
            status = hsm.status()
        finally:
            hsm.close()
    return CeremonyReport(
        hsm=config.name,
        region=config.region,
        token_label=config.token_label,
        token_serial=status.token_serial,
        installation=str(config.installation),
        root_kek=str(status.root_kek),
        audit_algorithm="Ed25519" if len(public) == 44 else "ECDSA P-256",
        audit_public_key=public.hex(),
        created=tuple(created),
        existing=tuple(existing),
        specs=status.specs,
        missing=status.missing,
    )


def held(config: TokenConfig) -> tuple[str, ...]:
    """Which of the installation's keys a token holds, by role; changes nothing. HsmUnavailable with the reason."""
    station = Station.at(config)
    try:
        return tuple(
            role
            for role in (ROOT, ROW_MAC, AUDIT)
            if (station.roots() if role == ROOT else station.find(role) is not None)
        )
    finally:
        station.sessions.close()


def note_keys(station: Station, transcript: Transcript, created: list[str]) -> None:
    """Note the installation's secret keys on the token, as they read back."""
    for version, handle in station.roots().items():
        facts = station.shown(ROOT, handle, version)
        transcript.add("key", hsm=station.config.name, made_now=f"{ROOT}/{version}" in created, **facts)
    if (row_mac := station.find(ROW_MAC)) is not None:
        facts = station.shown(ROW_MAC, row_mac)
        transcript.add("key", hsm=station.config.name, made_now=f"{ROW_MAC}/1" in created, **facts)


def tested(hsm: Pkcs11Hsm, transcript: Transcript) -> bytes:
    """Run self-test and canary; the audit public key (DER). SelfTestFailed with the rule that is broken."""
    hsm.check()
    hsm.canary()
    public = hsm.audit_public_key()
    transcript.add(
        "self-test",
        hsm=hsm.name,
        result="passed",
        waived=list(hsm.status().waivers),
        audit_public_key=trust_line(public),
    )
    return public


def same(one: bytes, other: bytes) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(one, other)
