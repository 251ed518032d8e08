"""The figures of sovereignty over the API: they change with the facts, and what they are counted from gives the same."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from typing import Any

import pytest

from harness import Files, Lab, lab_of, new_key, until, with_database
from service.cli.sovereignty import lines, page
from service.policychanges import under

pytestmark = pytest.mark.anyio
SYSTEMS = """
systems:
  records: {{tenant: "health", critical: true, stores: {{patients: "{key}"}}}}
  lost: {{tenant: "health", critical: true, stores: {{patients: "{key}", images: "alias/nobody"}}}}
  canteen: {{tenant: "health", critical: false, stores: {{menu: "alias/nobody"}}}}
"""


@pytest.fixture
async def own(dev_files: Files, tmp_path: Any) -> AsyncIterator[Lab]:
    """A node with a database and a policy of its own."""
    async with lab_of(with_database(dev_files, tmp_path)) as made:
        yield made


async def figures(lab: Lab, who: str = "platform") -> dict[str, Any]:
    answer = await lab.client(who).get("/v1/sovereignty/metrics")
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def registered(lab: Lab, key: str) -> None:
    """Name systems of this key in the charter."""
    charter = lab.files.config.policy.bundle / "charter.yaml"
    risen = under({"charter.yaml": charter.read_bytes()}, lab.node.kms.policy.version + 1)["charter.yaml"]
    charter.write_text(risen.decode() + SYSTEMS.format(key=key))
    answer = await lab.client("platform").post("/v1/policy/reload", headers={"Idempotency-Key": uuid.uuid4().hex})
    assert answer.status_code == 200, answer.text


async def test_a_critical_system_loses_its_share_with_its_key(own: Lab) -> None:
    assert (await figures(own))["critical_systems"]["share"] is None  # none is named: that is no 100 %
    key = await new_key(own, "AES_256")
    await registered(own, key)
    log = own.node.kms.log
    await until(lambda: log.checkpoint is not None, "no checkpoint")
    told = (await figures(own))["critical_systems"]
    assert (told["total"], told["sovereign"], told["share"]) == (2, 1, 0.5)
    assert {s["name"]: s["gaps"] for s in told["systems"]} == {"canteen": ["mapped"], "lost": ["mapped"], "records": []}
    await own.client("health-operator").post(f"/v1/keys/{key}/disable", json={})
    told = (await figures(own))["critical_systems"]
    assert (told["sovereign"], {c["criterion"]: c["unmet"] for c in told["criteria"]}["mapped"]) == (0, 2)


async def test_a_tier_3_key_may_be_released_to_a_vendor_and_is_not_under_sovereign_control(own: Lab) -> None:
    key = await new_key(own, "AES_256", tier=3)
    await registered(own, key)
    await until(lambda: own.node.kms.log.checkpoint is not None, "no checkpoint")
    (records,) = [s for s in (await figures(own))["critical_systems"]["systems"] if s["name"] == "records"]
    assert records["gaps"] == ["reason"]


async def test_keys_and_drills_move_the_figures_and_the_queries_give_them_again(own: Lab) -> None:
    before = await figures(own)
    assert before["containment"]["drills"]["count"] == 0
    assert before["containment"]["drilled"] is False
    key = await new_key(own, "AES_256", tags={"canary": "true"})
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    drill = await own.client("health-officer").post("/v1/freezes/drill", json={"key": key}, headers=headers)
    assert drill.status_code in {200, 201}, drill.text
    after = await figures(own)
    freezes = (await own.client("installation-officer").get("/v1/freezes")).json()["items"]
    took = [(await own.client("installation-officer").get(f"/v1/freezes/{f['id']}")).json() for f in freezes]
    assert after["containment"]["drills"]["max_s"] == max(t["seconds_to_contain"] for t in took)
    assert after["containment"]["drilled"] is True
    compliance = (await own.client("platform").get("/v1/compliance")).json()
    assert after["suppliers"]["keys"] == sum(t["keys"] for t in compliance["tiers"]) == before["suppliers"]["keys"] + 1
    assert after["checkpoint"] is None or len(after["checkpoint"]["root"]) == 64


async def test_a_tenants_people_and_workloads_do_not_see_them(lab: Lab) -> None:
    for who, status in (
        ("platform", 200),
        ("installation-officer", 403),  # the shipped policy lets platform and auditor read what concerns everybody
        ("health-auditor", 403),
        ("health-eu-de-1", 403),
    ):
        assert (await lab.client(who).get("/v1/sovereignty/metrics")).status_code == status, who


async def test_metrics_show_what_the_report_says(lab: Lab) -> None:
    told = await asyncio.to_thread(lab.node.kms.compliance.tiers, lab.node.kms.policy.registry)
    shown = (await lab.client("platform").get("/metrics")).text
    assert "skms_critical_systems 0.0" in shown
    assert 'skms_critical_system_gaps{criterion="residency"} 0.0' in shown
    assert ("skms_supplier_share{" in shown) is bool(
        sum(t.keys for t in told) or lab.node.kms.policy.registry.suppliers
    )


async def test_the_page_needs_nothing_and_escapes_every_name(lab: Lab) -> None:
    told = await figures(lab)
    hostile = '<script>alert("x")</script>&'
    told["critical_systems"]["systems"] = [{"name": hostile, "tenant": hostile, "critical": True, "gaps": [hostile]}]
    told["suppliers"]["suppliers"] = [{"supplier": hostile, "share": 0.5, "loss": 0.25}]
    told["exit"]["vendors"] = [
        {"vendor": hostile, "succeeded": 1, "failed": 0, "mean_s": 1.0, "max_s": 1.0, "refused": 0},
    ]
    seen: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.append((tag, dict(attrs)))

    Reader().feed(page(told))
    assert {tag for tag, _ in seen} >= {"svg", "rect", "table"}
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in seen}
    assert not {"src", "href", "onload"} & {name for _, attrs in seen for name in attrs}
    assert sum(hostile in name for name, *_ in lines(told)) == 3
