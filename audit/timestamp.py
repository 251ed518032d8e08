"""RFC 3161: a stranger's signature that a checkpoint existed at a time. Pure: what to send, and whether the answer is right.

The token is over the checkpoint's text, so it counts with whichever cosignatures the note has. It is kept as it is, a CMS
SignedData without certificates: `openssl ts -verify -token_in` reads it too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from rfc3161_client import (
    HashAlgorithm,
    TimeStampRequest,
    TimestampRequestBuilder,
    VerificationError,
    VerifierBuilder,
    decode_timestamp_response,
)

MAX_TOKEN: Final = 65_536
_GRANTED: Final = bytes.fromhex("3003020100")  # PKIStatusInfo { status 0 }


class BadTimestamp(Exception):
    """Not a timestamp of this text by this authority; the message says why."""


@dataclass(frozen=True, slots=True)
class Authority:
    """A time-stamping authority: its signing certificate, and those that lead to a root."""

    leaf: x509.Certificate
    roots: tuple[x509.Certificate, ...]
    between: tuple[x509.Certificate, ...] = ()


def authority_of(certificates: Sequence[x509.Certificate]) -> Authority:
    """Sort an authority's certificates; BadTimestamp unless exactly one may sign timestamps and one is a root."""
    leaves = [c for c in certificates if _stamps(c)]
    roots = tuple(c for c in certificates if c.issuer == c.subject)
    if len(leaves) != 1 or not roots:
        raise BadTimestamp("an authority's file holds one certificate for timeStamping, and its root")
    between = tuple(c for c in certificates if c is not leaves[0] and c not in roots)
    return Authority(leaves[0], roots, between)


def load_authority(path: Path) -> Authority:
    """The authority in a PEM file; BadTimestamp names it."""
    try:
        return authority_of(x509.load_pem_x509_certificates(path.read_bytes()))
    except OSError as error:
        raise BadTimestamp(f"{path}: {error.strerror}") from None
    except ValueError:
        raise BadTimestamp(f"{path}: no certificates in PEM") from None
    except BadTimestamp as bad:
        raise BadTimestamp(f"{path}: {bad}") from None


def _stamps(certificate: x509.Certificate) -> bool:
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    except x509.ExtensionNotFound:
        return False
    return ExtendedKeyUsageOID.TIME_STAMPING in usage.value


def question(text: bytes) -> TimeStampRequest:
    """A request about a text, with a nonce. Without certificates: ours are configured, and theirs prove nothing."""
    builder = TimestampRequestBuilder().data(text).hash_algorithm(HashAlgorithm.SHA256)
    return builder.nonce(nonce=True).cert_request(cert_request=False).build()


def token_in(answer: bytes, asked: TimeStampRequest, text: bytes, authority: Authority) -> tuple[bytes, datetime]:
    """(token, time) of an answer; BadTimestamp if it does not answer exactly this request."""
    return _checked(answer, text, authority, nonce=asked.nonce)


def verify_token(token: bytes, text: bytes, authority: Authority) -> datetime:
    """When the authority saw this text; BadTimestamp if the token does not say so."""
    body = _GRANTED + token
    return _checked(b"\x30" + _length(len(body)) + body, text, authority, nonce=None)[1]


def _checked(answer: bytes, text: bytes, authority: Authority, *, nonce: int | None) -> tuple[bytes, datetime]:
    if len(answer) > MAX_TOKEN:
        raise BadTimestamp(f"an answer of {len(answer)} bytes")
    try:
        response = decode_timestamp_response(answer)
        verifier = VerifierBuilder(
            tsa_certificate=authority.leaf,
            roots=list(authority.roots),
            intermediates=list(authority.between),
            nonce=nonce,
        ).build()
        verifier.verify(response, hashlib.sha256(text).digest())
        return response.time_stamp_token(), response.tst_info.gen_time
    except VerificationError as error:
        raise BadTimestamp(str(error).split(": ErrorStack")[0]) from None
    except ValueError:
        raise BadTimestamp("not an RFC 3161 answer") from None


def _length(size: int) -> bytes:
    """A length in DER."""
    if size < 0x80:
        return bytes([size])
    digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([0x80 | len(digits)]) + digits
