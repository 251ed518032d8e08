"""Using keys: each in its own HSM, counted before use, signatures and MACs by the book, batches for one derivation."""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import load_der_public_key
from keystore_lab import Lab, new_key, sqlite_lab

from keystore import (
    AlgorithmMismatch,
    DigestLength,
    Envelope,
    HsmFault,
    HsmUnavailable,
    InputRefused,
    Key,
    KeyLimitReached,
    KeyNotFound,
    KeySpec,
    KeyState,
    ListFilter,
    Purpose,
    Rotation,
    UnsupportedByHsm,
    UsageMismatch,
)
from keystore.hsm import Material
from keystore.store import STRICT_LIMIT, STRICT_ROTATE

SIGNING = [
    (KeySpec.EC_P256, ["ECDSA_SHA_256"]),
    (KeySpec.EC_P384, ["ECDSA_SHA_384"]),
    (KeySpec.ED25519, ["ED25519"]),
    (KeySpec.RSA_3072, [f"RSA_{p}_SHA_{h}" for p in ("PSS", "PKCS1") for h in (256, 384, 512)]),
]
CASES = [(s, a, f) for s, algorithms in SIGNING for a in algorithms for f in ("der", "raw")]


@pytest.fixture(scope="module")
def signers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with sqlite_lab(tmp_path_factory.mktemp("signers")) as lab:
        yield lab, {spec: lab.new(spec) for spec, _ in SIGNING}


def opened(lab: Lab, key: Key, blob: bytes, context: dict[str, str] | None = None) -> bytes:
    return lab.store.open(key, Envelope.parse(blob), context or {}, purpose=Purpose.ENCRYPT)


def uses(lab: Lab, key: Key, version: int = 1) -> int:
    found = lab.sql("SELECT uses FROM keystore_version WHERE key_id = :k AND number = :n", k=str(key.id), n=version)
    return int(found[0][0])


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_finding_and_listing_call_no_hsm(lab: Lab) -> None:
    key = lab.new(alias="payments")
    other = lab.worker()
    before = dict(lab.hsm.calls)
    for store in (lab.store, other):
        for name in (str(key.id), "alias/payments"):
            assert store.find("acme", name) == key
        store.list("acme", filters=ListFilter(), after=None, limit=10)
        store.aliases("acme", after=None, limit=10)
        store.poll()
        assert store.current(store.find("acme", str(key.id)))
    assert dict(lab.hsm.calls) == before


def test_unknown_malformed_and_foreign_names_have_one_answer(lab: Lab) -> None:
    key = lab.new(alias="payments")
    text = str(key.id)
    names = ["", "alias/", "alias/none", "x", str(uuid.uuid4()), text.upper(), text.replace("-", ""), "{" + text + "}"]
    names += ["urn:uuid:" + text, text + " ", "alias/PAYMENTS", "alias/payments' OR '1'='1", "../" + text, "\0", "é"]
    answers = set()
    for tenant, name in [("acme", n) for n in names if n != text] + [("evil", text), ("evil", "alias/payments")]:
        with pytest.raises(KeyNotFound) as caught:
            lab.store.find(tenant, name)
        answers.add((str(caught.value), caught.value.args))
    assert len(answers) == 1


def test_a_key_found_by_id_is_the_same_for_every_caller_who_must_compare_the_tenant(lab: Lab) -> None:
    key = lab.new()
    assert lab.store.by_id(key.id).tenant == "acme"
    with pytest.raises(KeyNotFound):
        lab.store.by_id(uuid.uuid4())


# ---- envelopes -------------------------------------------------------------------------------------------------------


def test_a_batch_costs_one_derivation_for_each_key_version_and_salt_in_both_directions(lab: Lab) -> None:
    one, two = lab.new(), lab.new()
    for key in (one, two):
        lab.seal(key)
    lab.hsm.calls.clear()
    with lab.store.batch() as batch:
        made = [batch.seal(key, b"%d" % i, {"i": str(i)}) for i in range(250) for key in (one, two)]
    assert lab.hsm.calls == {"hmac": 2}
    parsed = [Envelope.parse(m.ciphertext) for m in made]
    assert {m.suite for m in made} == {4}
    assert len({e.salt for e in parsed}) == 2
    assert len({e.iv for e in parsed}) == 500
    assert [int.from_bytes(e.index, "big") for e in parsed] == list(range(500))
    lab.hsm.calls.clear()
    with lab.store.batch() as batch:
        for n, e in enumerate(parsed):
            key, i = (one, two)[n % 2], n // 2
            assert batch.open(key, e, {"i": str(i)}, purpose=Purpose.ENCRYPT) == b"%d" % i
    assert lab.hsm.calls == {"hmac": 2}
    assert opened(lab, two, made[99].ciphertext, {"i": "49"}) == b"49"  # alone, it costs its own


