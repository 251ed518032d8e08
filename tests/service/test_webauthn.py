"""Approvers with a WebAuthn credential: exactly this request, this credential, this page, this person, and once."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from authenticator import UP, UV, Authenticator
from databases import address
from harness import Files, Lab, lab_of, new_key, officer
from policy.signing import one_form
from postgres import Cluster
from service.approvals import (
    Approval,
    ApprovalRefused,
    Approver,
    Asked,
    approve,
    challenge,
    check,
    revocation,
    statement,
)
from service.config import ApprovalsSection, ApproverSection, ConfigInvalid, WebauthnSection, load
from service.dev import domain
from service.webauthn import Assertion, AssertionRefused, Credential, decoded, encoded, verify

ASKED = Asked("r1", "i", "destroy_key", "health", {"key": "k", "version": 3}, "mtls:a:/b", 1, 2)
DIGEST = ASKED.digest()
RIGHT = bytes.fromhex(DIGEST)
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # the order of P-256


def enrolled(held: Authenticator, name: str = "carol") -> Approver:
    return Approver(name, held.key.public_key(), credential=Credential(held.id, held.rp, (held.origin,)))


def counts(data: bytes, approver: Approver, *, kind: str = ASKED.kind, digest: str = DIGEST) -> None:
    check(Approval(approver.name, kind, digest, data), [approver], kind=kind, digest=digest)


@pytest.mark.parametrize("key", [None, Ed25519PrivateKey.generate()])
def test_only_an_assertion_of_exactly_this_on_exactly_that_page_by_a_verified_person_counts(
    key: Ed25519PrivateKey | None,
) -> None:
    held = Authenticator() if key is None else Authenticator(key=key)
    carol = enrolled(held)
    counts(held.assertion(RIGHT), carol)
    other = dataclasses.replace(ASKED, parameters={"key": "k", "version": 4})
    for data, why in (
        (held.assertion(bytes.fromhex(other.digest())), "Wrong challenge"),
        (held.assertion(RIGHT + b"\0"), "Wrong challenge"),
        (held.assertion(b""), "Wrong challenge"),
        (held.assertion(challenge(revocation(ASKED.kind), DIGEST)), "Wrong challenge"),
        (held.assertion(RIGHT, origin="http://localhost:8911"), "Invalid origin"),
        (held.assertion(RIGHT, origin="https://localhost:8910"), "Invalid origin"),
        (held.assertion(RIGHT, origin="http://localhost:8910/"), "Invalid origin"),
        (held.assertion(RIGHT, origin="http://evil.example"), "Invalid origin"),
        (held.assertion(RIGHT, client={"origin": ["http://localhost:8910"]}), "Invalid origin"),
        (held.assertion(RIGHT, client={"origin": None}), "Invalid origin"),
        (held.assertion(RIGHT, client={"crossOrigin": True}), "frame of another site"),
        (held.assertion(RIGHT, client={"crossOrigin": "false"}), "frame of another site"),
        (held.assertion(RIGHT, client={"topOrigin": "http://evil.example"}), "frame of another site"),
        (held.assertion(RIGHT, rp="localhost.example"), "Wrong RP ID hash"),
        (held.assertion(RIGHT, flags=UP), "User verification required"),
        (held.assertion(RIGHT, flags=UV), "User Present"),
        (held.assertion(RIGHT, flags=0), "User Present"),
        (held.assertion(RIGHT, act="webauthn.create"), "Incorrect type"),
        (held.assertion(RIGHT, identity=os.urandom(32)), "another credential"),
        (Authenticator().assertion(RIGHT), "another credential"),
        (Authenticator().assertion(RIGHT, identity=held.id), "Invalid signature"),
    ):
        with pytest.raises(ApprovalRefused, match=why):
            counts(data, carol)


def test_neither_a_plain_signature_nor_altered_parts_count_and_keys_are_not_swapped(tmp_path: Path) -> None:
    held = Authenticator()
    carol = enrolled(held)
    officer(tmp_path, "alice")
    plain = approve(ASKED.kind, DIGEST, name="carol", key_file=tmp_path / "alice.key").signature
    made = Assertion.of(held.assertion(RIGHT))

    def altered(**parts: bytes) -> bytes:
        return dataclasses.replace(made, **{name: encoded(part) for name, part in parts.items()}).to_bytes()

    client, about, signature = (decoded(part) for part in (made.clientDataJSON, made.authenticatorData, made.signature))
    said = f"skms-approval/v1\n{ASKED.kind}\n{DIGEST}\n".encode()
    raw = held.key.sign(said, ECDSA(SHA256()))  # type: ignore[call-arg, arg-type]
    r, s = decode_dss_signature(signature)
    for data in (
        plain,
        b"",
        raw,
        altered(clientDataJSON=client + b" "),
        altered(authenticatorData=about[:32] + bytes([UP | UV | 0x10]) + about[33:]),
        altered(authenticatorData=about + b"\0"),
        altered(authenticatorData=about[:36]),
        altered(authenticatorData=b""),
        altered(authenticatorData=about[:32] + b"\xff" + about[33:]),
        altered(clientDataJSON=b"[]"),
        altered(clientDataJSON=b"{}"),
        altered(clientDataJSON=b"\xff"),
        altered(clientDataJSON=b"[" * 2_000),
        altered(signature=b""),
        altered(signature=r.to_bytes(32, "big") + s.to_bytes(32, "big")),
        altered(signature=encode_dss_signature(s, r)),
        made.to_bytes() + b" ",
        made.to_bytes().replace(b'"rawId":"', b'"rawId":"='),
        json.dumps({**dataclasses.asdict(made), "more": ""}).encode(),
        json.dumps({"rawId": made.rawId}).encode(),
    ):
        with pytest.raises(ApprovalRefused):
            counts(data, carol)
    # An approver with a key in a file gives no assertions with it.
    filed = Approver("carol", held.key.public_key())
    with pytest.raises(ApprovalRefused, match="false"):
        counts(made.to_bytes(), filed)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200), client=st.binary(max_size=80), about=st.binary(max_size=120))
def test_whatever_is_handed_in_is_refused_by_name(data: bytes, client: bytes, about: bytes) -> None:
    held = Authenticator(key=KEY)
    credential = Credential(held.id, held.rp, (held.origin,))
    parts = Assertion(*(encoded(part) for part in (held.id, client, about, data)))
    for given_ in (data, parts.to_bytes()):
        with pytest.raises(AssertionRefused):
            verify(given_, credential, KEY.public_key(), RIGHT)


KEY = Ed25519PrivateKey.generate()


def test_a_credential_that_no_browser_would_use_is_refused_at_load(dev_files: Files, tmp_path: Path) -> None:
    text = dev_files.config_file.read_text()
    held = Authenticator()
    one = f'[[approvals.approver]]\nname = "alice"\npublic_key = "{tmp_path}/a.pem"\nidentities = ["mtls:a:/b"]\n'
    carol = one.replace("alice", "carol").replace("mtls:a:/b", "mtls:a:/c") + 'algorithm = "ES256"\n'
    path = tmp_path / "skms.toml"
    credential = encoded(held.id)

    def loaded(added: str) -> None:
        path.write_text(text + "\n" + one + carol + added + "\n")
        load(path, environment={})

    loaded(f'webauthn = {{ credential = "{credential}", rp = "localhost", origins = ["http://localhost:8910"] }}')
    loaded(f'webauthn = {{ credential = "{credential}", rp = "gov.example", origins = ["https://kms.gov.example"] }}')
    for rp, origin, why in (
        ("localhost", "http://evil.example", "no browser lets"),
        ("gov.example", "http://gov.example", "no browser lets"),
        ("gov.example", "https://notgov.example", "no browser lets"),
        ("com", "https://kms.com", "no browser lets"),
        ("localhost", "http://localhost:8910/", "origins"),
        ("localhost", "null", "origins"),
        ("localhost", "file://", "origins"),
    ):
        with pytest.raises(ConfigInvalid, match=why):
            loaded(f'webauthn = {{ credential = "{credential}", rp = "{rp}", origins = ["{origin}"] }}')
    for added, why in (
        ('webauthn = { credential = "short", rp = "localhost", origins = ["http://localhost:1"] }', "credential"),
        (f'webauthn = {{ credential = "{credential}", rp = "localhost", origins = [] }}', "origins"),
        (f'webauthn = {{ credential = "{credential}", origins = ["http://localhost:1"] }}', "rp"),
        (
            f'webauthn = {{ credential = "{"a" * 25}", rp = "localhost", origins = ["http://localhost:1"] }}',
            "base64url",
        ),
    ):
        with pytest.raises(ConfigInvalid, match=why):
            loaded(added)


# ---- at a node ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Voting:
    lab: Lab
    files: Files
    directory: Path
    held: dict[str, Authenticator]
    card: EllipticCurvePrivateKey

    async def asked(self, lab: Lab | None = None) -> Asked:
        """A lift of a freeze, which takes two."""
        lab = lab or self.lab
        key = await new_key(lab, "AES_256")
        body = {"scope": {"kind": "key", "value": key}, "reason": {"code": "incident"}}
        officer_ = lab.client("health-officer")
        made = await officer_.post("/v1/freezes", json=body, headers={"Idempotency-Key": os.urandom(8).hex()})
        lift = f"/v1/freezes/{made.json()['id']}/lift"
        answer = await officer_.post(lift, headers={"Idempotency-Key": os.urandom(8).hex()})
        assert answer.status_code == 202, answer.text
        return Asked.of(json.dumps(answer.json()["request"]))

    async def hand_in(
        self, request: Asked, name: str, signature: bytes, where: str = "signatures", lab: Lab | None = None
    ) -> httpx.Response:
        body = {"approver": name, "signature": signature.hex()}
        client = (lab or self.lab).client("health-custodian")
        return await client.post(f"/v1/approvals/{request.id}/{where}", json=body)

    def by_card(self, request: Asked, *, kind: str = "", low: bool = True) -> bytes:
        """The form that counts of a P-256 signature, or the other one."""
        der = self.card.sign(statement(kind or request.kind, request.digest()), ECDSA(SHA256()))
        r, s = decode_dss_signature(der)
        made = one_form(r.to_bytes(32, "big") + s.to_bytes(32, "big"))
        return made if low else made[:32] + (N - int.from_bytes(made[32:], "big")).to_bytes(32, "big")

    async def sign(self, request: Asked, name: str, **how: object) -> httpx.Response:
        if name not in self.held:
            made = approve(request.kind, request.digest(), name=name, key_file=self.directory / f"{name}.key").signature
        else:
            made = self.held[name].assertion(bytes.fromhex(request.digest()), **how)  # type: ignore[arg-type]
        return await self.hand_in(request, name, made)


def section(held: Authenticator) -> WebauthnSection:
    return WebauthnSection(encoded(held.id), held.rp, (held.origin,))


def configured(dev_files: Files, directory: Path, url: str = "") -> tuple[Files, dict[str, Authenticator], Any]:
    """A node with approvers of each kind; zoe is who asks, dora approves for another tenant, cuckoo has bob's card."""
    card = generate_private_key(SECP256R1())
    names = {"carol": Authenticator(), "erin": Authenticator(counter=None, key=Ed25519PrivateKey.generate())}
    names["twin"] = dataclasses.replace(names["erin"], key=Ed25519PrivateKey.generate())  # erin's credential again
    names |= {"zoe": Authenticator(), "dora": Authenticator()}
    identity = {"zoe": f"mtls:{domain('eu-de-1')}:/health/officer/health-officer"}
    tenants = {"dora": ("defence",)}
    approvers = [ApproverSection("alice", officer(directory, "alice")[1], ("mtls:x:/alice",))]
    for name, one in names.items():
        kind = "Ed25519" if isinstance(one.key, Ed25519PrivateKey) else "ES256"
        who = (identity.get(name, f"mtls:x:/{name}"),)
        approvers.append(
            ApproverSection(name, one.pem(directory, name), who, tenants.get(name, ()), (), kind, section(one))
        )
    for name in ("bob", "cuckoo"):
        public = Authenticator(key=card).pem(directory, name)
        approvers.append(ApproverSection(name, public, (f"mtls:x:/{name}",), (), (), "ES256"))
    config = structs.replace(
        dev_files.config,
        database=structs.replace(dev_files.config.database, url=url or address(directory)),
        node=structs.replace(dev_files.config.node, state_dir=directory),
        approvals=ApprovalsSection(approver=tuple(approvers)),
    )
    return dataclasses.replace(dev_files, config=config), names, card


