"""Keys whose material would be, or has come to be, usable outside their residency: refused, listed, counted, frozen."""

from __future__ import annotations

import base64
import dataclasses
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from msgspec import structs

from harness import Files, Lab, lab_of, new_key, with_database
from keystore import Bounds
from keystore.pkcs11 import CeremonyRefused, Transcript
from policy import Scope
from service.database import open_engine
from service.keygraph import NIGHT_US, SINGLY, GraphWatch, to_freeze
from service.rootbackup import check_join, verify
from service.rows import Settings

pytestmark = pytest.mark.anyio
B64 = base64.b64encode(b"hello").decode()
PATH = "key -wrap-> root:eu-de-1 -backup-> vault in eu-fr-1"


def rewrite(bundle: Path, copies: dict[str, Any]) -> None:
    """The same charter with other copies, under a higher version."""
    path = bundle / "charter.yaml"
    charter = yaml.safe_load(path.read_text())
    charter["copies"], charter["version"] = copies, charter["version"] + 1
    path.write_text(yaml.safe_dump(charter, sort_keys=False))


async def reload(lab: Lab, **copies: Any) -> None:
    rewrite(lab.files.config.policy.bundle, copies)
    answer = await lab.client("platform").post("/v1/policy/reload")
    assert answer.status_code == 200, answer.text


def kept(*places: str, kind: str = "backup", of: str = "eu-de-1") -> dict[str, Any]:
    return {"kind": kind, "of": of, "places": list(places)}


@pytest.fixture(scope="module")
async def graph(dev_files: Files, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    """A node with a database and a bundle of its own."""
    async with lab_of(with_database(dev_files, tmp_path_factory.mktemp("graph") / "node")) as made:
        yield made


@pytest.fixture
async def copies(graph: Lab) -> AsyncIterator[None]:
    """No copies before and after the test."""
    yield
    await reload(graph)


async def encrypt(lab: Lab, key: str) -> httpx.Response:
    who = "health-eu-de-1"
    return await lab.client(who).post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})


async def listed(lab: Lab) -> dict[str, list[str]]:
    answer = await lab.client("health-auditor").get("/v1/compliance", params={"page_size": "500"})
    assert answer.status_code == 200, answer.text
    return {item["key_id"]: [gap["what"] for gap in item["missing"]] for item in answer.json()["items"]}


async def metric(lab: Lab) -> float:
    text = (await lab.client("platform").get("/metrics")).text
    (line,) = (ln for ln in text.splitlines() if ln.startswith("skms_key_graph_violations"))
    return float(line.split()[1])


