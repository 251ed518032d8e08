"""Alerts and dashboard: PromQL that parses, over metrics that a node has."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from promql_parser import Expr, MatrixSelector, VectorSelector, parse, walk

from catalogue import documented
from harness import ROOT, Lab

DEPLOY = ROOT / "deploy"
ALERTS: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((DEPLOY / "compose" / "grafana" / "skms.json").read_text())
SHOWN = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
EXPRESSIONS = [*(rule["expr"] for rule in ALERTS), *SHOWN]


def selectors(expression: str) -> list[VectorSelector]:
    found: list[VectorSelector] = []

    def visit(node: Expr) -> None:
        match node:
            case VectorSelector():
                found.append(node)
            case MatrixSelector():
                found.append(node.vector_selector)

    walk(parse(expression), visit)
    return found


@pytest.fixture
async def series(lab: Lab) -> dict[str, set[str]]:
    """Every series of a node and its labels; of those that it shows with sinks or witnesses only, what docs/metrics.md says."""
    for _ in range(2):  # the second shows what the first has counted
        text = (await lab.client("platform").get("/metrics")).raise_for_status().text
    found: dict[str, set[str]] = {"up": {"job", "instance"}}
    for family in text_string_to_metric_families(text):
        names = {family.name} | {sample.name for sample in family.samples}
        for name in names | ({f"{family.name}_total"} if family.type == "counter" else set()):
            labels = {label for sample in family.samples for label in sample.labels}
            found.setdefault(name, set()).update(labels, {"job", "instance"})
    for name, row in documented().items():
        found.setdefault(name, set()).update(row.labels, {"job", "instance"})
    return found


@pytest.mark.anyio
async def test_every_expression_asks_for_what_a_node_shows(series: dict[str, set[str]]) -> None:
    for expression in EXPRESSIONS:
        asked = selectors(expression)
        assert asked, expression
        for selector in asked:
            assert selector.name in series, f"{selector.name}: no metric of a node, in {expression}"
            if series[selector.name] > {"job", "instance"}:  # a metric without samples yet shows no labels
                unknown = {m.name for m in selector.matchers.matchers} - series[selector.name]
                assert not unknown, f"{unknown}: no label of {selector.name}, in {expression}"


@pytest.mark.anyio
async def test_summaries_name_labels_that_their_metric_has(series: dict[str, set[str]]) -> None:
    for rule in ALERTS:
        named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) - {"instance"}
        labels = {label for s in selectors(rule["expr"]) if s.name for label in series[s.name]}
        assert not named or not labels > {"job", "instance"} or named <= labels, rule["alert"]


def test_alerts_are_whole() -> None:
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS)
    for rule in ALERTS:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert set(rule["annotations"]) == {"summary", "playbook"}


def test_prometheus_scrapes_every_node_of_the_compose_file_with_a_certificate() -> None:
    compose = DEPLOY / "compose"
    (job,) = yaml.safe_load((compose / "prometheus.yml").read_text())["scrape_configs"]
    services = yaml.safe_load((compose / "compose.yaml").read_text())["services"]
    nodes = {f"{name}:8443" for name, s in services.items() if s["image"].startswith("sovereign-kms:")}
    assert {target for group in job["static_configs"] for target in group["targets"]} == nodes
    assert job["scheme"] == "https"
    assert job["tls_config"]["cert_file"].endswith("/platform.pem")  # whom the shipped policy lets read metrics
