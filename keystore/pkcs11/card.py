"""A person's card: one signature by a key of a token that is no HSM of the service, on the person's own machine.

The token is found by its label, the key by its own. The PIN is tried once. Keys that want it for each signature (PIV's
slot 9C, signature cards) get it again, and a reader with a keypad of its own asks for it itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from keystore.hsm import Material, SignScheme
from keystore.pkcs11.binding import CKU_CONTEXT_SPECIFIC, Session, mechanism, module
from keystore.pkcs11.errors import CkError, Fault, classify
from keystore.pkcs11.mechanisms import CKK, CKO, ED25519_PARAMS, KINDS, A, sign_parts

_KEYPAD: Final = 0x100  # CKF_PROTECTED_AUTHENTICATION_PATH
_LOGIN_REQUIRED: Final = 0x4  # CKF_LOGIN_REQUIRED
_SIZE: Final = 64  # bytes of a signature, of either scheme


class CardRefused(Exception):
    """A card does not sign; the message names the token or the key, why, and what to do."""


@dataclass(frozen=True, slots=True)
class CardKey:
    """Where a person's key is."""

    module: Path
    token_label: str
    key_label: str


def sign_on_card(where: CardKey, pin: Callable[[], bytes], data: bytes) -> tuple[SignScheme, bytes]:
    """The key's scheme, and its signature of 64 bytes over data; CardRefused. `pin` is asked for once, if at all."""
    token = f"token {where.token_label!r}"
    if not where.module.is_file():
        raise CardRefused(f"PKCS#11 module {where.module} does not exist: install the card's middleware")
    try:
        loaded = module(str(where.module))
        slot, about = loaded.find_slot(where.token_label, None)
        session = loaded.open(slot, write=False)
        try:
            flags = int(about.flags)
            given = None if flags & _KEYPAD or not flags & _LOGIN_REQUIRED else pin()
            if flags & _LOGIN_REQUIRED:
                session.login(given)
            return _signed(session, where, given, data)
        finally:
            session.close()
    except CkError as error:
        if classify(error) is Fault.PIN:
            raise CardRefused(
                f"{token} refused the PIN ({error.name}); it was tried once: a few more wrong ones lock the card"
            ) from None
        raise CardRefused(f"{token} of {where.module}: {error}; is the card in its reader?") from None


def _signed(session: Session, where: CardKey, pin: bytes | None, data: bytes) -> tuple[SignScheme, bytes]:
    named = f"key {where.key_label!r} on token {where.token_label!r}"
    found = session.find({A.CLASS: CKO.PRIVATE_KEY, A.LABEL: where.key_label})
    if len(found) != 1:
        many = "more than one private key has" if found else "no private key has"
        raise CardRefused(f"{named}: {many} this label: `pkcs11-tool --list-objects --login` shows them")
    key = found[0]
    scheme = _scheme(session, key)
    if scheme is None:
        raise CardRefused(f"{named}: neither Ed25519 nor ECDSA on P-256, and no other key approves")
    number, _, what = sign_parts(scheme, data if scheme is SignScheme.ED25519 else hashlib.sha256(data).digest())
    each_time = _true(session, key, A.ALWAYS_AUTHENTICATE)
    again = (lambda: session.login(pin, CKU_CONTEXT_SPECIFIC)) if each_time else None
    made = session.sign(key, mechanism(number), what, again=again)
    if len(made) != _SIZE:
        raise CardRefused(f"{named}: made a signature of {len(made)} bytes, and it has {_SIZE}")
    return scheme, made


def _scheme(session: Session, key: int) -> SignScheme | None:
    kind = int.from_bytes(session.get(key, A.KEY_TYPE), "little")
    params = session.get(key, A.EC_PARAMS) if kind in {CKK.EC, CKK.EC_EDWARDS} else b""
    if kind == CKK.EC_EDWARDS and params in ED25519_PARAMS:
        return SignScheme.ED25519
    return SignScheme.ECDSA_SHA_256 if kind == CKK.EC and params == KINDS[Material.EC_P256].params else None


def _true(session: Session, key: int, number: int) -> bool:
    try:
        return session.get(key, number) not in {b"", b"\0"}
    except CkError:  # the token does not know the attribute
        return False