def test_two_batches_share_no_salt_and_ask_for_randomness_many_bytes_at_a_time(lab: Lab) -> None:
    key, drawn = lab.new(), []

    def random(length: int) -> bytes:
        drawn.append(length)
        return os.urandom(length)

    lab.random = random
    salts = set()
    for _ in range(2):
        with lab.store.batch() as batch:
            salts |= {Envelope.parse(batch.seal(key, b"x", {}).ciphertext).salt for _ in range(100)}
    assert len(salts) == 2
    assert len(drawn) <= 4


def test_a_batchs_secrets_are_overwritten_when_it_ends(lab: Lab) -> None:
    key = lab.new()
    with lab.store.batch() as batch:
        batch.seal(key, b"x", {})
        secrets = list(batch._secrets.values())
        assert all(any(s) for s in secrets)
    assert secrets
    assert not any(any(s) for s in secrets)
    with pytest.raises(RuntimeError):
        batch.seal(key, b"x", {})


def test_a_strict_key_in_a_batch_stays_strict(lab: Lab) -> None:
    key = lab.new(suite=2)
    with lab.store.batch() as batch:
        made = batch.seal(key, b"x", {"a": "b"})
        assert made.suite == 2
        assert batch.open(key, Envelope.parse(made.ciphertext), {"a": "b"}, purpose=Purpose.ENCRYPT) == b"x"


@pytest.mark.parametrize("iv", [bytes(12), b"", bytes(11), bytes([1]) * 16])
def test_a_token_that_writes_no_iv_is_refused(lab: Lab, iv: bytes) -> None:
    key = lab.new(suite=2)
    lab.hsm.iv = bytes([1]) * 12
    assert Envelope.parse(lab.seal(key).ciphertext).iv == lab.hsm.iv
    lab.hsm.iv = iv
    with pytest.raises((HsmFault, ValueError)):
        lab.seal(key)


def test_every_message_has_its_own_salt_and_iv(lab: Lab) -> None:
    key = lab.new()
    parsed = [Envelope.parse(lab.seal(key).ciphertext) for _ in range(200)]
    assert len({e.salt for e in parsed}) == len({e.iv for e in parsed}) == 200


def test_an_older_version_can_be_named_for_sealing(lab: Lab) -> None:
    first = lab.new()
    key = lab.apply(lab.store.plan_rotate(first))
    assert lab.seal(key).version == 2
    assert lab.store.seal(key, b"x", {}, version=1).version == 1


@pytest.mark.parametrize("size", [0, 15, 65, 65_536])
def test_data_keys_have_16_to_64_bytes(lab: Lab, size: int) -> None:
    key = lab.new()
    for right in (16, 64):
        lab.store.seal(key, bytes(right), {}, purpose=Purpose.DATAKEY)
    with pytest.raises(InputRefused) as caught:
        lab.store.seal(key, bytes(size), {}, purpose=Purpose.DATAKEY)
    assert caught.value.pointer == "/bytes"


def test_a_plaintext_over_64_kib_is_refused_before_anything_is_counted(lab: Lab) -> None:
    key = lab.new()
    with pytest.raises(InputRefused) as caught:
        lab.seal(key, bytes(65_537))
    assert caught.value.pointer == "/plaintext"
    assert uses(lab, key) == 0


