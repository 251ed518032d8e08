"""deploy/compose: files that their readers take, and two nodes that serve through the proxy as the files say."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import compose_spec
import httpx
import pytest
import yaml

from commands import parses, words_of
from harness import ROOT, Served, stop
from postgres import Cluster
from service.dev import free_port

COMPOSE = ROOT / "deploy" / "compose"
FILE = COMPOSE / "compose.yaml"
SERVICES: dict[str, Any] = yaml.safe_load(FILE.read_text())["services"]
REQUESTS = int(os.environ.get("ROLLING_REQUESTS", "400"))
RATE = float(os.environ.get("ROLLING_RATE", "100"))  # a second
CLIENTS = 8
NODES = {name: service for name, service in SERVICES.items() if service["image"].startswith("sovereign-kms:")}


def test_the_file_is_what_the_compose_specification_says() -> None:
    merged = yaml.safe_dump(yaml.safe_load(FILE.read_text()), default_flow_style=False)  # it knows no YAML merges
    compose_spec.PyCompose.from_yaml(merged).to_spec()


def test_every_container_is_hardened() -> None:
    linted = subprocess.run(["compose-lint", "--format", "json", str(FILE)], capture_output=True, env=tools())
    found = {(f["rule_id"], f["service"]) for f in json.loads(linted.stdout)["findings"]}
    # Digests are for who deploys: a tag may be looked up, and a digest that was made up may not.
    assert {rule for rule, _ in found} <= {"CL-0019"}, found
    for name, service in SERVICES.items():
        assert service["read_only"], name
        assert service["user"].split(":")[0].isdigit(), name
        assert service["ulimits"]["core"] == 0, name
    assert all(port.startswith("127.0.0.1:") for s in SERVICES.values() for port in s.get("ports", []))


def tools() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"}


def test_every_file_that_is_mounted_or_built_from_is_there() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (COMPOSE / source).is_file(), (name, source)
        if build := service.get("build"):
            assert (COMPOSE / build["context"] / build["dockerfile"]).resolve().is_file() or (
                ROOT / build["dockerfile"].removeprefix("../../")
            ).is_file()


def test_commands_are_commands_of_skms() -> None:
    for service in NODES.values():
        parses(service["command"])
        assert service["healthcheck"]["test"][:2] == ["CMD", "skms"]
        parses(service["healthcheck"]["test"][2:])
    shown = [line for line in FILE.read_text().splitlines() if line.startswith("#") and " skms --" in line]
    assert shown
    for line in shown:
        parses(words_of(line.removeprefix("#")))


def haproxy(*arguments: str) -> list[str]:
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if program is None:
        pytest.fail("haproxy is not installed: run `make setup`, or apt-get install haproxy")
    return [program, *arguments]


def proxy_file(to: Path, node: Path, port: int, ports: dict[str, int]) -> Path:
    """haproxy.cfg with the addresses and files of this machine."""
    text = (COMPOSE / "haproxy.cfg").read_text()
    for old, new in {
        "bind :8443": f"bind 127.0.0.1:{port}",
        "/var/lib/skms/dev": str(node),
        "nameserver dns 127.0.0.11:53": "",
        " resolvers docker init-addr libc,none": "",
        "resolvers docker\n": "",
        **{f" {name} {name}:8443": f" {name} 127.0.0.1:{at}" for name, at in ports.items()},
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    to.write_text(text)
    return to


def test_haproxy_takes_the_whole_file(tmp_path: Path, dev_files: Any) -> None:
    text = (COMPOSE / "haproxy.cfg").read_text().replace("/var/lib/skms/dev", str(dev_files.directory))
    text = re.sub(r"server (n\d) n\d:", r"server \1 127.0.0.1:", text)  # names are known to Docker alone
    (tmp_path / "haproxy.cfg").write_text(text)
    checked = subprocess.run(haproxy("-c", "-dW", "-f", str(tmp_path / "haproxy.cfg")), capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr  # -dW: a warning is an error


@dataclass
class Stack:
    """Both nodes and the proxy: what runs, and the way through."""

    directory: Path
    node: Path
    commands: dict[str, tuple[list[str], dict[str, str], int]] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """Start it by its command and environment, and wait until it is ready."""
        command, environment, port = self.commands[name]
        with (self.directory / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True
            )
        until_ready(self.node, port, self.running[name], self.directory / f"{name}.log")

    @property
    def through(self) -> Served:
        found = json.loads((self.node / "env.json").read_text())
        url = f"https://127.0.0.1:{self.commands['proxy'][2]}"
        return Served(self.node, self.running["proxy"], found | {"base_url": url})


@pytest.fixture
def stack(tmp_path: Path, postgres: Cluster) -> Iterator[Stack]:
    """Both nodes and the proxy, started by the commands and environments of the file."""
    database, node = postgres.fresh("compose"), tmp_path / "dev"
    ports = {name: free_port() for name in NODES}
    made = Stack(tmp_path, node)
    with contextlib.ExitStack() as undo:
        undo.callback(lambda: [stop(process) for process in made.running.values()])
        for name, service in NODES.items():
            command = [
                word.replace("/var/lib/skms/dev", str(node)).replace("postgresql+psycopg://skms@db/skms", database)
                for word in service["command"]
            ]
            assert node.as_posix() in " ".join(command)
            command += ["--port", str(ports[name])] if command[0] == "dev" else []
            environment = {k: v for k, v in service["environment"].items() if k.startswith("SKMS_")}
            assert environment.pop("SKMS_LISTEN_HOST") == "0.0.0.0"  # of the container; here the loopback is enough
            environment["SKMS_LISTEN_PORT"] = str(ports[name])
            made.commands[name] = [sys.executable, "-m", "service.cli.main", *command], environment, ports[name]
            made.start(name)
        port = free_port()
        command = haproxy("-db", "-f", str(proxy_file(tmp_path / "haproxy.cfg", node, port, ports)))
        made.commands["proxy"] = command, {}, port
        made.start("proxy")
        yield made


def until_ready(node: Path, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, ValueError, httpx.TransportError):
            environment = json.loads((node / "env.json").read_text()) | {"base_url": f"https://127.0.0.1:{port}"}
            with Served(node, process, environment).client(None) as client:
                if client.get("/readyz").status_code == 200:
                    return
        time.sleep(0.2)
    pytest.fail("not ready: " + log.read_text()[-3_000:])


def served_by(client: httpx.Client) -> str:
    """Which node answered: the chain in the receipt is its own."""
    return client.get("/v1/whoami").raise_for_status().headers["audit-receipt"].split('"')[1].rsplit("/", 1)[1][:2]


def rolling(stack: Stack, key: str, *, requests: int, rate: float) -> tuple[int, int]:
    """Restart one node after the other, for ever, until so many requests were sent; (requests, restarts). None may fail."""
    failed, sent, over = list[str](), itertools.count(), threading.Event()

    def use() -> None:
        due = time.monotonic()
        while not over.is_set() and not failed:
            # A connection of its own for some requests: the proxy's choice. One that was never made is tried again, no
            # request is.
            way = httpx.HTTPTransport(verify=stack.through.tls("health-eu-de-1"), retries=3)
            with stack.through.client("health-eu-de-1", transport=way) as workload:
                for _ in range(10):
                    due = max(due + CLIENTS / rate, time.monotonic() - 1)
                    time.sleep(max(0.0, due - time.monotonic()))
                    next(sent)
                    try:
                        answer = workload.post(f"/v1/keys/{key}/encrypt", json={"plaintext": "aGk="})
                    except httpx.TransportError as error:
                        failed.append(repr(error))
                        return
                    if answer.status_code != 200:
                        failed.append(answer.text)
                        return

    threads = [threading.Thread(target=use) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    restarts = 0
    try:
        while not failed and (restarts < 2 or next(sent) < requests):
            name = f"n{1 - restarts % 2}"
            stack.running[name].terminate()
            assert stack.running[name].wait(60) == 0
            stack.start(name)
            restarts += 1
            time.sleep(3.0)  # the proxy looks twice before it believes
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert not failed, failed[0]
    return next(sent), restarts


def test_R9_nodes_restart_one_after_the_other_behind_the_proxy_and_no_request_fails(stack: Stack) -> None:
    through = stack.through
    with through.client("health-operator") as operator:
        asked = {"spec": "AES_256", "tier": 2, "home": "eu-de-1"}
        made = operator.post("/v1/keys", json=asked, headers={"idempotency-key": "k" * 20}).raise_for_status()
    key, nodes = made.json()["id"], set()
    deadline = time.monotonic() + 30
    while nodes != {"n0", "n1"} and time.monotonic() < deadline:  # the proxy finds the second node within two checks
        with through.client("health-eu-de-1") as workload:
            nodes.add(served_by(workload))
    assert nodes == {"n0", "n1"}
    begun = time.monotonic()
    sent, restarts = rolling(stack, key, requests=REQUESTS, rate=RATE)
    print(f"{restarts} restarts, {sent:,} requests at {sent / (time.monotonic() - begun):.0f}/s, none failed")
    stack.running["n1"].terminate()
    assert stack.running["n1"].wait(60) == 0
    with through.client("health-eu-de-1") as workload:
        assert served_by(workload) == "n0"
    # Tenants' identities pass the proxy untouched; one without a certificate is nobody behind it too.
    with through.client(None) as nobody:
        assert nobody.post(f"/v1/keys/{key}/encrypt", json={"plaintext": "aGk="}).status_code == 401
