"""A real token: self-test, sessions, handles, row MACs, errors (SoftHSM2)."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import softhsm
from keystore.hsm import (
    HsmFault,
    HsmUnavailable,
    InvalidCiphertext,
    Material,
    RowDamaged,
    SelfTestFailed,
    SignScheme,
    StoredKey,
    UnsupportedByHsm,
)
from keystore.pkcs11 import Pkcs11Hsm, TokenConfig, initialise, open_token, selftest, total_calls
from keystore.pkcs11.binding import Module, Session, module
from keystore.pkcs11.errors import CkError, Fault, classify
from keystore.pkcs11.mechanisms import CKO, A
from keystore.pkcs11.sessions import TokenSessions


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> TokenConfig:
    """A token of the development node under an installation of its own: a process loads a module once."""
    dev = request.getfixturevalue("dev_files")
    tokens = softhsm.bring_up(dev.directory / "softhsm", ["skms-eu-de-2"])
    return TokenConfig(
        name="tests",
        region="eu-de-1",
        vendor="softhsm2",
        module=tokens.module,
        token_label="skms-eu-de-2",
        pin_file=tokens.pin_file("skms-eu-de-2"),
        lock_dir=tmp_path_factory.mktemp("locks"),
        installation=uuid.uuid4(),
        environment=tokens.environment,
    )


@pytest.fixture(scope="session")
def hsm(config: TokenConfig) -> Iterator[Pkcs11Hsm]:
    report = initialise(config)
    assert report.created == ("root-kek", "row-mac", "audit")
    assert initialise(config).existing == ("root-kek", "row-mac", "audit")
    made = open_token(config)
    yield made
    made.close()


def stored(hsm: Pkcs11Hsm, material: Material, binding: bytes = b"row") -> StoredKey:
    made = hsm.generate(material, uuid.uuid4())
    mac = hsm.row_mac(binding)
    return StoredKey(uuid.uuid4(), material, made.blob, made.mechanism, made.kek, made.public, binding, mac)


def test_an_empty_token_is_told_what_to_do(config: TokenConfig, hsm: Pkcs11Hsm) -> None:
    with pytest.raises(HsmUnavailable, match="skms hsm init"):
        open_token(replace(config, installation=uuid.uuid4()))


def test_the_root_kek_wraps_and_unwraps_and_nothing_else(config: TokenConfig, hsm: Pkcs11Hsm) -> None:
    session = hsm._sessions.home
    (kek,) = session.find({A.CLASS: CKO.SECRET_KEY, A.ID: config.object_id("root-kek").bytes, A.TOKEN: True})
    on = {
        n
        for n in (
            "ENCRYPT",
            "DECRYPT",
            "SIGN",
            "VERIFY",
            "DERIVE",
            "WRAP",
            "UNWRAP",
            "SENSITIVE",
            "PRIVATE",
            "TOKEN",
            "EXTRACTABLE",
            "WRAP_WITH_TRUSTED",
            "MODIFIABLE",
        )
        if session.get(kek, getattr(A, n), 1) == b"\1"
    }
    assert on == {"WRAP", "UNWRAP", "SENSITIVE", "PRIVATE", "TOKEN", "EXTRACTABLE", "WRAP_WITH_TRUSTED"}
    with pytest.raises(CkError):
        session.get(kek, A.VALUE)


def test_a_cached_hmac_costs_two_calls(hsm: Pkcs11Hsm) -> None:
    key = stored(hsm, Material.KDK_512)
    first = hsm.hmac(key, "sha512", b"x")
    before = total_calls()
    assert hsm.hmac(key, "sha512", b"x") == first
    assert total_calls() - before == 2


@pytest.mark.parametrize("field", ["binding", "mac", "blob", "kek", "mechanism"])
def test_a_changed_row_is_refused_before_the_blob_reaches_the_token(hsm: Pkcs11Hsm, field: str) -> None:
    key = stored(hsm, Material.KDK_512)
    other: dict[str, Any] = {"binding": b"other", "mac": bytes(32), "kek": uuid.uuid4(), "mechanism": "X", "blob": b""}
    unwraps: list[str] = []
    real = hsm._sessions.module.functions["UnwrapKey"]
    before = real
    with pytest.raises(RowDamaged):
        hsm.hmac(replace(key, object_id=uuid.uuid4(), **{field: other[field]}), "sha512", b"x")
    assert not unwraps
    assert hsm._sessions.module.functions["UnwrapKey"] is before


def test_swapped_rows_are_refused(hsm: Pkcs11Hsm) -> None:
    one, two = stored(hsm, Material.KDK_512, b"tenant a"), stored(hsm, Material.KDK_512, b"tenant b")
    swapped = replace(two, object_id=uuid.uuid4(), binding=one.binding)
    with pytest.raises(RowDamaged):
        hsm.hmac(swapped, "sha512", b"x")


def test_A_09_bad_ciphertexts_are_the_callers_fault_and_change_nothing(hsm: Pkcs11Hsm) -> None:
    key = stored(hsm, Material.AES_256)
    iv, sealed = hsm.gcm_seal(key, b"aad", b"data")
    epoch = hsm.status().epoch
    for at in range(10_000):
        bad = bytearray(sealed)
        bad[at % len(bad)] ^= 1 << at % 8
        with pytest.raises(InvalidCiphertext):
            hsm.gcm_open(key, iv, b"aad", bytes(bad))
    for short in (b"", b"x", sealed[:15]):
        with pytest.raises(InvalidCiphertext):
            hsm.gcm_open(key, iv, b"aad", short)
    assert hsm.gcm_open(key, iv, b"aad", sealed) == b"data"
    assert (hsm.status().epoch, hsm.status().state) == (epoch, "UP")


def test_two_encryptions_have_two_ivs(hsm: Pkcs11Hsm) -> None:
    key = stored(hsm, Material.AES_256)
    assert len({hsm.gcm_seal(key, b"a", b"d")[0] for _ in range(200)}) == 200


def test_what_cannot_be_wrapped_is_missing_with_its_reason(hsm: Pkcs11Hsm) -> None:
    assert "CKR_KEY_NOT_WRAPPABLE" in (hsm.missing(Material.ED25519) or "")
    with pytest.raises(UnsupportedByHsm):
        hsm.generate(Material.ED25519, uuid.uuid4())


def test_the_audit_key_signs_and_its_public_half_verifies(hsm: Pkcs11Hsm) -> None:
    from audit.chain import check_signature

    assert check_signature(hsm.audit_public_key(), hsm.audit_sign(b"statement"), b"statement")
    assert not check_signature(hsm.audit_public_key(), hsm.audit_sign(b"statement"), b"other")


def test_a_login_that_was_lost_comes_back_without_a_wrong_answer(hsm: Pkcs11Hsm) -> None:
    key = stored(hsm, Material.KDK_512)
    right = hsm.hmac(key, "sha512", b"x")
    sessions = hsm._sessions
    epoch = sessions.epoch
    log_out = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong)(sessions.module.lib.table[19])
    log_out(sessions.home.handle)  # what a vendor's tool beside us may do
    assert hsm.hmac(key, "sha512", b"x") == right
    assert sessions.epoch > epoch
    hsm.canary()


def test_a_wrong_pin_is_tried_once_and_never_again(config: TokenConfig, hsm: Pkcs11Hsm, tmp_path: Path) -> None:
    script = f"""
