"""What a token must do, shown by behaviour before it may serve. A token that fails is refused.

Each rule is one function; its name is the rule's name in messages and in a profile's waivers.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_wrap_with_padding

from keystore.hsm import Material, SelfTestFailed
from keystore.pkcs11.binding import Session, gcm, mechanism
from keystore.pkcs11.errors import CkError
from keystore.pkcs11.mechanisms import CKK, CKM, CKO, A, at_birth, in_use, unused
from keystore.pkcs11.vendors import Vendor


@dataclass(frozen=True, slots=True)
class Subject:
    """The token under test: a logged-in session, the profile, the root KEK's handle."""

    session: Session
    vendor: Vendor
    kek: int

    def flag(self, handle: int, number: int) -> bool:
        """A boolean attribute."""
        return self.session.get(handle, number, 1) == b"\1"

    def wrapped(self, material: Material) -> bytes:
        """A fresh key of a kind, wrapped under the root KEK."""
        kind = {Material.AES_256: CKM.AES_KEY_GEN}.get(material, CKM.GENERIC_SECRET_KEY_GEN)
        born = self.session.generate(mechanism(kind), at_birth(material, uuid.uuid4()))
        try:
            return self.session.wrap(mechanism(self.vendor.kwp), self.kek, born)
        finally:
            self.session.destroy(born)

    def known(self, value: bytes, key_type: int, **usage: bool) -> int:
        """A session object of a known value: published vectors only."""
        flags = {getattr(A, name.upper()): on for name, on in usage.items()}
        attributes: dict[int, Any] = {
            A.CLASS: CKO.SECRET_KEY,
            A.KEY_TYPE: key_type,
            A.TOKEN: False,
            A.PRIVATE: True,
            A.SENSITIVE: False,
            A.EXTRACTABLE: True,
            **unused(Material.AES_256),
            **flags,
            A.VALUE: value,
        }
        return self.session.create(attributes)


def refused(act: Callable[[], object]) -> bool:
    """Whether the token refuses."""
    try:
        act()
    except CkError:
        return True
    return False


def root_flags_read_back(s: Subject) -> str | None:
    wanted = {A.SENSITIVE: True, A.EXTRACTABLE: False, A.WRAP: True, A.UNWRAP: True, A.MODIFIABLE: False}
    wanted |= {A.ENCRYPT: False, A.DECRYPT: False, A.SIGN: False, A.VERIFY: False, A.DERIVE: False}
    wrong = [hex(number) for number, value in wanted.items() if s.flag(s.kek, number) is not value]
    return None if not wrong else f"the root KEK reads back other flags than asked for: {', '.join(wrong)}"


def unwrap_honours_flags(s: Subject) -> str | None:
    handle = s.session.unwrap(
        mechanism(s.vendor.kwp), s.kek, s.wrapped(Material.KDK_512), in_use(Material.KDK_512, s.vendor)
    )
    try:
        if not s.flag(handle, A.SENSITIVE) or s.flag(handle, A.EXTRACTABLE):
            return "an unwrapped key is readable or extractable"
        if not refused(lambda: s.session.get(handle, A.VALUE)):
            return "the value of an unwrapped key can be read"
    finally:
        s.session.destroy(handle)
    return None


def wrap_of_non_extractable_refused(s: Subject) -> str | None:
    handle = s.session.unwrap(
        mechanism(s.vendor.kwp), s.kek, s.wrapped(Material.KDK_512), in_use(Material.KDK_512, s.vendor)
    )
    try:
        if not refused(lambda: s.session.wrap(mechanism(s.vendor.kwp), s.kek, handle)):
            return "a key that is not extractable was wrapped"
    finally:
        s.session.destroy(handle)
    return None


def unwrap_template_enforced(s: Subject) -> str | None:
    open_template = {**in_use(Material.KDK_512, s.vendor), A.SENSITIVE: False, A.EXTRACTABLE: True}
    blob = s.wrapped(Material.KDK_512)
    if not refused(lambda: s.session.unwrap(mechanism(s.vendor.kwp), s.kek, blob, open_template)):
        return "CKA_UNWRAP_TEMPLATE of the root KEK is not enforced: a blob was unwrapped as readable"
    return None


