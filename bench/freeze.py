"""How long a freeze takes to reach the last of several workers under load, and whether anything is released afterwards.

`make bench-freeze`: a node of WORKERS processes (default 4) serves RATE encryptions a second (default 500) of one key, and
an officer freezes that key; TRIALS times (default 100), each with a key of its own. A release is an answer 200 that comes
after the freeze was answered as contained. The baseline is the encryption itself, in the same run.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import httpx

from bench.workers import client_of, on_a_node, show
from harness import Files

WORKERS = int(os.environ.get("WORKERS", "4"))
RATE = int(os.environ.get("RATE", "500"))
TRIALS = int(os.environ.get("TRIALS", "100"))
CLIENTS = 20
BEFORE_S, AFTER_S = 0.3, 0.3


@dataclass(slots=True)
class Load:
    """What clients saw of one trial."""

    key: str
    sent: int = 0
    took: list[float] = field(default_factory=list)
    released: list[float] = field(default_factory=list)  # when each success was in the client's hands
    statuses: Counter[int] = field(default_factory=Counter)


async def use(client: httpx.AsyncClient, load: Load, going: asyncio.Event, at: float) -> None:
    """Encrypt at this client's share of the rate until it is over."""
    while going.is_set():
        at += CLIENTS / RATE
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        begun = time.monotonic()
        load.sent += 1
        answer = await client.post(f"/v1/keys/{load.key}/encrypt", json={"plaintext": "QUJD"})
        load.statuses[answer.status_code] += 1
        if answer.status_code == 200:
            load.took.append(time.monotonic() - begun)
            load.released.append(time.monotonic())


async def trial(officer: httpx.AsyncClient, users: Sequence[httpx.AsyncClient], load: Load) -> tuple[float, float, int]:
    """Seconds until the freeze was contained, by the officer's clock and by the service's, and releases afterwards."""
    going, now = asyncio.Event(), time.monotonic()
    going.set()
    async with asyncio.TaskGroup() as group:
        for number, client in enumerate(users):
            group.create_task(use(client, load, going, now + number / RATE))
        await asyncio.sleep(BEFORE_S)
        begun = time.monotonic()
        body = {"scope": {"kind": "key", "value": load.key}, "reason": {"code": "measured"}}
        answer = await officer.post("/v1/freezes", json=body, headers={"Idempotency-Key": uuid.uuid4().hex})
        contained = time.monotonic()
        answer.raise_for_status()
        told = answer.json()
        if told["contained_at"] is None:
            raise SystemExit(f"freeze {told['id']} was not contained in time")
        await asyncio.sleep(AFTER_S)
        going.clear()
    return contained - begun, told["seconds_to_contain"], sum(at > contained for at in load.released)


async def run(files: Files) -> None:
    """All trials, and the table."""
    loads, seen, told, late = list[Load](), list[float](), list[float](), 0
    async with AsyncExitStack() as stack:
        operator, officer = [
            await stack.enter_async_context(client_of(files, who)) for who in ("health-operator", "health-officer")
        ]
        users = [await stack.enter_async_context(client_of(files, "health-eu-de-1")) for _ in range(CLIENTS)]
        for number in range(TRIALS):
            body = {"spec": "AES_256", "tier": 2, "home": "eu-de-1"}
            made = await operator.post("/v1/keys", json=body, headers={"Idempotency-Key": f"freeze-{number}"})
            made.raise_for_status()
            loads.append(load := Load(made.json()["id"]))
            by_officer, by_service, released = await trial(officer, users, load)
            seen.append(by_officer)
            told.append(by_service)
            late += released
    took = [t for load in loads for t in load.took]
    statuses = sum((load.statuses for load in loads), Counter[int]())
    lasted = TRIALS * (BEFORE_S + AFTER_S) + sum(seen)
    print(
        f"{TRIALS} freezes, {WORKERS} workers, {sum(load.sent for load in loads) / lasted:.0f} requests/s "
        f"({', '.join(f'{n} x {status}' for status, n in sorted(statuses.items()))})\n"
    )
    rows = {"an encryption": took, "contained, as the service says": told, "contained, as the officer sees": seen}
    show(rows, base="an encryption")
    print(f"\nreleases after the freeze was answered as contained: {late}")


if __name__ == "__main__":
    on_a_node(run, workers=WORKERS)
