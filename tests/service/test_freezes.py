"""Freezes through the API: one officer stops, every worker obeys, and who cannot tell serves nothing."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from msgspec import structs

from databases import address, behind, empty
from harness import Files, Lab, lab_of, new_key, until
from policy import Freeze, Scope
from policy.freeze import MODES
from policy.rows import FreezeRows
from postgres import Cluster
from service.database import migrate, open_engine

B64 = base64.b64encode(b"hello").decode()
INCIDENT = {"code": "incident"}


@pytest.fixture(scope="module")
async def frozen_lab(dev_files: Files, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    """A node over a database of its own: nobody else meets what is frozen here."""
    async with lab_of(at(dev_files, tmp_path_factory.mktemp("frozen"))) as made:
        yield made


def at(files: Files, directory: Path, *, url: str | None = None, name: str = "n0", region: str = "eu-de-1") -> Files:
    config = files.config
    database = structs.replace(config.database, url=url or address(directory))
    node = structs.replace(config.node, name=name, region=region, state_dir=directory)
    return dataclasses.replace(files, config=structs.replace(config, database=database, node=node))


async def contained(lab: Lab, answer: httpx.Response) -> dict[str, Any]:
    """The freeze once every worker obeys: the answer itself waits two seconds for that, which a busy machine may exceed."""
    assert answer.status_code == 201, answer.text
    told: dict[str, Any] = answer.json()
    for _ in range(600):
        if told["contained_at"] is not None:
            return told
        await asyncio.sleep(0.1)
        told = (await lab.client("health-auditor").get(f"/v1/freezes/{told['id']}")).json()
    raise AssertionError(f"not contained: {told}")


async def stop(
    lab: Lab, kind: str, value: str = "", *, who: str = "health-officer", mode: str = "halt"
) -> httpx.Response:
    body = {"scope": {"kind": kind, "value": value}, "reason": INCIDENT, "mode": mode}
    return await lab.client(who).post("/v1/freezes", json=body, headers={"Idempotency-Key": uuid.uuid4().hex})


@pytest.mark.anyio
async def test_no_result_leaves_after_a_freeze_that_came_while_the_row_of_its_key_was_read_again(
    dev_files: Files, postgres: Cluster, tmp_path: Path
) -> None:
    url = postgres.fresh("freezing")
    async with lab_of(at(dev_files, tmp_path, url=url)) as lab:
        key, store = await new_key(lab, "AES_256"), lab.node.kms.keystore
        path, client = f"/v1/keys/{key}/encrypt", lab.client("health-eu-de-1")
        assert (await client.post(path, json={"plaintext": B64})).status_code == 200
        engine = open_engine(url)
        with engine.connect() as log, engine.connect() as keys:
            log.execute(sa.text("LOCK TABLE audit_batch IN SHARE MODE"))  # no record becomes durable
            using = asyncio.create_task(client.post(path, json={"plaintext": B64}))
            await asyncio.sleep(0.3)
            behind(url, "UPDATE keystore_epoch SET epoch = epoch + 1")  # as if another worker had changed some key
            await until(lambda: store.by_id_at_hand(uuid.UUID(key)) is None, "the change was not noticed")
            keys.execute(sa.text("LOCK TABLE keystore_key"))  # the row can be read once this ends
            log.rollback()
            frozen = await contained(lab, await stop(lab, "tenant", "health"))
            assert frozen["contained_at"]
            keys.rollback()
        engine.dispose()
        answer = await using
        assert (answer.status_code, answer.json()["code"]) in {(423, "frozen"), (503, "database_unavailable")}
        assert "ciphertext" not in answer.json()


class Made:
    """A key of each usage, and something the first one made."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.workload = lab, lab.client("health-eu-de-1")

    async def make(self, **body: Any) -> Made:
        self.aes, self.ec, self.hmac = [
            await new_key(self.lab, spec, **body) for spec in ("AES_256", "EC_P256", "HMAC_256")
        ]
        path = f"/v1/keys/{self.aes}"
        self.ciphertext = (await self.workload.post(f"{path}/encrypt", json={"plaintext": B64})).json()["ciphertext"]
        self.wrapped = (await self.workload.post(f"{path}/data-keys", json={})).json()["wrapped_key"]
        return self

    async def encrypt(self, **options: Any) -> httpx.Response:
        return await self.workload.post(f"/v1/keys/{self.aes}/encrypt", json={"plaintext": B64}, **options)

    def uses(self) -> list[tuple[str, dict[str, Any]]]:
        signed = {"message": B64, "algorithm": "ECDSA_SHA_256"}
        maced = {"message": B64, "algorithm": "HMAC_SHA_256"}
        item = {"key": self.aes, "plaintext": B64}
        return [
            (f"/v1/keys/{self.aes}/encrypt", {"plaintext": B64}),
            ("/v1/decrypt", {"ciphertext": self.ciphertext}),
            ("/v1/rewrap", {"ciphertext": self.ciphertext}),
            (f"/v1/keys/{self.aes}/data-keys", {}),
            ("/v1/data-keys/unwrap", {"wrapped_key": self.wrapped}),
            (f"/v1/keys/{self.ec}/sign", signed),
            (f"/v1/keys/{self.ec}/verify", {**signed, "signature": B64}),
            (f"/v1/keys/{self.hmac}/mac", maced),
            (f"/v1/keys/{self.hmac}/verify-mac", {**maced, "mac": B64}),
            ("/v1/batch/encrypt", {"items": [item]}),
        ]

    def changes(self) -> list[tuple[str, dict[str, Any]]]:
        return [
            (f"/v1/keys/{self.aes}/rotate", {}),
            (f"/v1/keys/{self.aes}/enable", {}),
            (f"/v1/keys/{self.aes}/schedule-deletion", {"wait": "P30D"}),
        ]


