"""docs/metrics.md against the code that makes metrics, a node that runs, alerts and dashboard."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families
from promql_parser import Expr, MatrixSelector, VectorSelector, parse, walk

from audit.event import OUTCOMES
from catalogue import Row, alerts_of_page, buckets_of_page, documented, labels_of_page, shown_later
from harness import ROOT, Served

ALERTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((ROOT / "deploy/compose/grafana/skms.json").read_text())
KINDS = {"Gauge": "gauge", "Counter": "counter", "Histogram": "histogram", "_gauge": "gauge", "_count": "counter"}
KINDS |= {"GaugeMetricFamily": "gauge", "CounterMetricFamily": "counter"}
ACROSS = {"livesum": "sum", "livemin": "least", "livemax": "greatest"}


def made() -> dict[str, Row]:
    """Each metric that a call in service/ makes, by its arguments."""
    found = {}
    for path in (ROOT / "service").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not call.args or not isinstance(call.args[0], ast.Constant):
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name not in KINDS or not str(call.args[0].value).startswith("skms_"):
                continue
            metric = str(call.args[0].value)
            if name == "CounterMetricFamily":
                metric += "_total"
            assert metric not in found, f"{metric} is made twice"
            found[metric] = Row(KINDS[name], _labels(call, path.read_text()), _workers(name, call), _text(call.args[1]))
    return found


def _text(node: ast.expr) -> str:
    value = ast.literal_eval(node)
    assert isinstance(value, str)
    return value


def _labels(call: ast.Call, source: str) -> tuple[str, ...]:
    lists = [a for a in call.args[2:3] if isinstance(a, ast.List)]
    lists += [k.value for k in call.keywords if k.arg == "labels" and isinstance(k.value, ast.List)]
    if any(isinstance(a, ast.Name) and a.id == "hsm" for a in call.args[2:3]):
        assert 'hsm = kms, ["hsm"]' in source
        return ("hsm",)
    return tuple(ast.literal_eval(lists[0])) if lists else ()


def _workers(name: str, call: ast.Call) -> str:
    if name.endswith("Family"):
        return "one"
    if KINDS[name] != "gauge":
        return "sum"
    modes = [k.value for k in call.keywords if k.arg == "multiprocess_mode"] or call.args[3:4]
    return ACROSS[ast.literal_eval(modes[0])]


def asked_by(expression: str) -> set[str]:
    found = set[str]()

    def visit(node: Expr) -> None:
        selector = node.vector_selector if isinstance(node, MatrixSelector) else node
        if isinstance(selector, VectorSelector) and selector.name:
            found.add(re.sub(r"_(bucket|sum|count)$", "", selector.name))

    walk(parse(expression), visit)
    return found - {"up"}


def test_the_page_has_what_the_code_makes_and_says_of_it_what_the_code_says() -> None:
    page, code = documented(), made()
    assert page.keys() == code.keys()
    for name, row in page.items():
        assert row == code[name], name


def test_alerts_and_dashboard_ask_for_metrics_of_the_page_which_names_the_alerts() -> None:
    used: dict[str, set[str]] = {name: set() for name in documented()}
    for rule in ALERTS:
        for metric in asked_by(rule["expr"]):
            used[metric].add(rule["alert"])
    assert used == alerts_of_page()
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            assert asked_by(target["expr"]) <= used.keys(), target["expr"]


def test_a_running_node_shows_what_the_page_says(node: Served) -> None:
    with node.client("health-eu-de-1") as workload:
        assert workload.post("/v1/random", json={"bytes": 16}).status_code == 200
    with node.client("platform") as platform:
        text = platform.get("/metrics").raise_for_status().text
    page, values = documented(), labels_of_page()
    shown = set[str]()
    buckets: dict[str, set[float]] = {}
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        shown.add(name)
        assert name in page, f"{name} is not on the page"
        assert family.type == page[name].kind, name
        assert family.documentation == page[name].meaning, name
        for sample in family.samples:
            labels = dict(sample.labels)
            if "le" in labels:
                buckets.setdefault(name, set()).add(float(labels.pop("le")))
            assert set(labels) == set(page[name].labels), sample
            for label, value in labels.items():
                assert not values[label] or value in values[label], f"{label}={value!r} of {name} is not on the page"
    later = shown_later()
    assert later <= page.keys()
    assert page.keys() - shown <= later, "neither shown by a fresh node nor listed under `Shown later`"
    wanted = {name: {*found, float("inf")} for name, found in buckets_of_page().items()}
    assert buckets == wanted


def test_values_of_labels_are_closed_sets() -> None:
    values = labels_of_page()
    assert {label for row in documented().values() for label in row.labels} == values.keys()
    assert values["out"] == OUTCOMES | {"none"}
    assert not {"key", "tenant", "caller", "kid", "key_id", "alias", "request"} & values.keys()
