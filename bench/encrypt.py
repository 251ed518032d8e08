"""Encrypt through REST, mTLS, policy, HSM and durable audit, against the cheapest answer the same server gives.

Prints rates, CPU per request of the serving process, and ratios of one run.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]
SECONDS, CLIENTS = 4.0, 16


def worker(node: psutil.Process) -> psutil.Process:
    """The process that serves: the supervisor's only child."""
    return node.children()[0]


async def measure(act: Callable[[], Awaitable[Any]], process: psutil.Process, per_call: int = 1) -> tuple[float, float]:
    """(items a second, CPU microseconds an item) of the serving process."""
    done, until = 0, time.monotonic() + SECONDS
    before, begun = sum(process.cpu_times()[:2]), time.monotonic()

    async def client() -> None:
        nonlocal done
        while time.monotonic() < until:
            await act()
            done += per_call

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    took, cpu = time.monotonic() - begun, sum(process.cpu_times()[:2]) - before
    return done / took, cpu / done * 1e6


async def run(directory: Path, node: psutil.Process) -> None:
    """The measurements."""
    found = json.loads((directory / "env.json").read_text())

    def client(name: str) -> httpx.AsyncClient:
        who = next(i for i in found["identities"] if i["name"] == name)
        trust = ssl.create_default_context(cafile=found["ca_file"])
        trust.load_cert_chain(who["cert_file"], who["key_file"])
        return httpx.AsyncClient(base_url=found["base_url"], verify=trust, timeout=30)

    async with client("health-operator") as operator, client("health-eu-de-1") as workload:
        body = {"spec": "AES_256", "tier": 2, "home": "eu-de-1"}
        key = (await operator.post("/v1/keys", json=body, headers={"Idempotency-Key": "bench"})).json()["id"]
        one = {"plaintext": "A" * 340 + "==", "context": {"row": "7"}}
        many = {"items": [{"key": key, **one} for _ in range(500)]}

        async def post(path: str, sent: Any) -> None:
            answer = await workload.post(path, json=sent)
            answer.raise_for_status()

        cases: dict[str, tuple[Callable[[], Awaitable[Any]], int]] = {
            "livez (no identity, no record)": (lambda: workload.get("/livez"), 1),
            "whoami (identity, record)": (lambda: workload.get("/v1/whoami"), 1),
            "encrypt 256 B": (lambda: post(f"/v1/keys/{key}/encrypt", one), 1),
            "encrypt, batches of 500": (lambda: post("/v1/batch/encrypt", many), 500),
        }
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for _ in range(3):  # interleaved, so that a noisy minute hits all
            for name, (act, per_call) in cases.items():
                results[name].append(await measure(act, worker(node), per_call))
        base = statistics.median(cpu for _, cpu in results["livez (no identity, no record)"])
        print(f"{'':34} {'items/s':>9} {'CPU us/item':>12} {'of livez':>9}")
        for name, rounds in results.items():
            rate, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(f"{name:34} {rate:9,.0f} {cpu:12,.0f} {cpu / base:8.2f}x")


def main() -> int:
    """Start a node, measure, stop it."""
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made) / "node"
        command = [sys.executable, "-m", "service.cli.main", "dev"]
        with (Path(made) / "log").open("wb") as log:
            node = subprocess.Popen([*command, "up", "--dir", str(directory), "--port", "0"], stderr=log, cwd=ROOT)
        try:
            while subprocess.run(
                [*command, "env", "--dir", str(directory)], capture_output=True, check=False
            ).returncode:
                time.sleep(0.2)
            asyncio.run(run(directory, psutil.Process(node.pid)))
        finally:
            node.terminate()
            node.wait(30)
    return 0


if __name__ == "__main__":
    sys.exit(main())