# ---- signatures and MACs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "algorithm", "form"), CASES)
def test_signatures_verify_and_nothing_else_does(signers: Any, spec: KeySpec, algorithm: str, form: str) -> None:
    lab, keys = signers
    key, store = keys[spec], lab.store
    signature, version = store.sign(key, algorithm, message=b"hello", form=form)
    assert version == 1
    assert store.verify(key, signature, algorithm, message=b"hello", form=form)
    assert not store.verify(key, signature, algorithm, message=b"hellp", form=form)
    wrong = [b"", signature[:-1], signature + b"\0", bytes(len(signature)), b"\xff" * len(signature), b"\0" * 5_000]
    wrong += [bytes([signature[0] ^ 1]) + signature[1:], signature[:-1] + bytes([signature[-1] ^ 1])]
    assert not any(store.verify(key, bad, algorithm, message=b"hello", form=form) for bad in wrong)
    if spec in {KeySpec.EC_P256, KeySpec.EC_P384}:
        other = "raw" if form == "der" else "der"
        assert not store.verify(key, signature, algorithm, message=b"hello", form=other)
    if spec is not KeySpec.ED25519:
        digest = hashlib.new("sha" + algorithm[-3:], b"hello").digest()
        assert store.verify(key, signature, algorithm, digest=digest, form=form)


def test_raw_ecdsa_has_the_jws_length_and_der_is_what_others_verify(signers: Any) -> None:
    lab, keys = signers
    for spec, algorithm, half in ((KeySpec.EC_P256, "ECDSA_SHA_256", 32), (KeySpec.EC_P384, "ECDSA_SHA_384", 48)):
        raw, _ = lab.store.sign(keys[spec], algorithm, message=b"m", form="raw")
        assert len(raw) == 2 * half
        der, _ = lab.store.sign(keys[spec], algorithm, message=b"m")
        public = load_der_public_key(lab.store.public_key(keys[spec]))
        assert isinstance(public, ec.EllipticCurvePublicKey)
        public.verify(der, b"m", ec.ECDSA(hashes.SHA256() if half == 32 else hashes.SHA384()))
        assert utils.decode_dss_signature(der)


@pytest.mark.parametrize("length", [0, 20, 31, 33, 48, 64])
def test_a_digest_of_another_length_is_refused(signers: Any, length: int) -> None:
    lab, keys = signers
    with pytest.raises(DigestLength) as caught:
        lab.store.sign(keys[KeySpec.EC_P256], "ECDSA_SHA_256", digest=bytes(length))
    assert caught.value.pointer == "/digest"


def test_an_algorithm_that_is_not_the_keys_is_refused(signers: Any) -> None:
    lab, keys = signers
    every = [a for _, algorithms in SIGNING for a in algorithms] + ["HMAC_SHA_256", "none", "", "RSA_PSS_SHA_1"]
    for spec, own in SIGNING:
        for algorithm in set(every) - set(own):
            for act in (lab.store.sign, lambda k, a, **m: lab.store.verify(k, b"", a, **m)):
                with pytest.raises(AlgorithmMismatch) as caught:
                    act(keys[spec], algorithm, message=b"m")
                assert caught.value.pointer == "/algorithm"


def test_message_or_digest_but_one_of_them(signers: Any) -> None:
    lab, keys = signers
    for given in ({}, {"message": b"m", "digest": bytes(32)}):
        for act in (lab.store.sign, lambda k, a, **m: lab.store.verify(k, b"", a, **m)):
            with pytest.raises(InputRefused):
                act(keys[KeySpec.EC_P256], "ECDSA_SHA_256", **given)
    with pytest.raises(InputRefused):
        lab.store.sign(keys[KeySpec.ED25519], "ED25519", digest=bytes(32))
    with pytest.raises(InputRefused):
        lab.store.sign(keys[KeySpec.EC_P256], "ECDSA_SHA_256", message=b"m", form="pem")


def test_verifying_calls_the_hsm_once_for_a_row_and_then_never(lab: Lab) -> None:
    key = lab.new(KeySpec.EC_P256)
    signature, _ = lab.store.sign(key, "ECDSA_SHA_256", message=b"m")
    fresh = lab.worker()
    found = fresh.find("acme", str(key.id))
    lab.hsm.calls.clear()
    lab.hsm.checked.clear()
    for _ in range(20):
        assert fresh.verify(found, signature, "ECDSA_SHA_256", message=b"m")
    assert lab.hsm.calls == {"check_row": 1}


