"""Imports on NSS: it opens RSAES-OAEP with SHA-256 itself, and what does not open never passes for a sick device (A-09)."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

sys.path.insert(0, str(Path(__file__).parents[1]))

from keystore_lab import Lab, sqlite_lab

from keystore import EXTERNAL, Envelope, InputRefused, KeySpec, Purpose
from keystore.hsm import InvalidCiphertext, Material, OaepHash, StoredKey
from keystore.pkcs11 import Pkcs11Hsm, TokenConfig, initialise, open_token
from softhsm import nss
from vectors import wrap_import

WRAPPED, DIRECT = "RSA_AES_KEY_WRAP_SHA_256", "RSAES_OAEP_SHA_256"


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pkcs11Hsm]:
    """An NSS token; a process loads the module for one directory only."""
    token = nss.bring_up(tmp_path_factory.mktemp("nss-import") / "token")
    config = TokenConfig(
        name="imports",
        region="eu-de-1",
        vendor="nss-test",
        module=token.module,
        token_label=token.label,
        pin_file=token.pin_file,
        token_dir=token.directory,
        lock_dir=tmp_path_factory.mktemp("locks"),
        installation=uuid.uuid4(),
        environment=token.environment,
    )
    initialise(config)
    made = open_token(config)
    yield made
    made.close()


@pytest.fixture
def lab(tmp_path: Path, hsm: Pkcs11Hsm) -> Iterator[Lab]:
    with sqlite_lab(tmp_path) as made:
        made.hsms = {"eu-de-1": hsm}
        made.reopen()
        yield made


def test_the_token_opens_both_hashes(hsm: Pkcs11Hsm) -> None:
    assert (hsm.opens(OaepHash.SHA_1), hsm.opens(OaepHash.SHA_256)) == (True, True)


@pytest.mark.parametrize("wrapping", [WRAPPED, DIRECT])
def test_a_secret_comes_in_inside_the_token(lab: Lab, wrapping: str) -> None:
    material = os.urandom(32)
    key = lab.import_into(lab.new(KeySpec.AES_256, origin=EXTERNAL), material, wrapping)
    assert key.latest.imported is not None
    assert key.latest.imported.path == "hsm"
    sealed = lab.seal(key).ciphertext
    assert lab.store.open(key, Envelope.parse(sealed), {}, purpose=Purpose.ENCRYPT) == b"hello"


@pytest.mark.parametrize("spec", [KeySpec.EC_P256, KeySpec.RSA_3072])
def test_a_private_key_comes_in_and_signs(lab: Lab, spec: KeySpec) -> None:
    elliptic = spec is KeySpec.EC_P256
    private: Any = ec.generate_private_key(ec.SECP256R1()) if elliptic else rsa.generate_private_key(65_537, 3_072)
    key = lab.new(spec, origin=EXTERNAL)
    made = lab.import_into(key, wrap_import.pkcs8(private), WRAPPED, public=wrap_import.spki(private))
    algorithm = "ECDSA_SHA_256" if elliptic else "RSA_PSS_SHA_256"
    signature, _ = lab.store.sign(made, algorithm, message=b"m")
    assert lab.store.verify(made, signature, algorithm, message=b"m")


@pytest.mark.parametrize("part", ["the first byte", "the middle", "the last byte", "cut"])
def test_what_does_not_open_is_the_customers_fault_and_the_token_goes_on(lab: Lab, hsm: Pkcs11Hsm, part: str) -> None:
    key = lab.new(KeySpec.AES_256, origin=EXTERNAL)
    epoch = hsm.status().epoch
    for wrapping in (WRAPPED, DIRECT):
        _, sent = lab.wrapped(key, os.urandom(32), wrapping)
        at = {"the first byte": 0, "the middle": len(sent.wrapped) // 2, "the last byte": len(sent.wrapped) - 1}.get(
            part
        )
        bad = (
            sent.wrapped[:-8]
            if at is None
            else (sent.wrapped[:at] + bytes([sent.wrapped[at] ^ 1]) + sent.wrapped[at + 1 :])
        )
        with pytest.raises(InputRefused) as why:
            lab.imports.plan_import(key, replace(sent, wrapped=bad))
        assert why.value.pointer == "/wrapped_key"
    assert (hsm.status().epoch, hsm.status().state) == (epoch, "UP")


def test_A_09_ten_thousand_bad_ciphertexts_change_nothing(hsm: Pkcs11Hsm) -> None:
    object_id = uuid.uuid4()
    made = hsm.generate(Material.AES_256, object_id)
    mac = hsm.row_mac(b"row")
    key = StoredKey(object_id, Material.AES_256, made.blob, made.mechanism, made.kek, b"", b"row", mac)
    iv, sealed = hsm.gcm_seal(key, b"aad", b"data")
    epoch = hsm.status().epoch
    for at in range(10_000):
        bad = bytearray(sealed)
        bad[at % len(bad)] ^= 1 << at % 8
        with pytest.raises(InvalidCiphertext):
            hsm.gcm_open(key, iv, b"aad", bytes(bad))
    assert hsm.gcm_open(key, iv, b"aad", sealed) == b"data"
    assert (hsm.status().epoch, hsm.status().state) == (epoch, "UP")
