"""What the number of keys costs: time until a node is ready, a cold key, a warm key, memory.

`make bench-keys` (`PYTHONPATH=.:tests python -m bench.keys [KEYS]`) fills a development node with copies of one
key, 100,000 unless said otherwise, and compares it with itself when it held ten. Ratios are against the same run.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil

from harness import Files, lab_of, new_key, prepared
from keystore import Envelope, Purpose
from keystore.store import Keystore
from many import fill
from service.database import open_engine
from service.dev import prepare

SAMPLE = 400


def start(files: Files) -> float:
    """Seconds from the start of a fresh interpreter until the node is wired: what stands between exec and `ready`."""
    script = (
        "import asyncio, sys; from pathlib import Path; from service.config import load; from service.wiring import wire\n"
        "async def main():\n"
        "    async with wire(load(Path(sys.argv[1]))): print('ready', flush=True); await asyncio.sleep(0)\n"
        "asyncio.run(main())"
    )
    begun = time.perf_counter()
    command = [sys.executable, "-c", script, str(files.config_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        return time.perf_counter() - begun


def used(store: Keystore, ids: list[uuid.UUID]) -> list[float]:
    """Microseconds to find, seal and open with each key."""
    found = []
    for key_id in ids:
        begun = time.perf_counter()
        key = store.by_id(key_id)
        sealed = store.seal(key, b"x", {})
        store.open(key, Envelope.parse(sealed.ciphertext), {}, purpose=Purpose.ENCRYPT)
        found.append((time.perf_counter() - begun) * 1e6)
    return found


async def measure(count: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory) / "node", port=0)
        files = prepared(Path(directory) / "node")
        async with lab_of(files) as lab:
            name = await new_key(lab, "AES_256")
            store = lab.node.kms.keystore
            template, hsm = store.find("health", name), store._hsm("eu-de-1")
            engine = open_engine(files.config.database.url)
            few = await asyncio.to_thread(fill, engine, template, hsm, 10)
            warm_few = statistics.median([t for _ in range(40) for t in used(store, few)][10:])
        start_few = statistics.median(start(files) for _ in range(5))
        async with lab_of(files) as lab:
            store = lab.node.kms.keystore
            template, hsm = store.find("health", name), store._hsm("eu-de-1")
            many = await asyncio.to_thread(fill, engine, template, hsm, count)
        start_many = statistics.median(start(files) for _ in range(5))
        async with lab_of(files) as lab:
            store = lab.node.kms.keystore
            before = psutil.Process().memory_info().rss
            cold = statistics.median(used(store, many[:SAMPLE]))
            warm = statistics.median(used(store, many[:SAMPLE]))
            used(store, many[SAMPLE : 20 * SAMPLE])
            grown = psutil.Process().memory_info().rss - before
            begun = time.perf_counter()
            due = store.due_rotations(0)
            scan = time.perf_counter() - begun
        print(f"{'':34}{'10 keys':>12}{f'{count:,} keys':>16}{'ratio':>8}")
        print(f"{'start of a process to ready, s':34}{start_few:12.2f}{start_many:16.2f}{start_many / start_few:8.2f}")
        print(f"{'warm seal and open, us':34}{warm_few:12.0f}{warm:16.0f}{warm / warm_few:8.2f}")
        print(f"{'first seal and open, one commit, us':34}{'':12}{cold:16.0f}{cold / warm:8.2f} of warm")
        print(f"{f'memory after {20 * SAMPLE:,} keys used, MB':34}{'':12}{grown / 2**20:16.1f}")
        print(f"{'keys due for rotation (none), ms':34}{'':12}{scan * 1e3:16.0f}")
        assert not due


asyncio.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000))
