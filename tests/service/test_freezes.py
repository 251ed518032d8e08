"""Freezes through the API: one officer stops, every worker obeys, and who cannot tell serves nothing."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from msgspec import structs

from harness import Files, Lab, lab_of, new_key
from postgres import Cluster

B64 = base64.b64encode(b"hello").decode()
INCIDENT = {"code": "incident"}


@pytest.fixture(scope="module")
async def frozen_lab(dev_files: Files, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    """A node over a database of its own: nobody else meets what is frozen here."""
    async with lab_of(at(dev_files, f"sqlite:///{tmp_path_factory.mktemp('frozen')}/skms.db")) as made:
        yield made


def at(files: Files, url: str, *, name: str = "n0", region: str = "eu-de-1") -> Files:
    config = files.config
    database = structs.replace(config.database, url=url)
    node = structs.replace(config.node, name=name, region=region, state_dir=Path(url.rpartition("/")[0][10:] or "/tmp"))
    return dataclasses.replace(files, config=structs.replace(config, database=database, node=node))


async def stop(lab: Lab, kind: str, value: str = "", *, who: str = "health-officer") -> httpx.Response:
    body = {"scope": {"kind": kind, "value": value}, "reason": INCIDENT}
    return await lab.client(who).post("/v1/freezes", json=body, headers={"Idempotency-Key": uuid.uuid4().hex})


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
    answer = await stop(lab, "tag", f"case={tag}")
    assert answer.status_code == 201, answer.text
    told = answer.json()
    assert told["contained_at"] is not None
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
    async with lab_of(at(dev_files, f"sqlite:///{tmp_path}/skms.db")) as lab:
        key, other = [await new_key(lab, "AES_256", tier=tier) for tier in (2, 3)]
        workload, hsm = lab.client("health-eu-de-1"), lab.files.config.hsm[0].name
        caller = (await workload.get("/v1/whoami")).json()["id"]
        answer = await stop(lab, kind, value.format(key=key, caller=caller, hsm=hsm), who=who)
        assert answer.status_code == 201, answer.text
        stopped = await workload.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
        assert stopped.json()["freeze_id"] == answer.json()["id"]
        beside = await workload.post(f"/v1/keys/{other}/encrypt", json={"plaintext": B64})
        assert (beside.status_code == 200) == (kind in {"key", "tier"})


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
    await asyncio.sleep(0.2)
    answer = await stop(lab, "key", made.aes)
    acknowledged = loop.time()
    await asyncio.sleep(0.3)
    going = False
    await asyncio.gather(*users)
    assert answer.json()["contained_at"] is not None
    assert released
    assert max(released) <= acknowledged


@pytest.mark.anyio
async def test_a_worker_that_cannot_read_the_freezes_serves_nothing_once_its_lease_is_over(frozen_lab: Lab) -> None:
    lab, freezes = frozen_lab, frozen_lab.node.kms.freezes
    made = await Made(lab).make(tier=1)
    engine = sa.create_engine(lab.files.config.database.url)
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE policy_freeze RENAME TO elsewhere"))
    try:
        assert (await made.encrypt()).status_code == 200  # within the lease of tier 1
        answers = [await made.encrypt()]
        while answers[-1].status_code == 200 and len(answers) < 400:
            await asyncio.sleep(0.05)
            answers.append(await made.encrypt())
        assert (answers[-1].status_code, answers[-1].json()["code"]) == (503, "freeze_unconfirmed")
        assert freezes.age_s is not None
        assert freezes.age_s > 3
    finally:
        with engine.begin() as connection:
            connection.execute(sa.text("ALTER TABLE elsewhere RENAME TO policy_freeze"))
        engine.dispose()
    await until(lambda: freezes.age_s is not None and freezes.age_s < 1)
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
    told = (await drill(made.aes)).json()
    assert told["drill"] is True
    assert told["contained_at"] is not None
    assert told["lifted_at"] is not None
    assert 0 < told["seconds_to_contain"] < 30
    assert told["last_success"]["key"] == made.aes
    await until(lambda: told["id"] not in {f.id for f in lab.node.kms.freezes.now.freezes})
    assert (await made.encrypt()).status_code == 200
    assert (await drill(made.hmac)).status_code == 201  # another canary, which an officer had stopped before
    assert kept["id"] in {f.id for f in lab.node.kms.freezes.now.freezes}
    (ended,) = lab.node.kms.search.records(op="lift_drill", out="ok", limit=1)
    assert ended.record["actor"].endswith("officer")


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(500):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come about")


@contextlib.contextmanager
def sabotage(url: str, statement: str) -> Any:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text(statement))
    yield
    engine.dispose()


@pytest.mark.anyio
async def test_A_18_freezes_changed_by_sql_stop_everything(dev_files: Files, tmp_path: Path) -> None:
    files = at(dev_files, f"sqlite:///{tmp_path}/skms.db")
    url = files.config.database.url
    async with lab_of(files) as lab:
        made = await Made(lab).make()
        for value in ("a", "b", "c"):
            assert (await stop(lab, "caller", value)).status_code == 201
        with sabotage(url, "DELETE FROM policy_freeze WHERE epoch = 3"):
            await until(lambda: bool(lab.node.kms.freezes.damaged))
        assert (await made.encrypt()).json()["code"] == "freeze_unconfirmed"
        assert (await lab.client("platform").get("/readyz")).status_code == 503
    for statement, why in (
        ("UPDATE policy_freeze SET value = 'nobody' WHERE epoch = 1", "freeze 1 was changed"),
        ("DELETE FROM policy_freeze WHERE epoch = 1", "freeze 1 is missing"),
    ):
        with sabotage(url, statement):
            async with lab_of(files) as lab:
                assert why in lab.node.kms.freezes.damaged
                refused = await lab.client("health-eu-de-1").post(
                    f"/v1/keys/{made.aes}/encrypt", json={"plaintext": B64}
                )
                assert (refused.status_code, refused.json()["code"]) == (503, "freeze_unconfirmed")


@pytest.mark.anyio
async def test_on_postgresql_another_node_obeys_and_a_restart_forgets_nothing(
    dev_files: Files, postgres: Cluster, tmp_path: Path
) -> None:
    url = postgres.fresh("freezes")
    state = [
        structs.replace(at(dev_files, url).config.node, name=n, region=r, state_dir=tmp_path / n) for n, r in NODES
    ]
    first, second = [
        dataclasses.replace(dev_files, config=structs.replace(at(dev_files, url).config, node=node)) for node in state
    ]
    async with lab_of(first) as lab, lab_of(second) as other:
        key = await new_key(lab, "AES_256", execution=["DE"])
        use = (f"/v1/keys/{key}/encrypt", {"plaintext": B64})
        assert (await other.client("health-eu-de-1").post(use[0], json=use[1])).status_code == 200
        answers = await asyncio.gather(stop(lab, "key", key), stop(other, "caller", "x"), stop(lab, "caller", "y"))
        assert [a.status_code for a in answers] == [201, 201, 201]
        told = answers[0].json()
        assert told["acknowledged"] == 2
        assert 0 < told["seconds_to_contain"] < 30
        assert (await other.client("health-eu-de-1").post(use[0], json=use[1])).json()["freeze_id"] == told["id"]
    async with lab_of(first) as again:
        assert (await again.client("health-eu-de-1").post(use[0], json=use[1])).json()["freeze_id"] == told["id"]
        assert again.node.kms.freezes.now.epoch == 3


NODES = (("n0", "eu-de-1"), ("n1", "eu-de-2"))
