"""Single operations through REST, mTLS, policy, HSM and durable audit, beside an empty FastAPI route of the same server.

`python -m bench.encrypt [ROUNDS] [CONNECTIONS] [SECONDS]` prints rates, latencies and CPU of the serving process, as medians of
interleaved rounds, and ratios to the empty route. The client is a process of its own on the same machine.
"""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import psutil

from service.config import Config, load

ROOT: Final = Path(__file__).resolve().parents[1]
SECONDS: Final = 4.0
ITEMS: Final = 4_000  # at once at the most: of more than 4,096 records that wait for their commit the rest is refused
PLAIN: Final = base64.b64encode(bytes(256)).decode()
CONTEXT: Final = {"row": "7"}


@dataclass(frozen=True, slots=True)
class Case:
    """A request, and the process that answers it."""

    name: str
    port: int
    worker: psutil.Process
    path: str
    body: dict[str, Any]
    items: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    more_paths: Sequence[str] = ()


class Node:
    """A development node with a key of each kind."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes]) -> None:
        environment = json.loads((directory / "env.json").read_text())
        self.identities = {i["name"]: i for i in environment["identities"]}
        self.ca, self.url = environment["ca_file"], httpx.URL(environment["base_url"])
        self.directory, self.worker = directory, psutil.Process(process.pid).children()[0]

    def client(self, name: str) -> httpx.Client:
        """A client with a certificate."""
        trust = ssl.create_default_context(cafile=self.ca)
        trust.load_cert_chain(self.identities[name]["cert_file"], self.identities[name]["key_file"])
        return httpx.Client(base_url=self.url, verify=trust, timeout=60)

    def cases(self, noop: tuple[int, psutil.Process]) -> list[Case]:
        """What is measured; the first is the baseline."""
        with self.client("health-operator") as operator, self.client("health-eu-de-1") as workload:

            def made(path: str, body: dict[str, Any], client: httpx.Client = workload) -> dict[str, Any]:
                found: dict[str, Any] = client.post(path, json=body).raise_for_status().json()
                return found

            def key(spec: str) -> str:
                operator.headers["Idempotency-Key"] = spec
                return str(made("/v1/keys", {"spec": spec, "tier": 2, "home": "eu-de-1"}, operator)["id"])

            aes, ec, mac = key("AES_256"), key("EC_P256"), key("HMAC_256")
            one = {"plaintext": PLAIN, "context": CONTEXT}
            sealed = made(f"/v1/keys/{aes}/encrypt", one)["ciphertext"]
        asked = [
            ("encrypt 256 B", f"/v1/keys/{aes}/encrypt", one, 1),
            ("decrypt 256 B", "/v1/decrypt", {"ciphertext": sealed, "context": CONTEXT}, 1),
            ("data key", f"/v1/keys/{aes}/data-keys", {"context": CONTEXT}, 1),
            ("sign, P-256", f"/v1/keys/{ec}/sign", {"message": PLAIN, "algorithm": "ECDSA_SHA_256"}, 1),
            ("MAC, SHA-256", f"/v1/keys/{mac}/mac", {"message": PLAIN, "algorithm": "HMAC_SHA_256"}, 1),
            ("encrypt, batches of 500", "/v1/batch/encrypt", {"items": [{"key": aes, **one} for _ in range(500)]}, 500),
        ]
        assert self.url.port is not None
        return [
            Case("empty FastAPI route", noop[0], noop[1], asked[0][1], one),
            *(Case(name, self.url.port, self.worker, path, body, items) for name, path, body, items in asked),
        ]


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Node]:
    """A node of its own, until the block is left."""
    command = [sys.executable, "-m", "service.cli.main", "dev"]
    with (directory / "log").open("wb") as log:
        up = [*command, "up", "--dir", str(directory / "node"), "--port", "0"]
        process = subprocess.Popen(up, stderr=log, cwd=ROOT)
    try:
        shown = [*command, "env", "--dir", str(directory / "node")]
        while subprocess.run(shown, capture_output=True, check=False, cwd=ROOT).returncode:
            time.sleep(0.2)
        yield Node(directory / "node", process)
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def empty_route(config: Config) -> Iterator[tuple[int, psutil.Process]]:
    """Port and process of the empty route, with the node's own certificates."""
    listen = config.listen
    files = (listen.certificate, listen.private_key, listen.client_ca)
    command = [sys.executable, "-m", "bench.noop", *map(str, files)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline()), psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True, slots=True)
class Measured:
    """One round of one case, per item."""

    rate: float
    cpu_us: float
    p50_ms: float
    p99_ms: float


def measure(case: Case, node: Node, connections: int, *, seconds: float = SECONDS) -> Measured:
    """Load one case from a process of its own."""
    who = node.identities["health-eu-de-1"]
    spec = node.directory / "load.json"
    spec.write_text(
        json.dumps(
            {
                "host": "127.0.0.1",
                "port": case.port,
                "pid": case.worker.pid,
                "ca": node.ca,
                "cert": who["cert_file"],
                "key": who["key_file"],
                "method": "POST",
                "path": case.path,
                "body": json.dumps(case.body),
                "connections": min(connections, ITEMS // case.items),
                "seconds": seconds,
                "headers": case.headers,
                "more_paths": case.more_paths,
            }
        )
    )
    ran = subprocess.run([sys.executable, "-m", "bench.load", str(spec)], capture_output=True, check=True, cwd=ROOT)
    told = json.loads(ran.stdout)
    if told["failed"]:
        raise SystemExit(f"{case.name}: {told['failed']}")
    done, latencies = told["done"] * case.items, told["latencies_ms"]
    return Measured(done / told["seconds"], told["cpu_seconds"] / done * 1e6, latencies["p50"], latencies["p99"])


def main() -> int:
    """Start a node and the empty route, measure, stop them."""
    rounds, connections, seconds = (float(a) for a in (*sys.argv[1:], *("5", "64", f"{SECONDS}")[len(sys.argv) - 1 :]))
    with (
        tempfile.TemporaryDirectory() as made,
        running(Path(made)) as node,
        empty_route(load(node.directory / "skms.toml")) as noop,
    ):
        cases = node.cases(noop)
        found: dict[str, list[Measured]] = {case.name: [] for case in cases}
        for _ in range(int(rounds)):  # interleaved, so that a noisy minute hits all
            for case in cases:
                found[case.name].append(measure(case, node, int(connections), seconds=seconds))
    print(
        f"{connections:.0f} connections, medians of {rounds:.0f} rounds of {seconds:.0f} s; ratios to the empty route"
    )
    print(f"{'':26} {'items/s':>9} {'rate':>7} {'CPU us':>8} {'CPU':>7} {'p50 ms':>8} {'p99 ms':>8}")
    base = found[cases[0].name]
    for name, all_rounds in found.items():
        rate, cpu, p50, p99 = (
            statistics.median(getattr(m, field) for m in all_rounds) for field in ("rate", "cpu_us", "p50_ms", "p99_ms")
        )
        of_rate = statistics.median(m.rate / b.rate for m, b in zip(all_rounds, base, strict=True))
        of_cpu = statistics.median(m.cpu_us / b.cpu_us for m, b in zip(all_rounds, base, strict=True))
        print(f"{name:26} {rate:9,.0f} {of_rate:6.2f}x {cpu:8,.0f} {of_cpu:6.2f}x {p50:8.1f} {p99:8.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
