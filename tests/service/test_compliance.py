"""Keys below the bar of their tier: refused, listed, still looked after, and usable again once the bar is met."""

from __future__ import annotations

import base64
import dataclasses
import re
import shutil
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from msgspec import structs

from databases import address
from harness import Files, Lab, lab_of, new_key
from service.compliance import Bars
from service.doctor import examine

pytestmark = pytest.mark.anyio
B64 = base64.b64encode(b"hello").decode()
DAY_US = 86_400_000_000
# Not today: between the collection of tests and this one it may have become midnight.
LAST = (datetime.now(UTC) + timedelta(days=1)).date().isoformat()
Change = Callable[[dict[str, Any]], None]


def labels(**until: str) -> dict[str, Any]:
    named = {name.replace("_", "-"): day for name, day in until.items()}
    return {name: {"level": 3, "evidence": f"cert.example/{name}", "valid_until": day} for name, day in named.items()}


def supplied(until: str) -> Change:
    def change(charter: dict[str, Any]) -> None:
        charter["suppliers"]["development"]["labels"] = labels(SOV_2=until, SOV_3="9999-12-31")

    return change


def write(bundle: Path, change: Change) -> None:
    """Another charter under a higher version."""
    path = bundle / "charter.yaml"
    charter = yaml.safe_load(path.read_text())
    change(charter)
    charter["version"] += 1
    path.write_text(yaml.safe_dump(charter, sort_keys=False))


async def reload(lab: Lab, change: Change) -> None:
    write(lab.files.config.policy.bundle, change)
    answer = await lab.client("platform").post("/v1/policy/reload")
    assert answer.status_code == 200, answer.text


def apart(files: Files, directory: Path, *changes: Change, **hsm: str) -> Files:
    """The node with a database and a bundle of its own; `hsm` changes the section of each HSM."""
    bundle = directory / "policy"
    shutil.copytree(files.config.policy.bundle, bundle)
    for change in changes:
        write(bundle, change)
    config = structs.replace(
        files.config,
        database=structs.replace(files.config.database, url=address(directory)),
        node=structs.replace(files.config.node, state_dir=directory),
        policy=structs.replace(files.config.policy, bundle=bundle),
        hsm=tuple(structs.replace(section, **hsm) for section in files.config.hsm),
    )
    return dataclasses.replace(files, config=config)


@pytest.fixture(scope="module")
async def ending(dev_files: Files, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    """A node whose supplier has SOV-2 until the end of tomorrow."""
    async with lab_of(apart(dev_files, tmp_path_factory.mktemp("ending"), supplied(LAST))) as made:
        yield made


async def read(lab: Lab, who: str, **query: str) -> Any:
    answer = await lab.client(who).get("/v1/compliance", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def listed(lab: Lab, who: str = "health-auditor") -> set[str]:
    return {item["key_id"] for item in (await read(lab, who, page_size="500"))["items"]}


async def encrypt(lab: Lab, key: str, tenant: str = "health", **options: Any) -> httpx.Response:
    client = lab.client(f"{tenant}-eu-de-1")
    return await client.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64}, **options)


async def create(lab: Lab, **body: Any) -> httpx.Response:
    wanted = {"spec": "AES_256", "tier": 1, "home": "eu-de-1", **body}
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    return await lab.client("health-operator").post("/v1/keys", json=wanted, headers=headers)


