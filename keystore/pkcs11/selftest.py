"""What a token must do, shown by behaviour before it may serve. A token that breaks a rule is refused.

Each rule is one function; its name is the rule's name in messages and in a profile's waivers. All rules are asked, so that
a report names everything that is wrong. A rule about a mechanism that only some kinds of key need, on a token that does
not offer it, makes these kinds unavailable instead.
"""

from __future__ import annotations

import hashlib
import hmac
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_wrap_with_padding

from keystore.hsm import Material, SelfTestFailed
from keystore.pkcs11.binding import Session, gcm, mechanism
from keystore.pkcs11.errors import CkError
from keystore.pkcs11.mechanisms import CKK, CKM, CKO, HMAC, A, at_birth, in_use, sealed_with, unused
from keystore.pkcs11.vendors import Vendor


@dataclass(frozen=True, slots=True)
class Subject:
    """The token under test: a logged-in session, the profile, the root KEK's handle."""

    session: Session
    vendor: Vendor
    kek: int
    listed: frozenset[int] | None = None  # the token's mechanisms; None: not known, so each is tried

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
    wanted = {A.SENSITIVE: True, A.WRAP: True, A.UNWRAP: True, A.MODIFIABLE: False}
    wanted |= {A.ENCRYPT: False, A.DECRYPT: False, A.SIGN: False, A.VERIFY: False, A.DERIVE: False}
    if s.flag(s.kek, A.EXTRACTABLE):  # a root KEK that may move to another HSM, under a key that the SO trusts
        wanted[A.WRAP_WITH_TRUSTED] = True
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


def copy_to_extractable_refused(s: Subject) -> str | None:
    blob = s.wrapped(Material.KDK_512)
    handle = s.session.unwrap(mechanism(s.vendor.kwp), s.kek, blob, in_use(Material.KDK_512, s.vendor))
    try:
        for weaker in ({A.EXTRACTABLE: True}, {A.SENSITIVE: False}):  # one by one: a token may refuse only the other
            if _copies(s, handle, weaker):
                return "C_CopyObject made a readable or extractable copy of a key that is neither"
    finally:
        s.session.destroy(handle)
    return None


def _copies(s: Subject, handle: int, weaker: dict[int, Any]) -> bool:
    """Whether a copy of a key has less protection than the key."""
    try:
        copy = s.session.copy(handle, {A.TOKEN: False, **weaker})
    except CkError:
        return False
    try:
        return s.flag(copy, A.EXTRACTABLE) or not s.flag(copy, A.SENSITIVE)
    finally:
        s.session.destroy(copy)


def root_kek_not_modifiable(s: Subject) -> str | None:
    if not refused(lambda: s.session.set(s.kek, {A.DECRYPT: True})):
        return "the root KEK can be given DECRYPT by C_SetAttributeValue"
    return None


def root_kek_leaves_only_under_a_trusted_key(s: Subject) -> str | None:
    untrusted = {**at_birth(Material.AES_256, uuid.uuid4()), **unused(Material.AES_256), A.WRAP: True}
    handle = s.session.generate(mechanism(CKM.AES_KEY_GEN), untrusted)
    try:
        if not refused(lambda: s.session.wrap(mechanism(s.vendor.kwp), handle, s.kek)):
            return "the root KEK was wrapped under a key that no security officer made trusted"
    finally:
        s.session.destroy(handle)
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


def bad_blob_refused(s: Subject) -> str | None:
    blob = s.wrapped(Material.KDK_512)
    template = in_use(Material.KDK_512, s.vendor)
    for wrong in (blob[:-8], bytes([blob[0] ^ 1]) + blob[1:]):
        if not refused(lambda w=wrong: s.session.unwrap(mechanism(s.vendor.kwp), s.kek, w, template)):  # type: ignore[misc]  # mypy infers no lambda with a default
            return "a wrapped key that was changed was unwrapped"
    s.session.destroy(s.session.unwrap(mechanism(s.vendor.kwp), s.kek, blob, template))
    return None


def hmac_vector(s: Subject) -> str | None:
    value = bytes(range(64))
    handle = s.known(value, CKK.GENERIC_SECRET, sign=True)
    try:
        made = {name: s.session.sign(handle, mechanism(number), b"skms", 64) for name, number in HMAC.items()}
        other = s.session.sign(handle, mechanism(CKM.SHA512_HMAC), b"skmt", 64)
    finally:
        s.session.destroy(handle)
    wrong = [name for name, mac in made.items() if not hmac.compare_digest(mac, hmac.digest(value, b"skms", name))]
    if wrong or hmac.compare_digest(other, made["sha512"]):
        return f"HMAC with a 64-byte key is wrong: {', '.join(wrong) or 'other data, same MAC'}"
    return None


