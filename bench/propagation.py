"""How long it takes until the last worker obeys: a key disabled or enabled, a token revoked, a policy reloaded.

`make bench-propagation`: a node of WORKERS processes (default 4), one client connection to each; TRIALS times each (default
100). A trial ends when every worker has answered as it must from then on. The time is from the first byte of the change's
request, so the change itself is in it; the baseline is one request to one worker, in the same run.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx

from bench.workers import client_of, on_a_node, show
from harness import Files

WORKERS = int(os.environ.get("WORKERS", "4"))
TRIALS = int(os.environ.get("TRIALS", "100"))
LIMIT_S = 10.0
BASE = "an encryption"
STOP = (
    '\n@id("health.bench") @layer("tenant") @code("BENCH") @disclose("code")\n'
    'forbid (principal, action == Action::"mac", resource in Tenant::"health");\n'
)


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


async def until(clients: Sequence[httpx.AsyncClient], ask: httpx.Request, status: int, what: str) -> None:
    """Until every worker answers this request with this status: any other, a 503 too, is not yet what was wanted."""

    async def one(client: httpx.AsyncClient) -> None:
        deadline = time.monotonic() + LIMIT_S
        while (found := (await client.send(ask)).status_code) != status:
            if time.monotonic() > deadline:
                raise SystemExit(f"{what}: a worker still answers {found} after {LIMIT_S:.0f} s")

    await asyncio.gather(*map(one, clients))


def rise(directory: Path, *, stopped: bool) -> None:
    """The next version of the bundle, with or without the rule that stops."""
    charter, rules = directory / "charter.yaml", directory / "tenants/health/00-roles.cedar"
    lines = charter.read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith('"version"'))
    lines[at] = f'"version": {int(lines[at].split(":")[1]) + 1}'
    charter.write_text("\n".join(lines) + "\n")
    rules.write_text(rules.read_text().replace(STOP, "") + (STOP if stopped else ""))


class Trials:
    """The connections, and what took how long."""

    def __init__(self, operator: httpx.AsyncClient, platform: httpx.AsyncClient, bundle: Path) -> None:
        self.operator, self.platform, self._bundle = operator, platform, bundle
        self.workers: list[httpx.AsyncClient] = []  # one each, as a workload
        self.bare: list[httpx.AsyncClient] = []  # one each, without a certificate
        self.took: dict[str, list[float]] = {}

    async def post(self, path: str, **options: Any) -> dict[str, Any]:
        answer = await self.operator.post(path, headers={"Idempotency-Key": uuid.uuid4().hex}, **options)
        found: dict[str, Any] = answer.raise_for_status().json()
        return found

    async def token(self) -> tuple[str, dict[str, str]]:
        """(id, headers) of a fresh API token."""
        made = await self.post("/v1/tokens", json={"scopes": ["listKeys"]})
        return made["id"], {"Authorization": f"Bearer {made['token']}"}

    async def one(self, number: int, aes: str, mac: str) -> None:
        """One of each."""
        encrypt = self.workers[0].build_request("POST", f"/v1/keys/{aes}/encrypt", json={"plaintext": "QUJD"})
        message = {"message": "QUJD", "algorithm": "HMAC_SHA_256"}
        maced = self.workers[0].build_request("POST", f"/v1/keys/{mac}/mac", json=message)
        begun = time.monotonic()
        await self.workers[number % WORKERS].send(encrypt)
        self.took.setdefault(BASE, []).append(time.monotonic() - begun)
        path = f"/v1/keys/{aes}"
        await self._timed("key disabled", self.operator.post(f"{path}/disable"), encrypt, 409)
        seen = {"If-Match": (await self.operator.get(path)).headers["etag"]}
        await self._timed("key enabled", self.operator.post(f"{path}/enable", headers=seen), encrypt, 200)
        token, bearer = await self.token()
        keys = self.bare[0].build_request("GET", "/v1/keys", headers=bearer)
        await until(self.bare, keys, 200, "token made")
        await self._timed("token revoked", self.operator.delete(f"/v1/tokens/{token}"), keys, 401, at=self.bare)
        stopped = number % 2 == 0
        rise(self._bundle, stopped=stopped)
        await self._timed("policy reloaded", self.platform.post("/v1/policy/reload"), maced, 403 if stopped else 200)

    async def _timed(
        self,
        name: str,
        change: Awaitable[httpx.Response],
        ask: httpx.Request,
        status: int,
        *,
        at: Sequence[httpx.AsyncClient] = (),
    ) -> None:
        begun = time.monotonic()
        (await change).raise_for_status()
        await until(at or self.workers, ask, status, name)
        self.took.setdefault(name, []).append(time.monotonic() - begun)


async def run(files: Files) -> None:
    """All trials, and the table."""
    async with AsyncExitStack() as stack:
        people = [await stack.enter_async_context(client_of(files, who)) for who in ("health-operator", "platform")]
        trials = Trials(*people, files.config.policy.bundle)
        trials.workers = await one_each(stack, files, "health-eu-de-1")
        trials.bare = await one_each(stack, files, None, (await trials.token())[1])
        body = {"tier": 2, "home": "eu-de-1"}
        aes, mac = [(await trials.post("/v1/keys", json=body | {"spec": s}))["id"] for s in ("AES_256", "HMAC_256")]
        for number in range(TRIALS):
            await trials.one(number, aes, mac)
    print(f"{TRIALS} trials, {WORKERS} workers\n")
    show(trials.took, base=BASE)


if __name__ == "__main__":
    on_a_node(run, workers=WORKERS)
