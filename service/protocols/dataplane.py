"""The data plane's bodies as work, and its results as JSON: one row per operation, for single calls and batches alike."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from keystore import InvalidCiphertext, Key, from_text
from service.kms import Ask, Kms
from service.outcome import RequestInvalid
from service.protocols import wire
from service.work import (
    Checked,
    Ciphertext,
    DataKey,
    Decrypt,
    Encrypt,
    Mac,
    MakeDataKey,
    Plaintext,
    Rewrap,
    Rewrapped,
    Sign,
    Signature,
    Unwrap,
    Use,
    Verify,
    VerifyMac,
    Work,
)


@dataclass(frozen=True, slots=True)
class Plane:
    """One data-plane operation: its body, its batch item (None: no batch), how it becomes work, how its result looks."""

    path: str
    summary: str
    body: type[msgspec.Struct]
    item: type[msgspec.Struct] | None
    answer: type[msgspec.Struct]
    op: str
    work: Callable[[Any, str], Work]
    do: Callable[[Kms, Ask, Any], Awaitable[Any]]
    show: Callable[[Any], dict[str, Any]]


def _use(b: wire.Use) -> Use:
    return Use(b.purpose, None if b.reason is None else b.reason.code, tuple(b.destination))


def _envelope(text: str) -> bytes:
    """The envelope's bytes, or b"" for a text that is none: `Kms` answers and records that as invalid ciphertext."""
    try:
        return from_text(text)
    except InvalidCiphertext:
        return b""


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _named(key: Key, version: int) -> dict[str, Any]:
    return {"key_id": str(key.id), "key_version": version}


def _ciphertext(made: Ciphertext) -> dict[str, Any]:
    text = wire.envelope_text(made.envelope)
    return {"ciphertext": text, **_named(made.key, made.version), "suite": f"0x{made.suite:04x}"}


def _rewrapped(out: Rewrapped) -> dict[str, Any]:
    to = _named(out.made.key, out.made.version)
    return {**_ciphertext(out.made), "from": _named(out.source, out.source_version), "to": to}


def _data_key(made: DataKey) -> dict[str, Any]:
    body = {"wrapped_key": wire.envelope_text(made.envelope), **_named(made.key, made.version)}
    return body if made.plaintext is None else {**body, "plaintext_key": _b64(made.plaintext)}


def _plaintext(name: str) -> Callable[[Plaintext], dict[str, Any]]:
    return lambda out: {name: _b64(out.data), **_named(out.key, out.version)}


def _signature(name: str) -> Callable[[Signature], dict[str, Any]]:
    return lambda out: {name: _b64(out.value), **_named(out.key, out.version)}


def _checked(out: Checked) -> dict[str, Any]:
    return {"valid": out.valid, **_named(out.key, out.version)}


def _signed(b: wire.SignBody) -> dict[str, Any]:
    if (b.message is None) == (b.digest is None):
        raise RequestInvalid(("/message", "one_of", "send either message or digest"))
    return {
        "use": _use(b),
        "algorithm": b.algorithm,
        "form": b.format,
        "message": None if b.message is None else wire.binary("/message", b.message),
        "digest": None if b.digest is None else wire.binary("/digest", b.digest),
    }


def _encrypt(b: wire.EncryptBody, key: str) -> Work:
    data = wire.binary("/plaintext", b.plaintext)
    if len(data) > wire.MAX_PLAINTEXT:
        raise RequestInvalid(("/plaintext", "too_long", "at most 65,536 bytes"))
    return Encrypt(use=_use(b), context=b.context, key=key, plaintext=data, version=b.version)


def _decrypt(b: wire.DecryptBody, _: str) -> Work:
    return Decrypt(use=_use(b), context=b.context, envelope=_envelope(b.ciphertext), expect_key=b.expect_key)


def _unwrap(b: wire.UnwrapBody, _: str) -> Work:
    return Unwrap(use=_use(b), context=b.context, envelope=_envelope(b.wrapped_key), expect_key=b.expect_key)


