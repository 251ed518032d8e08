"""How the cost of an encryption grows: with keys, with tenants and their policies, with records, with connections.

`make bench-growth` (`python -m bench.growth [--full] [--only WHAT] [--rounds N] [--seconds S] [--connections N]`): a
development node of each size, all running at once and asked in turn, so that a noisy minute hits all; medians of the
rounds, ratios to the smallest size in the same round. `--full` adds the largest sizes and takes some ten minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from audit import event
from bench.encrypt import CONTEXT, PLAIN, ROOT, Case, Measured, Node, measure, running
from bench.policy import add_tenants
from harness import lab_of, new_key, prepared
from many import fill
from service.database import open_engine
from service.dev import prepare

ASKED: Final = {"plaintext": PLAIN, "context": CONTEXT}
IN_TURN: Final = 900  # keys, asked for one after the other: more than a token keeps unwrapped
FRESH: Final = 9_000  # keys, each asked for once
RULES: Final = 10  # policies of each tenant
GROUP: Final = 512


# ---- nodes of a size: each made by a process of its own, since SoftHSM2 reads its configuration once a process ----------


async def _keys(directory: Path, count: int) -> None:
    """So many keys in SQL."""
    files = prepared(directory)
    async with lab_of(files) as lab:
        store = lab.node.kms.keystore
        name = await new_key(lab, "AES_256")
        engine = open_engine(files.config.database.url)
        ids = await asyncio.to_thread(fill, engine, store.find("health", name), store._hsm("eu-de-1"), count - 1)
        engine.dispose()
    (directory / "keys.json").write_text(json.dumps([str(i) for i in ids[: IN_TURN + FRESH]]))


async def _records(directory: Path, count: int) -> None:
    """So many records in the node's own log, written by its own writer."""
    key = str(uuid.uuid4())

    def record() -> event.Op:
        made, at = str(uuid.UUID(bytes=os.urandom(16), version=4)), time.time_ns() // 1_000
        return event.Op(id=made, ts=at, node="n0", op="encrypt", out="ok", tenant="health", key=key, req=made)

    async with lab_of(prepared(directory)) as lab:
        for _ in range(0, count, GROUP):
            await lab.node.kms.log.append_many([record() for _ in range(GROUP)])


async def _tenants(directory: Path, count: int) -> None:
    """So many further tenants, each with its policies."""
    add_tenants(directory / "policy", count, rules=RULES)


MAKERS: Final = {"keys": _keys, "records": _records, "tenants": _tenants}


def make(what: str, count: int, directory: Path) -> None:
    """A development node of this size, in this process."""
    prepare(directory, port=0)
    asyncio.run(MAKERS[what](directory, count))


# ---- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Curve:
    """One size after the other: how often each was measured, and what the process weighed at the end."""

    title: str
    rounds: Mapping[str, list[Measured]]
    memory: Mapping[str, float]

    def show(self) -> None:
        """Print it."""
        print(f"\n{self.title}")
        print(
            f"{'':>12} {'items/s':>9} {'CPU us':>8} {'of the smallest':>20} {'p50 ms':>8} {'':>20} {'p99 ms':>8} {'MB':>6}"
        )
        smallest = next(iter(self.rounds.values()))
        for size, rounds in self.rounds.items():
            middle = {f: statistics.median(getattr(m, f) for m in rounds) for f in Measured.__slots__}
            print(
                f"{size:>12} {middle['rate']:9,.0f} {middle['cpu_us']:8,.0f} {_spread(rounds, smallest, 'cpu_us'):>20}"
                f" {middle['p50_ms']:8.1f} {_spread(rounds, smallest, 'p50_ms'):>20} {middle['p99_ms']:8.1f}"
                f" {self.memory[size]:6.0f}",
                flush=True,
            )


def _spread(rounds: Sequence[Measured], smallest: Sequence[Measured], field: str) -> str:
    ratios = [getattr(a, field) / getattr(b, field) for a, b in zip(rounds, smallest, strict=True)]
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"


def _case(node: Node, paths: Sequence[str]) -> Case:
    assert node.url.port is not None
    return Case("encrypt", node.url.port, node.worker, paths[0], ASKED, more_paths=paths[1:])


def _path(node: Node) -> str:
    """The path of encrypting with a fresh key."""
    with node.client("health-operator") as operator:
        operator.headers["Idempotency-Key"] = uuid.uuid4().hex
        made = operator.post("/v1/keys", json={"spec": "AES_256", "tier": 2, "home": "eu-de-1"}).raise_for_status()
    return f"/v1/keys/{made.json()['id']}/encrypt"