@pytest.fixture(scope="module")
async def voting(dev_files: Files, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Voting]:
    directory = tmp_path_factory.mktemp("webauthn")
    files, held, card = configured(dev_files, directory)
    async with lab_of(files) as lab:
        yield Voting(lab, files, directory, held, card)


@pytest.mark.anyio
async def test_an_assertion_and_a_signature_make_a_quorum_and_a_replay_makes_none(voting: Voting) -> None:
    request = await voting.asked()
    made = voting.held["carol"].assertion(bytes.fromhex(request.digest()))
    first = await voting.hand_in(request, "carol", made)
    assert (first.json()["state"], first.json()["approvers"]) == ("open", ["carol"])
    for name in ("carol", "erin", "alice"):
        assert (await voting.hand_in(request, name, made)).status_code == 403, name
    other = await voting.asked()
    replayed = await voting.hand_in(other, "carol", made)
    assert (replayed.status_code, "Wrong challenge" in replayed.json()["detail"]) == (403, True)
    assert (await voting.sign(request, "alice")).json()["state"] == "executed"
    assert (await voting.hand_in(request, "carol", made)).json()["code"] == "approval_closed"


@pytest.mark.anyio
async def test_a_counter_that_does_not_rise_counts_nothing_and_is_an_alarm_also_after_a_restart(
    voting: Voting, caplog: pytest.LogCaptureFixture
) -> None:
    one, carol = await voting.asked(), voting.held["carol"]
    assert (await voting.sign(one, "carol")).status_code == 200
    stands = carol.counter
    assert stands is not None
    two = await voting.asked()
    for counter in (0, 1, stands - 1, stands):
        with caplog.at_level(logging.CRITICAL, "skms.alarm"):
            caplog.clear()
            answer = await voting.sign(two, "carol", counter=counter)
        assert (answer.status_code, answer.json()["code"]) == (403, "authenticator_cloned"), counter
        assert [r.getMessage() for r in caplog.records if r.name == "skms.alarm"] == [
            "an approver's authenticator may have been cloned"
        ]
        record = voting.lab.node.kms.search.records(op="sign_approval", out="denied")[0].record
        assert (record["why"], record["appr"]) == ("authenticator_cloned", [two.id])
    async with lab_of(voting.files) as restarted:
        made = carol.assertion(bytes.fromhex(two.digest()), counter=stands)
        assert (await voting.hand_in(two, "carol", made, lab=restarted)).json()["code"] == "authenticator_cloned"
        made = carol.assertion(bytes.fromhex(two.digest()))
        assert (await voting.hand_in(two, "carol", made, lab=restarted)).json()["approvers"] == ["carol"]
    # It is stored with what it approved, and whoever sets it back in the database is found out.
    engine = sa.create_engine(voting.files.config.database.url)
    name = f"webauthn/{hashlib.sha256(carol.id).hexdigest()[:48]}"
    with engine.begin() as connection:
        stored = connection.execute(
            sa.text("SELECT value FROM service_setting WHERE name = :n"), {"n": name}
        ).scalar_one()
        region, count, mac = stored.split(" ")
        assert int(count) == carol.counter
        change = sa.text("UPDATE service_setting SET value = :v WHERE name = :n")
        connection.execute(change, {"v": f"{region} 0 {mac}", "n": name})
    three = await voting.asked()
    assert (await voting.sign(three, "carol")).status_code == 500
    with engine.begin() as connection:
        connection.execute(change, {"v": stored, "n": name})
    engine.dispose()
    assert (await voting.sign(three, "carol")).status_code == 200