async def test_a_label_that_ends_stops_every_use_and_a_renewed_bundle_gives_it_back(ending: Lab) -> None:
    lab, workload, operator = ending, ending.client("health-eu-de-1"), ending.client("health-operator")
    aes, ec, mac = [await new_key(lab, spec, tier=1) for spec in ("AES_256", "EC_P256", "HMAC_256")]
    beside = await new_key(lab, "AES_256")  # tier 2 demands no label
    sealed = (await encrypt(lab, aes)).json()["ciphertext"]
    wrapped = (await workload.post(f"/v1/keys/{aes}/data-keys", json={})).json()["wrapped_key"]
    signed, maced = [{"message": B64, "algorithm": a} for a in ("ECDSA_SHA_256", "HMAC_SHA_256")]
    assert await listed(lab) == set()

    lab.clock.ahead = 2 * DAY_US
    try:
        before = lab.node.pkcs11_calls()
        uses: list[tuple[str, dict[str, Any]]] = [
            (f"/v1/keys/{aes}/encrypt", {"plaintext": B64}),
            ("/v1/decrypt", {"ciphertext": sealed}),
            ("/v1/rewrap", {"ciphertext": sealed}),
            ("/v1/rewrap", {"ciphertext": sealed, "to_key": beside}),  # out of tier 1: no way round the bar
            (f"/v1/keys/{aes}/data-keys", {}),
            ("/v1/data-keys/unwrap", {"wrapped_key": wrapped}),
            (f"/v1/keys/{ec}/sign", signed),
            (f"/v1/keys/{ec}/verify", {**signed, "signature": B64}),
            (f"/v1/keys/{mac}/mac", maced),
            (f"/v1/keys/{mac}/verify-mac", {**maced, "mac": B64}),
            ("/v1/batch/encrypt", {"items": [{"key": aes, "plaintext": B64}]}),
        ]
        for path, body in uses:
            refused = await workload.post(path, json=body)
            problem = refused.json()["results"][0]["problem"] if "batch" in path else refused.json()
            assert (problem["status"], problem["code"]) == (409, "tier_not_met"), path
            assert problem["missing"] == [f"development has SOV-2 at level 3 (ended on {LAST})"]
            assert not problem["executed"]
        assert lab.node.pkcs11_calls() == before
        assert (await encrypt(lab, beside)).status_code == 200
        recorded = lab.node.kms.search.records(key=aes, op="encrypt", out="denied")[0].record
        assert recorded["why"] == "tier_not_met"
        assert (await create(lab)).json()["code"] == "tier_not_met"

        told = await read(lab, "health-auditor")
        assert {item["key_id"] for item in told["items"]} == {aes, ec, mac}
        first = told["items"][0]
        midnight = datetime.fromisoformat(LAST).replace(tzinfo=UTC).timestamp() * 1e6 + DAY_US
        assert {k: first[k] for k in ("tenant", "tier", "home", "state")} == {
            "tenant": "health", "tier": 1, "home": "eu-de-1", "state": "enabled",
        }  # fmt: skip
        (gap,) = first["missing"]
        assert (gap["supplier"], gap["label"], gap["level"], gap["wanted"]) == ("development", "SOV-2", 3, 3)
        assert (gap["evidence"], gap["valid_until"]) == ("cert.example/SOV-2", LAST)
        assert datetime.fromisoformat(gap["since"]).timestamp() * 1e6 == midnight
        assert [(t["tier"], t["keys"], t["below"]) for t in told["tiers"]] == [(1, 3, 3), (2, 1, 0), (3, 0, 0)]

        # Reading and looking after it go on.
        shown = await operator.get(f"/v1/keys/{aes}")
        assert shown.json()["tier_status"] == {"met": False, "missing": [gap["what"]]}
        assert (await workload.get(f"/v1/keys/{ec}/public-key")).status_code == 200
        fresh = {"Idempotency-Key": uuid.uuid4().hex}
        assert (await operator.post(f"/v1/keys/{aes}/rotate", headers=fresh)).status_code == 200
        disabled = await operator.post(f"/v1/keys/{aes}/disable")
        assert disabled.json()["state"] == "disabled"
        enabled = await operator.post(f"/v1/keys/{aes}/enable", headers={"If-Match": disabled.headers["etag"]})
        assert enabled.json()["state"] == "enabled"
        shown = await operator.get(f"/v1/keys/{mac}")
        headers = {"Idempotency-Key": uuid.uuid4().hex, "If-Match": shown.headers["etag"]}
        gone = await operator.post(f"/v1/keys/{mac}/schedule-deletion", json={"wait": "P7D"}, headers=headers)
        assert gone.json()["state"] == "pending_deletion"
        assert mac in await listed(lab)

        await reload(lab, supplied("9999-12-31"))
        assert (await workload.post("/v1/decrypt", json={"ciphertext": sealed})).json()["plaintext"] == B64
        assert await listed(lab) == set()
    finally:
        lab.clock.ahead = 0