def _rewrap(b: wire.RewrapBody, _: str) -> Work:
    return Rewrap(
        use=_use(b),
        context=b.context,
        envelope=_envelope(b.ciphertext),
        to_key=b.to_key,
        to_context=b.to_context,
    )


def _make(b: wire.DataKeyBody, key: str) -> Work:
    return MakeDataKey(use=_use(b), context=b.context, key=key, length=b.length, with_plaintext=b.answer == "both")


def _sign(b: wire.SignBody, key: str) -> Work:
    return Sign(key=key, **_signed(b))


def _verify(b: wire.VerifyBody, key: str) -> Work:
    return Verify(key=key, signature=wire.binary("/signature", b.signature), version=b.version, **_signed(b))


def _mac(b: wire.MacBody, key: str) -> Work:
    return Mac(use=_use(b), key=key, algorithm=b.algorithm, message=wire.binary("/message", b.message))


def _verify_mac(b: wire.VerifyMacBody, key: str) -> Work:
    return VerifyMac(
        use=_use(b),
        key=key,
        algorithm=b.algorithm,
        message=wire.binary("/message", b.message),
        mac=wire.binary("/mac", b.mac),
        version=b.version,
    )


PLANES: Final[dict[str, Plane]] = {
    "encrypt": Plane(
        "/v1/keys/{key}/encrypt",
        "Encrypt at most 64 KiB, bound to a context",
        wire.EncryptBody,
        wire.EncryptItem,
        wire.EncryptAnswer,
        Encrypt.op,
        _encrypt,
        Kms.encrypt,
        _ciphertext,
    ),
    "decrypt": Plane(
        "/v1/decrypt",
        "Open a ciphertext",
        wire.DecryptBody,
        wire.DecryptItem,
        wire.DecryptAnswer,
        Decrypt.op,
        _decrypt,
        Kms.decrypt,
        _plaintext("plaintext"),
    ),
    "rewrap": Plane(
        "/v1/rewrap",
        "Move a ciphertext to the newest version, another key or another context",
        wire.RewrapBody,
        wire.RewrapItem,
        wire.RewrapAnswer,
        Rewrap.op,
        _rewrap,
        Kms.rewrap,
        _rewrapped,
    ),
    "data-keys": Plane(
        "/v1/keys/{key}/data-keys",
        "Make a data key, wrapped and, if asked for, in clear",
        wire.DataKeyBody,
        wire.DataKeyItem,
        wire.DataKeyAnswer,
        MakeDataKey.op,
        _make,
        Kms.data_key,
        _data_key,
    ),
    "unwrap": Plane(
        "/v1/data-keys/unwrap",
        "Open a wrapped data key",
        wire.UnwrapBody,
        wire.UnwrapItem,
        wire.UnwrapAnswer,
        Unwrap.op,
        _unwrap,
        Kms.unwrap_data_key,
        _plaintext("plaintext_key"),
    ),
    "sign": Plane(
        "/v1/keys/{key}/sign",
        "Sign a message or a digest",
        wire.SignBody,
        wire.SignItem,
        wire.SignAnswer,
        Sign.op,
        _sign,
        Kms.sign,
        _signature("signature"),
    ),
    "verify": Plane(
        "/v1/keys/{key}/verify",
        "Verify a signature; a wrong one is `valid: false`",
        wire.VerifyBody,
        wire.VerifyItem,
        wire.CheckAnswer,
        Verify.op,
        _verify,
        Kms.verify,
        _checked,
    ),
    "mac": Plane(
        "/v1/keys/{key}/mac",
        "Compute an HMAC",
        wire.MacBody,
        wire.MacItem,
        wire.MacAnswer,
        Mac.op,
        _mac,
        Kms.mac,
        _signature("mac"),
    ),
    "verify-mac": Plane(
        "/v1/keys/{key}/verify-mac",
        "Verify an HMAC; a wrong one is `valid: false`",
        wire.VerifyMacBody,
        None,
        wire.CheckAnswer,
        VerifyMac.op,
        _verify_mac,
        Kms.verify_mac,
        _checked,
    ),
}
