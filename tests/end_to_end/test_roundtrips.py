"""10,000 round trips of random sizes and contexts through the API and a real token (W1)."""

from __future__ import annotations

import base64
import random

import pytest

from harness import Lab, new_key

ROUND_TRIPS, BATCH = 10_000, 250


def _context(chooser: random.Random) -> dict[str, str]:
    letters = "abcdefghijklmnopqrstuvwxyzäöüßéøłđ日本語한국어🔑"
    return {
        "".join(chooser.choices(letters, k=chooser.randrange(1, 12))): "".join(
            chooser.choices(letters, k=chooser.randrange(0, 24))
        )
        for _ in range(chooser.randrange(0, 5))
    }


@pytest.mark.anyio
async def test_W1_ten_thousand_round_trips_open_and_a_changed_context_does_not(lab: Lab) -> None:
    key = await new_key(lab, "AES_256")
    workload = lab.client("health-eu-de-1")
    chooser = random.Random(1)
    for _ in range(ROUND_TRIPS // BATCH):
        # Sizes are log-uniform, so that a batch stays below the body limit and 64 KiB still occurs.
        sizes = [min(65_536, int(2 ** chooser.uniform(0, 13.5))) for _ in range(BATCH)]
        sizes[0] = 65_536
        items = [
            {
                "key": key,
                "plaintext": base64.b64encode(chooser.randbytes(n)).decode(),
                "context": _context(chooser),
            }
            for n in sizes
        ]
        sealed = (await workload.post("/v1/batch/encrypt", json={"items": items})).json()["results"]
        assert [r["status"] for r in sealed] == [200] * BATCH
        asked = [
            {
                "ciphertext": r["result"]["ciphertext"],
                "context": dict(reversed(item["context"].items())),
            }
            for r, item in zip(sealed, items, strict=True)
        ]
        opened = (await workload.post("/v1/batch/decrypt", json={"items": asked})).json()["results"]
        assert [r["result"]["plaintext"] for r in opened] == [i["plaintext"] for i in items]
        changed = [{**a, "context": {**a["context"], "x": "y"}} for a in asked]
        refused = (await workload.post("/v1/batch/decrypt", json={"items": changed})).json()["results"]
        assert {r["problem"]["code"] for r in refused} == {"invalid_ciphertext"}


@pytest.mark.anyio
async def test_every_changed_bit_of_a_ciphertext_fails_alike(lab: Lab) -> None:
    key = await new_key(lab, "AES_256")
    workload = lab.client("health-eu-de-1")
    answer = await workload.post(f"/v1/keys/{key}/encrypt", json={"plaintext": base64.b64encode(b"hello").decode()})
    text = answer.json()["ciphertext"].removeprefix("skms:v1:")
    envelope = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    bodies = set()
    for bit in range(len(envelope) * 8):
        bad = bytearray(envelope)
        bad[bit // 8] ^= 1 << bit % 8
        body = {"ciphertext": "skms:v1:" + base64.urlsafe_b64encode(bytes(bad)).rstrip(b"=").decode()}
        refused = await workload.post("/v1/decrypt", json=body)
        shown = refused.json()
        bodies.add((refused.status_code, *(shown[k] for k in ("type", "title", "code", "retryable", "executed"))))
        assert set(shown) == {
            *("type", "title", "status", "code", "retryable", "executed", "request_id", "decision_id")
        }
    assert len(bodies) == 1, bodies
    assert next(iter(bodies))[3] == "invalid_ciphertext"
