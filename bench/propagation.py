"""How long it takes until the last worker obeys: a key disabled or enabled, a token revoked, a policy reloaded.

`make bench-propagation`: a node of WORKERS processes (default 4), one client connection to each; TRIALS times each (default
100). A trial ends when every worker has answered as it must from then on. The time is from the first byte of the change's
request, so the change itself is in it; the baseline is one request to one worker, in the same run.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import httpx

from harness import Files, prepared, start, stop, tls_of

WORKERS = int(os.environ.get("WORKERS", "4"))
TRIALS = int(os.environ.get("TRIALS", "100"))
LIMIT_S = 10.0
STOP = (
    '\n@id("health.bench") @layer("tenant") @code("BENCH") @disclose("code")\n'
    'forbid (principal, action == Action::"mac", resource in Tenant::"health");\n'
)


def client_of(files: Files, name: str | None) -> httpx.AsyncClient:
    """One connection, as one of the node's identities or as nobody."""
    limits = httpx.Limits(max_connections=1)
    return httpx.AsyncClient(base_url=files.url, verify=tls_of(files, name), timeout=30, limits=limits)


async def one_each(
    stack: AsyncExitStack, files: Files, name: str | None, headers: dict[str, str] | None = None
) -> list[httpx.AsyncClient]:
    """A connection to each worker: whose chain stands in the receipt."""
    found: dict[str, httpx.AsyncClient] = {}
    for _ in range(400):
        client = client_of(files, name)
        answer = await client.get("/v1/whoami", headers=headers)
        log = answer.headers["audit-receipt"].split('"')[1]
        if log in found:
            await client.aclose()
        else:
            found[log] = client
            stack.push_async_callback(client.aclose)
        if len(found) == WORKERS:
            return list(found.values())
    raise SystemExit(f"of {WORKERS} workers only {len(found)} took a connection")


async def until(
    clients: Sequence[httpx.AsyncClient], ask: Callable[[httpx.AsyncClient], Awaitable[bool]], what: str
) -> None:
    """Until every worker answers so."""

    async def one(client: httpx.AsyncClient) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not await ask(client):
            if time.monotonic() > deadline:
                raise SystemExit(f"{what}: a worker did not follow within {LIMIT_S:.0f} s")

    await asyncio.gather(*map(one, clients))


def rise(directory: Path, *, stopped: bool) -> None:
    """The next version of the bundle, with or without the rule that stops."""
    charter, rules = directory / "charter.yaml", directory / "tenants/health/00-roles.cedar"
    lines = charter.read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith('"version"'))
    lines[at] = f'"version": {int(lines[at].split(":")[1]) + 1}'
    charter.write_text("\n".join(lines) + "\n")
    rules.write_text(rules.read_text().replace(STOP, "") + (STOP if stopped else ""))


async def run(files: Files) -> None:
    """All trials, and the table."""
    took: dict[str, list[float]] = {}
    async with AsyncExitStack() as stack:
        operator, platform = [
            await stack.enter_async_context(client_of(files, who)) for who in ("health-operator", "platform")
        ]
        workers = await one_each(stack, files, "health-eu-de-1")

        async def made(spec: str) -> str:
            body = {"spec": spec, "tier": 2, "home": "eu-de-1"}
            answer = await operator.post("/v1/keys", json=body, headers={"Idempotency-Key": uuid.uuid4().hex})
            return str(answer.raise_for_status().json()["id"])

        key, mac = await made("AES_256"), await made("HMAC_256")

        async def encrypts(client: httpx.AsyncClient) -> bool:
            return (await client.post(f"/v1/keys/{key}/encrypt", json={"plaintext": "QUJD"})).status_code == 200

        async def macs(client: httpx.AsyncClient) -> bool:
            return (
                await client.post(f"/v1/keys/{mac}/mac", json={"message": "QUJD", "algorithm": "HMAC_SHA_256"})
            ).status_code == 200

        async def issued() -> tuple[str, dict[str, str]]:
            headers = {"Idempotency-Key": uuid.uuid4().hex}
            answer = await operator.post("/v1/tokens", json={"scopes": ["listKeys"]}, headers=headers)
            token = answer.raise_for_status().json()
            return token["id"], {"Authorization": f"Bearer {token['token']}"}

        bare = await one_each(stack, files, None, (await issued())[1])

        async def timed(
            name: str,
            change: Awaitable[httpx.Response],
            ask: Callable[..., Awaitable[bool]],
            at: Sequence[httpx.AsyncClient] = workers,
        ) -> None:
            begun = time.monotonic()
            (await change).raise_for_status()
            await until(at, ask, name)
            took.setdefault(name, []).append(time.monotonic() - begun)

        async def not_(ask: Callable[[httpx.AsyncClient], Awaitable[bool]], client: httpx.AsyncClient) -> bool:
            return not await ask(client)

        for number in range(TRIALS):
            begun = time.monotonic()
            await encrypts(workers[number % WORKERS])
            took.setdefault("an encryption", []).append(time.monotonic() - begun)
            path = f"/v1/keys/{key}"
            await timed("key disabled", operator.post(f"{path}/disable"), lambda c: not_(encrypts, c))
            seen = {"If-Match": (await operator.get(path)).headers["etag"]}
            await timed("key enabled", operator.post(f"{path}/enable", headers=seen), encrypts)
            token, bearer = await issued()

            async def lists(client: httpx.AsyncClient, bearer: dict[str, str] = bearer) -> bool:
                return (await client.get("/v1/keys", headers=bearer)).status_code == 200

            async def refused(client: httpx.AsyncClient, bearer: dict[str, str] = bearer) -> bool:
                return (await client.get("/v1/keys", headers=bearer)).status_code == 401

            await until(bare, lists, "token made")
            await timed("token revoked", operator.delete(f"/v1/tokens/{token}"), refused, bare)
            rise(files.config.policy.bundle, stopped=number % 2 == 0)
            changed = macs if number % 2 else lambda c: not_(macs, c)
            await timed("policy reloaded", platform.post("/v1/policy/reload"), changed)
    base = statistics.median(took["an encryption"])
    print(
        f"{TRIALS} trials, {WORKERS} workers\n\n| seconds | p50 | p99 | max | p50, of an encryption |\n|---|---|---|---|---|"
    )
    for name, values in took.items():
        values.sort()
        p50, p99 = statistics.median(values), values[min(len(values) - 1, int(len(values) * 0.99))]
        print(f"| {name} | {p50:.3f} | {p99:.3f} | {values[-1]:.3f} | {p50 / base:.0f} |")


def main() -> int:
    """Start a node, measure, stop it."""
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made) / "node"
        node = start(directory, "--workers", str(WORKERS))
        try:
            asyncio.run(run(prepared(directory)))
        finally:
            stop(node.process)
    return 0


if __name__ == "__main__":
    sys.exit(main())