import sys, uuid, os
from pathlib import Path
from keystore.pkcs11.binding import Module
from keystore.pkcs11.recovery import Recovery
from keystore.pkcs11.vendors import VENDORS
from keystore.pkcs11.sessions import TokenSessions
from keystore.hsm import HsmUnavailable
os.environ.update({dict(config.environment)!r})
logins = []
def counted(functions):
    made = dict(functions)
    real = made["Login"]
    made["Login"] = lambda *a: (logins.append(1), real(*a))[1]
    return made
m = Module({str(config.module)!r}, wrap=counted)
r = Recovery(m, call_limit=VENDORS['softhsm2'].call_limit)
s = TokenSessions(r, label={config.token_label!r}, serial=None, pin=lambda: b"wrong-pin", size=2, read_only=True)
for _ in range(3):
    try:
        s.start() if s.state != "LOCKED" else s.run(lambda a, b: a.random(1))
    except HsmUnavailable as e:
        print(s.state, "PIN" in str(e))
print(len(logins))
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["LOCKED", "True"] * 3 + ["1"], done.stdout + done.stderr


def test_a_forked_child_fails_loudly(config: TokenConfig, hsm: Pkcs11Hsm) -> None:
    child = os.fork()
    if child == 0:
        try:
            module(str(config.module))
        except RuntimeError:
            os._exit(42)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42


