"""Five times more than a worker can do, and a neighbour that asks for ten times its share.

`python -m bench.overload [SECONDS]`. The capacity C is measured by a closed loop before and after; ratios are to the better
of both. An open loop then asks for 5 C, over connections that may all wait and over more than a worker takes. Then one tenant
asks for 0.2 C over few connections, beside another at its share (0.4 C) and at ten times that, without and with rate
limits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.encrypt import CONTEXT, PLAIN, ROOT, Node, running

CROWDS = (600, 1_080)  # connections: fewer than may wait, and more than a worker takes
FEW = 32
SHARE = 0.4


@dataclass
class Bench:
    """A node with a key of each tenant."""

    node: Node
    seconds: float

    def __post_init__(self) -> None:
        self.handshake = 0.0  # seconds of the worker's CPU for a connection
        self._keys = {}
        for tenant in ("health", "defence"):
            with self.node.client(f"{tenant}-operator") as operator:
                operator.headers["Idempotency-Key"] = "overload"
                made = operator.post("/v1/keys", json={"spec": "AES_256", "tier": 2, "home": "eu-de-1"})
                self._keys[tenant] = made.raise_for_status().json()["id"]

    def start(self, tenant: str, *, connections: int, rate: float | None = None, seconds: float) -> Any:
        """A load of one tenant in a process of its own."""
        who = self.node.identities[f"{tenant}-eu-de-1"]
        spec = {
            "host": "127.0.0.1",
            "port": self.node.url.port,
            "pid": self.node.worker.pid,
            "ca": self.node.ca,
            "cert": who["cert_file"],
            "key": who["key_file"],
            "method": "POST",
            "path": f"/v1/keys/{self._keys[tenant]}/encrypt",
            "body": json.dumps({"plaintext": PLAIN, "context": CONTEXT}),
            "connections": connections,
            "seconds": seconds,
        }
        if rate is not None:
            spec["rate"] = rate
        file = self.node.directory / f"{tenant}.json"
        file.write_text(json.dumps(spec))
        command = [sys.executable, "-m", "bench.load" if rate is None else "bench.crowd", str(file)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)

    def told(self, load: Any) -> dict[str, Any]:
        """What a load has found."""
        out, _ = load.communicate()
        if load.returncode:
            raise SystemExit(f"a load ended with {load.returncode}")
        found: dict[str, Any] = json.loads(out)
        return found

    def _cpu(self) -> float:
        return sum(self.node.worker.cpu_times()[:2])

    def capacity(self) -> tuple[float, float]:
        """(requests a second, seconds of the worker's CPU for each) of a closed loop."""
        before = self._cpu()
        found = self.told(self.start("health", connections=64, seconds=max(3.0, self.seconds / 6)))
        return found["done"] / found["seconds"], (self._cpu() - before) / found["done"]

    def connect(self) -> None:
        """Measure what a connection costs, so that the crowd's need not count as refusals."""
        before = self._cpu()
        self.told(self.start("health", connections=CROWDS[0], rate=0.001, seconds=0.1))
        self.handshake = (self._cpu() - before) / CROWDS[0]

    def flooded(self, rate: float, crowd: int) -> dict[str, Any]:
        """What an open loop finds, what it costs, and how far the worker's memory has grown."""
        memory, before = self.node.worker.memory_info().rss, self._cpu()
        found = self.told(self.start("health", connections=crowd, rate=rate, seconds=self.seconds))
        cpu = (self._cpu() - before - crowd * self.handshake) / max(1, found["done"])
        return found | {"memory": self.node.worker.memory_info().rss / memory, "cpu": cpu}

    def beside(self, rate: float, neighbour: float) -> dict[str, Any]:
        """What a tenant of few requests finds beside another."""
        seconds = max(3.0, self.seconds / 3)
        crowd = None
        if neighbour:
            crowd = self.start("health", connections=CROWDS[0], rate=neighbour, seconds=seconds + 2)
            while len(self.node.worker.net_connections("tcp")) < CROWDS[0] and crowd.poll() is None:
                time.sleep(0.1)
        found = self.told(self.start("defence", connections=FEW, rate=rate, seconds=seconds))
        if crowd is not None:
            found["neighbour"] = self.told(crowd)
        return found


def flooded(seconds: float, crowd: int) -> dict[str, Any]:
    """What becomes of five times as much as a worker can do."""
    with tempfile.TemporaryDirectory() as made, running(Path(made)) as node:
        bench = Bench(node, seconds)
        bench.capacity()  # warm
        bench.connect()
        first, cpu = bench.capacity()
        flood = bench.flooded(5 * first, crowd)
        again, cpu_again = bench.capacity()
    peak = max(first, again)
    return flood | {
        "capacity": peak,
        "goodput": flood["done"] / flood["seconds"] / peak,
        "goodput_cpu": min(cpu, cpu_again) / flood["cpu"],
    }


def neighbours(seconds: float, peak: float, *, limited: bool) -> list[dict[str, Any]]:
    """What a tenant finds alone, beside one at its share, and beside one at ten times its share."""
    if limited:
        os.environ["SKMS_LIMITS_TENANT_RATE"] = str(int(SHARE * peak))
    try:
        with tempfile.TemporaryDirectory() as made, running(Path(made)) as node:
            bench = Bench(node, seconds)
            bench.capacity()
            return [bench.beside(0.2 * peak, of * SHARE * peak) for of in (0, 1, 10)]
    finally:
        os.environ.pop("SKMS_LIMITS_TENANT_RATE", None)


def main() -> int:
    """Print the ratios."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    capacity = 0.0
    for connections in CROWDS:
        flood = flooded(seconds, connections)
        capacity = max(capacity, flood["capacity"])
        told = f"due {flood['due']:,}, unsent for want of a connection {flood['unsent']:,}, refused {flood['refused']}"
        print(f"capacity, closed loop of 64             {flood['capacity']:8,.0f} a second")
        print(f"open loop at 5 x, {connections:5,} connections     {flood['goodput']:8.2f} x")
        print(f"  for a second of the worker's CPU      {flood['goodput_cpu']:8.2f} x")
        print(f"  what was done took                    {flood['latencies_ms']} ms")
        print(f"  {told}, after {flood['refusals_ms']} ms")
        print(f"  without an answer: broken {flood['broken']}, hung {flood['hung']}; memory {flood['memory']:.2f} x")
    for limited, text in ((False, "tenants take turns"), (True, f"tenant_rate {SHARE} C, too")):
        alone, usual, crowd = neighbours(seconds, capacity, limited=limited)
        base = usual["latencies_ms"]
        print(f"a tenant at 0.2 C, {text}")
        for label, one in (
            ("alone", alone),
            ("beside one at its share", usual),
            ("beside one at 10 x its share", crowd),
        ):
            took, missed = one["latencies_ms"], one["refused"] | {"unsent": one["unsent"]}
            of = " ".join(f"{q} {took[q]:7.1f} ms {took[q] / base[q]:5.2f} x" for q in ("p50", "p99"))
            print(f"  {label:30} {of}  done {one['done'] / one['due']:.3f} {missed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