@pytest.mark.anyio
async def test_a_frozen_tag_denies_every_use_and_change_without_a_pkcs11_call(frozen_lab: Lab) -> None:
    lab = frozen_lab
    tag = uuid.uuid4().hex
    made = await Made(lab).make(tags={"case": tag})
    told = await contained(lab, await stop(lab, "tag", f"case={tag}"))
    assert told["acknowledged"] == 1
    assert told["silent"] == []
    assert told["last_success"]["op"] == "data_key"
    assert told["last_success"]["key"] == made.aes
    before = lab.node.pkcs11_calls()
    operator = lab.client("health-operator")
    for path, body in made.uses():
        refused = await made.workload.post(path, json=body)
        problem = refused.json()["results"][0]["problem"] if "batch" in path else refused.json()
        assert (problem["status"], problem["code"], problem["freeze_id"]) == (423, "frozen", told["id"]), path
    for path, body in made.changes():
        headers = {"If-Match": '"1"', "Idempotency-Key": uuid.uuid4().hex}
        assert (await operator.post(path, json=body, headers=headers)).json()["code"] == "frozen", path
    assert lab.node.pkcs11_calls() == before
    recorded = lab.node.kms.search.records(key=made.aes, op="encrypt", out="denied")[0].record
    assert (recorded["why"], recorded["rule"], recorded["frz"]) == (
        "frozen",
        ["FREEZE"],
        lab.node.kms.freezes.now.epoch,
    )
    # What only narrows stays possible: a key that is frozen because it leaked can be marked so.
    marked = await lab.client("health-officer").post(f"/v1/keys/{made.aes}/mark-compromised")
    assert marked.status_code == 200
    assert (await operator.get(f"/v1/keys/{made.aes}")).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("kind", "value", "who"),
    [
        ("key", "{key}", "health-officer"),
        ("caller", "{caller}", "health-officer"),
        ("tenant", "health", "health-officer"),
        ("region", "DE", "installation-officer"),
        ("tier", "2", "installation-officer"),
        ("hsm", "{hsm}", "installation-officer"),
        ("everything", "", "installation-officer"),
    ],
)
async def test_each_scope_stops_its_own(dev_files: Files, tmp_path: Path, kind: str, value: str, who: str) -> None:
    async with lab_of(at(dev_files, tmp_path)) as lab:
        key, other = [await new_key(lab, "AES_256", tier=tier) for tier in (2, 3)]
        workload, hsm = lab.client("health-eu-de-1"), lab.files.config.hsm[0].name
        caller = (await workload.get("/v1/whoami")).json()["id"]
        answer = await stop(lab, kind, value.format(key=key, caller=caller, hsm=hsm), who=who)
        assert answer.status_code == 201, answer.text
        stopped = await workload.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
        assert stopped.json()["freeze_id"] == answer.json()["id"]
        beside = await workload.post(f"/v1/keys/{other}/encrypt", json={"plaintext": B64})
        assert (beside.status_code == 200) == (kind in {"key", "tier"})