async def test_a_key_whose_backup_would_stand_outside_its_residency_is_not_made(graph: Lab, copies: None) -> None:
    await reload(graph, vault=kept("eu-fr-1"))
    wanted = {"spec": "AES_256", "tier": 2, "home": "eu-de-1"}
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    answer = await graph.client("health-operator").post("/v1/keys", json=wanted, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (409, "tier_not_met")
    assert PATH.removeprefix("key -wrap-> ") in answer.json()["missing"][0]
    await new_key(graph, "AES_256", residency=["DE", "FR"])  # its owner allows that


async def test_a_chain_of_copies_counts_to_its_end(graph: Lab, copies: None) -> None:
    key = await new_key(graph, "AES_256", residency=["DE"])
    await reload(graph, vault=kept("eu-de-2"), notary=kept("eu-de-2", kind="escrow", of="vault"))
    assert (await encrypt(graph, key)).status_code == 200
    await reload(graph, vault=kept("eu-de-2"), notary=kept("DE", "FR", kind="escrow", of="vault"))
    answer = await encrypt(graph, key)
    assert answer.json()["code"] == "tier_not_met"
    (told,) = answer.json()["missing"]
    assert told.endswith("key -wrap-> root:eu-de-1 -backup-> vault -escrow-> notary in eu-fr-1")


async def test_residency_is_not_narrowed_past_a_copy(graph: Lab, copies: None) -> None:
    kms = graph.node.kms
    key = kms.keystore.by_id(uuid.UUID(await new_key(graph, "AES_256", residency=["DE", "FR"])))
    narrow = Bounds(residency=frozenset({"eu-de-1"}))
    assert kms.tier_missing(narrow.on(key)) == []
    await reload(graph, vault=kept("eu-fr-1"))
    assert kms.tier_missing(key) == []
    (told,) = kms.tier_missing(narrow.on(key))
    assert told.endswith("root:eu-de-1 -backup-> vault in eu-fr-1")


async def test_data_moves_under_no_key_that_is_usable_outside_its_residency(graph: Lab, copies: None) -> None:
    places = {"residency": ["DE"], "execution": ["DE"], "reach": ["DE"], "egress": ["DE"]}
    source = await new_key(graph, "AES_256", **places)
    target = await new_key(graph, "AES_256", home="eu-de-2", **places)
    ciphertext = (await encrypt(graph, source)).json()["ciphertext"]

    async def rewrapped() -> httpx.Response:
        body = {"ciphertext": ciphertext, "to_key": target}
        return await graph.client("health-eu-de-1").post("/v1/rewrap", json=body)

    moved = await rewrapped()
    assert moved.status_code == 200, moved.text
    # The bounds of the other key did not change: only the graph knows of the copy of its root KEK.
    await reload(graph, drawer=kept("eu-fr-1", of="eu-de-2"))
    refused = await rewrapped()
    assert (refused.status_code, refused.json()["code"]) == (409, "tier_not_met")
    assert refused.json()["missing"][0].endswith("root:eu-de-2 -backup-> drawer in eu-fr-1")


async def test_the_nightly_run_finds_what_a_change_of_the_registry_did(graph: Lab, copies: None) -> None:
    kms = graph.node.kms
    key = await new_key(graph, "AES_256")
    fine = await new_key(graph, "AES_256", residency=["DE", "FR"])
    await graph.node.scheduler.once()
    assert (await encrypt(graph, key)).status_code == 200
    assert key not in await listed(graph)
    before = await metric(graph)

    await reload(graph, vault=kept("eu-fr-1"))
    assert (await encrypt(graph, key)).json()["code"] == "tier_not_met"  # at once, in memory
    assert any(PATH in what for what in (await listed(graph))[key])
    assert fine not in await listed(graph)
    assert await metric(graph) >= before + 1

    await graph.node.scheduler.once()
    assert (await encrypt(graph, key)).json()["code"] == "tier_not_met"  # frozen at night: a mistake can be mended
    graph.clock.ahead += NIGHT_US
    await graph.node.scheduler.once()
    answer = await encrypt(graph, key)
    assert (answer.status_code, answer.json()["code"]) == (423, "frozen")
    assert (await encrypt(graph, fine)).status_code == 200
    (freeze,) = (f for f in kms.freezes.now.freezes if f.scope == Scope("key", key))
    assert (freeze.tenant, freeze.reason, freeze.officer) == ("health", "key-graph", f"internal:{kms.node}:scheduler")
    records = [f.record for f in kms.search.records(limit=200) if f.record.get("op") in {"freeze", "check_key_graph"}]
    assert {"freeze", "check_key_graph"} <= {r["op"] for r in records}
    assert any(r["op"] == "freeze" and r["key"] == key and r["why"] == "key-graph" for r in records)

    await reload(graph)  # the registry is put right: the key stays frozen until a quorum lifts that
    graph.clock.ahead += NIGHT_US
    await graph.node.scheduler.once()
    assert (await encrypt(graph, key)).json()["code"] == "frozen"
    assert sum(f.scope == Scope("key", key) for f in kms.freezes.now.freezes) == 1


async def test_it_runs_once_a_night(graph: Lab) -> None:
    kms = graph.node.kms
    engine = open_engine(graph.files.config.database.url)
    try:
        ahead = [0]
        containment = graph.node.app.front.containment
        watch = GraphWatch(kms, Settings(engine), containment, clock=lambda: graph.clock() + ahead[0])
        await watch.due()
        assert await watch.due() is None
        ahead[0] = NIGHT_US + 1
        assert await watch.due() is not None
        assert await watch.due() is None
    finally:
        engine.dispose()


async def test_very_many_keys_are_frozen_together(graph: Lab, copies: None) -> None:
    key = await new_key(graph, "AES_256", tenant="defence", home="eu-de-2", residency=["eu-de-2"], execution=["DE"])
    await reload(graph, drawer=kept("eu-fr-1", of="eu-de-2"))
    _, found = graph.node.kms.compliance.leaking(graph.node.kms.policy.registry, after=None, limit=500)
    (one,) = (below for below in found if str(below.key.id) == key)
    many = [dataclasses.replace(one, key=dataclasses.replace(one.key, id=uuid.uuid4())) for _ in range(SINGLY)]
    assert [(w.tenant, w.scope) for w in to_freeze([one])] == [("defence", Scope("key", key))]
    assert [(w.tenant, w.scope) for w in to_freeze([one, *many])] == [("defence", Scope("region", "eu-de-2"))]
    assert all(w.path.endswith("drawer in eu-fr-1") for w in to_freeze([one, *many]))


async def test_a_backup_in_another_region_is_refused_with_its_path(graph: Lab, copies: None) -> None:
    config = graph.files.config
    token = structs.replace(config.hsm[0], name="vault", backup=True)
    config = structs.replace(config, hsm=(*config.hsm, token))
    await new_key(graph, "AES_256")
    check_join(config, "vault")  # in its region, since the charter says nothing else
    await reload(graph, vault=kept("eu-fr-1"))
    with pytest.raises(CeremonyRefused, match="key -wrap-> root:eu-de-1 -backup-> vault in eu-fr-1, outside eu-de-1"):
        check_join(config, "vault")
    with pytest.raises(CeremonyRefused, match="no HSM 'nobody'"):
        check_join(config, "nobody")
    with pytest.raises(CeremonyRefused, match="-backup-> vault in eu-fr-1"):
        verify(config, "vault", sample=1, transcript=Transcript("verify-backup", {}, graph.clock))
