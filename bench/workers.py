"""What benches of several workers share: a node, one connection as an identity, the table of what took how long."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path

import httpx

from harness import Files, prepared, served, tls_of


def client_of(files: Files, name: str | None) -> httpx.AsyncClient:
    """One connection, as one of the node's identities or as nobody."""
    limits = httpx.Limits(max_connections=1)
    return httpx.AsyncClient(base_url=files.url, verify=tls_of(files, name), timeout=30, limits=limits)


def on_a_node(run: Callable[[Files], Coroutine[None, None, None]], *, workers: int) -> None:
    """Measure on a fresh development node of so many processes."""
    with tempfile.TemporaryDirectory() as made, served(Path(made) / "node", "--workers", str(workers)):
        asyncio.run(run(prepared(Path(made) / "node")))


def show(took: Mapping[str, list[float]], *, base: str) -> None:
    """A table of seconds; `base` names the row that the others are compared with."""
    unit = statistics.median(took[base])
    print(f"| seconds | p50 | p99 | max | p50, of {base} |\n|---|---|---|---|---|")
    for name, unordered in took.items():
        values = sorted(unordered)
        p50, p99 = statistics.median(values), values[min(len(values) - 1, int(len(values) * 0.99))]
        print(f"| {name} | {p50:.4f} | {p99:.4f} | {values[-1]:.4f} | {p50 / unit:.1f} |")