def test_threads_share_a_token_and_evictions_harm_nobody(hsm: Pkcs11Hsm) -> None:
    keys = [stored(hsm, Material.KDK_512, b"row %d" % n) for n in range(12)]
    right = {k.object_id: hsm.hmac(k, "sha512", b"x") for k in keys}
    wrong: list[str] = []
    stop = threading.Event()

    def use(seed: int) -> None:
        at = seed
        while not stop.is_set():
            key = keys[at % len(keys)]
            at += 1
            try:
                if hsm.hmac(key, "sha512", b"x") != right[key.object_id]:
                    wrong.append("another key's answer")
            except Exception as error:
                wrong.append(repr(error))

    def evict() -> None:
        at = 0
        while not stop.is_set():
            hsm.forget(keys[at % len(keys)].object_id)
            at += 1

    threads = [threading.Thread(target=use, args=(n,)) for n in range(6)] + [threading.Thread(target=evict)]
    for thread in threads:
        thread.start()
    stop.wait(2.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]


class Broken:
    """A C function table in which one function answers as a token with that fault would."""

    def __init__(self, name: str, answer: Any) -> None:
        self.name, self.answer = name, answer

    def __call__(self, functions: Any) -> Any:
        made = dict(functions)
        real = made[self.name]
        made[self.name] = lambda *arguments: self.answer(real, *arguments)
        return made


@pytest.mark.parametrize(
    ("function", "answer", "rule"),
    [
        ("SetAttributeValue", lambda real, *a: 0, "root_kek_not_modifiable"),
        ("Sign", lambda real, *a: real(*a) or _spoil(a[3]), "hmac_vector"),
        ("Encrypt", lambda real, *a: real(*a) or _spoil(a[3]), "gcm_vector"),
        ("Decrypt", lambda real, *a: 0, "bad_tag_refused"),
    ],
)
def test_the_self_test_refuses_a_token_that_breaks_a_rule(
    hsm: Pkcs11Hsm, function: str, answer: Any, rule: str
) -> None:
    real = hsm._sessions.module
    shadow = object.__new__(Module)
    shadow.__dict__.update(real.__dict__)
    shadow.functions = Broken(function, answer)(real.functions)
    session = Session(shadow, hsm._sessions.home.handle)
    kek = hsm._root(session)
    selftest.run(selftest.Subject(hsm._sessions.home, hsm._vendor, kek))
    with pytest.raises(SelfTestFailed, match=rule):
        selftest.run(selftest.Subject(session, hsm._vendor, kek))


def _spoil(address: int) -> int:
    import ctypes

    if address:
        ctypes.memset(address, 0, 1)
    return 0


def test_errors_are_classified_by_stage() -> None:
    assert classify(CkError(0x5, "C_Decrypt")) is Fault.AMBIGUOUS
    assert classify(CkError(0x5, "C_Sign")) is Fault.DEVICE
    assert classify(CkError(0x101, "C_Sign")) is Fault.LOGIN
    assert classify(CkError(0xA0, "C_Login")) is Fault.PIN
    assert classify(CkError(0x80000001, "C_Sign")) is Fault.DEVICE


def test_signatures_come_in_the_forms_of_the_contract(hsm: Pkcs11Hsm) -> None:
    ec = stored(hsm, Material.EC_P256)
    assert len(hsm.sign(ec, SignScheme.ECDSA_SHA_256, bytes(32))) == 64
    rsa = stored(hsm, Material.RSA_3072)
    assert len(hsm.sign(rsa, SignScheme.RSA_PSS_SHA_256, bytes(32))) == 384
    with pytest.raises((HsmFault, HsmUnavailable)):
        hsm.sign(rsa, SignScheme.RSA_PSS_SHA_256, bytes(31))
    hsm.canary()


def test_plain_sessions_never_log_out(hsm: Pkcs11Hsm) -> None:
    assert isinstance(hsm._sessions, TokenSessions)
    extra = hsm._sessions.module.open(hsm._sessions.slot, write=False)
    extra.close()
    assert hsm._sessions.logged_in()
