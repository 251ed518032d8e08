"""A second implementation of the ciphertext format, and the vectors it makes. It imports nothing of the product.

Written from the format's description alone, so that a mistake would have to be made twice. `python make_envelope.py`
writes `envelope.json` beside itself; the tests compare the product with both.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

KEY_ID = "00112233-4455-6677-8899-aabbccddeeff"
PURPOSES = {"encrypt": 1, "datakey": 2, "wrap": 3, "backup": 4}
WHERE = {"tenant": "acme", "region": "eu-de-1", "key_id": KEY_ID, "version": 7}
KEYS = {1: bytes(range(64)), 2: bytes(range(32)), 4: bytes(range(64)), 5: bytes(range(32)), 6: bytes(range(32))}
SALT, IV = bytes(range(0x80, 0xA0)), bytes(range(0xA0, 0xAC))


def lp(field: bytes) -> bytes:
    return len(field).to_bytes(4, "big") + field


def aad_of(suite: int, purpose: str, context: dict[str, str], where: dict[str, Any]) -> bytes:
    out = lp(b"skms/aad/1") + lp(where["tenant"].encode()) + lp(where["region"].encode())
    out += lp(bytes.fromhex(where["key_id"].replace("-", ""))) + lp(where["version"].to_bytes(4, "big"))
    out += lp(suite.to_bytes(2, "big")) + lp(purpose.encode()) + lp(len(context).to_bytes(4, "big"))
    for name in sorted(n.encode("utf-8") for n in context):
        out += lp(name) + lp(context[name.decode()].encode("utf-8"))
    return out


def header(suite: int, purpose: str, where: dict[str, Any]) -> bytes:
    key_id = bytes.fromhex(where["key_id"].replace("-", ""))
    version: int = where["version"]
    return b"SK\x01" + suite.to_bytes(2, "big") + key_id + bytes([PURPOSES[purpose]]) + version.to_bytes(3, "big")


def prf(key: bytes, label: str, data: bytes) -> bytes:
    return hmac.new(key, b"\x00\x00\x00\x01" + label.encode() + b"\x00" + data + b"\x00\x00\x02\x00", "sha512").digest()


def imported_prf(key: bytes, label: str, data: bytes) -> bytes:
    """As `prf` for an imported key of 32 bytes: HMAC-SHA-256, 256 bits."""
    assert len(key) == 32
    return hmac.new(key, b"\x00\x00\x00\x01" + label.encode() + b"\x00" + data + b"\x00\x00\x01\x00", "sha256").digest()


def imported_keys(key: bytes, salt: bytes, index: bytes, aad: bytes) -> tuple[bytes, bytes]:
    digest = hashlib.sha256(aad).digest()
    if not index:
        secret, info = imported_prf(key, "skms/v1/enc", salt + digest), b"skms/v1/enc-keys\x00"
    else:
        secret, info = imported_prf(key, "skms/v1/batch", salt), b"skms/v1/item\x00" + index + digest
    out = HKDFExpand(hashes.SHA512(), 64, info).derive(secret)
    return out[:32], out[32:]


def message_keys(key: bytes, salt: bytes, index: bytes, aad: bytes) -> tuple[bytes, bytes]:
    if len(key) == 32:
        return imported_keys(key, salt, index, aad)
    digest = hashlib.sha256(aad).digest()
    if not index:
        out = prf(key, "skms/v1/enc", salt + digest)
    else:
        secret = prf(key, "skms/v1/batch", salt)
        out = hmac.new(secret, b"skms/v1/item\x00" + index + digest + b"\x01", "sha512").digest()
    return out[:32], out[32:]


def seal(
    suite: int,
    key: bytes,
    purpose: str,
    plaintext: bytes,
    context: dict[str, str],
    *,
    iv: bytes,
    salt: bytes = b"",
    index: int | None = None,
    where: dict[str, Any] | None = None,
) -> bytes:
    where = where or WHERE
    aad = aad_of(suite, purpose, context, where)
    head = header(suite, purpose, where)
    if suite == 2:
        return head + iv + AESGCM(key).encrypt(iv, bytes(32) + plaintext, hashlib.sha256(aad).digest())
    place = b"" if index is None else index.to_bytes(4, "big")
    message_key, commitment = message_keys(key, salt, place, aad)
    return head + salt + place + iv + commitment + AESGCM(message_key).encrypt(iv, plaintext, aad)


def open_envelope(blob: bytes, key: bytes, context: dict[str, str], *, tenant: str, region: str) -> bytes:
    """The plaintext; an exception if anything is wrong."""
    suite, purpose = int.from_bytes(blob[3:5], "big"), {v: k for k, v in PURPOSES.items()}[blob[21]]
    where = {
        "tenant": tenant,
        "region": region,
        "key_id": blob[5:21].hex(),
        "version": int.from_bytes(blob[22:25], "big"),
    }
    assert blob[:3] == b"SK\x01"
    aad, rest = aad_of(suite, purpose, context, where), blob[25:]
    if suite == 2:
        data = AESGCM(key).decrypt(rest[:12], rest[12:], hashlib.sha256(aad).digest())
        assert data[:32] == bytes(32)
        return data[32:]
    cut = 36 if suite in (4, 6) else 32
    message_key, commitment = message_keys(key, rest[:32], rest[32:cut], aad)
    assert commitment == rest[cut + 12 : cut + 44]
    return AESGCM(message_key).decrypt(rest[cut : cut + 12], rest[cut + 44 :], aad)


ROW = {"table": "patients", "row": "42"}
CASES: list[tuple[str, int, str, bytes, dict[str, str], int | None]] = [
    ("published", 1, "encrypt", b"hello", ROW, None),
    ("published-batch", 4, "encrypt", b"hello", ROW, 3),
    ("strict", 2, "encrypt", b"hello", ROW, None),
    *(
        (f"{name}-{suite:04x}", suite, purpose, data, context, 0 if suite in (4, 6) else None)
        for suite in (1, 2, 4, 5, 6)
        for name, purpose, data, context in (
            ("empty-plaintext", "encrypt", b"", ROW),
            ("empty-context", "encrypt", b"hello", {}),
            ("empty-value", "encrypt", b"hello", {"row": ""}),
            ("unicode", "encrypt", "grüße 🔑".encode(), {"straße": "Köln", "z": "1", "🔑": "ключ", "a": "1"}),
            ("datakey", "datakey", bytes(range(32)), {"file": "a.tar"}),
            ("long", "encrypt", bytes(i % 251 for i in range(1000)), {"k" * 100: "v" * 200}),
        )
    ),
    ("last-of-batch", 4, "encrypt", b"hello", ROW, 499),
    ("imported", 5, "encrypt", b"hello", ROW, None),
    ("imported-batch", 6, "encrypt", b"hello", ROW, 3),
]


def vectors() -> list[dict[str, Any]]:
    made = []
    for name, suite, purpose, plaintext, context, index in CASES:
        salt = b"" if suite == 2 else SALT
        blob = seal(suite, KEYS[suite], purpose, plaintext, context, iv=IV, salt=salt, index=index)
        made.append(
            {
                "name": name,
                "suite": f"0x{suite:04x}",
                **WHERE,
                "key": KEYS[suite].hex(),
                "purpose": purpose,
                "context": context,
                "plaintext": plaintext.hex(),
                "salt": salt.hex(),
                "index": index,
                "iv": IV.hex(),
                "aad_sha256": hashlib.sha256(aad_of(suite, purpose, context, WHERE)).hexdigest(),
                "envelope": blob.hex(),
            }
        )
    return made


def text() -> str:
    return json.dumps({"format": "skms envelope 1", "vectors": vectors()}, indent=1, ensure_ascii=True) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("envelope.json").write_text(text())
