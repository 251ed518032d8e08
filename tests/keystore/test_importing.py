"""Import of keys that were made elsewhere: tokens, what is refused, expiry, restarts and races (A-03, C-10 to C-13)."""

from __future__ import annotations

import dataclasses
import os
import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.keywrap import aes_key_wrap
from keystore_lab import Lab

from keystore import (
    EXTERNAL,
    Envelope,
    HsmUnavailable,
    Import,
    Imports,
    InputRefused,
    Key,
    KeySpec,
    KeyState,
    Purpose,
    Rotation,
    RowDamaged,
    UsageMismatch,
    WrongState,
)
from keystore.hsm import OaepHash
from keystore.importing import ATTEMPTS, is_pattern, is_roca, known_weak
from vectors import wrap_import

DAY = 86_400_000_000
RSA_KEYS: dict[int, rsa.RSAPrivateKey] = {}


def rsa_key(bits: int = 3_072) -> rsa.RSAPrivateKey:
    if bits not in RSA_KEYS:
        RSA_KEYS[bits] = rsa.generate_private_key(65_537, bits)
    return RSA_KEYS[bits]


@pytest.fixture(autouse=True)
def quick_transport(lab: Lab) -> None:
    """Transport keys that cost no generation."""
    from keystore.hsm import Material

    lab.hsm.pairs[Material.TRANSPORT_RSA_3072] = wrap_import.pkcs8(rsa_key())


def code_of(act: Callable[[], object]) -> str:
    """`pointer code` of the refusal."""
    with pytest.raises(InputRefused) as refused:
        act()
    return f"{refused.value.pointer} {refused.value.code}"


def attempt(lab: Lab, key: Key, material: bytes, wrapping: str = "RSA_AES_KEY_WRAP_SHA_256", **facts: Any) -> str:
    """The code with which an import is refused."""
    sent = lab.wrapped(key, material, wrapping, **facts)[1]
    return code_of(lambda: lab.imports.plan_import(key, sent))


def waiting(lab: Lab, spec: KeySpec = KeySpec.AES_256, **facts: Any) -> Key:
    return lab.new(spec, origin=EXTERNAL, **facts)


def software(lab: Lab) -> None:
    lab.hsm.oaep = frozenset()


# ---- the way in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapping", wrap_import.WRAPPINGS)
@pytest.mark.parametrize("inside", [True, False], ids=["hsm", "software"])
def test_every_wrapping_brings_a_key_in_on_both_paths(lab: Lab, wrapping: str, inside: bool) -> None:
    if not inside:
        software(lab)
    key, material = waiting(lab), os.urandom(32)
    assert (key.api_state, key.versions, key.latest_number, key.suite) == ("pending_import", (), 0, 5)
    made = lab.import_into(key, material, wrapping)
    assert (made.state, made.origin, made.latest_number) == (KeyState.ACTIVE, "external", 1)
    assert made.latest.imported is not None
    assert made.latest.imported.path == ("hsm" if inside and not wrapping.startswith("HPKE") else "software")
    sealed = lab.seal(made)
    assert sealed.suite == 5
    from vectors import make_envelope

    opened = make_envelope.open_envelope(sealed.ciphertext, material, {}, tenant="acme", region="eu-de-1")
    assert opened == b"hello"
    fresh = lab.worker().find("acme", str(key.id))
    assert lab.worker().open(fresh, Envelope.parse(sealed.ciphertext), {}, purpose=Purpose.ENCRYPT) == b"hello"


@pytest.mark.parametrize(
    ("spec", "suite", "size"),
    [(KeySpec.AES_256, 1, 64), (KeySpec.HMAC_256, None, 32), (KeySpec.HMAC_512, None, 64)],
)
def test_secrets_of_each_kind_and_length_come_in(lab: Lab, spec: KeySpec, suite: int | None, size: int) -> None:
    made = lab.imported(spec, os.urandom(size), suite=suite)
    assert made.state is KeyState.ACTIVE
    assert made.suite == (suite or 0)


