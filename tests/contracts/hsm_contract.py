"""What every `keystore.hsm.Hsm` must do, as functions that fail. Run as a program it prints one line per claim.

`python hsm_contract.py CONFIG` (JSON) initialises a token and holds it to the contract in a process of its own: a process
loads a module once.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import load_der_public_key

from keystore.hsm import (
    DataKeeper,
    Hsm,
    InvalidCiphertext,
    Material,
    RowDamaged,
    SignScheme,
    StoredKey,
    UnsupportedByHsm,
)


@dataclass(frozen=True)
class Subject:
    """An HSM, and how many keys it has loaded so far."""

    hsm: Hsm
    unwraps: Callable[[], int]

    def stored(self, material: Material, row: bytes = b"row") -> StoredKey:
        made = self.hsm.generate(material, uuid.uuid4())
        mac = self.hsm.row_mac(row)
        return StoredKey(uuid.uuid4(), material, made.blob, made.mechanism, made.kek, made.public, row, mac)

    def has(self, material: Material) -> bool:
        return self.hsm.missing(material) is None


def raises(kind: type[Exception], act: Callable[[], object]) -> None:
    try:
        act()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def a_kind_is_made_or_refused_with_its_reason(s: Subject) -> None:
    for material in Material:
        if s.has(material):
            made = s.hsm.generate(material, uuid.uuid4())
            assert made.blob
            assert bool(made.public) is material.startswith(("EC", "RSA", "ED", "TRANSPORT"))
        else:
            assert str(material) in (s.hsm.missing(material) or "")
            raises(UnsupportedByHsm, lambda m=material: s.hsm.generate(m, uuid.uuid4()))


def hmac_is_of_one_key_and_one_message(s: Subject) -> None:
    one, two = s.stored(Material.KDK_512), s.stored(Material.KDK_512)
    first = s.hsm.hmac(one, "sha512", b"x")
    assert s.hsm.hmac(one, "sha512", b"x") == first
    assert s.hsm.hmac(two, "sha512", b"x") != first != s.hsm.hmac(one, "sha512", b"y")
    assert [len(s.hsm.hmac(one, name, b"x")) for name in ("sha256", "sha384", "sha512")] == [32, 48, 64]


def gcm_opens_what_it_sealed_and_nothing_else(s: Subject) -> None:
    if not s.has(Material.AES_256):
        return
    key = s.stored(Material.AES_256)
    iv, sealed = s.hsm.gcm_seal(key, b"aad", b"data")
    assert (len(iv), len(sealed)) == (12, 20)
    assert s.hsm.gcm_seal(key, b"aad", b"data")[0] != iv
    wrong_tag = sealed[:-1] + bytes([sealed[-1] ^ 1])
    for bad in (
        (iv, b"aad", wrong_tag),
        (iv, b"other", sealed),
        (bytes(12), b"aad", sealed),
        (iv, b"aad", sealed[:15]),
    ):
        raises(InvalidCiphertext, lambda b=bad: s.hsm.gcm_open(key, *b))
    assert s.hsm.gcm_open(key, iv, b"aad", sealed) == b"data"


def signatures_verify_outside(s: Subject) -> None:
    for material, scheme in (
        (Material.EC_P256, SignScheme.ECDSA_SHA_256),
        (Material.EC_P384, SignScheme.ECDSA_SHA_384),
        (Material.RSA_3072, SignScheme.RSA_PSS_SHA_256),
        (Material.ED25519, SignScheme.ED25519),
    ):
        if s.has(material):
            key = s.stored(material)
            digest = bytes(48 if scheme.endswith("384") else 32)
            verify(key.public, s.hsm.sign(key, scheme, digest), digest)


def verify(public: bytes, signature: bytes, digest: bytes) -> None:
    key = load_der_public_key(public)
    hashed = utils.Prehashed(hashes.SHA384() if len(digest) == 48 else hashes.SHA256())
    if isinstance(key, ec.EllipticCurvePublicKey):
        half = len(signature) // 2
        r, s = int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
        key.verify(utils.encode_dss_signature(r, s), digest, ec.ECDSA(hashed))
    elif isinstance(key, rsa.RSAPublicKey):
        key.verify(signature, digest, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashed)
    else:
        assert isinstance(key, ed25519.Ed25519PublicKey)
        key.verify(signature, digest)


def a_damaged_row_is_refused_before_its_key_is_loaded(s: Subject) -> None:
    one, two = s.stored(Material.KDK_512, b"tenant a"), s.stored(Material.KDK_512, b"tenant b")
    before = s.unwraps()
    for bad in (replace(one, mac=bytes(32)), replace(one, binding=b"other"), replace(two, binding=one.binding)):
        raises(RowDamaged, lambda b=bad: s.hsm.hmac(b, "sha512", b"x"))
    assert s.unwraps() == before
    s.hsm.check_row(one.binding, one.mac)
    raises(RowDamaged, lambda: s.hsm.check_row(two.binding, one.mac))


def a_forgotten_key_is_loaded_again(s: Subject) -> None:
    key = s.stored(Material.KDK_512)
    first, before = s.hsm.hmac(key, "sha512", b"x"), s.unwraps()
    assert (s.hsm.hmac(key, "sha512", b"x"), s.unwraps()) == (first, before)
    s.hsm.forget(key.object_id)
    assert (s.hsm.hmac(key, "sha512", b"x"), s.unwraps()) == (first, before + 1)


def the_status_says_what_it_can_do(s: Subject) -> None:
    s.hsm.canary()
    status = s.hsm.status()
    assert (status.name, status.region, status.state, s.hsm.state) == (s.hsm.name, s.hsm.region, "UP", "UP")
    assert len(s.hsm.random(16)) == 16


def a_data_object_is_kept_and_replaced_or_refused_with_its_reason(s: Subject) -> None:
    if not isinstance(s.hsm, DataKeeper):
        return
    keeper: DataKeeper = s.hsm
    assert keeper.data_objects("audit-anchor") == ()
    try:
        keeper.keep_data_object("audit-anchor", b"first")
    except UnsupportedByHsm as refused:
        assert "CKR_" in str(refused)
        assert keeper.data_objects("audit-anchor") == ()
        return
    assert keeper.data_objects("audit-anchor") == (b"first",)
    for data in (b"a second and longer one", b"x" * 2_048):
        keeper.keep_data_object("audit-anchor", data)
        assert keeper.data_objects("audit-anchor") == (data,)
    assert keeper.data_objects("another") == ()
    raises(UnsupportedByHsm, lambda: keeper.keep_data_object("audit-anchor", b"x" * 2_049))


CLAIMS: dict[str, Callable[[Subject], None]] = {
    claim.__name__: claim
    for claim in (
        a_kind_is_made_or_refused_with_its_reason,
        hmac_is_of_one_key_and_one_message,
        gcm_opens_what_it_sealed_and_nothing_else,
        signatures_verify_outside,
        a_damaged_row_is_refused_before_its_key_is_loaded,
        a_forgotten_key_is_loaded_again,
        the_status_says_what_it_can_do,
        a_data_object_is_kept_and_replaced_or_refused_with_its_reason,
    )
}


def held(subject: Subject) -> dict[str, str]:
    """Each claim and how it failed; "" if it holds."""
    found = {}
    for name, claim in CLAIMS.items():
        try:
            claim(subject)
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def main(config: dict[str, Any]) -> None:
    from keystore.pkcs11 import TokenConfig, initialise, open_token

    paths = {name: Path(config[name]) for name in ("module", "pin_file", "lock_dir", "token_dir") if config.get(name)}
    token = TokenConfig(**(config | paths | {"installation": uuid.UUID(config["installation"])}))
    initialise(token)
    hsm = open_token(token)
    print(json.dumps(held(Subject(hsm, lambda: hsm._sessions.unwraps))))
    hsm.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
