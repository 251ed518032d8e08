"""docs/logs.md against the code that writes log lines, and a node that runs."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness import ROOT, Served, served

PAGE = (ROOT / "docs" / "logs.md").read_text()
LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}
Event = tuple[str, str, str]  # logger, level, event


def rows(*, title: str) -> list[list[str]]:
    """The cells of the table below a title."""
    part = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    found = [[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| `")]
    assert found, title
    return found


def fields(cell: str) -> frozenset[str]:
    return frozenset(re.findall(r"`(\w+)`", cell))


def fields_of(title: str) -> frozenset[str]:
    return frozenset(row[0].strip("`") for row in rows(title=title))


def events_of_page() -> dict[Event, frozenset[str]]:
    found = {(r[1].strip("`"), r[2], r[0].strip("`")): fields(r[3]) for r in rows(title="Events")}
    assert len(found) == len(rows(title="Events")), "an event has two rows"
    return found


def loggers(tree: ast.Module) -> dict[str, str]:
    """The loggers of a module, by the names of the variables."""
    found = {}
    for node in tree.body:
        made = node.value if isinstance(node, ast.AnnAssign) else None
        if isinstance(made, ast.Call) and ast.unparse(made.func) == "logging.getLogger":
            found[ast.unparse(node.target)] = ast.literal_eval(made.args[0])
    return found


def keys(facts: ast.expr, function: ast.AST) -> frozenset[str]:
    """The names in the `facts` of a line: of the dict there, or of those that its function puts into the variable."""
    if isinstance(facts, ast.Dict):
        return frozenset(ast.literal_eval(key) for key in facts.keys if key is not None)
    assert isinstance(facts, ast.Name), ast.unparse(facts)
    found = frozenset[str]()
    for node in ast.walk(function):
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets += [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else []
        if any(isinstance(t, ast.Name) and t.id == facts.id for t in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)
            assert isinstance(node.value, ast.Dict), ast.unparse(node)
            found |= keys(node.value, function)
    assert found, ast.unparse(facts)
    return found


def written() -> dict[Event, frozenset[str]]:
    """Every line that a call in our packages can write."""
    found: dict[Event, frozenset[str]] = {}
    for package in ("service", "keystore", "policy", "audit"):
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text())
            names = loggers(tree)
            functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
            for function in functions:
                for call in ast.walk(function):
                    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                        continue
                    if call.func.attr not in LEVELS or ast.unparse(call.func.value) not in names:
                        continue
                    level = {"exception": "error"}.get(call.func.attr, call.func.attr)
                    extra = [k.value for k in call.keywords if k.arg == "extra"]
                    shown = frozenset[str]()
                    if extra:
                        assert isinstance(extra[0], ast.Dict), path
                        shown = keys(extra[0].values[0], function)
                    shown |= {"exception"} if call.func.attr == "exception" else set()
                    said = call.args[0]
                    for text in [said.body, said.orelse] if isinstance(said, ast.IfExp) else [said]:
                        event = names[ast.unparse(call.func.value)], level, ast.literal_eval(text)
                        found[event] = found.get(event, frozenset()) | shown
    return found


def test_the_page_has_every_event_with_its_fields_and_no_other() -> None:
    page, code = events_of_page(), written()
    assert page.keys() == code.keys()
    for event, shown in page.items():
        assert shown == code[event], event


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    directory = tmp_path_factory.mktemp("logging") / "node"
    with served(directory) as node:
        yield node, directory.with_suffix(".log")


def test_a_node_writes_nothing_but_lines_of_the_page(log: tuple[Served, Path]) -> None:
    node, file = log
    with node.client("health-operator") as operator, node.client("health-eu-de-1") as workload:
        body = {"spec": "AES_256", "tier": 2, "home": "eu-de-1"}
        key = (
            operator.post("/v1/keys", json=body, headers={"idempotency-key": "k" * 20}).raise_for_status().json()["id"]
        )
        assert workload.post(f"/v1/keys/{key}/encrypt", json={"plaintext": "aGk="}).status_code == 200
        assert workload.post(f"/v1/keys/{key}/rotate").status_code >= 400
        assert workload.get("/v1/nothing").status_code == 404
    with node.client(None) as nobody:
        assert nobody.get("/v1/whoami").status_code == 401
    (worker,) = psutil.Process(node.process.pid).children()
    os.kill(worker.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while file.read_text().count('"event": "serving"') < 2:
        assert time.monotonic() < deadline, "no other worker came"
        time.sleep(0.1)
    # What `skms dev up` says to a person is not of the node.
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{") or "worker" in line]
    always, of_request, events = fields_of("Every line"), fields_of("Requests"), events_of_page()
    seen, requests = set[str](), set[str]()
    for line in lines:
        assert always <= line.keys(), line
        event = line["logger"], line["level"], line["event"]
        own = line.keys() - always
        if event == ("skms.request", "info", "request"):
            assert own <= of_request, line
            requests |= own
        else:
            assert own == events[event], line
        seen.add(line["event"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert {"serving", "request", "worker ended"} <= seen
    assert requests == of_request
