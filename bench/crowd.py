"""A load generator that does not wait: requests are due at a rate, whatever becomes of those before.

`python -m bench.crowd SPEC.json` reads what `bench.load` does and "rate", and prints {"done", "seconds", "due", "unsent",
"refused": {code: count}, "broken", "hung", "latencies_ms", "refusals_ms"} as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import uvloop

from bench.load import whole


class Sender(asyncio.Protocol):
    """One connection of an open loop: it sends when it is told to, and says when it is free."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd, self._transport, self._got = crowd, None, bytearray()
        self.due = 0.0  # when what it waits for was due

    def connection_made(self, transport: Any) -> None:
        """Free."""
        self._transport = transport
        self._crowd.free.append(self)

    def send(self, request: bytes, due: float) -> None:
        """Ask for what was due then."""
        assert self._transport is not None
        self.due = due
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Count a whole answer."""
        self._got += data
        answer = whole(self._got)
        if answer is None:
            return
        status, head, body = answer
        self._crowd.answered(self, status, body)
        if b"connection: close" not in head:
            self._crowd.free.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Another one takes its place; what it waited for will have no answer."""
        if self in self._crowd.free:
            self._crowd.free.remove(self)
        self._crowd.lost(self)


class Crowd:
    """An open loop: requests are due at a rate, whatever becomes of those before. Refused ones are not tried again.

    One that is due while every connection waits is counted as unsent: a client of so many connections has no way to ask.
    """

    def __init__(self, spec: dict[str, Any], request: bytes, tls: ssl.SSLContext) -> None:
        self._spec, self._request, self._tls = spec, request, tls
        self.free: list[Sender] = []
        self.due = self.unsent = self.broken = 0
        self.latencies: list[float] = []
        self.refusals: list[float] = []
        self.codes: Counter[str] = Counter()
        self._waiting: set[Sender] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._over = False

    def answered(self, sender: Sender, status: int, body: bytes) -> None:
        """An answer: its time counts from when the request was due."""
        self._waiting.discard(sender)
        took = time.perf_counter() - sender.due
        if status == 200:
            self.latencies.append(took)
            return
        self.refusals.append(took)
        try:
            problem = json.loads(body)
            self.codes[f"{status} {problem['code']}" if problem["status"] == status else "untyped"] += 1
        except (ValueError, KeyError):
            self.codes["untyped"] += 1

    def lost(self, sender: Sender) -> None:
        """A connection ended."""
        if sender in self._waiting:
            self._waiting.discard(sender)
            self.broken += 1
        if not self._over:
            task = asyncio.create_task(self._open())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self) -> None:
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().create_connection(
                lambda: Sender(self), self._spec["host"], self._spec["port"], ssl=self._tls
            )

    async def run(self) -> dict[str, Any]:
        """Send for as long as the specification says; then wait for what is under way."""
        for _ in range(self._spec["connections"]):
            await self._open()
        began, rate = time.perf_counter(), self._spec["rate"]
        while (now := time.perf_counter()) < began + self._spec["seconds"]:
            while self.due < (now - began) * rate:
                due = began + self.due / rate
                self.due += 1
                if not self.free:
                    self.unsent += 1
                    continue
                sender = self.free.pop()
                self._waiting.add(sender)
                sender.send(self._request, due)
            await asyncio.sleep(0.001)
        took, done = time.perf_counter() - began, len(self.latencies)
        for _ in range(1_500):  # fifteen seconds are more than any limit of the service
            if not self._waiting:
                break
            await asyncio.sleep(0.01)
        self._over = True
        return {
            "done": done,
            "seconds": took,
            "due": self.due,
            "unsent": self.unsent,
            "refused": dict(self.codes),
            "broken": self.broken,
            "hung": len(self._waiting),
            "latencies_ms": quantiles(self.latencies),
            "refusals_ms": quantiles(self.refusals),
        }


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds at p50, p99 and p99.9; empty of nothing."""
    ordered = sorted(seconds)
    shares = (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)) if ordered else ()
    return {name: round(ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1e3, 2) for name, share in shares}


async def load(spec: dict[str, Any]) -> dict[str, Any]:
    """Ask for as long as the specification says."""
    tls = ssl.create_default_context(cafile=spec["ca"])
    tls.load_cert_chain(spec["cert"], spec["key"])
    body = spec["body"].encode()
    request = (
        f"{spec['method']} {spec['path']} HTTP/1.1\r\nHost: {spec['host']}:{spec['port']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    return await Crowd(spec, request, tls).run()


if __name__ == "__main__":
    uvloop.install()
    print(json.dumps(asyncio.run(load(json.loads(Path(sys.argv[1]).read_text())))))
