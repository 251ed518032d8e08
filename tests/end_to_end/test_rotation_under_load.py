"""20 rotations under 200 requests a second: no error, and every version opens (O1)."""

from __future__ import annotations

import asyncio
import base64
import time

import pytest

from harness import Served

RATE, ROTATIONS, IN_FLIGHT = 200, 20, 32


@pytest.mark.anyio
async def test_O1_rotating_under_load_fails_nothing_and_every_version_opens(node: Served) -> None:
    async with node.async_client("health-operator") as operator, node.async_client("health-eu-de-1") as workload:
        body = {"spec": "AES_256", "tier": 2, "home": "eu-de-1"}
        made = await operator.post("/v1/keys", json=body, headers={"Idempotency-Key": "rotation-load"})
        path = f"/v1/keys/{made.json()['id']}"
        results: list[tuple[str, int, bytes]] = []
        failures: list[str] = []
        done = asyncio.Event()

        async def one(number: int) -> None:
            data = b"row %d" % number
            answer = await workload.post(f"{path}/encrypt", json={"plaintext": base64.b64encode(data).decode()})
            if answer.status_code != 200:
                failures.append(answer.text)
                return
            shown = answer.json()
            results.append((shown["ciphertext"], shown["key_version"], data))

        sent = 0

        async def load() -> None:
            nonlocal sent
            begun = time.monotonic()
            tasks: set[asyncio.Task[None]] = set()
            while not done.is_set():
                due = int((time.monotonic() - begun) * RATE)
                # A client that falls behind on a busy machine must not drown itself: what is due is sent as places free up.
                due = min(due, sent + IN_FLIGHT - len(tasks))
                for number in range(sent, due):
                    task = asyncio.create_task(one(number))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                sent = max(sent, due)
                await asyncio.sleep(0.005)
            await asyncio.gather(*tasks)

        loading = asyncio.create_task(load())
        for rotation in range(ROTATIONS):
            enough = sent + RATE * 0.2 * 0.5
            await asyncio.sleep(0.2)
            while sent < enough and not failures and not loading.done():  # a busy machine takes longer for as much load
                await asyncio.sleep(0.01)
            answer = await operator.post(f"{path}/rotate", headers={"Idempotency-Key": f"rotation-{rotation}"})
            assert answer.status_code == 200, answer.text
        await asyncio.sleep(0.2)
        done.set()
        await loading
        assert not failures, failures[:3]
        assert sent >= RATE * ROTATIONS * 0.2 * 0.5, "the load did not load"
        assert {version for _, version, _ in results} >= set(range(2, ROTATIONS + 1))
        newest = [version for _, version, _ in results]
        assert max(newest) == ROTATIONS + 1
        for at in range(0, len(results), 500):
            part = results[at : at + 500]
            opened = await workload.post("/v1/batch/decrypt", json={"items": [{"ciphertext": c} for c, _, _ in part]})
            for (_, version, data), shown in zip(part, opened.json()["results"], strict=True):
                assert shown["status"] == 200, shown
                assert base64.b64decode(shown["result"]["plaintext"]) == data
                assert shown["result"]["key_version"] == version