def root_kek_not_modifiable(s: Subject) -> str | None:
    if not refused(lambda: s.session.set(s.kek, {A.DECRYPT: True})):
        return "the root KEK can be given DECRYPT by C_SetAttributeValue"
    return None


def kwp_vector(s: Subject) -> str | None:
    # Secrets of whole blocks of eight bytes, as all of ours are: SoftHSM 2.6.1 pads others with zeros before it wraps.
    value, secret = bytes(range(32)), bytes(range(64))
    kek = s.known(value, CKK.AES, wrap=True, unwrap=True)
    data = s.known(secret, CKK.GENERIC_SECRET, sign=True)
    try:
        made = s.session.wrap(mechanism(s.vendor.kwp), kek, data)
    finally:
        s.session.destroy(data)
        s.session.destroy(kek)
    return None if made == aes_key_wrap_with_padding(value, secret) else "AES-KWP is not RFC 5649"


def hmac_vector(s: Subject) -> str | None:
    value = bytes(range(64))
    handle = s.known(value, CKK.GENERIC_SECRET, sign=True)
    try:
        made = s.session.sign(handle, mechanism(CKM.SHA512_HMAC), b"skms")
    finally:
        s.session.destroy(handle)
    right = hmac.compare_digest(made, hmac.digest(value, b"skms", "sha512"))
    return None if right else "HMAC-SHA-512 with a 64-byte key is wrong"


def gcm_vector(s: Subject) -> str | None:
    value, iv, aad = bytes(range(32)), bytes(range(12)), hashlib.sha256(b"aad").digest()
    handle = s.known(value, CKK.AES, encrypt=True, decrypt=True)
    try:
        made = s.session.encrypt(handle, gcm(CKM.AES_GCM, iv, aad), b"skms")
    finally:
        s.session.destroy(handle)
    return None if made == AESGCM(value).encrypt(iv, b"skms", aad) else "AES-256-GCM with AAD is wrong"


def two_encrypts_two_ivs(s: Subject) -> str | None:
    handle = s.session.generate(mechanism(CKM.AES_KEY_GEN), at_birth(Material.AES_256, uuid.uuid4()))
    seen = set()
    try:
        for _ in range(2):
            how = gcm(CKM.AES_GCM, bytes(12) if s.vendor.gcm_iv == "zero" else os.urandom(12), b"aad")
            s.session.encrypt(handle, how, b"skms")
            seen.add(bytes(how.keep.iv.raw))
    finally:
        s.session.destroy(handle)
    return None if len(seen) == 2 and bytes(12) not in seen else "two encryptions used one IV, or a zero one"


def bad_tag_refused(s: Subject) -> str | None:
    handle = s.session.generate(mechanism(CKM.AES_KEY_GEN), at_birth(Material.AES_256, uuid.uuid4()))
    iv = os.urandom(12)
    try:
        made = s.session.encrypt(handle, gcm(CKM.AES_GCM, iv, b"aad"), b"skms")
        bad = made[:-1] + bytes([made[-1] ^ 1])
        if not refused(lambda: s.session.decrypt(handle, gcm(CKM.AES_GCM, iv, b"aad"), bad)):
            return "a ciphertext with a wrong tag was opened"
        if s.session.decrypt(handle, gcm(CKM.AES_GCM, iv, b"aad"), made) != b"skms":
            return "the session is not usable after a wrong tag"
    finally:
        s.session.destroy(handle)
    return None


Rule = Callable[[Subject], str | None]
RULES: Final[tuple[Rule, ...]] = (
    root_flags_read_back,
    unwrap_honours_flags,
    wrap_of_non_extractable_refused,
    unwrap_template_enforced,
    root_kek_not_modifiable,
    kwp_vector,
    hmac_vector,
    gcm_vector,
    two_encrypts_two_ivs,
    bad_tag_refused,
)


def run(subject: Subject) -> None:
    """Every rule that the profile does not waive; SelfTestFailed names the first that is broken."""
    for rule in RULES:
        if rule.__name__ in subject.vendor.waivers:
            continue
        try:
            wrong = rule(subject)
        except CkError as error:
            wrong = str(error)
        if wrong is not None:
            raise SelfTestFailed(f"self-test {rule.__name__}: {wrong}; this token must not serve")
