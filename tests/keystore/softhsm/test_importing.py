"""Imports on a real token: SHA-1 is opened inside SoftHSM, SHA-256 and HPKE in software, and what comes in stays in."""

from __future__ import annotations

import dataclasses
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.keywrap import aes_key_wrap, aes_key_wrap_with_padding

import softhsm

sys.path.insert(0, str(Path(__file__).parents[1]))

from keystore_lab import Lab, sqlite_lab

from keystore import EXTERNAL, Envelope, InputRefused, Key, KeySpec, Purpose
from keystore.hsm import Importer, Material, OaepHash
from keystore.pkcs11 import Pkcs11Hsm, TokenConfig, initialise, open_token
from keystore.pkcs11.binding import gcm, mechanism
from keystore.pkcs11.errors import CkError
from keystore.pkcs11.mechanisms import CKM, A
from vectors import wrap_import

SHA_1, SHA_256 = "RSA_AES_KEY_WRAP_SHA_1", "RSA_AES_KEY_WRAP_SHA_256"


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Pkcs11Hsm]:
    """A token of the development node under an installation of its own: a process loads a module once."""
    dev = request.getfixturevalue("dev_files")
    tokens = softhsm.bring_up(dev.directory / "softhsm", ["skms-eu-de-2"])
    config = TokenConfig(
        name="imports",
        region="eu-de-1",
        vendor="softhsm2",
        module=tokens.module,
        token_label="skms-eu-de-2",
        pin_file=tokens.pin_file("skms-eu-de-2"),
        lock_dir=tmp_path_factory.mktemp("locks"),
        installation=uuid.uuid4(),
        environment=tokens.environment,
    )
    initialise(config)
    made = open_token(config)
    yield made
    made.close()


@pytest.fixture
def lab(tmp_path: Path, hsm: Pkcs11Hsm) -> Iterator[Lab]:
    """A keystore over the real token."""
    with sqlite_lab(tmp_path) as made:
        made.hsms = {"eu-de-1": hsm}
        made.reopen()
        yield made


def refused(lab: Lab, key: Key, sent: Any) -> str:
    with pytest.raises(InputRefused) as why:
        lab.imports.plan_import(key, sent)
    return f"{why.value.pointer} {why.value.code}"


def waiting(lab: Lab, spec: KeySpec = KeySpec.AES_256, **facts: Any) -> Key:
    return lab.new(spec, origin=EXTERNAL, **facts)


def test_the_token_opens_what_it_can_and_says_so(hsm: Pkcs11Hsm) -> None:
    assert isinstance(hsm, Importer)
    assert (hsm.opens(OaepHash.SHA_1), hsm.opens(OaepHash.SHA_256)) == (True, False)


@pytest.mark.parametrize("wrapping", wrap_import.WRAPPINGS)
def test_a_secret_comes_in_by_every_wrapping(lab: Lab, wrapping: str) -> None:
    material = os.urandom(32)
    key = lab.import_into(waiting(lab), material, wrapping)
    assert key.latest.imported is not None
    assert key.latest.imported.path == ("hsm" if wrapping.endswith("SHA_1") else "software")
    sealed = lab.seal(key).ciphertext
    from vectors import make_envelope

    assert make_envelope.open_envelope(sealed, material, {}, tenant="acme", region="eu-de-1") == b"hello"
    assert lab.store.open(key, Envelope.parse(sealed), {}, purpose=Purpose.ENCRYPT) == b"hello"


@pytest.mark.parametrize(
    ("spec", "wrapping"),
    [
        *((KeySpec.EC_P256, SHA_1), (KeySpec.EC_P384, SHA_256), (KeySpec.RSA_3072, SHA_1)),
        *((KeySpec.EC_P384, wrap_import.HPKE_NAME), (KeySpec.RSA_3072, wrap_import.HPKE_NAME)),
    ],
)
def test_a_private_key_comes_in_and_signs(lab: Lab, spec: KeySpec, wrapping: str) -> None:
    private: Any = rsa.generate_private_key(65_537, 3_072)
    if spec is not KeySpec.RSA_3072:
        private = ec.generate_private_key(ec.SECP256R1() if spec is KeySpec.EC_P256 else ec.SECP384R1())
    key = waiting(lab, spec)
    made = lab.import_into(key, wrap_import.pkcs8(private), wrapping, public=wrap_import.spki(private))
    algorithm = {"EC_P256": "ECDSA_SHA_256", "EC_P384": "ECDSA_SHA_384"}.get(spec, "RSA_PSS_SHA_256")
    signature, _ = lab.store.sign(made, algorithm, message=b"m")
    assert lab.store.verify(made, signature, algorithm, message=b"m")


def test_another_length_is_refused_though_the_token_would_pad_it(lab: Lab) -> None:
    for suite, sizes, right in ((5, (5, 31, 33, 64), 32), (1, (32, 57, 63), 64)):
        key = waiting(lab, suite=suite)
        made, sent = lab.wrapped(key, os.urandom(right), SHA_1)
        for size in sizes:
            bad = dataclasses.replace(sent, wrapped=wrap_import.wrap(SHA_1, made.public, os.urandom(size)))
            assert refused(lab, key, bad) == "/wrapped_key wrong_length"
        assert lab.apply(lab.imports.plan_import(key, sent)).latest_number == 1