async def test_from_a_key_below_its_bar_data_move_to_one_that_meets_it(dev_files: Files, tmp_path: Path) -> None:
    """eu-de-1 loses its label, eu-de-2 has another supplier: what was sealed here can be sealed there."""

    def two(charter: dict[str, Any]) -> None:
        charter["suppliers"]["development"]["labels"] = labels(SOV_2=LAST, SOV_3="9999-12-31")
        charter["suppliers"]["second"] = {
            "jurisdiction": "DE",
            "labels": labels(SOV_2="9999-12-31", SOV_3="9999-12-31"),
        }

    files = apart(dev_files, tmp_path, two)
    hsm = tuple(
        structs.replace(h, supplier="second" if h.region == "eu-de-2" else "development") for h in files.config.hsm
    )
    async with lab_of(dataclasses.replace(files, config=structs.replace(files.config, hsm=hsm))) as lab:
        both = ["eu-de-1", "eu-de-2"]
        old = await new_key(lab, "AES_256", tier=1, residency=both)
        new = await new_key(
            lab, "AES_256", tier=1, home="eu-de-2", residency=["eu-de-2"], execution=both, reach=both, egress=both
        )
        sealed = (await encrypt(lab, old)).json()["ciphertext"]
        lab.clock.ahead = 2 * DAY_US
        assert (await encrypt(lab, old)).json()["code"] == "tier_not_met"
        body = {"ciphertext": sealed, "to_key": new}
        moved = await lab.client("health-eu-de-1").post("/v1/rewrap", json=body)
        assert moved.status_code == 200, moved.text
        opened = await lab.client("health-eu-de-1").post("/v1/decrypt", json={"ciphertext": moved.json()["ciphertext"]})
        assert opened.json()["plaintext"] == B64
        assert await listed(lab) == {old}


async def test_each_tenant_sees_its_own_and_the_installation_all(ending: Lab) -> None:
    lab = ending
    await reload(lab, supplied("2020-01-01"))
    try:
        await reload(lab, supplied("9999-12-31"))
        mine, theirs = [await new_key(lab, "AES_256", tenant=t, tier=1) for t in ("health", "defence")]
        await reload(lab, supplied("2020-01-01"))
        for who in ("health-auditor", "health-officer"):
            found = await read(lab, who, page_size="500")
            assert mine in {item["key_id"] for item in found["items"]}
            assert {item["tenant"] for item in found["items"]} == {"health"}
            assert theirs not in str(found)
        assert await listed(lab, "defence-auditor") == {theirs}
        assert {mine, theirs} <= await listed(lab, "platform")
        for who in ("health-eu-de-1", "health-operator", "health-custodian"):
            assert (await lab.client(who).get("/v1/compliance")).status_code == 403, who
        # Page by page, and a token of one tenant says nothing to another.
        pages, token = [], None
        while True:
            page = await read(lab, "platform", page_size="1", **({} if token is None else {"page_token": token}))
            pages += [item["key_id"] for item in page["items"]]
            token = page["next_page_token"]
            if token is None:
                break
            foreign = await lab.client("health-auditor").get("/v1/compliance", params={"page_token": token})
            assert foreign.json()["code"] == "page_token_invalid"
        assert pages == sorted(await listed(lab, "platform"))
        assert (await encrypt(lab, theirs, "defence")).json()["code"] == "tier_not_met"
    finally:
        await reload(lab, supplied("9999-12-31"))


