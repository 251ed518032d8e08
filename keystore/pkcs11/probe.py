"""What a token can do, found out by doing it: each mechanism with the parameters and key sizes that we use.

A token's list of mechanisms is not enough: one lists RSA-OAEP and takes SHA-1 only, another lists Ed25519 and cannot wrap
such a key. Everything is done with session objects, so a probe changes nothing on the token.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import load_der_public_key

from keystore.hsm import Material, SelfTestFailed, SignScheme
from keystore.pkcs11 import selftest
from keystore.pkcs11.binding import Session, gcm, mechanism, oaep, pss
from keystore.pkcs11.errors import CkError
from keystore.pkcs11.mechanisms import (
    CKK,
    CKM,
    CKO,
    HMAC,
    KINDS,
    OAEP,
    PSS,
    A,
    at_birth,
    in_use,
    pair_at_birth,
    root_kek,
    sealed_with,
    sign_parts,
    spki,
)
from keystore.pkcs11.token import ROOT, TokenConfig, connect
from keystore.pkcs11.vendors import Vendor

_RSA: Final = tuple(s for s in SignScheme if s.startswith("RSA_"))
SCHEMES: Final[Mapping[Material, tuple[SignScheme, ...]]] = {
    Material.EC_P256: (SignScheme.ECDSA_SHA_256,),
    Material.EC_P384: (SignScheme.ECDSA_SHA_384,),
    Material.ED25519: (SignScheme.ED25519,),
    Material.RSA_3072: _RSA,
    Material.RSA_4096: _RSA,
}
_OAEP_HASHES: Final[Mapping[str, hashes.HashAlgorithm]] = {"sha1": hashes.SHA1(), "sha256": hashes.SHA256()}  # noqa: S303 - as AWS and Azure wrap
_DIGESTS: Final = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}


@dataclass(frozen=True, slots=True)
class Check:
    """One mechanism, run: what needs it, and what came out."""

    need: str  # a kind of key, or "import"
    what: str
    works: bool
    detail: str = ""
    milliseconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What a token can do, what the self-test found, and whether it may serve."""

    hsm: str
    vendor: str
    title: str
    tested: str
    token_label: str
    token_serial: str
    firmware: str
    checks: tuple[Check, ...]
    self_test: tuple[selftest.Finding, ...]
    kinds: tuple[tuple[str, str], ...]  # (kind of key, "" or why the token cannot hold it)
    verdict: Literal["may serve", "may serve in tests", "must not serve"]
    reasons: tuple[str, ...]


def probe(config: TokenConfig) -> ProbeReport:
    """Everything we need of a token, tried. HsmUnavailable if it cannot be reached or refuses the PIN."""
    vendor, sessions = config.profile(), connect(config)
    try:
        _, token = sessions.module.find_slot(config.token_label, config.token_serial or None)
        listed = frozenset(int(m) for m in token.slot.get_mechanisms())
        session = sessions.home
        checks: list[Check] = []
        findings: tuple[selftest.Finding, ...] = ()
        reasons: list[str] = []
        kek, made = 0, False
        try:
            kek, made = _kek(session, config)
        except CkError as error:
            reasons.append(f"it cannot make the root KEK: {error}")
        if kek:
            checks = list(_checks(session, vendor, kek))
            try:
                findings = selftest.examine(selftest.Subject(session, vendor, kek, listed)).findings
            except SelfTestFailed as refused:
                reasons.append(str(refused))
            if made:
                session.destroy(kek)
        reasons += [f"{f.rule}: {f.reason}" for f in findings if f.verdict == "failed"]
        kinds = tuple((str(m), _lacking(m, checks)) for m in Material) if checks else ()
        lacking = dict(kinds)
        if kinds and lacking[Material.KDK_512]:
            reasons.append(f"it cannot hold keys of the default suite: {lacking[Material.KDK_512]}")
        return ProbeReport(
            hsm=config.name,
            vendor=vendor.name,
            title=vendor.title,
            tested=vendor.tested,
            token_label=config.token_label,
            token_serial=sessions.serial,
            firmware=sessions.firmware,
            checks=tuple(checks),
            self_test=findings,
            kinds=kinds,
            verdict="must not serve" if reasons else "may serve in tests" if vendor.test else "may serve",
            reasons=tuple(reasons),
        )
    finally:
        sessions.close()


def _kek(session: Session, config: TokenConfig) -> tuple[int, bool]:
    """(root KEK, whether it was made for the probe): the installation's own, or a session object like it."""
    wanted = {A.CLASS: CKO.SECRET_KEY, A.ID: config.object_id(ROOT).bytes, A.TOKEN: True}
    if len(found := session.find(wanted)) == 1:
        return found[0], False
    template = root_kek(uuid.uuid4(), "skms/probe") | {A.TOKEN: False}
    return session.generate(mechanism(CKM.AES_KEY_GEN), template), True


def _lacking(material: Material, checks: list[Check]) -> str:
    return "; ".join(f"{c.what}: {c.detail}" for c in checks if c.need == material and not c.works)


def _checks(session: Session, vendor: Vendor, kek: int) -> Iterator[Check]:
    for material in Material:
        yield from _kind(session, vendor, kek, material)


def _tried(need: str, what: str, act: Callable[[], object]) -> Check:
    begun = time.perf_counter()
    try:
        act()
    except CkError as error:
        return Check(need, what, works=False, detail=str(error))
    except InvalidSignature:
        return Check(need, what, works=False, detail="the signature is wrong")
    except (ValueError, KeyError) as error:
        return Check(need, what, works=False, detail=str(error) or type(error).__name__)
    return Check(need, what, works=True, milliseconds=round((time.perf_counter() - begun) * 1e3, 2))