def test_patterns_and_reused_material_are_found_inside_the_token(lab: Lab) -> None:
    key, material = waiting(lab), os.urandom(32)
    made, sent = lab.wrapped(key, material, SHA_1)
    for weak in (bytes(32), b"\xa5\x5a" * 16):
        wrapped, value = wrap_import.wrap(SHA_1, made.public, weak), wrap_import.check_value(weak)
        bad = dataclasses.replace(sent, wrapped=wrapped, check_value=value)
        assert refused(lab, key, bad) == "/wrapped_key weak_material"
    key = lab.apply(lab.imports.plan_import(key, sent))
    again = lab.wrapped(key, material, wrap_import.HPKE_NAME)[1]
    assert refused(lab, key, again) == "/wrapped_key reused_material"


def test_what_does_not_open_is_one_answer_and_the_token_goes_on(lab: Lab, hsm: Pkcs11Hsm) -> None:
    key, material = waiting(lab), os.urandom(32)
    epoch = hsm.status().epoch
    made, sent = lab.wrapped(key, material, SHA_1)
    ephemeral = os.urandom(32)
    transport = wrap_import.oaep(made.public, "1", ephemeral)
    for wrong in (
        os.urandom(len(sent.wrapped)),
        transport + aes_key_wrap(ephemeral, material + b"\x08" * 8),  # C-13: PKCS#5 padding under RFC 3394
        transport + aes_key_wrap_with_padding(os.urandom(32), material),
        wrap_import.oaep(made.public, "256", ephemeral) + sent.wrapped[384:],
    ):
        assert refused(lab, key, dataclasses.replace(sent, wrapped=wrong)) == "/wrapped_key not_openable"
    assert (hsm.status().state, hsm.status().epoch) == ("UP", epoch)
    assert lab.apply(lab.imports.plan_import(key, sent)).latest_number == 1


def test_malformed_pkcs8_and_another_pair_are_refused(lab: Lab) -> None:
    one, two = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    public = wrap_import.spki(one)
    key = waiting(lab, KeySpec.EC_P256)
    made, sent = lab.wrapped(key, b"x", SHA_1, public=public)
    for material, answer in (
        (os.urandom(64), "/wrapped_key not_openable"),
        (wrap_import.pkcs8(one)[:-20], "/wrapped_key not_openable"),
        (wrap_import.pkcs8(two), "/public_key key_mismatch"),
        (wrap_import.pkcs8(ec.generate_private_key(ec.SECP384R1())), "/public_key key_mismatch"),
    ):
        wrapped = wrap_import.wrap(SHA_1, made.public, material)
        assert refused(lab, key, dataclasses.replace(sent, wrapped=wrapped)) == answer


def test_C_12_an_imported_key_signs_and_does_nothing_else_and_is_never_called_born_inside(
    lab: Lab, hsm: Pkcs11Hsm
) -> None:
    key = lab.import_into(waiting(lab), os.urandom(32), SHA_1)
    lab.seal(key)
    stored = lab.store._stored(key, 1)
    assert stored.material is Material.KDK_256
    session = hsm._sessions.home
    handle = hsm._loader(stored)(session)
    try:
        flags = {
            n: session.get(handle, number, 1) for n, number in (("always", 0x165), ("never", 0x164), ("local", 0x163))
        }
        assert set(flags.values()) == {b"\0"}
        for refuse in (
            lambda: session.encrypt(handle, gcm(CKM.AES_GCM, os.urandom(12), b""), b"x"),
            lambda: session.decrypt(handle, gcm(CKM.AES_GCM, os.urandom(12), b""), bytes(17)),
            lambda: session.wrap(mechanism(hsm._kwp), hsm._root(session), handle),
            lambda: session.wrap(mechanism(hsm._kwp), handle, hsm._row_mac_key(session)),
            lambda: session.get(handle, A.VALUE),
        ):
            with pytest.raises(CkError):
                refuse()
        assert all(session.get(handle, a, 1) == b"\0" for a in (A.DERIVE, A.ENCRYPT, A.DECRYPT, A.WRAP, A.UNWRAP))
    finally:
        session.destroy(handle)
    assert key.origin == "external"


def test_a_transport_key_unwraps_and_does_nothing_else(lab: Lab, hsm: Pkcs11Hsm) -> None:
    made = hsm.generate(Material.TRANSPORT_RSA_3072, uuid.uuid4())
    binding = b"row"
    from keystore.hsm import StoredKey

    stored = StoredKey(
        *(uuid.uuid4(), Material.TRANSPORT_RSA_3072, made.blob, made.mechanism, made.kek, made.public, binding),
        hsm.row_mac(binding),
    )
    session = hsm._sessions.home
    handle = hsm._loader(stored)(session)
    try:
        on = {
            n for n in ("SIGN", "DECRYPT", "UNWRAP", "DERIVE", "EXTRACTABLE", "SENSITIVE") if _flag(session, handle, n)
        }
        assert on == {"UNWRAP", "SENSITIVE"}
    finally:
        session.destroy(handle)


def _flag(session: Any, handle: int, name: str) -> bool:
    return bool(session.get(handle, getattr(A, name), 1) == b"\1")


def test_no_object_stays_on_the_token(lab: Lab, hsm: Pkcs11Hsm) -> None:
    session = hsm._sessions.home
    before = set(session.find({A.TOKEN: False}, 500))
    key = lab.import_into(waiting(lab), os.urandom(32), SHA_1)
    lab.import_into(key, os.urandom(32), wrap_import.HPKE_NAME)
    assert len(set(session.find({A.TOKEN: False}, 500)) - before) == 0