async def test_a_region_that_leaves_the_registry_takes_its_keys_out_of_use(dev_files: Files, tmp_path: Path) -> None:
    async with lab_of(apart(dev_files, tmp_path)) as lab:
        wide = await new_key(lab, "AES_256", residency=["eu-de-1", "eu-fi-1"])
        narrow = await new_key(lab, "AES_256")
        await reload(lab, lambda charter: charter["places"].pop("eu-fi-1"))
        assert (await encrypt(lab, wide)).json()["missing"] == ["residency lies within ALLIED"]
        assert (await encrypt(lab, narrow)).status_code == 200
        told = await read(lab, "health-auditor")
        assert [item["key_id"] for item in told["items"]] == [wide]
        assert told["items"][0]["missing"][0]["since"] == told["policy_since"] is not None

        def home(charter: dict[str, Any]) -> None:
            charter["tiers"][2]["residency_within"] = "NO"  # the tier's rule itself moves

        await reload(lab, home)
        assert await listed(lab) == {wide, narrow}
        assert (await encrypt(lab, narrow)).json()["code"] == "tier_not_met"


@pytest.mark.parametrize(
    ("supplier", "missing"),
    [
        ("", "every HSM of the key's region names its supplier"),
        ("unheard-of", "supplier unheard-of is in the charter"),
    ],
)
async def test_an_hsm_whose_supplier_is_unknown_holds_no_tier_with_a_bar(
    dev_files: Files, tmp_path: Path, supplier: str, missing: str
) -> None:
    async with lab_of(apart(dev_files, tmp_path, supplier=supplier)) as lab:
        refused = await create(lab)
        assert (refused.status_code, refused.json()["code"]) == (409, "tier_not_met")
        assert refused.json()["missing"] == [missing]
        assert (await create(lab, tier=2)).status_code == 201
        told = await read(lab, "platform")
        assert told["hsms_without_supplier"] == ["softhsm-eu-de-1", "softhsm-eu-de-2"]
        assert [(s["name"], s["hsms"]) for s in told["suppliers"]] == [("development", [])]


async def test_a_node_without_hsms_of_a_region_refuses_its_keys_and_leaves_the_list_to_others(
    dev_files: Files, tmp_path: Path
) -> None:
    files = apart(dev_files, tmp_path)
    async with lab_of(files) as lab:
        here, there = await new_key(lab, "AES_256", tier=1), await new_key(lab, "AES_256", tier=1, home="eu-de-2")
    config = structs.replace(files.config, hsm=tuple(h for h in files.config.hsm if h.region == "eu-de-1"))
    async with lab_of(dataclasses.replace(files, config=config)) as lab:
        assert (await encrypt(lab, here)).status_code == 200
        refused = await encrypt(lab, there)
        assert refused.json()["code"] == "tier_not_met"
        told = await read(lab, "health-auditor")
        assert told["items"] == []
        assert told["tiers"][0] == {
            "tier": 1, "labels": {"SOV-2": 3, "SOV-3": 3}, "keys": 2, "below": 0, "elsewhere": 1,
        }  # fmt: skip


async def test_no_key_is_made_that_would_not_meet_its_tier(ending: Lab) -> None:
    lab = ending
    good = labels(SOV_2="9999-12-31", SOV_3="9999-12-31")
    wrong = {
        "supplier development is in the charter": {},
        "development has SOV-2 at level 3 (has 2)": {"development": good | {"SOV-2": {**good["SOV-2"], "level": 2}}},
        "development has SOV-3 at level 3": {"development": {"SOV-2": good["SOV-2"]}},
        "development has SOV-2 at level 3 (ended on 2020-01-01)": {
            "development": labels(SOV_2="2020-01-01", SOV_3="9999-12-31")
        },
    }

    def those(suppliers: dict[str, Any]) -> Change:
        return lambda charter: charter.update(
            suppliers={name: {"jurisdiction": "DE", "labels": told} for name, told in suppliers.items()}
        )

    try:
        for missing, suppliers in wrong.items():
            await reload(lab, those(suppliers))
            refused = await create(lab)
            assert (refused.status_code, refused.json()["code"]) == (409, "tier_not_met")
            assert refused.json()["missing"] == [missing]
    finally:
        await reload(lab, those({"development": good}))
    assert (await create(lab)).status_code == 201