@pytest.mark.anyio
async def test_of_two_assertions_with_one_counter_at_once_one_counts(voting: Voting) -> None:
    carol, requests = voting.held["carol"], [await voting.asked() for _ in range(2)]
    assert carol.counter is not None
    carol.counter += 1
    made = [carol.assertion(bytes.fromhex(r.digest()), counter=carol.counter) for r in requests]
    answers = await asyncio.gather(*(voting.hand_in(r, "carol", one) for r, one in zip(requests, made, strict=True)))
    assert sorted(a.status_code for a in answers) == [200, 403]
    assert [a.json()["code"] for a in answers if a.status_code == 403] == ["authenticator_cloned"]


@pytest.mark.anyio
async def test_an_authenticator_that_does_not_count_approves_and_one_credential_is_one_person(voting: Voting) -> None:
    for _ in range(2):
        request = await voting.asked()
        assert (await voting.sign(request, "erin")).json()["approvers"] == ["erin"]
    twice = await voting.sign(request, "twin")
    assert (twice.status_code, "counts once" in twice.json()["detail"]) == (403, True)
    # Once it counts, it goes on counting.
    request = await voting.asked()
    assert (await voting.sign(request, "erin", counter=7)).status_code == 200
    request = await voting.asked()
    assert (await voting.sign(request, "erin")).json()["code"] == "authenticator_cloned"


