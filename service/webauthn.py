"""Approvals by WebAuthn (Level 2, 7.2): an assertion of one enrolled credential over one challenge.

The library parses and verifies; here stands what must hold beside the signature: which credential, which origins and relying
party, the user verified, no frame of another site around it. An assertion that was stored is verified again each time it counts,
so whether the signature counter rose is judged apart, once, by who stores it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from policy.signing import PersonKey, algorithm

_UNPARSED: Final = (ValueError, LookupError, TypeError, AttributeError, struct.error, RecursionError, OverflowError)


class AssertionRefused(Exception):
    """An assertion does not do; the message says why."""


@dataclass(frozen=True, slots=True)
class Credential:
    """What an approver enrolled, beside its public key. Origins are compared whole, as the browser writes them."""

    id: bytes
    rp: str
    origins: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Assertion:
    """What `navigator.credentials.get` gives, each in base64url without padding, as its `toJSON` names them."""

    rawId: str  # noqa: N815
    clientDataJSON: str  # noqa: N815
    authenticatorData: str  # noqa: N815
    signature: str

    def to_bytes(self) -> bytes:
        """As it is handed in and stored."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def of(cls, data: bytes) -> Assertion:
        """The assertion that bytes spell, in their one way; AssertionRefused if they spell none."""
        try:
            made = cls(**json.loads(data))
            if not all(type(text) is str and encoded(decoded(text)) == text for text in asdict(made).values()):
                raise ValueError
            if made.to_bytes() != data:
                raise ValueError
        except _UNPARSED:
            raise AssertionRefused("it is no assertion of a WebAuthn credential") from None
        return made

    @property
    def counter(self) -> int:
        """How often the authenticator says that it has signed; 0 if it does not count."""
        return int.from_bytes(decoded(self.authenticatorData)[33:37], "big")


def encoded(data: bytes) -> str:
    """Base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decoded(text: str) -> bytes:
    """The bytes of base64url without padding; ValueError."""
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def usable(rp: str, origin: str) -> bool:
    """Whether a browser lets a page of this origin use credentials of this relying party."""
    from fido2.rpid import verify_rp_id

    return verify_rp_id(rp, origin)


def verify(data: bytes, credential: Credential, key: PersonKey, challenge: bytes) -> None:
    """AssertionRefused unless this is a right assertion of that credential over exactly this challenge."""
    from fido2.cose import ES256, EdDSA
    from fido2.server import Fido2Server
    from fido2.webauthn import (
        Aaguid,
        AttestedCredentialData,
        CollectedClientData,
        PublicKeyCredentialRpEntity,
        UserVerificationRequirement,
    )

    given = Assertion.of(data)
    if decoded(given.rawId) != credential.id:
        raise AssertionRefused("it is of another credential than the enrolled one")
    cose = EdDSA if isinstance(key, Ed25519PublicKey) else ES256
    enrolled = AttestedCredentialData.create(Aaguid.NONE, credential.id, cose.from_cryptography_key(key))  # type: ignore[no-untyped-call]
    server = Fido2Server(
        PublicKeyCredentialRpEntity(id=credential.rp, name=credential.rp),
        verify_origin=lambda origin: type(origin) is str and origin in credential.origins,
    )
    response = {name: text for name, text in asdict(given).items() if name != "rawId"}
    state = {"challenge": encoded(challenge), "user_verification": UserVerificationRequirement.REQUIRED}
    try:
        client = decoded(given.clientDataJSON)
        if CollectedClientData(client).cross_origin is not False or "topOrigin" in json.loads(client):
            raise ValueError("Made in a frame of another site.")
        server.authenticate_complete(state, [enrolled], {"rawId": given.rawId, "response": response})
    except ValueError as error:
        raise AssertionRefused(f"it does not verify: {error}") from None
    except _UNPARSED:
        raise AssertionRefused("it does not verify: its parts are not those of an assertion") from None


def enrolled(
    answer: Mapping[str, str], challenge: bytes, rp: str, origins: tuple[str, ...]
) -> tuple[Credential, PersonKey, str]:
    """(credential, its public key, its algorithm) that `navigator.credentials.create` made; AssertionRefused."""
    from fido2.server import Fido2Server
    from fido2.webauthn import PublicKeyCredentialRpEntity, UserVerificationRequirement

    server = Fido2Server(PublicKeyCredentialRpEntity(id=rp, name=rp), verify_origin=lambda origin: origin in origins)
    state = {"challenge": encoded(challenge), "user_verification": UserVerificationRequirement.REQUIRED}
    try:
        response = {name: answer[name] for name in ("clientDataJSON", "attestationObject")}
        made = server.register_complete(state, {"rawId": answer["rawId"], "response": response})
        found = made.credential_data
        if found is None:
            raise ValueError("without a credential")
        key = _person_key(found.public_key)
    except _UNPARSED as error:
        raise AssertionRefused(f"the authenticator's answer is no credential that can approve: {error}") from None
    return Credential(found.credential_id, rp, origins), key, algorithm(key)


def _person_key(cose: Mapping[int, Any]) -> PersonKey:
    """The key of RFC 9053, 7.1 and 7.2: P-256 with ES256, or Ed25519 with EdDSA; ValueError."""
    match cose.get(1), cose.get(3), cose.get(-1):
        case 2, -7, 1:
            return EllipticCurvePublicKey.from_encoded_point(SECP256R1(), b"\x04" + cose[-2] + cose[-3])
        case 1, -8, 6:
            return Ed25519PublicKey.from_public_bytes(cose[-2])
    raise ValueError("neither ES256 nor Ed25519")


def pem(key: PersonKey) -> bytes:
    """A public key as a configuration names it."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def counter_name(credential: Credential) -> str:
    """What the counter of a credential is stored under."""
    return f"webauthn/{hashlib.sha256(credential.id).hexdigest()[:48]}"