def test_the_doctor_says_which_tiers_a_region_can_hold(dev_files: Files, tmp_path: Path) -> None:
    def found(name: str, *changes: Change, **hsm: str) -> tuple[bool, str]:
        (tmp_path / name).mkdir()
        findings = examine(apart(dev_files, tmp_path / name, *changes, **hsm).config)
        return next((f.good, f.detail) for f in findings if f.check == "suppliers")

    def each(tiers: str) -> tuple[bool, str]:
        return True, "; ".join(f"{region} meets the labels of tiers {tiers}" for region in ("eu-de-1", "eu-de-2"))

    assert found("good") == each("1, 2, 3")
    assert found("ended", supplied("2020-01-01")) == each("2, 3")
    good, detail = found("unknown", supplier="unheard-of")
    assert not good
    assert "'unheard-of' is not in charter.yaml" in detail


async def test_no_material_is_imported_below_the_bar(ending: Lab) -> None:
    lab = ending
    await reload(lab, supplied("9999-12-31"))
    made = await create(lab, origin="external")
    assert made.status_code == 201, made.text
    await reload(lab, supplied("2020-01-01"))
    try:
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        path, body = f"/v1/keys/{made.json()['id']}/import-parameters", {"wrapping": "RSA_AES_KEY_WRAP_SHA_256"}
        refused = await lab.client("health-operator").post(path, json=body, headers=headers)
        assert refused.json()["code"] == "tier_not_met", refused.text
    finally:
        await reload(lab, supplied("9999-12-31"))


async def test_metrics_count_keys_below_and_the_time_that_labels_have(ending: Lab) -> None:
    lab = ending

    async def metric(name: str) -> float:
        text = (await lab.client("platform").get("/metrics")).text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found is not None, text
        return float(found[1])

    await reload(lab, supplied("9999-12-31"))
    await new_key(lab, "AES_256", tier=1)
    assert await metric('skms_keys_below_tier{tier="1"}') == 0
    await reload(lab, supplied(LAST))
    left = await metric('skms_supplier_label_expires_seconds{label="SOV-2",supplier="development"}')
    assert 0 < left <= 2 * 86_400
    lab.clock.ahead = 2 * DAY_US
    try:
        assert await metric('skms_keys_below_tier{tier="1"}') == len(await listed(lab, "platform")) > 0
        assert await metric('skms_keys_below_tier{tier="2"}') == 0
        assert (
            -2 * 86_400 <= await metric('skms_supplier_label_expires_seconds{label="SOV-2",supplier="development"}') < 0
        )
    finally:
        lab.clock.ahead = 0


async def test_the_weakest_hsm_counts_for_as_long_as_it_may_be_called(ending: Lab) -> None:
    registry, now = ending.node.kms.policy.registry, ending.clock()
    key = ending.node.kms.keystore.by_id(uuid.UUID(await new_key(ending, "AES_256", tier=1)))
    serving = {"eu-de-1": frozenset({"a", "b"})}
    bars = Bars({"a": "development", "b": None}, regions=serving, serving=serving.__getitem__)

    def met() -> bool:
        return not bars.verdict(registry, key, now).gaps

    assert not met()
    serving["eu-de-1"] = frozenset({"a"})  # b is drained
    assert not met()  # what is known stands until somebody looks
    bars.refresh()
    assert met()
    serving["eu-de-1"] = frozenset({"a", "b"})
    bars.refresh()
    assert not met()
    serving["eu-de-1"] = frozenset()
    bars.refresh()
    assert not met()