@pytest.mark.anyio
async def test_an_approval_is_taken_back_by_an_assertion_over_that_and_stays_back(voting: Voting) -> None:
    request, carol = await voting.asked(), voting.held["carol"]
    approved = carol.assertion(bytes.fromhex(request.digest()))
    assert (await voting.hand_in(request, "carol", approved)).status_code == 200
    assert (await voting.hand_in(request, "carol", approved, "revocations")).status_code == 403
    back = carol.assertion(challenge(revocation(request.kind), request.digest()))
    assert (await voting.hand_in(request, "carol", back)).status_code == 403
    assert (await voting.hand_in(request, "carol", back, "revocations")).json()["approvers"] == []
    for data in (approved, carol.assertion(bytes.fromhex(request.digest()))):
        again = await voting.hand_in(request, "carol", data)
        assert (again.status_code, "took the approval back" in again.json()["detail"]) == (403, True)
    assert (await voting.sign(request, "alice")).json()["state"] == "open"


@pytest.mark.anyio
async def test_a_signature_of_no_bytes_or_of_half_a_byte_is_no_signature(voting: Voting) -> None:
    request = await voting.asked()
    for signature in ("", "0" * 127, "0" * 129, "0" * 8_194, "zz" * 64):
        body = {"approver": "carol", "signature": signature}
        answer = await voting.lab.client("health-custodian").post(f"/v1/approvals/{request.id}/signatures", json=body)
        assert answer.status_code in {400, 422}, (len(signature), answer.text)
    for data in (b"\xff" * 64, bytes(4_096)):
        assert (await voting.hand_in(request, "carol", data)).json()["code"] == "approval_refused"