@pytest.mark.parametrize("inside", [True, False], ids=["hsm", "software"])
@pytest.mark.parametrize("spec", [KeySpec.EC_P256, KeySpec.EC_P384, KeySpec.RSA_3072])
def test_private_keys_come_in_and_sign(lab: Lab, spec: KeySpec, inside: bool) -> None:
    if not inside:
        software(lab)
    private = fresh_pair(spec)
    public = wrap_import.spki(private)
    key = lab.import_into(waiting(lab, spec), wrap_import.pkcs8(private), public=public)
    algorithm = {"EC_P256": "ECDSA_SHA_256", "EC_P384": "ECDSA_SHA_384"}.get(spec, "RSA_PSS_SHA_256")
    signature, _ = lab.store.sign(key, algorithm, message=b"m")
    assert lab.store.verify(key, signature, algorithm, message=b"m")
    assert lab.store.public_key(key) == public


def fresh_pair(spec: KeySpec) -> Any:
    curves = {KeySpec.EC_P256: ec.SECP256R1(), KeySpec.EC_P384: ec.SECP384R1()}
    return ec.generate_private_key(curves[spec]) if spec in curves else rsa.generate_private_key(65_537, 3_072)


def test_a_pending_key_is_of_no_use_and_only_ends(lab: Lab) -> None:
    key = waiting(lab)
    for use in (
        lambda: lab.seal(key),
        lambda: lab.store.plan_transition(key, KeyState.ACTIVE),
        lambda: lab.store.plan_transition(key, KeyState.SUSPENDED),
    ):
        with pytest.raises(WrongState):
            use()
    with pytest.raises(WrongState):
        lab.store.public_key(waiting(lab, KeySpec.EC_P256))
    stopped = lab.apply(lab.store.plan_schedule_deletion(key, wait_s=7 * 86_400))
    assert stopped.api_state == "pending_deletion"
    back = lab.apply(lab.store.plan_cancel_deletion(stopped))
    assert back.api_state == "pending_import"
    stopped = lab.apply(lab.store.plan_schedule_deletion(back, wait_s=7 * 86_400))
    lab.clock.days(8)
    gone = lab.apply(lab.store.plan_destroy(stopped))
    assert lab.worker().find("acme", str(key.id)).state is gone.state is KeyState.DESTROYED


def test_destroying_a_key_ends_its_open_import(lab: Lab) -> None:
    key = waiting(lab)
    sent = lab.wrapped(key, os.urandom(32))[1]
    stopped = lab.apply(lab.store.plan_schedule_deletion(key, wait_s=7 * 86_400))
    with pytest.raises(WrongState):
        lab.imports.plan_import(stopped, sent)
    lab.clock.days(8)
    lab.apply(lab.store.plan_destroy(stopped))
    assert [bytes(r[0]) for r in lab.sql("SELECT blob FROM keystore_import")] == [b""]


def test_rotation_is_by_import_only_and_old_ciphertexts_go_on_opening(lab: Lab) -> None:
    key = lab.imported()
    first = lab.seal(key)
    assert code_of(lambda: lab.store.plan_rotate(key)) == " not_for_imported"
    assert code_of(lambda: waiting(lab, rotation=Rotation(86_400, None))) == "/rotation not_for_imported"
    assert code_of(lambda: lab.store.plan_update(key, rotation=Rotation(86_400, None))) == "/rotation not_for_imported"
    again = lab.import_into(key, os.urandom(32))
    assert again.latest_number == 2
    assert lab.store.open(again, Envelope.parse(first.ciphertext), {}, purpose=Purpose.ENCRYPT) == b"hello"
    disabled = lab.apply(lab.store.plan_transition(again, KeyState.SUSPENDED))
    assert lab.import_into(disabled, os.urandom(32)).state is KeyState.SUSPENDED


def test_only_keys_created_for_import_take_material_and_only_in_their_suites(lab: Lab) -> None:
    own = lab.new()
    plan = lab.imports.plan_parameters
    assert code_of(lambda: plan(own, lab_wrapping("RSAES_OAEP_SHA_256"), None)) == " not_external"
    assert code_of(lambda: waiting(lab, suite=2)) == "/suite not_for_imported"
    assert code_of(lambda: lab.new(suite=5)) == "/suite unknown"
    assert code_of(lambda: waiting(lab, KeySpec.ED25519)) == "/spec not_importable"
    pair = waiting(lab, KeySpec.EC_P256)
    assert code_of(lambda: plan(pair, lab_wrapping("RSAES_OAEP_SHA_256"), None)) == "/wrapping not_for_spec"
    hpke = lab_wrapping(wrap_import.HPKE_NAME)
    assert code_of(lambda: plan(pair, hpke, "RSA_3072")) == "/wrapping_key_spec not_for_wrapping"


