"""Exit from one HSM vendor to another and back, under live traffic: nobody is refused, every ciphertext opens (O12)."""

from __future__ import annotations

import base64
import os
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from harness import Served, served

KEYS = int(os.environ.get("EXIT_DRILL_KEYS", "1000"))
REQUESTS = int(os.environ.get("EXIT_DRILL_REQUESTS", "1000"))  # there and back again until so many were sent
SOFT, NSS = "softhsm-eu-de-1", "nss-eu-de-1"


@pytest.fixture(scope="module")
def two_vendors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A node whose group has a SoftHSM2 and an NSS token."""
    with served(tmp_path_factory.mktemp("vendors") / "node", "--nss", "--workers", "2") as running:
        yield running


@dataclass
class Traffic:
    """Clients that encrypt and decrypt until told to stop."""

    node: Served
    keys: list[str]
    sent: int = 0
    refused: list[str] = field(default_factory=list)
    sealed: list[tuple[str, str]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def _one(self, seed: int) -> None:
        with self.node.client("health-eu-de-1") as client:
            number = seed
            while not self._stop.is_set():
                number += 1
                plain = base64.b64encode(b"row %d" % number).decode()
                key = self.keys[number * 7 % len(self.keys)]
                made = self._send(client, f"/v1/keys/{key}/encrypt", {"plaintext": plain})
                if made is None:
                    continue
                opened = self._send(client, "/v1/decrypt", {"ciphertext": made["ciphertext"]})
                if opened is not None and opened["plaintext"] != plain:
                    self.refused.append("a wrong plaintext")
                if number % 20 == 0:
                    self.sealed.append((made["ciphertext"], plain))

    def _send(self, client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
        answer = client.post(path, json=body)
        self.sent += 1
        if answer.status_code != 200:
            self.refused.append(answer.text)
            return None
        return answer.json()

    def __enter__(self) -> Traffic:
        self._threads = [threading.Thread(target=self._one, args=(seed * 1_000_000,)) for seed in range(4)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def fresh() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


def make_keys(node: Served, count: int) -> tuple[list[str], list[str]]:
    """(encryption keys, other keys)."""

    def some(first: int) -> list[tuple[str, str]]:
        with node.client("health-operator") as client:
            return [one(client, number) for number in range(first, count, 4)]

    def one(client: httpx.Client, number: int) -> tuple[str, str]:
        spec = {8: "EC_P256", 9: "HMAC_256"}.get(number % 10, "AES_256")
        body = {"spec": spec, "tier": 2, "home": "eu-de-1"}
        if number % 10 == 7:
            body["suite"] = "0x0002"
        answer = client.post("/v1/keys", json=body, headers=fresh())
        assert answer.status_code == 201, answer.text
        return answer.json()["id"], spec

    with ThreadPoolExecutor(4) as pool:
        made = [key for part in pool.map(some, range(4)) for key in part]
    return [k for k, spec in made if spec == "AES_256"], [k for k, spec in made if spec != "AES_256"]


def exit_to(node: Served, source: str, target: str) -> dict[str, Any]:
    """Drill, confirm; the report."""
    with node.client("platform") as platform:
        body = {"kind": "exit", "from": source, "to": target, "observe": "PT1S", "window": "PT2S", "rate": 2_000}
        answer = platform.post("/v1/drills", json=body, headers=fresh())
        assert answer.status_code == 202, answer.text
        path = f"/v1/drills/{answer.json()['id']}"
        deadline = time.monotonic() + 60 + KEYS / 20
        while (shown := platform.get(path).json())["step"] != "confirm":
            assert shown["state"] == "running", shown
            assert time.monotonic() < deadline, shown
            time.sleep(0.2)
        time.sleep(0.3)
        assert platform.post(f"{path}/confirm").json()["state"] == "succeeded"
        time.sleep(0.5)
        report: dict[str, Any] = platform.get(f"{path}/report").json()
        return report


def serve_again(node: Served, name: str) -> None:
    """Let the drained HSM serve again, on every worker."""
    with node.client("platform") as platform:
        assert platform.post(f"/v1/hsms/{name}/undrain").status_code == 200
        deadline = time.monotonic() + 20
        while any(h["state"] != "UP" for h in platform.get("/v1/hsms").json()["items"]):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1.5)  # the other worker's canary too


def test_O12_from_one_vendor_to_another_and_back_refuses_nobody(two_vendors: Served) -> None:
    node = two_vendors
    keys, others = make_keys(node, KEYS)
    before: list[tuple[str, str]] = []
    with node.client("health-eu-de-1") as client:
        for at in range(0, len(keys), 500):
            items = [{"key": k, "plaintext": base64.b64encode(k.encode()).decode()} for k in keys[at : at + 500]]
            made = client.post("/v1/batch/encrypt", json={"items": items}).json()["results"]
            before += [(m["result"]["ciphertext"], i["plaintext"]) for m, i in zip(made, items, strict=True)]
    reports: list[dict[str, Any]] = []
    with Traffic(node, keys) as traffic:
        time.sleep(0.5)
        while traffic.sent < REQUESTS or not reports:
            for source, target in ((SOFT, NSS), (NSS, SOFT)):
                reports.append(exit_to(node, source, target))
                serve_again(node, source)
    assert not traffic.refused, traffic.refused[:3]
    assert traffic.sent >= REQUESTS
    for report in reports:
        assert report["refused"] == {}
        assert report["requests"] > 0
        assert report["keys"]["mismatches"] == []
        assert report["keys"]["keys"] >= len(keys) + len(others)
    with node.client("health-eu-de-1") as client:
        everything = before + traffic.sealed
        for at in range(0, len(everything), 500):
            part = everything[at : at + 500]
            opened = client.post("/v1/batch/decrypt", json={"items": [{"ciphertext": c} for c, _ in part]})
            for (_, plain), shown in zip(part, opened.json()["results"], strict=True):
                assert shown["result"]["plaintext"] == plain
    there, back = reports[0], reports[1]
    print(
        f"\n{KEYS} keys: there {there['seconds']:.1f} s, back {back['seconds']:.1f} s, {traffic.sent} requests, 0 refused"
    )
    for name, phase in there["phases"].items():
        print(f"{name:8} {phase['requests']:6} requests, p50 {phase['p50_us']} us, p99 {phase['p99_us']} us")