@pytest.mark.anyio
async def test_A_20_a_card_and_a_credential_count_by_the_same_rules_as_a_key_in_a_file(voting: Voting) -> None:
    request, other = await voting.asked(), await voting.asked()
    carol, zoe, dora = (voting.held[name] for name in ("carol", "zoe", "dora"))
    right = bytes.fromhex(request.digest())
    forged = dataclasses.replace(request, parameters={**request.parameters, "scope": {"kind": "everything"}})
    moved = dataclasses.replace(request, installation="00000000-0000-4000-8000-000000000000")
    assert (await voting.hand_in(request, "bob", voting.by_card(request))).json()["approvers"] == ["bob"]
    for name, made, why in (
        ("bob", voting.by_card(request), "counts once"),
        ("bob", voting.by_card(request, low=False), "false"),
        ("cuckoo", voting.by_card(request), "counts once"),
        ("cuckoo", voting.by_card(request, low=False), "false"),
        ("bob", voting.by_card(other), "false"),
        ("bob", voting.by_card(forged), "false"),
        ("bob", voting.by_card(moved), "false"),
        ("bob", voting.by_card(request, kind="destroy_key"), "false"),
        ("alice", voting.by_card(request), "false"),
        ("bob", carol.assertion(right), "false"),
        ("carol", voting.by_card(request), "no assertion"),
        ("carol", carol.assertion(bytes.fromhex(other.digest())), "Wrong challenge"),
        ("carol", carol.assertion(bytes.fromhex(forged.digest())), "Wrong challenge"),
        ("carol", carol.assertion(bytes.fromhex(moved.digest())), "Wrong challenge"),
        ("zoe", zoe.assertion(right), "asked for this"),
        ("dora", dora.assertion(right), "not approve for this tenant"),
        ("mallory", carol.assertion(right), "no approver"),
    ):
        answer = await voting.hand_in(request, name, made)
        assert (answer.status_code, answer.json()["code"]) == (403, "approval_refused"), (name, why)
        assert why in answer.json()["detail"], (name, why, answer.json()["detail"])
    shown = (await voting.lab.client("health-officer").get(f"/v1/approvals/{request.id}")).json()
    assert (shown["state"], shown["approvers"]) == ("open", ["bob"])
    # The last one at once in two ways executes once.
    last = voting.hand_in(request, "carol", carol.assertion(right))
    answers = await asyncio.gather(last, voting.sign(request, "alice"))
    assert sorted(a.status_code for a in answers) == [200, 409]