def grown(what: str, sizes: Sequence[int], asked: argparse.Namespace) -> None:
    """Curves over nodes of these sizes: one key over and over, and where keys grow, another key with each request."""
    with contextlib.ExitStack() as stack:
        nodes: dict[str, Node] = {}
        for size in sizes:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            command = [sys.executable, "-m", "bench.growth", "make", what, str(size), str(place / "node")]
            subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
            nodes[f"{size:,}"] = stack.enter_context(running(place))
        _turns(what, "one key", {size: [[_path(node)]] for size, node in nodes.items()}, nodes, asked)
        if what == "keys":
            ids = {size: json.loads((node.directory / "keys.json").read_text()) for size, node in nodes.items()}
            for size, node in nodes.items():
                _used(node, ids[size][:IN_TURN])
            _turns(
                what,
                f"{IN_TURN} in turn",
                {size: [_paths(these[:IN_TURN])] for size, these in ids.items()},
                nodes,
                asked,
            )
            fresh = {size: these[IN_TURN:] for size, these in ids.items() if len(these) == IN_TURN + FRESH}
            each = FRESH // asked.rounds
            slices = {s: [_paths(t[n * each :][:each]) for n in range(asked.rounds)] for s, t in fresh.items()}
            _turns(what, "the first use of each", slices, nodes, asked)


def _turns(
    what: str, way: str, paths: Mapping[str, list[list[str]]], nodes: Mapping[str, Node], asked: argparse.Namespace
) -> None:
    """Ask nodes in turn; each has paths for every round, or those of a round of its own."""
    rounds: dict[str, list[Measured]] = {size: [] for size in paths}
    for turn in range(asked.rounds):
        for size, its in paths.items():
            case = _case(nodes[size], its[turn % len(its)])
            rounds[size].append(measure(case, nodes[size], asked.connections, seconds=asked.seconds))
    memory = {size: nodes[size].worker.memory_info().rss / 2**20 for size in paths}
    Curve(f"{what}, {way}, {asked.connections} connections", rounds, memory).show()


def _paths(keys: Sequence[str]) -> list[str]:
    return [f"/v1/keys/{key}/encrypt" for key in keys]


def _used(node: Node, keys: Sequence[str]) -> None:
    """Use each key once."""
    with node.client("health-eu-de-1") as workload:
        for at in range(0, len(keys), 300):
            items = [{"key": key, **ASKED} for key in keys[at : at + 300]]
            workload.post("/v1/batch/encrypt", json={"items": items}).raise_for_status()


def connected(counts: Sequence[int], asked: argparse.Namespace) -> None:
    """The curve over connections to one node."""
    with tempfile.TemporaryDirectory() as made, running(Path(made)) as node:
        case = _case(node, [_path(node)])
        rounds: dict[str, list[Measured]] = {f"{count}": [] for count in counts}
        memory: dict[str, float] = {}
        for _ in range(asked.rounds):
            for count in counts:
                rounds[f"{count}"].append(measure(case, node, count, seconds=asked.seconds))
                memory[f"{count}"] = node.worker.memory_info().rss / 2**20
        Curve("connections, one key", rounds, memory).show()


def main() -> int:
    """Print the curves."""
    if sys.argv[1:2] == ["make"]:
        make(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
        return 0
    wanted = argparse.ArgumentParser(description=__doc__)
    wanted.add_argument("--full", action="store_true")
    wanted.add_argument("--only", choices=[*MAKERS, "connections"])
    wanted.add_argument("--rounds", type=int, default=3)
    wanted.add_argument("--seconds", type=float, default=2.0)
    wanted.add_argument("--connections", type=int, default=16)
    asked = wanted.parse_args()
    sizes = {"keys": [1_000, 10_000], "tenants": [10, 100], "records": [10_000, 100_000]}
    if asked.full:
        for what, largest in (("keys", 100_000), ("tenants", 1_000), ("records", 1_000_000)):
            sizes[what].append(largest)
    for what, these in sizes.items():
        if asked.only in {None, what}:
            grown(what, these, asked)
    if asked.only in {None, "connections"}:
        connected([1, 4, 16, 64, 256], asked)
    return 0


if __name__ == "__main__":
    sys.exit(main())
