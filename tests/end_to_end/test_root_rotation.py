"""A new root KEK under live traffic: killed midway and gone on with, nothing lost, the old one destroyed at the end."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import softhsm
from databases import address, behind
from harness import Served, served, skms

KEYS = 60


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A node whose region has two SoftHSM2 tokens."""
    with served(tmp_path_factory.mktemp("rotation") / "node", "--hsms", "2") as running:
        yield running


def make(client: httpx.Client, number: int) -> str:
    spec = ("AES_256", "EC_P256", "HMAC_256", "AES_256")[number % 4]
    body = {"spec": spec, "tier": 2, "home": "eu-de-1"} | ({"suite": "0x0002"} if number % 4 == 3 else {})
    answer = client.post("/v1/keys", json=body, headers={"Idempotency-Key": uuid.uuid4().hex})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def keks(directory: Path) -> dict[str, int]:
    """How many key versions are under each root KEK."""
    rows = behind(address(directory), "SELECT kek, count(*) FROM keystore_version GROUP BY kek")
    return {str(kek): int(count) for kek, count in rows}


class Traffic:
    """Encrypts and decrypts with every key until it is over."""

    def __init__(self, node: Served, keys: list[str]) -> None:
        self.node, self.keys, self.wrong, self.over, self.sent = node, keys, list[str](), threading.Event(), 0

    def run(self) -> None:
        with self.node.client("health-eu-de-1") as client:
            while not self.over.is_set():
                key = self.keys[self.sent % len(self.keys)]
                plain = base64.b64encode(os.urandom(12)).decode()
                made = client.post(f"/v1/keys/{key}/encrypt", json={"plaintext": plain})
                opened = client.post("/v1/decrypt", json={"ciphertext": made.json().get("ciphertext", "")})
                self.sent += 1
                if opened.status_code != 200 or opened.json()["plaintext"] != plain:
                    self.wrong.append(made.text + opened.text)


def rotate(node: Served, *more: str) -> list[str]:
    officer = node.directory / "softhsm" / "skms-eu-de-1.so-pin"
    config = str(node.directory / "skms.toml")
    command = ["hsm", "rotate-root", "--config", config, "--so-pin-file", str(officer), *more]
    return ["-o", "json", *command]


def backup_config(node: Served) -> str:
    """The node's configuration with a third token that is stored away."""
    tokens = softhsm.bring_up(node.directory / "softhsm", ["skms-backup"])
    found = node.directory / "with-backup.toml"
    found.write_text(
        (node.directory / "skms.toml").read_text()
        + f"""
[[hsm]]
name = "stored-away"
region = "eu-de-1"
vendor = "softhsm2"
backup = true
module = "{tokens.module}"
token_label = "skms-backup"
pin_file = "{tokens.pin_file("skms-backup")}"
environment = {{SOFTHSM2_CONF = "{tokens.directory}/softhsm2.conf"}}
"""
    )
    return str(found)


def join_backup(node: Served, config: str) -> None:
    officer = str(node.directory / "softhsm" / "skms-eu-de-1.so-pin")
    done = skms(
        *("hsm", "join", "--config", config, "--from", "softhsm-eu-de-1", "--to", "stored-away"),
        *("--so-pin-file", officer),
    )
    assert done.returncode == 0, done.stderr


def test_a_backup_of_the_root_is_proven_by_a_drill(pair: Served) -> None:
    with pair.client("health-operator") as operator:
        for number in range(4):
            make(operator, number)
    config = backup_config(pair)
    verify = ("-o", "json", "hsm", "verify-backup", "--config", config, "--hsm", "stored-away", "--sample", "20")
    empty = skms(*verify)
    assert empty.returncode == 1
    assert b"root-kek" in empty.stderr, empty.stderr
    join_backup(pair, config)
    done = skms(*verify)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert report["canaries"] >= 7
    assert report["versions"] >= 4


def test_a_root_rotation_under_traffic_is_killed_resumed_and_loses_nothing(pair: Served) -> None:
    with pair.client("health-operator") as operator, pair.client("health-eu-de-1") as workload:
        keys = [make(operator, n) for n in range(KEYS)]
        ciphers = [k for n, k in enumerate(keys) if n % 4 in {0, 3}]
        before = {
            k: workload.post(f"/v1/keys/{k}/encrypt", json={"plaintext": "aGk="}).json()["ciphertext"] for k in ciphers
        }
        macs = {
            k: workload.post(f"/v1/keys/{k}/mac", json={"message": "aGk=", "algorithm": "HMAC_SHA_256"}).json()["mac"]
            for n, k in enumerate(keys)
            if n % 4 == 2
        }
        (old,) = keks(pair.directory)
        traffic = Traffic(pair, ciphers)
        thread = threading.Thread(target=traffic.run)
        thread.start()
        try:
            command = [sys.executable, "-m", "service.cli.main", *rotate(pair, "--rate", "10")]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
                deadline = time.monotonic() + 60
                while sum(n for kek, n in keks(pair.directory).items() if kek != old) < 5:
                    assert time.monotonic() < deadline
                    assert first.poll() is None, "the rotation ended before it could be killed"
                    time.sleep(0.05)
                first.send_signal(signal.SIGKILL)
            under = keks(pair.directory)
            assert under[old] > 0, "it was killed too late to show anything"
            born = make(operator, 0)  # under the new root already
            assert keks(pair.directory)[old] == under[old]
            refused = skms("hsm", "retire-root", "--config", str(pair.directory / "skms.toml"), "--version", "1")
            assert (refused.returncode, b"key versions" in refused.stderr) == (5, True), refused.stderr
            done = skms(*rotate(pair))
            assert done.returncode == 0, done.stderr
            report: dict[str, Any] = json.loads(done.stdout)
            assert (report["old"], report["new"], report["damaged"]) == (1, 2, [])
            assert not any(report["left"].values())
        finally:
            traffic.over.set()
            thread.join()
        assert not traffic.wrong, traffic.wrong[:2]
        assert traffic.sent > 10
        assert set(keks(pair.directory)) == {next(k for k in under if k != old)}
        retired = skms("hsm", "retire-root", "--config", str(pair.directory / "skms.toml"), "--version", "1")
        assert retired.returncode == 0, retired.stderr
        for key, ciphertext in before.items():
            assert workload.post("/v1/decrypt", json={"ciphertext": ciphertext}).json()["plaintext"] == "aGk=", key
        for key, mac in macs.items():
            body = {"message": "aGk=", "algorithm": "HMAC_SHA_256", "mac": mac}
            assert workload.post(f"/v1/keys/{key}/verify-mac", json=body).json()["valid"] is True
        assert workload.post(f"/v1/keys/{born}/encrypt", json={"plaintext": "aGk="}).status_code == 200


def test_a_backup_from_before_the_rotation_is_told_to_be_old_and_is_brought_up_to_date(pair: Served) -> None:
    config = backup_config(pair)
    verify = ("-o", "json", "hsm", "verify-backup", "--config", config, "--hsm", "stored-away", "--sample", "20")
    old = skms(*verify)
    assert (old.returncode, b"version 2" in old.stderr) == (1, True), old.stderr
    join_backup(pair, config)
    done = skms(*verify)
    assert (done.returncode, json.loads(done.stdout)["wrong"]) == (0, [])


def test_after_it_a_node_starts_with_the_new_root_alone(pair: Served) -> None:
    doctor = skms("doctor", "--config", str(pair.directory / "skms.toml"))
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    verified = skms("audit", "verify", "--config", str(pair.directory / "skms.toml"))
    assert verified.returncode == 0, verified.stdout + verified.stderr
