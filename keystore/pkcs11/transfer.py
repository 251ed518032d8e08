"""Bring an installation's root KEKs and row-MAC key to another token, of the same vendor or another.

The keys travel wrapped under an RSA key that the receiving token made and never lets out. The sending token wraps them
only under a key that its security officer declared trusted, so that whoever merely has the user PIN cannot send them
to a key pair of his own: this is tried first, and the transfer stops if the token allows it. On the receiving token a
key first is a session object; only when it was shown to be the same key does it become a token object, with every flag
said. Rows need no change.

Each step can be repeated: what is there is compared and kept, what a crash left behind is removed by the next run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from keystore.hsm import Material
from keystore.pkcs11.binding import Session, mechanism, oaep
from keystore.pkcs11.ceremony import Station, make_audit, note_keys, one_ceremony, same, tested
from keystore.pkcs11.errors import CkError
from keystore.pkcs11.mechanisms import (
    CKM,
    OAEP,
    A,
    at_birth,
    in_use,
    root_kek,
    row_mac_key,
    transport_pair,
    transport_public,
)
from keystore.pkcs11.officer import CeremonyRefused, Order, trust
from keystore.pkcs11.token import AUDIT, ROOT, ROW_MAC, Pkcs11Hsm, TokenConfig
from keystore.pkcs11.transcript import Transcript

TRANSPORT: Final = "transport"


@dataclass(frozen=True, slots=True)
class JoinReport:
    """What stands on the token that joined. Nothing in it is secret."""

    hsm: str
    token_label: str
    token_serial: str
    roots: tuple[int, ...]  # versions
    moved: tuple[str, ...]
    existing: tuple[str, ...]
    audit_public_key: str  # hex of the SubjectPublicKeyInfo


def join(source: TokenConfig, target: TokenConfig, *, so_pin_file: Path | None, transcript: Transcript) -> JoinReport:
    """Give `target` the keys that `source` holds for their region, and an audit key of its own.

    CeremonyRefused, HsmUnavailable or SelfTestFailed with the reason; a repeated call goes on where it stopped.
    """
    _kin(source, target)
    with one_ceremony(target.lock_dir):
        sender, receiver = Station.at(source), Station.at(target)
        if sender.sessions.serial == receiver.sessions.serial and source.module == target.module:
            raise CeremonyRefused(f"{source.name} and {target.name} are the same token: name two")
        transcript.add("sender", **sender.describe())
        transcript.add("receiver", **receiver.describe())
        hsm = Pkcs11Hsm(target, receiver.sessions)
        try:
            moved, existing = _transfer(sender, receiver, so_pin_file, transcript)
            if receiver.find(AUDIT) is None:
                make_audit(receiver, hsm)
                moved.append(AUDIT)
            note_keys(receiver, transcript, moved)
            roots = tuple(receiver.roots())
            hsm.use_root(max(roots))
            public = tested(hsm, transcript)
        except CkError as error:
            raise CeremonyRefused(f"transfer from {source.name} to {target.name}: {error}") from error
        finally:
            hsm.close()
            sender.sessions.close()
        transcript.add("joined", hsm=target.name)
    return JoinReport(
        hsm=target.name,
        token_label=target.token_label,
        token_serial=receiver.sessions.serial,
        roots=roots,
        moved=tuple(moved),
        existing=tuple(existing),
        audit_public_key=public.hex(),
    )


def _kin(source: TokenConfig, target: TokenConfig) -> None:
    if source.installation != target.installation:
        raise CeremonyRefused(f"{source.name} and {target.name} belong to two installations")
    if source.region != target.region:
        raise CeremonyRefused(
            f"{source.name} stands in {source.region} and {target.name} in {target.region}: "
            "a root KEK never leaves its region"
        )


def _transfer(
    sender: Station, receiver: Station, so_pin_file: Path | None, transcript: Transcript
) -> tuple[list[str], list[str]]:
    """Compare what both have, move what is missing: (moved, already there)."""
    here = [(ROOT, version, handle) for version, handle in sender.roots().items()]
    mac = sender.find(ROW_MAC)
    if not here or mac is None:
        raise CeremonyRefused(
            f"token {sender.config.token_label!r} holds no root KEK or no row-MAC key of this installation: "
            "run `skms hsm init` on the first token of the region"
        )
    wanted = [*here, (ROW_MAC, 1, mac)]
    there = {(ROOT, version): handle for version, handle in receiver.roots().items()}
    if (held := receiver.find(ROW_MAC)) is not None:
        there[ROW_MAC, 1] = held
    moved, existing, missing = [], [], []
    for role, version, handle in wanted:
        if (role, version) in there:
            prove_same(sender, receiver, role, handle, there[role, version])
            transcript.add("same-key", object=f"{role}/{version}", hsm=receiver.config.name)
            existing.append(f"{role}/{version}")
        else:
            missing.append((role, version, handle))
    clean(sender, receiver)
    if missing:
        for role, version, handle in missing:
            _transferable(sender, role, version, handle)
        with transport(sender, receiver, so_pin_file, transcript) as way:
            for role, version, handle in missing:
                way.carry(role, version, handle)
                transcript.add("transferred", object=f"{role}/{version}", hsm=receiver.config.name)
                moved.append(f"{role}/{version}")
    return moved, existing


def _transferable(sender: Station, role: str, version: int, handle: int) -> None:
    if sender.flag(handle, A.EXTRACTABLE):
        return
    raise CeremonyRefused(
        f"the {role} key (version {version}) on token {sender.config.token_label!r} is sealed: it was made not "
        "extractable and can never leave this token. To move, make a new installation without --sealed-root, create "
        "its keys anew and re-encrypt their data; until then this token has no backup"
    )


def prove_same(one: Station, other: Station, role: str, mine: int, theirs: int) -> None:
    """CeremonyRefused unless both handles are the same key; nothing of it is shown."""
    if role == ROW_MAC:
        nonce, how = os.urandom(32), mechanism(CKM.SHA256_HMAC)
        right = same(one.session.sign(mine, how, nonce, 64), other.session.sign(theirs, how, nonce, 64))
    else:
        right = _opens_the_same(one, other, mine, theirs)
    if not right:
        raise CeremonyRefused(
            f"token {other.config.token_label!r} holds another {role} key under the same CKA_ID than "
            f"{one.config.token_label!r}: it belongs to another ceremony; remove it, or use another token"
        )


def _opens_the_same(one: Station, other: Station, mine: int, theirs: int) -> bool:
    """A fresh key wrapped under one root unwraps under the other and computes the same HMAC."""
    how, nonce = mechanism(CKM.SHA256_HMAC), os.urandom(32)
    made = one.session.generate(mechanism(CKM.GENERIC_SECRET_KEY_GEN), at_birth(Material.HMAC_256, uuid.uuid4()))
    try:
        blob = one.session.wrap(mechanism(one.vendor.kwp), mine, made)
        right = one.session.sign(made, how, nonce, 64)
    finally:
        one.session.destroy(made)
    try:
        opened = other.session.unwrap(
            mechanism(other.vendor.kwp), theirs, blob, in_use(Material.HMAC_256, other.vendor)
        )
    except CkError:
        return False
    try:
        return same(other.session.sign(opened, how, nonce, 64), right)
    finally:
        other.session.destroy(opened)


# ---- the way between two tokens ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Way:
    """A public key on the sender, trusted there, and its private half on the receiver."""

    sender: Station
    receiver: Station
    public: int
    private: int
    how: tuple[int, int]  # OAEP's hash and MGF1

    def wrapped(self, handle: int) -> bytes:
        """A key of the sender, wrapped for the receiver alone."""
        return self.sender.session.wrap(oaep(CKM.RSA_PKCS_OAEP, *self.how), self.public, handle)

    def carry(self, role: str, version: int, handle: int) -> None:
        """Bring one key over: as a session object, compared, then as a token object with all its flags."""
        config, session = self.receiver.config, self.receiver.session
        make = root_kek if role == ROOT else row_mac_key
        wanted = make(config.object_id(role, version), config.label(role, version))
        blob = self.wrapped(handle)
        opened = unwrapped(session, self.private, self.how, blob, {**wanted, A.TOKEN: False})
        try:
            prove_same(self.sender, self.receiver, role, handle, opened)
            if self.receiver.vendor.seals_by == "copy":
                kept = session.copy(opened, {A.TOKEN: True, A.MODIFIABLE: False})
            else:
                kept = unwrapped(session, self.private, self.how, blob, wanted, modifiable=False)
        finally:
            session.destroy(opened)
        wrong = [
            hex(number)
            for number, value in wanted.items()
            if isinstance(value, bool) and self.receiver.flag(kept, number) not in {value, None}
        ]
        if wrong:
            session.destroy(kept)
            raise CeremonyRefused(
                f"token {config.token_label!r} made the {role} key with other flags than asked for: {', '.join(wrong)}"
            )


def unwrapped(
    session: Session,
    private: int,
    how: tuple[int, int],
    blob: bytes,
    wanted: dict[int, Any],
    *,
    modifiable: bool = True,
) -> int:
    """C_UnwrapKey under a transport key. Length and modifiability are left out where tokens refuse them."""
    left_out = {A.VALUE_LEN, A.MODIFIABLE} if modifiable else {A.VALUE_LEN}
    chosen = {number: value for number, value in wanted.items() if number not in left_out}
    return session.unwrap(oaep(CKM.RSA_PKCS_OAEP, *how), private, blob, chosen)


@contextlib.contextmanager
def transport(sender: Station, receiver: Station, so_pin_file: Path | None, transcript: Transcript) -> Iterator[Way]:
    """A way for the block, removed on both tokens after it, whatever happened."""
    object_id, label = receiver.config.object_id(TRANSPORT), receiver.config.label(TRANSPORT)
    how = _common_hash(sender, receiver)
    public, private = receiver.session.generate_pair(
        mechanism(CKM.RSA_PKCS_KEY_PAIR_GEN), *transport_pair(object_id, label)
    )
    try:
        modulus = receiver.session.get(public, A.MODULUS)
        exponent = receiver.session.get(public, A.PUBLIC_EXPONENT)
        transcript.add(
            "transport-key",
            hsm=receiver.config.name,
            public_key_sha256=fingerprint(modulus, exponent),
            oaep=next(name for name, numbers in OAEP.items() if numbers == how),
        )
        trusted = trusted_copy(sender, object_id, label, modulus, exponent, so_pin_file)
        transcript.add(
            "transport-key-trusted",
            hsm=sender.config.name,
            by="security officer" if sender.vendor.trusted_wrap == "enforced" else "user",
        )
        yield Way(sender, receiver, trusted, private, how)
    finally:
        receiver.session.destroy(private)
        receiver.session.destroy(public)
        clean(sender, receiver)
        transcript.add("transport-key-destroyed", hsms=[sender.config.name, receiver.config.name])


def _common_hash(sender: Station, receiver: Station) -> tuple[int, int]:
    for name in sender.vendor.oaep_hashes:
        if name in receiver.vendor.oaep_hashes:
            return OAEP[name]
    raise CeremonyRefused(f"{sender.config.vendor} and {receiver.config.vendor} have no OAEP hash in common")


def fingerprint(modulus: bytes, exponent: bytes) -> str:
    """SHA-256 of a public key's SubjectPublicKeyInfo: what people at the two tokens compare."""
    numbers = rsa.RSAPublicNumbers(int.from_bytes(exponent, "big"), int.from_bytes(modulus, "big"))
    der = numbers.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def trusted_copy(
    station: Station, object_id: uuid.UUID, label: str, modulus: bytes, exponent: bytes, so_pin_file: Path | None
) -> int:
    """The public key as a trusted wrapping key of this token; only its security officer can make one.

    First a copy that the user imports must not wrap: else the token protects its root KEK from nobody with the PIN.
    """
    wanted = {**transport_public(object_id, label), A.MODULUS: modulus, A.PUBLIC_EXPONENT: exponent}
    if station.vendor.trusted_wrap == "ignored":
        return station.session.create({**wanted, A.TOKEN: True})
    _untrusted_must_fail(station, {**wanted, A.TOKEN: False})
    if so_pin_file is None:
        raise CeremonyRefused(
            f"token {station.config.token_label!r} sends its keys only under a key that its security officer trusts: "
            "give --so-pin-file"
        )
    config, lock = station.config, station.sessions.recovery.lock
    trust(
        Order(
            module=str(config.module),
            reserved=(config.reserved() or b"").decode(),
            label=config.token_label,
            serial=station.sessions.serial,
            pin_file=str(so_pin_file),
            lock=str(lock) if lock is not None else "",
            object_id=object_id.hex,
            object_label=label,
            modulus=modulus.hex(),
            exponent=exponent.hex(),
        )
    )
    found = station.all_with(object_id)
    if len(found) != 1 or not station.flag(found[0], A.TRUSTED):
        raise CeremonyRefused(
            f"token {config.token_label!r} does not show the key that its security officer made as trusted"
        )
    return found[0]


def _untrusted_must_fail(station: Station, public: dict[int, Any]) -> None:
    handle, session = station.session.create(public), station.session
    try:
        for root in station.roots().values():
            for numbers in OAEP.values():
                try:
                    session.wrap(oaep(CKM.RSA_PKCS_OAEP, *numbers), handle, root)
                except CkError:
                    continue  # KEY_NOT_WRAPPABLE; or a hash that the token lacks
                raise CeremonyRefused(
                    f"token {station.config.token_label!r} wraps its root KEK under a key that nobody trusted: "
                    "CKA_WRAP_WITH_TRUSTED is not enforced, whoever has the user PIN can take the root KEK away"
                )
    finally:
        session.destroy(handle)


def clean(*stations: Station) -> None:
    """Remove transport keys that a crashed ceremony left on the tokens."""
    for station in stations:
        for handle in station.all_with(station.config.object_id(TRANSPORT)):
            station.session.destroy(handle)