RELEASES = {"/v1/decrypt", "/v1/data-keys/unwrap"}


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["no-release", "admin-only"])
async def test_a_mode_stops_what_it_names_and_nothing_else(frozen_lab: Lab, mode: str) -> None:
    lab, operator = frozen_lab, frozen_lab.client("health-operator")
    tag = uuid.uuid4().hex
    made = await Made(lab).make(tags={"case": tag})
    other = await new_key(lab, "AES_256")
    answer = (await stop(lab, "tag", f"case={tag}", mode=mode)).json()
    assert answer["mode"] == mode
    for path, body in made.uses():
        found = (await made.workload.post(path, json=body)).json()
        problem = found["results"][0].get("problem", {}) if "batch" in path else found
        stopped = mode == "admin-only" or path in RELEASES
        assert (problem.get("code") == "frozen") == stopped, (path, found)
    # Under another key everybody who may use that one could read it.
    leaves = await made.workload.post("/v1/rewrap", json={"ciphertext": made.ciphertext, "to_key": other})
    assert leaves.json()["code"] == "frozen", leaves.text
    for path, body in made.changes():
        etag = (await operator.get(f"/v1/keys/{made.aes}")).headers["ETag"]
        headers = {"If-Match": etag, "Idempotency-Key": uuid.uuid4().hex}
        changed = await operator.post(path, json=body, headers=headers)
        was_enabled = path.endswith("/enable")  # and so cannot be
        assert changed.json().get("code") == ("key_state_invalid" if was_enabled else None), (path, changed.text)


@pytest.mark.anyio
async def test_a_later_freeze_of_the_same_scope_that_stops_more_counts(frozen_lab: Lab) -> None:
    made = await Made(frozen_lab).make()
    first = (await stop(frozen_lab, "key", made.aes, mode="no-release")).json()
    assert (await made.encrypt()).status_code == 200
    second = (await stop(frozen_lab, "key", made.aes)).json()
    assert (await made.encrypt()).json()["freeze_id"] == second["id"]
    stopped = await made.workload.post("/v1/decrypt", json={"ciphertext": made.ciphertext})
    assert stopped.json()["freeze_id"] == first["id"]


@pytest.mark.anyio
async def test_no_release_tells_the_last_release_and_not_a_later_use(frozen_lab: Lab) -> None:
    made = await Made(frozen_lab).make()
    assert (await made.workload.post("/v1/decrypt", json={"ciphertext": made.ciphertext})).status_code == 200
    assert (await made.encrypt()).status_code == 200
    told = (await stop(frozen_lab, "key", made.aes, mode="no-release")).json()
    assert told["last_success"]["op"] == "decrypt"


@pytest.mark.anyio
async def test_a_freeze_says_when_its_incident_began_and_never_in_the_future(frozen_lab: Lab) -> None:
    officer = frozen_lab.client("health-officer")
    body = {"scope": {"kind": "tag", "value": "case=began"}, "reason": INCIDENT}

    async def made(began: str) -> httpx.Response:
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        return await officer.post("/v1/freezes", json={**body, "began": began}, headers=headers)

    told = (await made("2026-01-02T03:04:05Z")).json()
    assert (await officer.get(f"/v1/freezes/{told['id']}")).json()["began"] == "2026-01-02T03:04:05.000Z"
    assert (await stop(frozen_lab, "tag", "case=unknown")).json()["began"] is None
    refused = await made("2126-01-02T03:04:05Z")
    assert (refused.status_code, refused.json()["code"]) == (422, "validation_failed")
    assert refused.json()["errors"][0]["pointer"] == "/began"
    report = (await frozen_lab.client("platform").get("/v1/sovereignty/metrics")).json()["containment"]
    assert report["detected"]["count"] == 1


def test_an_action_of_which_nothing_is_known_is_stopped_in_every_mode() -> None:
    for mode in MODES:
        assert Freeze("f", 1, Scope("everything", ""), None, "incident", "o", 1, mode=mode).stops(frozenset())


