"""Approvers and signers of bundles with a card: another way to hold a key, and no other rule about who counts."""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from typer.testing import CliRunner

from cards import Card, card
from harness import officer
from policy.bundle import SHIPPED, read
from policy.signatures import Signer, check
from policy.signing import one_form, verifies
from service.approvals import (
    Approval,
    ApprovalRefused,
    Approver,
    Asked,
    load_approval,
    load_approver,
    quorum,
    statement,
)
from service.approvals import check as right
from service.cli.client import Failed
from service.cli.commands import app
from service.keyfiles import public_key

KEYS = {
    "ed": ("ED25519", False),
    "p256": ("EC_P256", False),
    "each": ("EC_P256", True),
    "p384": ("EC_P384", False),
    "rsa": ("RSA_3072", False),
    "twin#1": ("EC_P256", False),
    "twin#2": ("EC_P256", False),
}
ASKED = Asked("r1", "i", "destroy_key", "health", {"key": "k", "version": 3, "needed": 2}, "mtls:a:/b", 1, 2)
ALGORITHMS = {"ed": "Ed25519", "p256": "ES256", "each": "ES256"}
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Card:
    return card(tmp_path_factory.mktemp("card"), "alice-card", KEYS)


def enrolled(held: Card, directory: Path, key: str) -> Path:
    """The public key of a card's key in a file."""
    path = directory / f"{key}.pem"
    public = load_der_public_key(bytes.fromhex(held.public[key]))
    path.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


def approvers(held: Card, directory: Path) -> list[Approver]:
    return [load_approver(k, enrolled(held, directory, k), algorithm=a) for k, a in ALGORITHMS.items()]


def signed(
    held: Card, directory: Path, options: list[str], *, name: str = "alice", **how: object
) -> subprocess.CompletedProcess[str]:
    request, to = directory / "request.json", directory / f"{name}.json"
    request.write_text(json.dumps(dataclasses.asdict(ASKED)))
    return held.skms("approval", "sign", str(request), "--name", name, "--to", str(to), *options, **how)


def test_a_card_approves_with_ed25519_and_with_p256_and_with_a_pin_for_each_signature(
    held: Card, tmp_path: Path
) -> None:
    known, given = approvers(held, tmp_path), []
    for key in ALGORITHMS:
        done = signed(held, tmp_path, held.options(key), name=key)
        assert done.returncode == 0, done.stderr
        given.append(load_approval(tmp_path / f"{key}.json"))
        assert right(given[-1], known, kind=ASKED.kind, digest=ASKED.digest()).name == key
    assert len(quorum(given, known, kind=ASKED.kind, digest=ASKED.digest(), needed=3)) == 3
    pin = held.pin_file.read_text().strip()
    for more in ({"env": {**held.environment, "SKMS_CARD_PIN": pin}}, {"input": pin + "\n"}):
        done = signed(held, tmp_path, held.options("p256")[:-2], name="asked", **more)
        assert done.returncode == 0, done.stderr
        assert pin not in done.stdout + done.stderr


