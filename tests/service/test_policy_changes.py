"""Changing the policy by a quorum: planned, asked by one, approved by others, in force everywhere, and back again."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import shutil
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from msgspec import structs

from databases import patient
from harness import Files, Lab, lab_of, new_key, officer, until, with_database
from policy import BundleRefused, Policy
from postgres import Cluster
from service.approvals import Asked, approve
from service.config import ApprovalsSection, ApproverSection
from service.database import migrate, open_engine
from service.decisions import BundleLost, Bundles, content
from service.dev import domain
from service.policychanges import under
from service.protocols import wire
from service.rows import Applied, AppliedDamaged, Settings

B64 = base64.b64encode(b"hello").decode()
OFFICER = f"mtls:{domain('eu-de-1')}:/platform/officer"
STOP = (
    '\n@id("health.stop") @layer("tenant") @code("HEALTH-STOP") @disclose("code")\n'
    'forbid (principal, action == Action::"encrypt", resource in Tenant::"health");\n'
)
MEMBERS = "tenants/health/members.yaml"
RULES = "tenants/health/00-roles.cedar"
pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def changing_files(dev_files: Files, tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("changes")
    found = tuple(
        ApproverSection(name, officer(directory, name)[1], (f"mtls:x:/{name}",), tenants)
        for name, tenants in (("alice", ()), ("bob", ()), ("carol", ("defence",)))
    )
    return with_database(dev_files, directory, approvals=ApprovalsSection(approver=found))


@pytest.fixture(scope="module")
async def changing(changing_files: Files) -> AsyncIterator[Lab]:
    async with lab_of(changing_files) as made:
        yield made


def draft(lab: Lab, edits: Mapping[str, str | None] | None = None, *, rise: int = 1) -> dict[str, str]:
    """The bundle in force with a higher version; edits add text to a file, None removes it."""
    now = lab.node.kms.policy
    files = {path: data.decode() for path, data in under(now.bundle.sources, now.version + rise).items()}
    for path, text in (edits or {}).items():
        if text is None:
            del files[path]
        else:
            files[path] = files.get(path, "") + text
    return files


async def ask(
    lab: Lab, body: Mapping[str, Any], *, how: str = "apply", who: str = "installation-officer"
) -> httpx.Response:
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    return await lab.client(who).post(f"/v1/policy/{how}", json=body, headers=headers)


async def sign(lab: Lab, request: Asked, name: str, *, who: str = "installation-officer") -> httpx.Response:
    key = lab.files.config.node.state_dir / f"{name}.key"
    made = approve(request.kind, request.digest(), name=name, key_file=key)
    body = {"approver": name, "signature": made.signature.hex()}
    return await lab.client(who).post(f"/v1/approvals/{request.id}/signatures", json=body)


def asked(answer: httpx.Response) -> Asked:
    assert answer.status_code == 202, answer.text
    return Asked.of(json.dumps(answer.json()["request"]))


async def applied(lab: Lab, body: Mapping[str, Any], *, how: str = "apply", who: str = "installation-officer") -> Asked:
    """A change that was asked for and approved by two."""
    request = asked(await ask(lab, body, how=how, who=who))
    for name, state in (("alice", "open"), ("bob", "executed")):
        answer = await sign(lab, request, name)
        assert (answer.status_code, answer.json().get("state")) == (200, state), answer.text
    return request


async def use(lab: Lab, key: str) -> int:
    answer = await lab.client("health-eu-de-1").post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    return answer.status_code


async def becomes(lab: Lab, digest: str) -> None:
    await until(lambda: lab.node.kms.policy.digest == digest, "the bundle was not taken over")


async def recorded(lab: Lab, request: Asked) -> dict[str, Any]:
    """The record of the bundle that this request put in force."""

    def found() -> list[dict[str, Any]]:
        active = (dict(f.record) for f in lab.node.kms.search.records(op="bundle_active", limit=20))
        return [record for record in active if record.get("intent") == request.id]

    await until(found, "no record of the change")
    return found()[0]


async def test_a_quorum_puts_a_bundle_in_force_and_a_rollback_restores_the_decisions(changing: Lab) -> None:
    key = await new_key(changing, "AES_256")
    old = changing.node.kms.policy
    request = asked(await ask(changing, {"files": draft(changing, {RULES: STOP}), "replaces": old.digest[:12]}))
    assert (request.parameters["replaces"], request.parameters["version"]) == (old.digest, old.version + 1)
    assert request.parameters["files"] == {RULES: "changed", "charter.yaml": "changed"}
    assert (await sign(changing, request, "alice")).json()["state"] == "open"
    assert await use(changing, key) == 200
    assert (await sign(changing, request, "bob")).json()["state"] == "executed"
    assert await use(changing, key) == 403
    new = changing.node.kms.policy
    assert new.digest == request.parameters["bundle"]
    shown = (await changing.client("installation-officer").get("/v1/policy")).json()
    assert (shown["digest"], shown["applied"]) == (new.digest, request.id)
    record = await recorded(changing, request)
    assert (record["pol"], record["why"]) == (new.digest[:32], f"replaces:{old.digest[:32]}")
    assert (record["appr"], record["rh"]) == (["alice", "bob"], request.digest())
    # Executed once, and only once.
    assert (await sign(changing, request, "alice")).json()["code"] == "approval_closed"
    back = await applied(changing, {}, how="rollback")
    assert await use(changing, key) == 200
    restored = changing.node.kms.policy
    assert (restored.digest, restored.version) == (back.parameters["bundle"], new.version + 1)
    assert {**restored.bundle.sources, "charter.yaml": b""} == {**old.bundle.sources, "charter.yaml": b""}
    # An earlier one by name; an unknown one is told.
    named = asked(await ask(changing, {"to": new.digest[:12]}, how="rollback"))
    assert (named.parameters["version"], named.parameters["files"]) == (new.version + 2, request.parameters["files"])
    cancelled = await changing.client("installation-officer").post(f"/v1/approvals/{named.id}/cancel")
    assert cancelled.json()["state"] == "cancelled"
    assert (await sign(changing, named, "alice")).json()["code"] == "approval_closed"
    assert (await ask(changing, {"to": "0" * 12}, how="rollback")).json()["code"] == "bundle_lost"


async def test_another_charter_takes_as_many_as_the_one_in_force_asks_for_at_most(
    changing: Lab, dev_files: Files, tmp_path: Path
) -> None:
    more = {"charter/00-charter.cedar": "\n// K13 is for another day.\n"}
    refused = await ask(changing, {"files": draft(changing, more)})  # carol approves for one tenant alone
    assert (refused.status_code, refused.json()["code"]) == (403, "approval_refused")
    assert "2 approvers may approve this and 3 must" in refused.json()["detail"]
    people = f"mtls:{domain('eu-de-1')}:/health/people"
    three = tuple(ApproverSection(n, officer(tmp_path, n)[1], (f"{people}/{n}",)) for n in ("alice", "bob", "dave"))
    async with lab_of(with_database(dev_files, tmp_path, approvals=ApprovalsSection(approver=three))) as lab:
        answer = await ask(lab, {"files": draft(lab, more)})
        request = asked(answer)
        assert (answer.json()["needed"], request.parameters["needed"]) == (3, 3)
        states = [(await sign(lab, request, name)).json()["state"] for name in ("alice", "bob", "dave")]
        assert states == ["open", "open", "executed"]
        assert lab.node.kms.policy.digest == request.parameters["bundle"]
        assert (await ask(lab, {"files": draft(lab, {RULES: STOP})})).json()["needed"] == 2
        # One person's two logins are parted by as many as could have been outvoted by them.
        linked = "".join(f'- {{id: "{people}/{n}", role: "auditor", person: "health-p99"}}\n' for n in ("alice", "bob"))
        request = asked(await ask(lab, {"files": draft(lab, {MEMBERS: linked})}))
        assert request.parameters["needed"] == 0  # no more than always
        assert [(await sign(lab, request, n)).json()["state"] for n in ("alice", "dave")] == ["open", "executed"]
        two = draft(lab)
        two[MEMBERS] = two[MEMBERS].replace(
            '/bob", role: "auditor", person: "health-p99"', '/bob", role: "auditor", person: "b"'
        )
        refused = await ask(lab, {"files": two})  # and now nobody else is left to agree
        assert (refused.status_code, refused.json()["code"]) == (403, "approval_refused")
        assert "2 approvers may approve this and 3 must" in refused.json()["detail"]


async def test_who_may_not_ask_cannot_and_a_tenant_changes_its_own_files_only(changing: Lab) -> None:
    files = draft(changing, {RULES: STOP})
    for who in ("health-operator", "health-eu-de-1", "health-custodian", "health-auditor", "platform"):
        for how, body in (("apply", {"files": files}), ("rollback", {}), ("plan", {"files": files})):
            answer = await ask(changing, body, how=how, who=who)
            assert (answer.status_code, answer.json()["code"]) == (403, "policy_denied"), (who, how)
    foreign = await ask(changing, {"files": files}, who="defence-officer")
    assert (foreign.status_code, foreign.json()["file"]) == (422, RULES)
    wider = await ask(changing, {"files": draft(changing, {"charter/09-more.cedar": STOP})}, who="health-officer")
    assert wider.status_code == 422
    charter = draft(changing, {RULES: STOP})
    charter["charter.yaml"] = charter["charter.yaml"].replace('"customer-initiated"', '"unspecified"')
    refused = await ask(changing, {"files": charter}, who="health-officer")
    assert (refused.status_code, refused.json()["file"]) == (422, "charter.yaml")
    skipping = await ask(changing, {"files": draft(changing, {RULES: STOP}, rise=2)}, who="health-officer")
    assert (skipping.status_code, skipping.json()["file"]) == (422, "charter.yaml")
    # Its own: by the tenant's approvers, of whom another tenant's is none.
    key = await new_key(changing, "AES_256")
    request = asked(await ask(changing, {"files": files}, who="health-officer"))
    assert request.tenant == "health"
    assert "not approve for this tenant" in (await sign(changing, request, "carol")).json()["detail"]
    assert (await sign(changing, request, "alice", who="defence-custodian")).status_code == 404
    assert (await sign(changing, request, "alice", who="health-custodian")).status_code == 200
    assert (await sign(changing, request, "bob", who="health-custodian")).json()["state"] == "executed"
    assert await use(changing, key) == 403
    await applied(changing, {}, how="rollback", who="health-officer")
    assert await use(changing, key) == 200


async def test_a_draft_for_another_bundle_is_stale_when_asked_and_when_signed(changing: Lab) -> None:
    stale = await ask(changing, {"files": draft(changing), "replaces": "0" * 64})
    assert (stale.status_code, stale.json()["code"]) == (409, "policy_stale")
    first, second = [asked(await ask(changing, {"files": draft(changing, rise=n)})) for n in (1, 2)]
    assert (await sign(changing, second, "alice")).status_code == 200
    for name in ("alice", "bob"):
        assert (await sign(changing, first, name)).status_code == 200
    late = await sign(changing, second, "bob")
    assert (late.status_code, late.json()["code"]) == (409, "policy_stale")
    assert changing.node.kms.policy.digest == first.parameters["bundle"]
    # What is in force already, or a version that does not rise.
    same = {path: data.decode() for path, data in changing.node.kms.policy.bundle.sources.items()}
    assert (await ask(changing, {"files": same})).json()["code"] == "policy_stale"
    low = await ask(changing, {"files": draft(changing, {RULES: STOP}, rise=0)})
    assert (low.status_code, low.json()["file"]) == (422, "charter.yaml")


async def test_two_applies_signed_at_once_put_one_in_force(changing: Lab) -> None:
    first, second = [asked(await ask(changing, {"files": draft(changing, rise=n)})) for n in (1, 2)]
    assert [(await sign(changing, r, "alice")).status_code for r in (first, second)] == [200, 200]
    answers = await asyncio.gather(*(sign(changing, r, "bob") for r in (first, second, first)))
    assert sorted(a.status_code for a in answers) == [200, 409, 409]
    won = next(r for r, a in zip((first, second, first), answers, strict=True) if a.status_code == 200)
    assert changing.node.kms.policy.digest == won.parameters["bundle"]
    again = changing.node.kms.applied.get()
    assert again is not None
    assert (again.approval, again.signers) == (won.id, ("alice", "bob"))


async def test_a_lock_out_is_refused_with_the_names_of_those_locked_out(changing: Lab) -> None:
    files = draft(changing)
    members = files["tenants/health/members.yaml"]
    files["tenants/health/members.yaml"] = members.replace("role: operator", "role: auditor")
    assert files["tenants/health/members.yaml"] != members
    planned = await ask(changing, {"files": files}, how="plan")
    lost = {(one["tenant"], one["action"]) for one in planned.json()["locked_out"]}
    assert lost == {("health", "createKey"), ("health", "rotate"), ("health", "enable")}
    refused = await ask(changing, {"files": files})
    assert (refused.status_code, refused.json()["code"]) == (409, "policy_would_lock_out")
    assert refused.json()["names"] == [f"mtls:{domain('eu-de-1')}:/health/operator/health-operator"]
    assert "tenant health could createKey" in refused.json()["detail"]
    # The installation's own officer, by a rule this time.
    files = draft(changing)
    path = "installation/00-platform.cedar"
    files[path] = files[path].replace('Action::"changePolicy"', 'Action::"readPolicy"')
    refused = await ask(changing, {"files": files})
    assert (refused.json()["code"], refused.json()["names"]) == ("policy_would_lock_out", [OFFICER])
    # Approvers who become the one who asks: nobody would be left to approve the next change.
    files = draft(changing)
    same = [{"id": f"mtls:x:/{name}", "role": "auditor", "person": "officer"} for name in ("alice", "bob")]
    path = "installation/members.yaml"
    files[path] = yaml.safe_dump({"members": [*yaml.safe_load(files[path])["members"], *same]})
    refused = await ask(changing, {"files": files})
    assert (refused.json()["code"], refused.json()["names"]) == ("policy_would_lock_out", [OFFICER])


async def test_a_broken_draft_or_one_that_breaks_a_promise_changes_nothing(changing: Lab) -> None:
    before = changing.node.kms.policy
    broken = await ask(changing, {"files": draft(changing, {RULES: "permit (principal, action, resource);"})})
    assert (broken.status_code, broken.json()["file"]) == (422, RULES)
    loose = draft(changing)
    path = "charter/00-charter.cedar"
    loose[path] = loose[path].replace("resource.execution.containsAll(context.via)", "true")
    assert loose[path] != draft(changing)[path]
    planned = (await ask(changing, {"files": loose}, how="plan")).json()
    assert [one["code"] for one in planned["refuted"]] == ["SOV-EXECUTION"]
    refused = await ask(changing, {"files": loose})
    assert refused.status_code == 422
    assert "SOV-EXECUTION" in refused.json()["errors"][0]["detail"]
    # A rule without a formula leaves everything unproved: no cover for a change of the charter.
    like = STOP.rstrip()[:-1] + '\nwhen { context.reason like "vendor*" };\n'
    told = (await ask(changing, {"files": draft(changing, {RULES: like})}, how="plan")).json()
    assert "health.stop" in told["unproved"]
    unproved = await ask(changing, {"files": draft(changing, {RULES: like, path: "// looser one day\n"})})
    assert (unproved.status_code, unproved.json()["file"]) == (422, "charter")
    assert "unproved" in unproved.json()["errors"][0]["detail"]
    request = asked(await ask(changing, {"files": draft(changing, {RULES: like})}))
    assert "health.stop" in str(request.parameters["unproved"])
    assert changing.node.kms.policy is before


async def test_a_plan_tells_files_meaning_witness_and_blast_radius(changing: Lab) -> None:
    began = wire.moment(changing.clock())
    key = await new_key(changing, "AES_256")
    assert [await use(changing, key) for _ in range(2)] == [200, 200]
    body = {"files": draft(changing, {RULES: STOP}), "from": began, "to": wire.moment(changing.clock() + 1_000_000)}
    answer = await ask(changing, body, how="plan", who="health-officer")
    assert answer.status_code == 200, answer.text
    told = answer.json()
    (rules,) = [f for f in told["files"] if f["path"] == RULES]
    assert '+@id("health.stop") @layer("tenant") @code("HEALTH-STOP") @disclose("code")' in rules["diff"]
    (change,) = told["changes"]
    assert (change["newly"], change["resource"], change["decided"]) == ("denied", "Key", "deny")
    assert change["request"]["action"] == "encrypt"
    assert told["replay"]["newly_denied"] == 2
    assert told["replay"]["radius"]["key"] == {key: 2}
    assert told["replay"]["radius"]["rule"] == {"health.stop": 2, "health.workload-use": 2}
    assert (told["refuted"], told["locked_out"], told["members"]) == ([], [], [])


async def test_the_applied_bundle_survives_a_restart_and_every_worker_follows(
    dev_files: Files, changing_files: Files, tmp_path: Path
) -> None:
    files = with_database(dev_files, tmp_path / "node", approvals=changing_files.config.approvals)
    for name in ("alice", "bob"):
        shutil.copy(changing_files.config.node.state_dir / f"{name}.key", files.config.node.state_dir)
    section = structs.replace(files.config.node, name="n1", region="eu-de-2")
    second = dataclasses.replace(files, config=structs.replace(files.config, node=section))
    async with lab_of(files) as lab, lab_of(second) as other:
        first = lab.node.kms.policy
        nothing = await ask(lab, {}, how="rollback")
        assert (nothing.status_code, nothing.json()["code"]) == (409, "policy_stale")
        key = await new_key(lab, "AES_256")
        request = await applied(lab, {"files": draft(lab, {RULES: STOP})})
        digest = str(request.parameters["bundle"])
        await becomes(other, digest)
        assert (await recorded(other, request))["appr"] == ["alice", "bob"]
        # A directory takes the place of an applied bundle neither by a reload nor at a restart.
        reloaded = await lab.client("platform").post("/v1/policy/reload")
        assert (reloaded.status_code, reloaded.json()["code"]) == (409, "policy_by_quorum")
    assert Policy.load(files.config.policy.bundle).digest == first.digest
    async with lab_of(files) as lab:
        assert lab.node.kms.policy.digest == digest
        assert await use(lab, key) == 403
        await asyncio.sleep(0.5)  # the poll comes round, and leaves it
        assert lab.node.kms.policy.digest == digest
        shown = (await lab.client("installation-officer").get("/v1/policy")).json()
        assert (shown["digest"], shown["applied"]) == (digest, request.id)
        assert (await recorded(lab, request))["node"] == lab.node.kms.node
        # What somebody writes into the database is not believed, however well it fits: this worker stays with what it has.
        evil = Policy.stored(under(first.bundle.sources, 50))
        forged = {"digest": evil.digest, "version": 50, "content": content(evil.bundle.sources)}
        engine = patient(files.config.database.url)
        with engine.begin() as connection:
            lab.node.kms.decisions.bundles.keep(connection, evil, at=lab.clock())
            stored = json.loads(Settings.value(connection, "policy-applied") or "")
            Settings.put(connection, "policy-applied", json.dumps(stored | forged, sort_keys=True))
            Settings.put(connection, "policy-digest", evil.digest)
        await asyncio.sleep(0.5)
        assert lab.node.kms.policy.digest == digest
        assert await use(lab, key) == 403
    for change in ("forged", "deleted"):
        with pytest.raises(BundleRefused, match="applied bundle"):
            async with lab_of(files):
                raise AssertionError(f"a node started with what was {change}")
        with engine.begin() as connection:
            Settings.drop(connection, "policy-applied")
    # Put back, it counts again.
    with engine.begin() as connection:
        Settings.put(connection, "policy-applied", json.dumps(stored, sort_keys=True))
        Settings.put(connection, "policy-digest", digest)
    engine.dispose()
    async with lab_of(files) as lab:
        assert lab.node.kms.policy.digest == digest


async def test_two_applies_signed_at_once_on_two_nodes_put_one_in_force_on_both(
    dev_files: Files, changing_files: Files, postgres: Cluster, tmp_path: Path
) -> None:
    files = with_database(dev_files, tmp_path / "node", approvals=changing_files.config.approvals)
    url = structs.replace(files.config.database, url=postgres.fresh("policy"))
    config = structs.replace(files.config, database=url)
    files = dataclasses.replace(files, config=config)
    section = structs.replace(config.node, name="n1", region="eu-de-2")
    second = dataclasses.replace(files, config=structs.replace(config, node=section))
    for name in ("alice", "bob"):
        shutil.copy(changing_files.config.node.state_dir / f"{name}.key", config.node.state_dir)
    async with lab_of(files) as lab, lab_of(second) as other:
        for _ in range(2):  # nothing was applied before the first, something before the second
            pair = [asked(await ask(lab, {"files": draft(lab, rise=n)})) for n in (1, 2)]
            for one in pair:
                assert (await sign(lab, one, "alice")).status_code == 200
            answers = await asyncio.gather(sign(lab, pair[0], "bob"), sign(other, pair[1], "bob"))
            assert sorted(a.status_code for a in answers) == [200, 409], [a.text for a in answers]
            won = next(r for r, a in zip(pair, answers, strict=True) if a.status_code == 200)
            assert next(a.json()["code"] for a in answers if a.status_code == 409) == "policy_stale"
            for node in (lab, other):
                await becomes(node, str(won.parameters["bundle"]))
            assert (await recorded(lab, won))["appr"] == ["alice", "bob"]


async def test_a_release_with_another_schema_takes_the_approved_files_and_no_others(
    dev_files: Files, tmp_path: Path
) -> None:
    config = with_database(dev_files, tmp_path / "upgraded").config
    engine = open_engine(config.database.url)
    migrate(engine, lock_dir=tmp_path)
    found = Policy.load(config.policy.bundle, sample=25)
    earlier = Applied(
        "ab" * 32, found.version, content(found.bundle.sources), "cd" * 32, "id", "ef" * 32, ("alice",), 1
    )
    text = json.dumps({path: data.decode() for path, data in found.bundle.sources.items()}, sort_keys=True)
    with engine.begin() as connection:
        Settings.put(connection, f"policy-bundle/{earlier.digest[:32]}", text)
    bundles = Bundles(engine)
    assert bundles.in_force(earlier).digest == found.digest
    with pytest.raises(AppliedDamaged, match="changed outside"):
        bundles.in_force(dataclasses.replace(earlier, content="00" * 32))
    with pytest.raises(BundleLost):
        bundles.in_force(dataclasses.replace(earlier, digest="00" * 32))
    engine.dispose()


async def test_without_approvers_the_answer_says_what_to_do(lab: Lab) -> None:
    refused = await ask(lab, {"files": draft(lab)})
    assert (refused.status_code, refused.json()["code"]) == (403, "approval_refused")
    assert "[[approvals.approver]]" in refused.json()["detail"]