@pytest.mark.parametrize("spec", [KeySpec.HMAC_256, KeySpec.HMAC_512])
def test_macs_are_right_or_not_and_belong_to_one_algorithm(lab: Lab, spec: KeySpec) -> None:
    key, algorithm, name = lab.new(spec), "HMAC_SHA_" + spec[-3:], "sha" + spec[-3:]
    value, version = lab.store.mac(key, b"message", algorithm)
    assert value == hmac.digest(lab.hsm.secrets[-1], b"message", name)
    assert version == 1
    assert lab.store.verify_mac(key, b"message", value, algorithm)
    for bad in (b"", value[:-1], value[:8], value + b"\0", bytes(len(value)), bytes([value[0] ^ 1]) + value[1:]):
        assert not lab.store.verify_mac(key, b"message", bad, algorithm)
    assert not lab.store.verify_mac(key, b"messagf", value, algorithm)
    for other in {"HMAC_SHA_256", "HMAC_SHA_512", "HMAC_SHA_384", "ED25519"} - {algorithm}:
        with pytest.raises(AlgorithmMismatch):
            lab.store.mac(key, b"m", other)
    with pytest.raises(InputRefused):
        lab.store.mac(key, bytes(65_537), algorithm)


def test_a_key_serves_its_one_use_only(lab: Lab) -> None:
    encrypting, signing, macing = lab.new(), lab.new(KeySpec.EC_P256), lab.new(KeySpec.HMAC_256)
    calls: list[Any] = [lambda k=key: lab.seal(k) for key in (signing, macing)]
    for key in (encrypting, macing):
        calls += [
            lambda k=key: lab.store.sign(k, "ECDSA_SHA_256", message=b"m"),
            lambda k=key: lab.store.verify(k, b"", "ECDSA_SHA_256", message=b"m"),
            lambda k=key: lab.store.public_key(k),
        ]
    for key in (encrypting, signing):  # a key derivation key above all: its MACs would be message keys
        calls += [
            lambda k=key: lab.store.mac(k, b"m", "HMAC_SHA_512"),
            lambda k=key: lab.store.verify_mac(k, b"m", b"", "HMAC_SHA_512"),
        ]
    before = dict(lab.hsm.calls)
    for call in calls:
        with pytest.raises(UsageMismatch):
            call()
    assert dict(lab.hsm.calls) == before