def test_what_a_card_does_not_do_is_named_and_writes_nothing(held: Card, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pin"
    wrong.write_text("00000000")
    private, _ = officer(tmp_path, "filed")
    for options, says in (
        (held.options("p256", pin=wrong), "refused the PIN (CKR_PIN_INCORRECT); it was tried once"),
        (held.options("nobody"), "no private key has this label"),
        (held.options("twin"), "more than one private key has this label"),
        (held.options("p384"), "neither Ed25519 nor ECDSA on P-256"),
        (held.options("rsa"), "neither Ed25519 nor ECDSA on P-256"),
        (held.options("p256", label="bob-card"), "0 present"),
    ):
        done = signed(held, tmp_path, options, name="refused")
        assert done.returncode == 2, (options, done.stdout, done.stderr)
        assert says in done.stderr, (options, done.stderr)
        assert not (tmp_path / "refused.json").exists(), options
        assert "00000000" not in done.stderr
    for options, says in (  # before any module is loaded
        (["--pkcs11-module", "/none.so", *held.options("p256")[2:]], "install the card's middleware"),
        ([*held.options("p256"), "--key", str(private)], "either --key, or all of"),
        (held.options("p256")[2:], "either --key, or all of"),
        ([], "either --key, or all of"),
    ):
        request = str(tmp_path / "request.json")
        result = CliRunner().invoke(app, ["approval", "sign", request, "--name", "refused", *options])
        assert isinstance(result.exception, Failed), options
        assert says in str(result.exception)


def test_a_signature_has_one_form_and_a_key_one_algorithm(held: Card, tmp_path: Path) -> None:
    known = approvers(held, tmp_path)
    assert signed(held, tmp_path, held.options("p256"), name="p256").returncode == 0
    made = load_approval(tmp_path / "p256.json")
    r, s = made.signature[:32], int.from_bytes(made.signature[32:], "big")
    assert 2 * s < N
    high = r + (N - s).to_bytes(32, "big")
    der = ec.generate_private_key(ec.SECP256R1()).sign(b"x", ec.ECDSA(SHA256()))
    for altered in (high, der, made.signature + b"\0", made.signature[:-1], b"", bytes(64), r + N.to_bytes(32, "big")):
        with pytest.raises(ApprovalRefused, match="false"):
            right(
                dataclasses.replace(made, signature=altered),
                known,
                kind=ASKED.kind,
                digest=ASKED.digest(),
            )
    assert one_form(high) == one_form(made.signature) == made.signature
    for key, other in (("p256", "Ed25519"), ("ed", "ES256"), ("p384", "ES256"), ("p384", "Ed25519")):
        with pytest.raises(ApprovalRefused, match=f"{key}.pem: not an {other} key"):
            load_approver("alice", enrolled(held, tmp_path, key), algorithm=other)
    # One key of a card under two names is one person.
    twice = [*known, Approver("alias", known[1].key)]
    with pytest.raises(ApprovalRefused, match="one officer"):
        quorum(
            [made, dataclasses.replace(made, approver="alias")],
            twice,
            kind=ASKED.kind,
            digest=ASKED.digest(),
            needed=2,
        )


def test_p256_signatures_of_every_kind_come_into_the_one_form() -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    said = statement("destroy_key", "ab" * 32)
    for _ in range(40):  # about half of them have the greater s
        r, s = decode_dss_signature(private.sign(said, ec.ECDSA(SHA256())))
        raw = r.to_bytes(32, "big") + s.to_bytes(32, "big")
        assert verifies(private.public_key(), raw, said) == (2 * s < N)
        assert verifies(private.public_key(), one_form(raw), said)
        assert not verifies(private.public_key(), one_form(raw), said + b"\n")
    for wrong in (b"", bytes(64), bytes(63), b"\1" * 32 + N.to_bytes(32, "big")):
        with pytest.raises(ValueError, match="not an ECDSA signature"):
            one_form(wrong)
    assert Approval("a", "k", "d", b"").signature == b""


def test_a_card_signs_a_bundle(held: Card, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(SHIPPED, tmp_path / "bundle"))
    for key, algorithm in ALGORITHMS.items():
        done = held.skms("policy", "sign", str(bundle), *held.options(key))
        assert done.returncode == 0, done.stderr
        mine = Signer("bundle", public_key(enrolled(held, tmp_path, key), algorithm))
        check(bundle, read(bundle), [mine])
    path = bundle / "signatures/bundle.sig"
    made = base64.b64decode(path.read_text())
    high = made[:32] + (N - int.from_bytes(made[32:], "big")).to_bytes(32, "big")
    path.write_text(base64.b64encode(high).decode() + "\n")
    with pytest.raises(Exception, match="no signature of a signer"):
        check(bundle, read(bundle), [mine])
