"""A load generator that costs little: one request over and over on kept TLS connections, in a process of its own.

`python -m bench.load SPEC.json` reads {"host", "port", "pid", "ca", "cert", "key", "method", "path", "body",
"connections", "seconds"}, perhaps "headers" and "more_paths" (asked in turn with the first), and prints {"done",
"seconds", "cpu_seconds" of the server's process, "latencies_ms": {"p50", "p99", "p99.9"}, "failed": {status: count}} as
JSON. It begins to measure when all its connections are made.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import uvloop

END = b"\r\n\r\n"
LENGTH = b"content-length:"
CHUNKED = b"transfer-encoding: chunked"
LAST = b"0\r\n\r\n"  # chunk: nothing is asked for before it, so it is the end of what has come


def whole(got: bytearray) -> tuple[int, bytes, bytes] | None:
    """(status, head in lower case, body) once an answer has come whole; it is taken out. A chunked body stays as it is."""
    end = got.find(END)
    if end < 0:
        return None
    head, body = bytes(got[:end]).lower(), bytes(got[end + len(END) :])
    at = head.find(LENGTH)
    if at >= 0:
        if len(body) < int(head[at + len(LENGTH) :].split(b"\r\n", 1)[0]):
            return None
    elif CHUNKED not in head:
        raise SystemExit(f"an answer of unknown length: {head.decode(errors='replace')}")
    elif not got.endswith(LAST):
        return None
    got.clear()
    return int(head[9:12]), head, body


class Connection(asyncio.Protocol):
    """One connection that asks again as soon as it has its answer."""

    def __init__(self, requests: Iterator[bytes], ended: asyncio.Future[None]) -> None:
        self._requests, self._until, self._ended = requests, 0.0, ended
        self._transport: asyncio.Transport | None = None
        self._got = bytearray()
        self._asked = 0.0
        self.latencies: list[float] = []
        self.statuses: Counter[int] = Counter()

    def connection_made(self, transport: Any) -> None:
        """It is there; it asks when all are."""
        self._transport = transport

    def begin(self, until: float) -> None:
        """Ask for the first time."""
        self._until = until
        self._ask()

    def _ask(self) -> None:
        assert self._transport is not None
        self._asked = time.perf_counter()
        self._transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        """Count a whole answer, and ask again."""
        self._got += data
        answer = whole(self._got)
        if answer is None:
            return
        now = time.perf_counter()
        self.latencies.append(now - self._asked)
        self.statuses[answer[0]] += 1
        if now >= self._until:
            assert self._transport is not None
            self._transport.close()
            if not self._ended.done():
                self._ended.set_result(None)
        else:
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        """The server closed: that ends this connection's part."""
        if not self._ended.done():
            self._ended.set_result(None)


def request(spec: dict[str, Any], path: str) -> bytes:
    """The bytes of one request."""
    body = spec["body"].encode()
    headers = {
        "Host": f"{spec['host']}:{spec['port']}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **spec.get("headers", {}),
    }
    lines = [f"{spec['method']} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + END + body


async def load(spec: dict[str, Any]) -> dict[str, Any]:
    """Ask for as long as the specification says."""
    tls = ssl.create_default_context(cafile=spec["ca"])
    tls.load_cert_chain(spec["cert"], spec["key"])
    requests = itertools.cycle([request(spec, path) for path in [spec["path"], *spec.get("more_paths", ())]])
    loop = asyncio.get_running_loop()
    made, ends = [], []
    for _ in range(spec["connections"]):
        ended: asyncio.Future[None] = loop.create_future()
        _, protocol = await loop.create_connection(
            lambda ended=ended: Connection(requests, ended),  # type: ignore[misc] # one for each
            spec["host"],
            spec["port"],
            ssl=tls,
        )
        made.append(protocol)
        ends.append(ended)
    server = psutil.Process(spec["pid"])
    used, began = sum(server.cpu_times()[:2]), time.perf_counter()
    for connection in made:  # the handshakes are over, and not measured
        connection.begin(began + spec["seconds"])
    await asyncio.gather(*ends)
    took, used = time.perf_counter() - began, sum(server.cpu_times()[:2]) - used
    latencies = sorted(one for c in made for one in c.latencies)
    statuses = sum((c.statuses for c in made), Counter())
    return {
        "done": statuses.pop(200, 0),
        "seconds": took,
        "cpu_seconds": used,
        "latencies_ms": {
            name: round(latencies[min(len(latencies) - 1, int(len(latencies) * share))] * 1e3, 2)
            for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))
        },
        "failed": statuses,
    }


if __name__ == "__main__":
    uvloop.install()
    print(json.dumps(asyncio.run(load(json.loads(Path(sys.argv[1]).read_text())))))
