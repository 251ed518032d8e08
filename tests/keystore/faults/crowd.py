"""64 threads on one token: `python crowd.py VENDOR DIRECTORY SECONDS`. The last line is a JSON object with the counts.

What is watched is below the product: which codes the C functions answer, and how many sessions are open at a time.
"""

from __future__ import annotations

import collections
import hmac
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lab import Faults, open_lab, together

from keystore.hsm import HsmUnavailable, Material

THREADS = 64


class Watched(Faults):
    """The C functions as they are, counted."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: collections.Counter[str] = collections.Counter()
        self.open = self.most = 0
        self.lock = threading.Lock()

    def wrap(self, functions: Mapping[str, Callable[..., int]]) -> Mapping[str, Callable[..., int]]:
        return {name: self.watched(name, function) for name, function in functions.items()}

    def watched(self, name: str, real: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            rv = real(*arguments)
            if rv:
                self.answers[f"{name} 0x{rv:x}"] += 1
            elif name in {"OpenSession", "CloseSession"}:
                with self.lock:
                    self.open += 1 if name == "OpenSession" else -1
                    self.most = max(self.most, self.open)
            return rv

        return call


def main(vendor: str, directory: Path, seconds: float) -> None:
    watched = Watched()
    lab = open_lab(vendor, directory, faults=watched)
    keys = [lab.known(Material.KDK_512) for _ in range(40)]
    results: collections.Counter[str] = collections.Counter()
    watched.answers.clear()
    watched.open = watched.most = lab.hsm.status().sessions_open
    until = time.monotonic() + seconds

    def work() -> None:
        mine: collections.Counter[str] = collections.Counter()
        while time.monotonic() < until:
            key, data = random.choice(keys), os.urandom(32)
            try:
                mine[
                    "ok"
                    if lab.hsm.hmac(key.stored, "sha512", data) == hmac.digest(key.value, data, "sha512")
                    else "WRONG"
                ] += 1
            except HsmUnavailable:
                mine["unavailable"] += 1
            if random.random() < 0.01:
                lab.hsm.forget(random.choice(keys).stored.object_id)
        with watched.lock:
            results.update(mine)

    together([work] * THREADS)
    status = lab.hsm.status()
    told = {"results": dict(results), "answers": dict(watched.answers), "most_sessions": watched.most}
    print(json.dumps({**told, "sessions_max": status.sessions_max, "epoch": status.epoch}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