def gcm_vector(s: Subject) -> str | None:
    value, aad = bytes(range(32)), hashlib.sha256(b"aad").digest()
    handle = s.known(value, CKK.AES, encrypt=True, decrypt=True)
    try:
        iv, made = sealed_with(s.session, handle, s.vendor, aad, b"skms")
        opened = s.session.decrypt(handle, gcm(s.vendor.gcm, iv, aad), made)
    except ValueError as error:
        return str(error)
    finally:
        s.session.destroy(handle)
    right = made == AESGCM(value).encrypt(iv, b"skms", aad) and opened == b"skms"
    return None if right else "AES-256-GCM with AAD is wrong"


def two_encrypts_two_ivs(s: Subject) -> str | None:
    handle = s.session.generate(mechanism(CKM.AES_KEY_GEN), at_birth(Material.AES_256, uuid.uuid4()))
    try:
        seen = {sealed_with(s.session, handle, s.vendor, b"aad", b"skms")[0] for _ in range(2)}
    except ValueError as error:
        return str(error)
    finally:
        s.session.destroy(handle)
    return None if len(seen) == 2 else "two encryptions used one IV"


def bad_tag_refused(s: Subject) -> str | None:
    handle = s.session.generate(mechanism(CKM.AES_KEY_GEN), at_birth(Material.AES_256, uuid.uuid4()))
    try:
        iv, made = sealed_with(s.session, handle, s.vendor, b"aad", b"skms")
        bad = made[:-1] + bytes([made[-1] ^ 1])
        if not refused(lambda: s.session.decrypt(handle, gcm(s.vendor.gcm, iv, b"aad"), bad)):
            return "a ciphertext with a wrong tag was opened"
        if s.session.decrypt(handle, gcm(s.vendor.gcm, iv, b"aad"), made) != b"skms":
            return "the session is not usable after a wrong tag"
    except ValueError as error:
        return str(error)
    finally:
        s.session.destroy(handle)
    return None


Rule = Callable[[Subject], str | None]
GCM_RULES: Final[tuple[Rule, ...]] = (gcm_vector, two_encrypts_two_ivs, bad_tag_refused)
RULES: Final[tuple[Rule, ...]] = (
    root_flags_read_back,
    root_kek_not_modifiable,
    unwrap_template_enforced,
    unwrap_honours_flags,
    wrap_of_non_extractable_refused,
    root_kek_leaves_only_under_a_trusted_key,
    copy_to_extractable_refused,
    kwp_vector,
    bad_blob_refused,
    hmac_vector,
    *GCM_RULES,
)
_NOT_OFFERED: Final = frozenset(
    {0x54, 0x70, 0x71}
)  # FUNCTION_NOT_SUPPORTED, MECHANISM_INVALID, MECHANISM_PARAM_INVALID


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rule found. `unavailable`: the token does not offer the mechanism, and no more than that is wrong."""

    rule: str
    verdict: Literal["passed", "failed", "waived", "unavailable"]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What all rules found."""

    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """Rules for which the token must not serve."""
        return tuple(f for f in self.findings if f.verdict == "failed")

    def missing(self) -> dict[Material, str]:
        """Kinds of key that the token cannot hold for what the self-test found, with the reason."""
        gone = next((f.reason for f in self.findings if f.verdict == "unavailable"), None)
        return {} if gone is None else {Material.AES_256: f"{Material.AES_256}: {gone}"}


def examine(subject: Subject) -> Report:
    """Every rule that the profile does not waive. SelfTestFailed if it waives one that is not there."""
    unknown = set(subject.vendor.waivers) - {rule.__name__ for rule in RULES}
    if unknown:
        raise SelfTestFailed(
            f"profile {subject.vendor.name!r} waives rules that the self-test has not: {', '.join(sorted(unknown))}"
        )
    return Report(tuple(_asked(subject, rule) for rule in RULES))


def _asked(subject: Subject, rule: Rule) -> Finding:
    name = rule.__name__
    if name in subject.vendor.waivers:
        return Finding(name, "waived")
    if rule in GCM_RULES and subject.listed is not None and subject.vendor.gcm not in subject.listed:
        return Finding(name, "unavailable", "the token lacks CKM_AES_GCM")
    try:
        wrong = rule(subject)
    except CkError as error:
        if rule in GCM_RULES and error.rv in _NOT_OFFERED and error.function in {"C_EncryptInit", "C_Encrypt"}:
            return Finding(name, "unavailable", f"AES-GCM as suite 0x0002 needs it: {error}")
        wrong = str(error)
    return Finding(name, "passed") if wrong is None else Finding(name, "failed", wrong)


def run(subject: Subject) -> Report:
    """What all rules found; SelfTestFailed names each that is broken."""
    report = examine(subject)
    if report.failed:
        broken = "; ".join(f"{f.rule}: {f.reason}" for f in report.failed)
        raise SelfTestFailed(f"self-test {broken}; this token must not serve")
    return report