def _kind(session: Session, vendor: Vendor, kek: int, material: Material) -> Iterator[Check]:
    """Make, wrap, unwrap and use a key of the kind, in every way in which we use one."""
    made: list[tuple[bytes, bytes]] = []
    handles: list[int] = []
    yield _tried(material, "generate and wrap (AES-KWP)", lambda: made.append(_born(session, vendor, kek, material)))
    if not made:
        return
    blob, public = made[0]
    template = in_use(material, vendor, public)
    yield _tried(
        material,
        "unwrap for use",
        lambda: handles.append(session.unwrap(mechanism(vendor.kwp), kek, blob, template)),
    )
    if not handles:
        return
    try:
        # One hash of RSA-OAEP is enough to import: a transport key is not lacking for want of the other.
        need = "import" if A.UNWRAP in KINDS[material].usage else material
        for what, act in _uses(session, vendor, handles[0], material, public):
            yield _tried(need, what, act)
    finally:
        session.destroy(handles[0])


def _born(session: Session, vendor: Vendor, kek: int, material: Material) -> tuple[bytes, bytes]:
    """(wrapped key, public half)."""
    kind = KINDS[material]
    public, others = b"", []
    if kind.object_class == CKO.SECRET_KEY:
        born = session.generate(mechanism(kind.generate), at_birth(material, uuid.uuid4()))
    else:
        half, born = session.generate_pair(mechanism(kind.generate), *pair_at_birth(material, uuid.uuid4(), vendor))
        others.append(half)
    try:
        if others:
            names = (A.MODULUS, A.PUBLIC_EXPONENT) if kind.key_type == CKK.RSA else (A.EC_POINT,)
            public = spki(material, {n: session.get(others[0], n) for n in names}, vendor)
        return session.wrap(mechanism(vendor.kwp), kek, born), public
    finally:
        for handle in (born, *others):
            session.destroy(handle)


def _uses(
    session: Session, vendor: Vendor, key: int, material: Material, public: bytes
) -> Iterator[tuple[str, Callable[[], object]]]:
    kind = KINDS[material]
    if material is Material.AES_256:
        yield "AES-256-GCM, 12-byte IV, AAD, 128-bit tag", lambda: _gcm(session, vendor, key)
    elif kind.object_class == CKO.SECRET_KEY:
        for name, number in HMAC.items():
            if kind.length == 64 or name == "sha256":
                what = f"HMAC-{name.upper()}, {kind.length}-byte key"
                yield what, lambda n=number: session.sign(key, mechanism(n), b"probe", 64)  # type: ignore[misc]  # mypy infers no lambda with a default
    elif A.UNWRAP in kind.usage:
        for name in OAEP:
            what = f"RSA-OAEP {name} unwrap, {kind.length} bits"
            yield what, lambda n=name: _oaep(session, key, public, n)  # type: ignore[misc]  # mypy infers no lambda with a default
    else:
        for scheme in SCHEMES.get(material, ()):  # what a transport key does is tried as "import"
            yield scheme, lambda s=scheme: _signed(session, key, s, public)  # type: ignore[misc]  # mypy infers no lambda with a default


def _gcm(session: Session, vendor: Vendor, key: int) -> None:
    iv, sealed = sealed_with(session, key, vendor, b"aad", bytes(100))
    if session.decrypt(key, gcm(vendor.gcm, iv, b"aad"), sealed) != bytes(100):
        raise ValueError("what was encrypted does not decrypt")


def _signed(session: Session, key: int, scheme: SignScheme, public: bytes) -> None:
    """Sign, and check the signature outside; InvalidSignature if it is wrong."""
    algorithm = _DIGESTS.get(scheme[-3:], hashes.SHA256())
    data = bytes(range(algorithm.digest_size))
    number, pss_hash, signed = sign_parts(scheme, data)
    made = session.sign(key, pss(number, *PSS[pss_hash]) if pss_hash else mechanism(number), signed)
    verifier = load_der_public_key(public)
    if isinstance(verifier, ed25519.Ed25519PublicKey):
        verifier.verify(made, data)
    elif isinstance(verifier, ec.EllipticCurvePublicKey):
        half = len(made) // 2
        r, s = int.from_bytes(made[:half], "big"), int.from_bytes(made[half:], "big")
        verifier.verify(utils.encode_dss_signature(r, s), data, ec.ECDSA(utils.Prehashed(algorithm)))
    elif isinstance(verifier, rsa.RSAPublicKey):
        scheme_padding = padding.PSS(padding.MGF1(algorithm), algorithm.digest_size) if pss_hash else padding.PKCS1v15()
        verifier.verify(made, data, scheme_padding, utils.Prehashed(algorithm))
    else:
        raise InvalidSignature


def _oaep(session: Session, key: int, public: bytes, name: str) -> None:
    """Unwrap an AES key that was wrapped outside for a transport key."""
    algorithm, outside = _OAEP_HASHES[name], load_der_public_key(public)
    if not isinstance(outside, rsa.RSAPublicKey):
        raise ValueError("not an RSA public key")
    wrapped = outside.encrypt(bytes(32), padding.OAEP(padding.MGF1(algorithm), algorithm, None))
    template = {
        A.CLASS: CKO.SECRET_KEY,
        A.KEY_TYPE: CKK.AES,
        A.TOKEN: False,
        A.PRIVATE: True,
        A.SENSITIVE: True,
        A.EXTRACTABLE: True,
        A.ENCRYPT: True,
        A.DECRYPT: True,
    }
    session.destroy(session.unwrap(oaep(CKM.RSA_PKCS_OAEP, *OAEP[name]), key, wrapped, template))
