"""Lifting a freeze: asked by one, approved by others with keys of their own, executed once."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import itertools
import json
import random
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import structs

from databases import address, patient
from harness import Files, Lab, lab_of, new_key, officer
from service.approvals import Approver, Asked, GroupRule, approve
from service.config import (
    ApprovalsSection,
    ApproverSection,
    Config,
    ConfigInvalid,
    GroupRuleSection,
    GroupSection,
    load,
)
from service.dev import domain

B64 = base64.b64encode(b"hello").decode()
APPROVERS = ("health-officer", "alice", "bob", "carol", "dave", "nobody")


def approvals(directory: Path) -> ApprovalsSection:
    """The officer who asks is an approver too; carol is one of another tenant, dave has alice's key, nobody no identity."""
    officers = {name: officer(directory, name)[1] for name in APPROVERS}
    officers["dave"] = officers["alice"]
    requester = f"mtls:{domain('eu-de-1')}:/health/officer/health-officer"
    identity: dict[str, tuple[str, ...]] = {"health-officer": (requester,), "nobody": ()}
    tenants = {"carol": ("defence",)}
    return ApprovalsSection(
        approver=tuple(
            ApproverSection(n, path, identity.get(n, (f"mtls:x:/{n}",)), tenants.get(n, ()))
            for n, path in officers.items()
        )
    )