@pytest.mark.anyio
async def test_what_expired_or_lost_its_enrolment_does_not_count(voting: Voting) -> None:
    request, late = await voting.asked(), await voting.asked()
    assert (await voting.sign(request, "carol")).status_code == 200
    voting.lab.clock.ahead = 3_601_000_000
    assert (await voting.sign(late, "carol")).json()["code"] == "approval_closed"
    voting.lab.clock.ahead = 0
    listed = voting.files.config.approvals
    carol = voting.held["carol"]
    elsewhere = structs.replace(section(carol), origins=("http://localhost:8999",))
    renewed = section(dataclasses.replace(carol, id=os.urandom(32)))
    for changed in (None, elsewhere, renewed):  # out, or enrolled in another way since
        approvers = [
            a if a.name != "carol" else structs.replace(a, webauthn=changed)
            for a in listed.approver
            if a.name != "carol" or changed is not None
        ]
        config = structs.replace(voting.files.config, approvals=structs.replace(listed, approver=tuple(approvers)))
        async with lab_of(dataclasses.replace(voting.files, config=config)) as lab:
            shown = (await lab.client("health-officer").get(f"/v1/approvals/{request.id}")).json()
            assert (shown["state"], shown["approvers"]) == ("open", [])
    assert (await voting.hand_in(request, "bob", voting.by_card(request))).json()["state"] == "executed"


@pytest.mark.anyio
async def test_on_postgresql_two_nodes_take_a_counter_once(dev_files: Files, postgres: Cluster, tmp_path: Path) -> None:
    files, held, card = configured(dev_files, tmp_path, postgres.fresh("counters"))
    node = structs.replace(files.config.node, name="n1")
    beside = dataclasses.replace(files, config=structs.replace(files.config, node=node))
    async with lab_of(files) as lab, lab_of(beside) as other:
        both, carol = Voting(lab, files, tmp_path, held, card), held["carol"]
        for counter in (1, 2):  # the first one is stored beside none, the second in the place of another
            requests = [await both.asked() for _ in range(2)]
            made = [carol.assertion(bytes.fromhex(r.digest()), counter=counter) for r in requests]
            answers = await asyncio.gather(
                both.hand_in(requests[0], "carol", made[0], lab=lab),
                both.hand_in(requests[1], "carol", made[1], lab=other),
            )
            assert sorted(a.status_code for a in answers) == [200, 403], [a.text for a in answers]
            assert [a.json()["code"] for a in answers if a.status_code == 403] == ["authenticator_cloned"]