# ---- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_uses", [None, 10, 1_000, 100_000])
def test_counting_never_counts_too_few_across_crashes(lab: Lab, max_uses: int | None) -> None:
    key, done = lab.new(rotation=Rotation(max_uses=max_uses)), 0
    for worker in range(5):
        store = lab.worker()
        for _ in range(1 + 7 * worker):
            store.seal(store.find("acme", str(key.id)), b"x", {})
            done += 1
            assert uses(lab, key) >= done
        # The worker is gone without a word; what it had leased stays counted.
    block = 1 if max_uses in {10} else max(1, min(1_024, (max_uses or 2**30) // 64))
    assert done <= uses(lab, key) <= done + 5 * block


def test_uses_are_committed_before_the_hsm_is_called(lab: Lab) -> None:
    key = lab.new(rotation=Rotation(max_uses=64))
    lab.seal(key)
    lab.hsm.online = False
    counted = uses(lab, key)
    with pytest.raises(HsmUnavailable):
        lab.seal(key)
    assert uses(lab, key) == counted + 1


def test_counting_from_many_threads_misses_none(lab: Lab) -> None:
    key = lab.new(rotation=Rotation(max_uses=640))  # leases of ten

    def work() -> None:
        for _ in range(50):
            lab.seal(key)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert uses(lab, key) == 400


def test_a_found_key_tells_the_uses_that_were_leased(lab: Lab) -> None:
    key = lab.new(rotation=Rotation(max_uses=10))
    for _ in range(3):
        lab.seal(lab.store.find("acme", str(key.id)))
    shown = lab.store.find("acme", str(key.id))
    assert shown.latest.uses == 3
    assert lab.store.current(key)
    assert lab.store.current(shown)


def test_suite_0x0002_refuses_at_its_limit_and_not_one_before(lab: Lab) -> None:
    key = lab.new(suite=2)
    lab.sql("UPDATE keystore_version SET uses = :u WHERE key_id = :k", u=STRICT_LIMIT - 3, k=str(key.id))
    store = lab.worker()
    for _ in range(3):
        store.seal(store.find("acme", str(key.id)), b"x", {})
    for _ in range(3):
        with pytest.raises(KeyLimitReached):
            store.seal(store.find("acme", str(key.id)), b"x", {})
    assert uses(lab, key) == STRICT_LIMIT == 3_865_470_566
    rotated = lab.apply(lab.store.plan_rotate(store.find("acme", str(key.id))))
    assert lab.seal(rotated).version == 2


def test_of_keys_that_are_counted_ahead_together_each_is_told_what_is_wrong_with_it(lab: Lab) -> None:
    full, gone, good = lab.new(suite=2), lab.new(), lab.new()
    lab.sql("UPDATE keystore_version SET uses = :u WHERE key_id = :k", u=STRICT_LIMIT, k=str(full.id))
    lab.sql("DELETE FROM keystore_version WHERE key_id = :k", k=str(gone.id))
    store = lab.worker()
    assert not any(map(store.counted, (full, gone, good)))
    told = store.count_ahead([(full, 1, 1), (gone, 1, 1), (good, 1, 1)])
    assert [type(error) for error in told] == [KeyLimitReached, KeyNotFound, type(None)]
    assert [store.counted(key) for key in (full, gone, good)] == [False, False, True]
    assert (uses(lab, full), uses(lab, good)) == (STRICT_LIMIT, 1_024)
    lab.sql("DELETE FROM keystore_version WHERE key_id = :k", k=str(good.id))  # a use asks nobody any more
    for _ in range(1_024):
        assert store.counted(good)
        store.seal(good, b"x", {})
    assert not store.counted(good)


def test_suite_0x0002_leases_2_to_the_20_and_0x0001_has_no_limit(lab: Lab) -> None:
    strict, single = lab.new(suite=2), lab.new()
    lab.seal(strict)
    assert uses(lab, strict) == 2**20
    lab.sql("UPDATE keystore_version SET uses = :u WHERE key_id = :k", u=2**40, k=str(single.id))
    lab.seal(single)


def test_what_is_due_for_rotation(lab: Lab) -> None:
    aging, busy = lab.new(rotation=Rotation(max_age=86_400)), lab.new(rotation=Rotation(max_uses=10))
    strict, never, stopped = lab.new(suite=2), lab.new(), lab.new(rotation=Rotation(max_age=86_400))
    lab.apply(lab.store.plan_transition(stopped, KeyState.SUSPENDED))

    def due() -> set[uuid.UUID]:
        return {k.id for k in lab.store.due_rotations(lab.clock())}

    assert due() == set()
    for _ in range(9):
        lab.seal(busy)
    assert due() == set()
    lab.seal(busy)
    assert due() == {busy.id}
    lab.sql("UPDATE keystore_version SET uses = :u WHERE key_id = :k", u=STRICT_ROTATE, k=str(strict.id))
    assert due() == {busy.id, strict.id}
    lab.clock.days(1)
    assert due() == {busy.id, strict.id, aging.id}
    lab.store.poll()
    for key_id in due():
        lab.apply(lab.store.plan_rotate(lab.store.by_id(key_id)))
    assert due() == set()
    assert never.latest.number == 1


# ---- HSMs ------------------------------------------------------------------------------------------------------------


def test_a_key_is_used_in_the_hsm_of_its_own_region_and_never_in_another(tmp_path: Path) -> None:
    with sqlite_lab(tmp_path, regions=("eu-de-1", "eu-fr-1")) as lab:
        key = lab.new(home="eu-fr-1")
        here, there = lab.hsms["eu-de-1"], lab.hsms["eu-fr-1"]
        here.calls.clear()
        blob = lab.seal(key).ciphertext
        assert opened(lab, key, blob) == b"hello"
        assert not here.calls
        there.online = False
        with pytest.raises(HsmUnavailable):
            opened(lab, key, blob)
        assert not here.calls
        alone = lab.worker(hsms={"eu-de-1": here})
        for act in (
            lambda: alone.seal(alone.by_id(key.id), b"x", {}),
            lambda: alone.open(key, Envelope.parse(blob), {}, purpose=Purpose.ENCRYPT),
            lambda: alone.plan_rotate(key),
            lambda: alone.random("eu-fr-1", 16),
        ):
            with pytest.raises(HsmUnavailable):
                act()
        assert not here.calls


def test_a_token_that_lacks_a_mechanism_refuses_at_creation_with_its_reason(lab: Lab) -> None:
    lab.hsm.lacks[Material.ED25519] = "CKM_EDDSA is missing"
    with pytest.raises(UnsupportedByHsm, match="CKM_EDDSA is missing"):
        lab.store.plan_create(new_key(KeySpec.ED25519))
    with pytest.raises(InputRefused) as caught:
        lab.store.supports(new_key(home="nowhere"))
    assert caught.value.pointer == "/home"
    assert not lab.hsm.calls["generate"]


@pytest.mark.parametrize(
    ("facts", "pointer"),
    [
        ({"usage": "sign"}, "/usage"),
        ({"suite": 4}, "/suite"),
        ({"suite": 0}, "/suite"),
        ({"spec": KeySpec.EC_P256, "suite": 1}, "/suite"),
        ({"purposes": ("a", "a")}, "/purposes"),
    ],
)
def test_a_new_key_that_contradicts_its_spec_is_refused(facts: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InputRefused) as caught:
        new_key(**facts)
    assert caught.value.pointer == pointer


def test_random_comes_from_the_named_regions_token(lab: Lab) -> None:
    assert len(lab.store.random("eu-de-1", 48)) == 48
    assert lab.hsm.calls["random"] == 1


# ---- tenants' audit keys ---------------------------------------------------------------------------------------------


def test_a_tenants_audit_key_is_made_once_and_is_the_same_for_every_worker(lab: Lab) -> None:
    assert not lab.store.has_tenant_secret("acme")
    generation, secret = lab.store.tenant_secret("acme")
    assert (generation, len(secret)) == (1, 32)
    assert lab.store.has_tenant_secret("acme")
    assert lab.worker().tenant_secret("acme") == lab.store.tenant_secret("acme") == (1, secret)
    assert lab.hsm.calls["generate"] == 1
    assert lab.store.tenant_secret("other")[1] != secret


def test_L_09_the_audit_key_differs_per_tenant_and_is_not_stored_in_clear(lab: Lab) -> None:
    secrets = [lab.store.tenant_secret(t)[1] for t in ("acme", "evil")]
    assert len(set(secrets)) == 2
    stored = b"".join(bytes(v) for row in lab.sql("SELECT blob, mac FROM keystore_tenant_secret") for v in row)
    assert not any(clear in stored for clear in (*secrets, *lab.hsm.secrets))


def test_workers_that_race_for_a_tenants_audit_key_agree(lab: Lab) -> None:
    stores, got = [lab.worker() for _ in range(4)], []
    threads = [threading.Thread(target=lambda s=s: got.append(s.tenant_secret("acme"))) for s in stores]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(got) == 4
    assert len(set(got)) == 1


def test_a_node_with_two_hsms_opens_an_audit_key_in_the_one_that_made_it(tmp_path: Path) -> None:
    with sqlite_lab(tmp_path, regions=("eu-de-1", "eu-fr-1")) as lab:
        made = lab.store.tenant_secret("acme")
        for hsm in lab.hsms.values():
            hsm.cached.clear()
        assert lab.worker().tenant_secret("acme") == made == (1, made[1])
        assert sum(h.calls["generate"] for h in lab.hsms.values()) == 1


def test_a_node_with_another_hsm_makes_its_own_generation(tmp_path: Path) -> None:
    with sqlite_lab(tmp_path, regions=("eu-de-1", "eu-fr-1")) as lab:
        german = lab.worker(hsms={"eu-de-1": lab.hsms["eu-de-1"]})
        french = lab.worker(hsms={"eu-fr-1": lab.hsms["eu-fr-1"]})
        assert german.tenant_secret("acme")[0] == 1
        assert not french.has_tenant_secret("acme")
        assert french.tenant_secret("acme")[0] == 2
        assert lab.worker(hsms={"eu-de-1": lab.hsms["eu-de-1"]}).tenant_secret("acme") == german.tenant_secret("acme")