@pytest.fixture(scope="module")
def quorum_files(dev_files: Files, tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("quorum")
    database = structs.replace(dev_files.config.database, url=address(directory))
    node = structs.replace(dev_files.config.node, state_dir=directory)
    config = structs.replace(dev_files.config, database=database, node=node, approvals=approvals(directory))
    return dataclasses.replace(dev_files, config=config)


@pytest.fixture(scope="module")
async def voting(quorum_files: Files) -> AsyncIterator[Lab]:
    async with lab_of(quorum_files) as made:
        yield made


def fresh() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


async def frozen(lab: Lab, *, who: str = "health-officer") -> tuple[str, str]:
    """(a key, the freeze that stops it)."""
    key = await new_key(lab, "AES_256")
    body = {"scope": {"kind": "key", "value": key}, "reason": {"code": "incident"}}
    made = await lab.client(who).post("/v1/freezes", json=body, headers=fresh())
    assert made.status_code == 201, made.text
    return key, made.json()["id"]


async def asked(lab: Lab, freeze: str, *, who: str = "health-officer") -> Asked:
    answer = await lab.client(who).post(f"/v1/freezes/{freeze}/lift", headers=fresh())
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/approvals/{answer.json()['id']}"
    made = Asked.of(json.dumps(answer.json()["request"]))
    assert made.digest() == answer.json()["digest"]
    return made


async def sign(
    lab: Lab, request: Asked, name: str, *, key: str | None = None, to: str | None = None, who: str = "health-custodian"
) -> httpx.Response:
    """An approver's signature of a request, handed in for it or for another one (`to`)."""
    directory = lab.files.config.node.state_dir
    made = approve(request.kind, request.digest(), name=name, key_file=directory / f"{key or name}.key")
    body = {"approver": name, "signature": made.signature.hex()}
    return await lab.client(who).post(f"/v1/approvals/{to or request.id}/signatures", json=body)


async def use(lab: Lab, key: str) -> int:
    answer = await lab.client("health-eu-de-1").post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    return answer.status_code


async def thawed(lab: Lab, key: str) -> None:
    for _ in range(1_000):
        if await use(lab, key) == 200:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the lift was not obeyed")


@pytest.mark.anyio
async def test_two_approvers_lift_what_one_officer_stopped(voting: Lab) -> None:
    key, freeze = await frozen(voting)
    request = await asked(voting, freeze)
    first = await sign(voting, request, "alice")
    assert (first.json()["state"], first.json()["approvers"]) == ("open", ["alice"])
    assert await use(voting, key) == 423
    second = await sign(voting, request, "bob")
    assert (second.json()["state"], second.json()["approvers"]) == ("executed", ["alice", "bob"])
    await thawed(voting, key)
    shown = (await voting.client("health-auditor").get(f"/v1/freezes/{freeze}")).json()
    assert shown["lifted_at"] is not None
    record = voting.node.kms.search.records(op="sign_approval", out="ok")[0].record
    assert (record["kind"], record["appr"]) == ("outcome", [request.id, request.digest(), "alice", "bob"])
    # What has been executed is over: nothing is executed twice, and nothing lifts a later freeze of the key.
    for name in ("alice", "bob"):
        replayed = await sign(voting, request, name)
        assert (replayed.status_code, replayed.json()["code"]) == (409, "approval_closed")
    again = {"scope": {"kind": "key", "value": key}, "reason": {"code": "incident"}}
    assert (await voting.client("health-officer").post("/v1/freezes", json=again, headers=fresh())).status_code == 201
    assert (await sign(voting, request, "alice")).status_code == 409
    assert await use(voting, key) == 423


@pytest.mark.anyio
async def test_A_20_what_is_not_another_persons_signature_of_exactly_this_counts_nothing(voting: Lab) -> None:
    key, freeze = await frozen(voting)
    request, other = await asked(voting, freeze), await asked(voting, (await frozen(voting))[1])
    forged = dataclasses.replace(
        request, parameters={**request.parameters, "scope": {"kind": "everything", "value": ""}}
    )
    assert (await sign(voting, request, "alice")).status_code == 200
    for attempt, why in (
        (sign(voting, request, "health-officer"), "asked for this"),
        (sign(voting, request, "alice"), "counts once"),
        (sign(voting, request, "dave", key="alice"), "counts once"),
        (sign(voting, request, "bob", key="carol"), "false"),
        (sign(voting, request, "carol"), "not approve for this tenant"),
        (sign(voting, request, "nobody"), "no identities"),
        (sign(voting, request, "mallory", key="bob"), "no approver"),
        (sign(voting, other, "bob", to=request.id), "false"),
        (sign(voting, forged, "bob"), "false"),
    ):
        answer = await attempt
        assert (answer.status_code, answer.json()["code"]) == (403, "approval_refused"), why
        assert why in answer.json()["detail"]
    shown = (await voting.client("health-officer").get(f"/v1/approvals/{request.id}")).json()
    assert (shown["state"], shown["approvers"]) == ("open", ["alice"])
    assert await use(voting, key) == 423


@pytest.mark.anyio
async def test_A_21_who_may_not_ask_sign_or_cancel_cannot(voting: Lab) -> None:
    _, freeze = await frozen(voting)
    request = await asked(voting, freeze)
    # An operator may look at requests, of which some are its own.
    for who, status, reading in (
        ("health-eu-de-1", 403, 403),
        ("health-operator", 403, 200),
        ("defence-officer", 404, 404),
    ):
        lift = await voting.client(who).post(f"/v1/freezes/{freeze}/lift", headers=fresh())
        cancel = await voting.client(who).post(f"/v1/approvals/{request.id}/cancel")
        signed = await sign(voting, request, "alice", who=who)
        read = await voting.client(who).get(f"/v1/approvals/{request.id}")
        assert [a.status_code for a in (lift, cancel, signed, read)] == [status] * 3 + [reading], who
    # A tenant cannot lift what the installation's officer stopped.
    _, above = await frozen(voting, who="installation-officer")
    assert (await voting.client("health-officer").post(f"/v1/freezes/{above}/lift", headers=fresh())).status_code == 404
    assert (await voting.client("health-officer").post(f"/v1/approvals/{request.id}/cancel")).json()[
        "state"
    ] == "cancelled"
    assert (await sign(voting, request, "alice")).json()["code"] == "approval_closed"


@pytest.mark.anyio
async def test_two_last_signatures_at_once_lift_once(voting: Lab) -> None:
    _, freeze = await frozen(voting)
    first, second = await asked(voting, freeze), await asked(voting, freeze)
    assert [(await sign(voting, r, "alice")).status_code for r in (first, second)] == [200, 200]
    answers = await asyncio.gather(sign(voting, first, "bob"), sign(voting, first, "bob"), sign(voting, second, "bob"))
    assert sorted(a.status_code for a in answers)[0] == 200
    assert [a.status_code for a in answers].count(200) == 1
    by_second = answers[2].status_code == 200  # then both others come to a freeze that another request has lifted
    refusals = sorted(a.json()["code"] for a in answers if a.status_code != 200)
    assert refusals == ["freeze_lifted" if by_second else "approval_closed", "freeze_lifted"]
    with sa.create_engine(voting.files.config.database.url).connect() as connection:
        lifts = sa.text("SELECT count(*) FROM policy_freeze WHERE lifts AND freeze_id = :id")
        assert connection.execute(lifts, {"id": freeze}).scalar() == 1
    connection.engine.dispose()


@pytest.mark.anyio
async def test_a_request_that_is_late_or_altered_or_lost_an_approver_lifts_nothing(quorum_files: Files) -> None:
    url = quorum_files.config.database.url
    async with lab_of(quorum_files) as lab:
        key, freeze = await frozen(lab)
        request, altered = await asked(lab, freeze), await asked(lab, freeze)
        lab.clock.ahead = 3_601_000_000
        late = await sign(lab, request, "alice")
        assert (late.status_code, late.json()["code"]) == (409, "approval_closed")
        assert "expired" in late.json()["detail"]
        lab.clock.ahead = 0
        assert (await sign(lab, request, "alice")).status_code == 200
    section = quorum_files.config.approvals
    without = structs.replace(section, approver=tuple(a for a in section.approver if a.name not in {"alice", "dave"}))
    engine = patient(url)
    with engine.begin() as connection:
        change = sa.text("UPDATE service_approval SET content = replace(content, 'key', 'tag') WHERE id = :id")
        assert connection.execute(change, {"id": altered.id}).rowcount == 1
    engine.dispose()
    changed = dataclasses.replace(quorum_files, config=structs.replace(quorum_files.config, approvals=without))
    async with lab_of(changed) as lab:
        answer = await sign(lab, request, "bob")  # the second signature, and the first that still counts
        assert (answer.json()["state"], answer.json()["approvers"]) == ("open", ["bob"])
        assert (await sign(lab, altered, "bob")).status_code == 500
        assert await use(lab, key) == 423


@pytest.mark.anyio
async def test_nations_approve_together_and_a_person_fills_one_place(quorum_files: Files, tmp_path: Path) -> None:
    groups = {
        "alice": ("nation:DE", "nation:FR"), "bob": ("nation:DE",), "erin": ("nation:FR",), "frank": ("nation:DE",),
        "dave": ("nation:FR",),
    }  # fmt: skip
    keys = {name: officer(tmp_path, name)[1] for name in groups}
    keys["dave"] = keys["alice"]  # one person through two groups
    section = ApprovalsSection(
        approver=tuple(ApproverSection(n, keys[n], (f"mtls:x:/{n}",), (), groups[n]) for n in groups),
        rule=(
            GroupRuleSection(
                (GroupSection("nation:DE", 2), GroupSection("nation:FR", 1)), ("lift_freeze",), ("health",)
            ),
            GroupRuleSection((GroupSection("nation:FR", 3),), ("destroy_key",)),
        ),
    )
    config = structs.replace(quorum_files.config, approvals=section)
    async with lab_of(dataclasses.replace(quorum_files, config=config)) as lab:
        key, freeze = await frozen(lab)
        request = await asked(lab, freeze)

        async def signed(name: str) -> tuple[str, list[str], int]:
            made = approve(request.kind, request.digest(), name=name, key_file=tmp_path / f"{name}.key")
            body = {"approver": name, "signature": made.signature.hex()}
            answer = await lab.client("health-custodian").post(f"/v1/approvals/{request.id}/signatures", json=body)
            assert answer.status_code == 200, answer.text
            found = answer.json()
            return found["state"], found["missing"], found["needed"]

        assert await signed("bob") == ("open", ["nation:DE", "nation:FR"], 3)
        assert await signed("frank") == ("open", ["nation:FR"], 3)
        assert await signed("alice") == ("executed", [], 3)  # for France, since Germany's places are taken
        await thawed(lab, key)

        key, freeze = await frozen(lab)
        request = await asked(lab, freeze)
        assert await signed("alice") == ("open", ["nation:DE", "nation:FR"], 3)
        assert await signed("erin") == ("open", ["nation:DE"], 3)  # alice is Germany's now
        assert await signed("bob") == ("executed", [], 3)
        await thawed(lab, key)

        operator = lab.client("health-operator")
        headers = fresh() | {"If-Match": (await operator.get(f"/v1/keys/{key}")).headers["etag"]}
        body = {"reason": {"code": "leaked"}}
        answer = await operator.post(f"/v1/keys/{key}/destroy", json=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "approval_refused")
        assert "nobody of nation:FR may approve this beside the others" in answer.json()["detail"]


def test_places_are_filled_if_there_is_a_way_at_all() -> None:
    key = Ed25519PrivateKey.generate().public_key()

    def unfilled(places: str, *officers: str) -> tuple[str, ...]:
        found = [Approver(str(n), key, groups=tuple(groups)) for n, groups in enumerate(officers)]
        return GroupRule(tuple(places)).unfilled(found)

    assert unfilled("ab", "ab", "a") == ()
    assert unfilled("abc", "abc", "ab", "a") == ()
    assert unfilled("aab", "ab", "ab") == ("b",)
    assert unfilled("aab", "ab", "b", "b") == ("a",)
    assert unfilled("ab", "ab") == ("b",)
    assert unfilled("a") == ("a",)
    for seed in range(200):  # against every order of seating
        chance = random.Random(seed)
        places = [chance.choice("abc") for _ in range(3)]
        officers = ["".join(g for g in "abc" if chance.random() < 0.4) for _ in range(chance.randrange(5))]
        most = max(
            sum(place in groups for place, groups in zip(places, order, strict=False))
            for order in itertools.permutations([*officers, "", "", ""])
        )
        assert len(unfilled("".join(places), *officers)) == 3 - most


def test_a_quorum_of_one_or_of_more_than_there_are_is_refused_at_load(dev_files: Files, tmp_path: Path) -> None:
    text = dev_files.config_file.read_text()
    one = f'[[approvals.approver]]\nname = "alice"\npublic_key = "{tmp_path}/alice.pem"\nidentities = ["mtls:a:/b"]\n'
    bob = one.replace("alice", "bob")
    other = bob.replace("mtls:a:/b", "mtls:a:/c")
    for added, why in (
        *((f"[approvals]\nneeded = {n}\n" + one + bob, "needed") for n in (0, -1, 1)),
        (one, "needed = 2, but there are 1"),
        (one + one, "one name"),
        (one + bob, "one identity"),
        ("[approvals]\nunneeded = 2\n", "unneeded"),
        *(
            (one + other + f"[[approvals.rule]]\n{rule}\n", why)
            for rule, why in (
                ("groups = []", "groups"),
                ('groups = [{group = "nation:DE", min = 0}]', "min"),
                ('groups = [{group = "nation:DE", min = -1}]', "min"),
                ('groups = [{group = "nation:DE"}]', "min"),
                ('groups = [{group = "nation:DE", min = 1}]', "min = 1, but 0"),
                ('groups = [{group = "all", min = 1}]', "group"),
                ('kinds = ["encrypt"]\ngroups = [{group = "nation:DE", min = 1}]', "kinds"),
            )
        ),
    ):
        path = tmp_path / "skms.toml"
        path.write_text(text + "\n" + added)
        with pytest.raises(ConfigInvalid, match=why):
            load(path, environment={})
    assert isinstance(dev_files.config, Config)


def test_a_request_reads_back_as_it_was_written() -> None:
    request = Asked("1", "i", "lift_freeze", None, {"freeze": "f"}, "mtls:a:/b", 1, 2)
    assert Asked.of(request.to_json()) == request
    other: Any
    for field, other in (
        ("id", "2"),
        ("tenant", "t"),
        ("kind", "k"),
        ("parameters", {}),
        ("requester", "x"),
        ("expires", 3),
    ):
        assert dataclasses.replace(request, **{field: other}).digest() != request.digest(), field