def lab_wrapping(name: str) -> Any:
    from keystore import Wrapping

    return Wrapping(name)


def test_a_kdk_is_reachable_by_no_mac_operation(lab: Lab) -> None:
    key = lab.imported()
    with pytest.raises(UsageMismatch):
        lab.store.mac(key, b"skms/kcv/1", "HMAC_SHA_256")


# ---- tokens --------------------------------------------------------------------------------------------------------


def test_a_token_is_good_once_also_after_a_restart_and_on_another_worker(lab: Lab) -> None:
    key = waiting(lab)
    sent = lab.wrapped(key, os.urandom(32))[1]
    other = lab.worker()  # another process, which never saw the parameters made
    elsewhere = Imports(other, lab.catalog)
    used = lab.apply(elsewhere.plan_import(other.find("acme", str(key.id)), sent), told=False)
    lab.store.poll()
    for imports in (lab.imports, elsewhere):
        assert code_of(lambda i=imports: i.plan_import(used, sent)) == "/import_token used"
    assert lab.sql("SELECT blob, sealed FROM keystore_import") == [(b"", b"")]


def test_of_two_imports_with_one_token_exactly_one_wins(lab: Lab) -> None:
    key, material = waiting(lab), os.urandom(32)
    sent = lab.wrapped(key, material)[1]
    stores = [lab.worker(), lab.worker()]
    both, answers = threading.Barrier(2), []

    def run(store: Any) -> None:
        plan = Imports(store, lab.catalog).plan_import(store.find("acme", str(key.id)), sent)
        both.wait(10)
        try:
            lab.apply(plan)
            answers.append("ok")
        except InputRefused as refused:
            answers.append(refused.code)

    threads = [threading.Thread(target=run, args=(s,)) for s in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(answers) == ["ok", "used"]
    assert lab.worker().find("acme", str(key.id)).latest_number == 1


def test_asking_again_spends_the_earlier_token_and_24_hours_end_one(lab: Lab) -> None:
    key = waiting(lab)
    first, second = lab.wrapped(key, os.urandom(32))[1], lab.wrapped(key, os.urandom(32))[1]
    assert code_of(lambda: lab.imports.plan_import(key, first)) == "/import_token used"
    lab.clock.days(1.001)
    assert code_of(lambda: lab.imports.plan_import(key, second)) == "/import_token expired"
    assert lab.imports.sweep(lab.clock()) == 1
    assert lab.sql("SELECT blob FROM keystore_import WHERE length(blob) > 0") == []
    lab.clock.days(31)
    lab.imports.sweep(lab.clock())
    assert code_of(lambda: lab.imports.plan_import(key, second)) == "/import_token invalid"


def test_A_03_a_token_of_another_key_or_tenant_or_an_altered_one_is_invalid(lab: Lab) -> None:
    key, other, foreign = waiting(lab), waiting(lab), waiting(lab, tenant="evil")
    sent = lab.wrapped(key, os.urandom(32))[1]
    for wrong in (other, foreign):
        assert code_of(lambda k=wrong: lab.imports.plan_import(k, sent)) == "/import_token invalid"
    for at in (12, 30, 40, 60, len(sent.token) - 1):
        altered = sent.token[:at] + ("A" if sent.token[at] != "A" else "B") + sent.token[at + 1 :]
        bad = dataclasses.replace(sent, token=altered)
        assert code_of(lambda b=bad: lab.imports.plan_import(key, b)) == "/import_token invalid"
    assert lab.apply(lab.imports.plan_import(key, sent)).latest_number == 1, "the token itself is still good"


@pytest.mark.parametrize(
    "change",
    [
        *("wrapping = 'RSAES_OAEP_SHA_256'", "expires_at = expires_at + 1000000", "path = 'software'"),
        *("blob = zeroblob(40)", "public = x'00'", "sealed = x'01'", "material = 'KDK_512'"),
        *("object_id = '00000000-0000-4000-8000-000000000000'", "kek = '00000000-0000-4000-8000-000000000000'"),
        *("key_id = '00000000-0000-4000-8000-000000000000'", "tenant = 'evil'", "mechanism = 'AES_KEY_WRAP'"),
    ],
)
def test_a_changed_row_of_an_import_is_refused(lab: Lab, change: str) -> None:
    key = waiting(lab)
    sent = lab.wrapped(key, os.urandom(32))[1]
    lab.sql(f"UPDATE keystore_import SET {change}")
    calls = lab.hsm.calls["unwrap"]
    with pytest.raises((RowDamaged, InputRefused)):
        lab.imports.plan_import(key, sent)
    assert lab.hsm.calls["unwrap"] == calls


def test_five_failures_spend_a_token_and_none_tells_why_it_does_not_open(lab: Lab) -> None:
    key, material = waiting(lab), os.urandom(32)
    sent = lab.wrapped(key, material)[1]
    wrong = [
        bytes([sent.wrapped[0] ^ 1]) + sent.wrapped[1:],  # the RSA part
        sent.wrapped[:-1] + bytes([sent.wrapped[-1] ^ 1]),  # the AES part
        sent.wrapped[:100],
        sent.wrapped + bytes(8),
        os.urandom(len(sent.wrapped)),
    ]
    assert len(wrong) == ATTEMPTS
    for data in wrong:
        bad = dataclasses.replace(sent, wrapped=data)
        assert code_of(lambda b=bad: lab.imports.plan_import(key, b)) == "/wrapped_key not_openable"
    assert code_of(lambda: lab.imports.plan_import(key, sent)) == "/import_token used"
    assert lab.sql("SELECT length(blob) FROM keystore_import") == [(0,)]


def test_an_hsm_that_is_away_costs_no_attempt(lab: Lab) -> None:
    key = waiting(lab)
    sent = lab.wrapped(key, os.urandom(32))[1]
    for _ in range(ATTEMPTS + 1):
        lab.hsm.online = False
        with pytest.raises(HsmUnavailable):
            lab.imports.plan_import(key, sent)
        lab.hsm.online = True
    assert lab.apply(lab.imports.plan_import(key, sent)).latest_number == 1


def test_hpke_is_bound_to_tenant_key_and_expiry(lab: Lab) -> None:
    key = waiting(lab)
    for change in ({"tenant": "evil"}, {"key": uuid.uuid4()}, {"spec": "HMAC_256"}, {"later": 1}):
        made, plan = lab.imports.plan_parameters(key, lab_wrapping(wrap_import.HPKE_NAME), None)
        lab.apply(plan)
        info = wrap_import.info(
            str(change.get("tenant", "acme")),
            uuid.UUID(str(change.get("key", key.id))).bytes,
            str(change.get("spec", "AES_256")),
            made.expires_at // 1_000_000 + int(str(change.get("later", 0))),
        )
        material = os.urandom(32)
        wrapped = wrap_import.wrap(wrap_import.HPKE_NAME, made.public, material, info=info)
        sent = Import(made.token, wrapped, wrap_import.check_value(material))
        assert code_of(lambda s=sent: lab.imports.plan_import(key, s)) == "/wrapped_key not_openable"


# ---- refused material ----------------------------------------------------------------------------------------------

PATTERNS = {
    "zero": bytes(32),
    "ones": b"\xff" * 32,
    "two bytes": b"\x12\x34" * 16,
    "counting up": bytes(range(32)),
    "counting down": bytes(range(200, 168, -1)),
}


@pytest.mark.parametrize("inside", [True, False], ids=["hsm", "software"])
@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_patterns_are_weak_on_both_paths(lab: Lab, name: str, inside: bool) -> None:
    if not inside:
        software(lab)
    assert attempt(lab, waiting(lab), PATTERNS[name]) == "/wrapped_key weak_material"


def test_longer_periods_are_seen_where_the_secret_can_be_looked_at(lab: Lab) -> None:
    software(lab)
    for period in (3, 5, 8, 13, 16):
        assert attempt(lab, waiting(lab), (os.urandom(period) * 32)[:32]) == "/wrapped_key weak_material"
    assert attempt(lab, waiting(lab, suite=1), os.urandom(32) * 2) == "/wrapped_key weak_material"
    assert not is_pattern(os.urandom(32))
    assert wrap_import.check_value(b"ab" * 32) in {v.hex() for v in known_weak(64)}


@pytest.mark.parametrize("inside", [True, False], ids=["hsm", "software"])
@pytest.mark.parametrize("size", [16, 31, 33, 64, 24])
def test_another_length_is_refused(lab: Lab, size: int, inside: bool) -> None:
    if not inside:
        software(lab)
    assert attempt(lab, waiting(lab), os.urandom(size)) == "/wrapped_key wrong_length"


def test_material_comes_in_once_for_each_tenant(lab: Lab) -> None:
    material = os.urandom(32)
    key = lab.imported(material=material)
    assert attempt(lab, key, material) == "/wrapped_key reused_material"
    assert attempt(lab, waiting(lab), material) == "/wrapped_key reused_material"
    assert attempt(lab, waiting(lab, KeySpec.HMAC_256), material) == "/wrapped_key reused_material"
    lab.imported(material=material, tenant="other")
    pair = fresh_pair(KeySpec.EC_P256)
    facts: dict[str, Any] = {"public": wrap_import.spki(pair)}
    lab.import_into(waiting(lab, KeySpec.EC_P256), wrap_import.pkcs8(pair), **facts)
    assert (
        attempt(lab, waiting(lab, KeySpec.EC_P256), wrap_import.pkcs8(pair), **facts) == "/wrapped_key reused_material"
    )


def test_two_imports_of_one_material_at_once_leave_one(lab: Lab) -> None:
    material = os.urandom(32)
    keys = [waiting(lab), waiting(lab)]
    plans = [lab.imports.plan_import(k, lab.wrapped(k, material)[1]) for k in keys]
    lab.apply(plans[0])
    assert code_of(lambda: lab.apply(plans[1])) == "/wrapped_key reused_material"
    assert lab.worker().find("acme", str(keys[1].id)).api_state == "pending_import"


def test_a_wrong_check_value_is_refused(lab: Lab) -> None:
    assert attempt(lab, waiting(lab), os.urandom(32), check_value="0" * 16) == "/key_check_value check_value_mismatch"
    pair = fresh_pair(KeySpec.EC_P256)
    sent = lab.wrapped(waiting(lab, KeySpec.EC_P256), wrap_import.pkcs8(pair), public=wrap_import.spki(pair))[1]
    assert sent.check_value == wrap_import.public_check_value(wrap_import.spki(pair))


def test_C_13_padding_of_pkcs5_is_not_rfc_5649(lab: Lab) -> None:
    for inside in (True, False):
        if not inside:
            software(lab)
        key, material = waiting(lab), os.urandom(32)
        made, sent = lab.wrapped(key, material)
        ephemeral = os.urandom(32)
        padded = aes_key_wrap(ephemeral, material + b"\x08" * 8)
        wrapped = wrap_import.oaep(made.public, "256", ephemeral) + padded
        bad = dataclasses.replace(sent, wrapped=wrapped)
        assert code_of(lambda b=bad, k=key: lab.imports.plan_import(k, b)) == "/wrapped_key not_openable"


@pytest.mark.parametrize("name", ["garbage", "truncated", "trailing", "ed25519", "sec1"])
def test_malformed_or_foreign_private_keys_are_refused(lab: Lab, name: str) -> None:
    software(lab)
    pair = fresh_pair(KeySpec.EC_P256)
    good = wrap_import.pkcs8(pair)
    material = {
        "garbage": os.urandom(100),
        "truncated": good[:-9],
        "trailing": good + b"abc",
        "ed25519": wrap_import.pkcs8(ed25519.Ed25519PrivateKey.generate()),
        "sec1": b"\0" * 40,
    }[name]
    answer = attempt(lab, waiting(lab, KeySpec.EC_P256), material, public=wrap_import.spki(pair))
    assert answer in {"/wrapped_key not_openable", "/wrapped_key not_for_spec"}


@pytest.mark.parametrize("inside", [True, False], ids=["hsm", "software"])
def test_a_public_half_that_does_not_belong_is_refused(lab: Lab, inside: bool) -> None:
    if not inside:
        software(lab)
    one, two = fresh_pair(KeySpec.EC_P256), fresh_pair(KeySpec.EC_P256)
    other_curve = fresh_pair(KeySpec.EC_P384)
    for private in (one, other_curve):
        answer = attempt(lab, waiting(lab, KeySpec.EC_P256), wrap_import.pkcs8(private), public=wrap_import.spki(two))
        assert answer == "/public_key key_mismatch"
    rsa_pair = rsa.generate_private_key(65_537, 3_072)
    key = waiting(lab, KeySpec.RSA_3072)
    assert (
        attempt(lab, key, wrap_import.pkcs8(rsa_pair), public=wrap_import.spki(rsa_key())) == "/public_key key_mismatch"
    )


def public_refusal(lab: Lab, spec: KeySpec, public: bytes | None) -> str:
    key = waiting(lab, spec)
    sent = Import("skms_import_" + "A" * 64, b"x", "0" * 16, public=public)
    return code_of(lambda: lab.imports.plan_import(key, sent))


def test_C_10_points_that_are_none_and_other_curves_are_refused(lab: Lab) -> None:
    good = wrap_import.spki(fresh_pair(KeySpec.EC_P256))
    off_curve = good[:-1] + bytes([good[-1] ^ 1])
    infinity = good[:-65] + b"\x00"
    for bad in (off_curve, infinity, b"", b"x", good[:-1], good + b"\0"):
        assert public_refusal(lab, KeySpec.EC_P256, bad) == "/public_key invalid"
    # sect163k1 (1.3.132.0.1): a binary curve with a cofactor, where CVE-2026-26007 leaked bits of private keys
    point = b"\x04" + bytes(42)
    algorithm = bytes.fromhex("301006072a8648ce3d020106052b81040001")
    sect = (
        b"\x30"
        + bytes([len(algorithm) + 3 + len(point)])
        + algorithm
        + b"\x03"
        + bytes([len(point) + 1])
        + b"\0"
        + point
    )
    assert public_refusal(lab, KeySpec.EC_P256, sect) == "/public_key invalid"
    for curve in (ec.SECP384R1(), ec.SECP256K1(), ec.SECP521R1(), ec.BrainpoolP256R1()):
        other = wrap_import.spki(ec.generate_private_key(curve))
        assert public_refusal(lab, KeySpec.EC_P256, other) == "/public_key not_for_spec"
    assert public_refusal(lab, KeySpec.EC_P256, wrap_import.spki(rsa_key())) == "/public_key not_for_spec"
    assert public_refusal(lab, KeySpec.EC_P256, None) == "/public_key required"
    assert public_refusal(lab, KeySpec.AES_256, good) == "/public_key not_for_spec"


def rsa_public(n: int, e: int = 65_537) -> bytes:
    return (
        rsa.RSAPublicNumbers(e, n)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def roca_shaped(bits: int) -> int:
    """A modulus of the flawed generator's shape: a power of 65537 modulo every prime of the fingerprint."""
    product = 1
    for p in range(3, 168):
        if all(p % q for q in range(2, p)):
            product *= p
    n = pow(65_537, 12_345, product)
    n += product * ((1 << (bits - 1)) // product + 1)
    while n % 2 == 0 or n.bit_length() != bits:
        n += product
    return n


def test_C_11_weak_rsa_moduli_are_refused(lab: Lab) -> None:
    good = rsa_key().public_key().public_numbers().n
    half = 3 << 1_534
    cases = {
        "roca": (rsa_public(roca_shaped(3_072)), "weak_material"),
        "e = 3": (rsa_public(good, 3), "weak_material"),
        "e = 17": (rsa_public(good, 17), "weak_material"),
        "small factor": (rsa_public(good - good % 64_997 + (64_997 if good % 64_997 % 2 else 0)), "weak_material"),
        "close primes": (rsa_public((half + 1) * (half + 3)), "weak_material"),
        "equal primes": (rsa_public((half + 1) ** 2), "weak_material"),
        "2048 bits": (wrap_import.spki(rsa_key(2_048)), "wrong_length"),
    }
    for name, (public, code) in cases.items():
        assert public_refusal(lab, KeySpec.RSA_3072, public) == f"/public_key {code}", name
    assert not is_roca(good)
    der = rsa_public(good)
    at = der.rindex(bytes.fromhex("0203010001"))
    even = der[: at - 1] + bytes([der[at - 1] & 0xFE]) + der[at:]
    exponent_one = der[:at] + bytes.fromhex("0203000001")
    for broken in (even, exponent_one):
        assert public_refusal(lab, KeySpec.RSA_3072, broken) in {"/public_key invalid", "/public_key weak_material"}


def der_integer(n: int) -> bytes:
    raw = n.to_bytes(n.bit_length() // 8 + 1, "big")
    size = bytes([len(raw)]) if len(raw) < 128 else b"\x82" + len(raw).to_bytes(2, "big")
    return b"\x02" + size + raw


def sequence(*parts: bytes) -> bytes:
    body = b"".join(parts)
    return b"\x30\x82" + len(body).to_bytes(2, "big") + body


def pkcs8_of(p: int, q: int) -> bytes:
    n, d = p * q, pow(65_537, -1, (p - 1) * (q - 1))
    numbers = (0, n, 65_537, d, p, q, d % (p - 1), d % (q - 1), pow(q, -1, p))
    inner = sequence(*(der_integer(i) for i in numbers))
    algorithm = bytes.fromhex("300d06092a864886f70d0101010500")
    return sequence(b"\x02\x01\x00", algorithm, b"\x04\x82" + len(inner).to_bytes(2, "big") + inner)


def test_C_11_primes_that_are_none_are_refused_where_they_can_be_seen(lab: Lab) -> None:
    software(lab)
    numbers = rsa_key().private_numbers()
    composite = numbers.q + 2
    while True:
        try:
            material = pkcs8_of(numbers.p, composite)
            break
        except ValueError:
            composite += 2
    public = rsa_public(numbers.p * composite)
    answer = attempt(lab, waiting(lab, KeySpec.RSA_3072), material, public=public)
    assert answer in {"/wrapped_key not_openable", "/public_key weak_material"}


# ---- expiry --------------------------------------------------------------------------------------------------------


def test_O7_expired_material_is_refused_before_anybody_disables_the_key(lab: Lab) -> None:
    key = lab.imported(expires_at=lab.clock.at + DAY)
    blob = lab.seal(key).ciphertext
    assert lab.store.due_expiries(lab.clock()) == []
    lab.clock.days(1.01)
    for use in (lambda: lab.seal(key), lambda: lab.store.open(key, Envelope.parse(blob), {}, purpose=Purpose.ENCRYPT)):
        with pytest.raises(WrongState) as refused:
            use()
        assert refused.value.state == "disabled"
    (due,) = lab.store.due_expiries(lab.clock())
    assert due.id == key.id
    disabled = lab.apply(lab.store.plan_transition(due, KeyState.SUSPENDED))
    assert lab.store.due_expiries(lab.clock()) == []
    with pytest.raises(WrongState):
        lab.store.plan_transition(disabled, KeyState.ACTIVE)
    renewed = lab.import_into(disabled, os.urandom(32))
    enabled = lab.apply(lab.store.plan_transition(renewed, KeyState.ACTIVE))
    assert lab.seal(enabled).version == 2
    with pytest.raises(WrongState):
        lab.store.open(enabled, Envelope.parse(blob), {}, purpose=Purpose.ENCRYPT)


def test_an_end_in_the_past_is_refused(lab: Lab) -> None:
    assert attempt(lab, waiting(lab), os.urandom(32), expires_at=lab.clock.at) == "/expires_at in_the_past"


def test_L_08_no_wrapping_key_and_no_material_is_stored_in_clear(lab: Lab) -> None:
    software(lab)
    material = os.urandom(32)
    key = waiting(lab)
    sent = lab.wrapped(key, material, wrap_import.HPKE_NAME)[1]
    before = b"".join(bytes(v) for r in lab.sql("SELECT blob, sealed, public, mac FROM keystore_import") for v in r)
    assert material not in before
    lab.apply(lab.imports.plan_import(key, sent))
    stored = lab.sql("SELECT blob FROM keystore_version") + lab.sql("SELECT fingerprint FROM keystore_material")
    assert all(material not in bytes(r[0]) for r in stored)
    assert all(len(h) != 96 or h not in before for h in lab.hsm.hidden)


def test_the_hash_names_of_both_sides_agree() -> None:
    assert [lab_wrapping(w).oaep for w in wrap_import.WRAPPINGS] == [
        *(OaepHash.SHA_1, OaepHash.SHA_256, OaepHash.SHA_1, OaepHash.SHA_256),
        None,
    ]
    assert hashes.SHA256().digest_size == 32