@pytest.mark.anyio
async def test_who_is_no_officer_or_another_tenants_freezes_nothing(frozen_lab: Lab) -> None:
    lab = frozen_lab
    key, epoch = await new_key(lab, "AES_256"), lab.node.kms.freezes.now.epoch
    for who in ("health-eu-de-1", "health-operator", "health-custodian", "health-auditor", "platform"):
        assert (await stop(lab, "key", key, who=who)).status_code == 403, who
    for kind, value in (("key", key), ("tenant", "health"), ("key", str(uuid.uuid4())), ("tenant", "nobody")):
        refused = await stop(lab, kind, value, who="defence-officer")
        assert (refused.status_code, refused.json()["code"]) == (404, "not_found"), kind
    for kind, value in (("everything", ""), ("tier", "4"), ("region", "atlantis"), ("tag", "none")):
        assert (await stop(lab, kind, value)).status_code == 422, kind
    assert (await stop(lab, "hsm", "none")).status_code == 404
    assert lab.node.kms.freezes.now.epoch == epoch
    # A tenant's freeze stops that tenant's keys alone, and nobody else sees it.
    mine = (await stop(lab, "caller", "mtls:someone")).json()
    seen = await lab.client("defence-officer").get("/v1/freezes")
    assert mine["id"] not in seen.text
    assert (await lab.client("defence-officer").get(f"/v1/freezes/{mine['id']}")).status_code == 404
    assert (await lab.client("health-auditor").get(f"/v1/freezes/{mine['id']}")).json()["officer"].endswith("officer")
    assert (await stop(lab, "region", "DE", who="defence-officer")).status_code == 201
    assert (
        await lab.client("health-eu-de-1").post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
    ).status_code == 200


@pytest.mark.anyio
async def test_nothing_in_flight_is_released_after_the_acknowledgement(frozen_lab: Lab) -> None:
    lab = frozen_lab
    made = await Made(lab).make()
    released: list[float] = []
    loop, going = asyncio.get_running_loop(), True

    async def use() -> None:
        while going:
            if (await made.encrypt()).status_code == 200:
                released.append(loop.time())

    users = [asyncio.create_task(use()) for _ in range(8)]
    await until(lambda: bool(released), "nothing was released")
    await contained(lab, await stop(lab, "key", made.aes))
    acknowledged = loop.time()
    await asyncio.sleep(0.3)
    going = False
    await asyncio.gather(*users)
    assert max(released) <= acknowledged


@pytest.mark.anyio
async def test_a_worker_that_cannot_read_the_freezes_serves_nothing_once_its_lease_is_over(frozen_lab: Lab) -> None:
    lab, freezes = frozen_lab, frozen_lab.node.kms.freezes
    made = await Made(lab).make(tier=1)
    url = lab.files.config.database.url
    behind(url, "ALTER TABLE policy_freeze RENAME TO elsewhere")
    try:
        early = await made.encrypt()
        assert early.status_code == 200 or (freezes.age_s or 0) > 3  # within the lease of tier 1
        answers = [await made.encrypt()]
        while answers[-1].status_code == 200 and len(answers) < 400:
            await asyncio.sleep(0.05)
            answers.append(await made.encrypt())
        assert (answers[-1].status_code, answers[-1].json()["code"]) == (503, "freeze_unconfirmed")
        assert freezes.age_s is not None
        assert freezes.age_s > 3
    finally:
        behind(url, "ALTER TABLE elsewhere RENAME TO policy_freeze")
    await until(lambda: freezes.age_s is not None and freezes.age_s < 1, "the freezes are not read")
    assert (await made.encrypt()).status_code == 200


@pytest.mark.anyio
async def test_a_drill_stops_a_canary_measures_and_lifts_itself(frozen_lab: Lab) -> None:
    lab = frozen_lab
    made, real = await Made(lab).make(tags={"canary": "true"}), await new_key(lab, "AES_256")

    async def drill(key: str, who: str = "health-officer") -> httpx.Response:
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        return await lab.client(who).post("/v1/freezes/drill", json={"key": key}, headers=headers)

    refused = await drill(real)
    assert (refused.status_code, refused.json()["errors"][0]["code"]) == (422, "no_canary")
    assert [(await drill(made.aes, who)).status_code for who in ("health-operator", "defence-officer")] == [403, 404]
    kept = (await stop(lab, "key", made.hmac)).json()
    told = await contained(lab, await drill(made.aes))
    assert told["drill"] is True
    assert told["lifted_at"] is not None
    assert 0 < told["seconds_to_contain"] < 60
    assert told["last_success"]["key"] == made.aes
    await until(lambda: told["id"] not in {f.id for f in lab.node.kms.freezes.now.freezes}, "it is still in force")
    assert (await made.encrypt()).status_code == 200
    assert (await drill(made.hmac)).status_code == 201  # another canary, which an officer had stopped before
    assert kept["id"] in {f.id for f in lab.node.kms.freezes.now.freezes}
    (ended,) = lab.node.kms.search.records(op="lift_drill", out="ok", limit=1)
    assert ended.record["actor"].endswith("officer")


