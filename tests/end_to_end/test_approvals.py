"""A key destroyed by several people at the command line, with a node that is killed between their signatures."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from databases import address
from harness import ROOT, Files, officer, tls_of
from service.dev import free_port

NAMES = ("alice", "bob")


def written(files: Files, directory: Path, port: int) -> Path:
    """The development node's configuration with a port and a database of its own, and two approvers."""
    text = files.config_file.read_text()
    text = re.sub(r'(?m)^url = ".*"', f'url = "{address(directory)}"', text, count=1)
    text = re.sub(r'(?m)^state_dir = ".*"', f'state_dir = "{directory / "state"}"', text, count=1)
    text, changed = re.subn(r"(?m)^port = \d+", f"port = {port}", text, count=1)
    assert changed == 1
    for name in NAMES:
        _, public = officer(directory, name)
        text += f'\n[[approvals.approver]]\nname = "{name}"\npublic_key = "{public}"\nidentities = ["mtls:x:/{name}"]\n'
    path = directory / "skms.toml"
    path.write_text(text)
    return path


def launch(config: Path, files: Files, url: str) -> subprocess.Popen[bytes]:
    with config.with_suffix(".log").open("ab") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli.main", "serve", "--config", str(config)],
            stdout=sink,
            stderr=sink,
            cwd=ROOT,
            start_new_session=True,
        )
    until = time.monotonic() + 180
    with httpx.Client(base_url=url, verify=tls_of(files, None), timeout=10) as probe:
        while time.monotonic() < until and process.poll() is None:
            try:
                if probe.get("/readyz").status_code == 200:
                    return process
            except httpx.TransportError:
                time.sleep(0.1)
    kill(process)
    raise AssertionError(config.with_suffix(".log").read_text()[-2_000:])


def kill(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of the node and its workers."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)


def test_people_destroy_a_key_at_the_command_line_though_the_node_is_killed_between(
    dev_files: Files, tmp_path: Path
) -> None:
    port = free_port()
    config, url = written(dev_files, tmp_path, port), f"https://127.0.0.1:{port}"

    def skms(who: str, *arguments: str, status: int = 0) -> Any:
        found = dev_files.identities[who]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "service.cli.main", "-o", "json", "--url", url),
                *(
                    "--ca",
                    dev_files.environment["ca_file"],
                    "--cert",
                    str(found.cert_file),
                    "--key",
                    str(found.key_file),
                ),
                *arguments,
            ],
            capture_output=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert done.returncode == status, (arguments, done.returncode, done.stdout, done.stderr)
        return json.loads(done.stdout) if done.stdout else done.stderr.decode()

    process = launch(config, dev_files, url)
    try:
        key = skms("health-operator", "key", "create", "--spec", "AES_256", "--tier", "2", "--home", "eu-de-1")["id"]
        wider = skms("health-officer", "key", "set-policy", key, "--tier", "3", "--reach", "EU", status=6)
        assert wider["request"]["parameters"]["to"] == {
            "tier": 3,
            "reach": ["eu-de-1", "eu-de-2", "eu-fi-1", "eu-fr-1"],
        }
        alice = ("--name", "alice", "--key", "alice.key")
        assert skms("health-custodian", "approval", "sign", wider["id"], *alice)["approvers"] == ["alice"]
        assert skms("health-custodian", "approval", "revoke", wider["id"], *alice)["approvers"] == []
        asked = skms("health-operator", "key", "destroy", key, "--reason", "leaked", status=6)
        assert (asked["code"], asked["needed"]) == ("approval_required", 2)
        request = asked["id"]
        # alice signs on a machine without network, bob where he sits.
        skms("health-custodian", "approval", "show", request, "--to", "request.json")
        skms(
            "health-custodian",
            *("approval", "sign", "request.json", *alice, "--to", "alice.json"),
        )
        first = skms("health-custodian", "approval", "add", request, "alice.json")
        assert (first["state"], first["approvers"]) == ("open", ["alice"])
        kill(process)
        process = launch(config, dev_files, url)
        by_bob = ("approval", "sign", request, "--name", "bob", "--key", "bob.key")
        assert skms("health-custodian", *by_bob)["state"] == "executed"
        assert skms("health-operator", "key", "show", key)["state"] == "destroyed"
        assert "approval_closed" in skms("health-custodian", *by_bob, status=5)
    finally:
        kill(process)