@pytest.mark.anyio
async def test_A_18_freezes_changed_by_sql_stop_everything(dev_files: Files, tmp_path: Path) -> None:
    files = at(dev_files, tmp_path)
    url = files.config.database.url
    async with lab_of(files) as lab:
        made = await Made(lab).make()
        for value in ("a", "b", "c"):
            assert (await stop(lab, "caller", value)).status_code == 201
        behind(url, "DELETE FROM policy_freeze WHERE epoch = 3")
        await until(lambda: bool(lab.node.kms.freezes.damaged), "the damage was not noticed")
        assert (await made.encrypt()).json()["code"] == "freeze_unconfirmed"
        assert (await lab.client("platform").get("/readyz")).status_code == 503
    use = (f"/v1/keys/{made.aes}/encrypt", {"plaintext": B64})
    async with lab_of(files) as lab:  # a restart does not forget that there was a third
        assert "freeze 3 was there and is missing" in lab.node.kms.freezes.damaged
        assert (await lab.client("health-eu-de-1").post(use[0], json=use[1])).json()["code"] == "freeze_unconfirmed"
    (files.config.node.state_dir / "freeze-epoch").unlink()  # set back on purpose
    async with lab_of(files) as lab:
        assert (await lab.client("health-eu-de-1").post(use[0], json=use[1])).status_code == 200
    for statement, why in (
        ("UPDATE policy_freeze SET value = 'nobody' WHERE epoch = 1", "freeze 1 was changed"),
        ("UPDATE policy_freeze SET value = 'a', mode = 'no-release' WHERE epoch = 1", "freeze 1 was changed"),
        ("UPDATE policy_freeze SET value = 'a', began = 1 WHERE epoch = 1", "freeze 1 was changed"),
        ("DELETE FROM policy_freeze WHERE epoch = 1", "freeze 1 is missing"),
    ):
        behind(url, statement)
        async with lab_of(files) as lab:
            assert why in lab.node.kms.freezes.damaged
            refused = await lab.client("health-eu-de-1").post(use[0], json=use[1])
            assert (refused.status_code, refused.json()["code"]) == (503, "freeze_unconfirmed")


@pytest.mark.anyio
async def test_on_postgresql_another_node_obeys_and_a_restart_forgets_nothing(
    dev_files: Files, postgres: Cluster, tmp_path: Path
) -> None:
    url = postgres.fresh("freezes")
    first, second = (at(dev_files, tmp_path / name, url=url, name=name, region=region) for name, region in NODES)
    async with lab_of(first) as lab, lab_of(second) as other:
        key = await new_key(lab, "AES_256", execution=["DE"])
        use = (f"/v1/keys/{key}/encrypt", {"plaintext": B64})
        assert (await other.client("health-eu-de-1").post(use[0], json=use[1])).status_code == 200
        answers = await asyncio.gather(stop(lab, "key", key), stop(other, "caller", "x"), stop(lab, "caller", "y"))
        assert [a.status_code for a in answers] == [201, 201, 201]
        told = await contained(lab, answers[0])
        assert told["acknowledged"] == 2
        assert 0 < told["seconds_to_contain"] < 60
        assert (await other.client("health-eu-de-1").post(use[0], json=use[1])).json()["freeze_id"] == told["id"]
    async with lab_of(first) as again:
        assert (await again.client("health-eu-de-1").post(use[0], json=use[1])).json()["freeze_id"] == told["id"]
        assert again.node.kms.freezes.now.epoch == 3


NODES = (("n0", "eu-de-1"), ("n1", "eu-de-2"))


def test_a_worker_that_starts_while_a_freeze_is_stored_is_waited_for(tmp_path: Path) -> None:
    engine = open_engine(empty(tmp_path))
    migrate(engine, lock_dir=tmp_path)
    time = [1_000_000_000_000_000]
    rows = FreezeRows(engine, key=lambda _: bytes(32), region="eu-de-1", clock=lambda: time[0])
    rows.enlist("before", "n0")
    freeze = Freeze("f", 1, Scope("tenant", "health"), "health", "why", "officer", time[0], False)
    time[0] += 1_000_000  # it is decided, and not stored yet
    rows.enlist("meanwhile", "n1")
    with engine.begin() as connection:
        rows.put(connection, freeze)
    time[0] += 4_000_000
    rows.enlist("after", "n2")  # read it before its first request
    rows.acknowledge("before", 1)
    rows.acknowledge("after", 1)
    reach = rows.reach(freeze)
    assert (set(reach.acknowledged), [s.worker for s in reach.silent], reach.contained_at) == (
        {"before"},
        ["meanwhile"],
        None,
    )
    rows.acknowledge("meanwhile", 1)
    assert rows.reach(freeze).contained_at == time[0]
    engine.dispose()
