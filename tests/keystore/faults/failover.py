"""Two members of two vendors under load, one of them dies below the binding and comes back: `python failover.py DIRECTORY`.

From the moment it dies every C function of that module answers CKR_DEVICE_REMOVED. Its group goes on with the other one,
and takes it in again when it is back. Every result is compared. The last line is a JSON object.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lab import together

from keystore.group import HsmGroup
from keystore.hsm import HsmFault, HsmUnavailable, Material, StoredKey
from keystore.pkcs11 import open_token
from keystore.pkcs11.binding import Module
from service.config import load
from service.wiring import token_configs

THREADS, KEYS = 8, 24
UP_S, DOWN_S, BACK_S = 2.0, 4.0, 12.0


class Switch:
    """The C functions of one module, which may be switched off."""

    def __init__(self) -> None:
        self.dead = False

    def wrap(self, functions: Mapping[str, Callable[..., int]]) -> Mapping[str, Callable[..., int]]:
        return {name: functools.partial(self.call, function) for name, function in functions.items()}

    def call(self, real: Callable[..., int], *arguments: Any) -> int:
        return 0x32 if self.dead else real(*arguments)


def stored(group: HsmGroup, material: Material) -> StoredKey:
    object_id = uuid.uuid4()
    made = group.generate(material, object_id)
    binding = object_id.bytes + made.blob
    return StoredKey(object_id, material, made.blob, made.mechanism, made.kek, b"", binding, group.row_mac(binding))


def main(directory: Path) -> None:
    making = "import sys; from pathlib import Path; from service.dev import prepare; prepare(Path(sys.argv[1]), port=0, nss=True)"
    subprocess.run([sys.executable, "-c", making, str(directory)], check=True)
    switch = Switch()
    openers = {}
    for token in token_configs(load(directory / "skms.toml")):
        if token.vendor == "nss-test":
            os.environ.update(token.profile().environment)
            module = Module(str(token.module), reserved=token.reserved(), wrap=switch.wrap)
            openers[token.name] = functools.partial(open_token, token, module)
        else:
            openers[token.name] = functools.partial(open_token, token)
    group = HsmGroup("eu-de-1", openers)
    group.open()
    macs = {key: group.hmac(key, "sha512", b"x") for key in (stored(group, Material.KDK_512) for _ in range(KEYS))}
    boxes = {key: group.gcm_seal(key, b"a", b"data") for key in (stored(group, Material.AES_256) for _ in range(KEYS))}
    results: collections.Counter[str] = collections.Counter()
    errors, lock, over = list[float](), threading.Lock(), threading.Event()

    def once() -> bool:
        if random.random() < 0.5:
            key = random.choice(list(macs))
            return group.hmac(key, "sha512", b"x") == macs[key]
        key = random.choice(list(boxes))
        iv, sealed = group.gcm_seal(key, b"a", b"fresh")
        return (
            group.gcm_open(key, iv, b"a", sealed) == b"fresh"
            and group.gcm_open(key, boxes[key][0], b"a", boxes[key][1]) == b"data"
        )

    def work() -> None:
        while not over.is_set():
            try:
                outcome = "ok" if once() else "WRONG"
            except (HsmUnavailable, HsmFault):
                outcome = "error"
            with lock:
                results[outcome] += 1
                if outcome == "error":
                    errors.append(time.monotonic())

    def probe() -> None:
        """What a node's health task does."""
        while not over.wait(1.0):
            for name in group.out():
                with contextlib.suppress(HsmUnavailable, HsmFault):
                    group.probe(name)

    def disturb() -> None:
        time.sleep(UP_S)
        switch.dead = True
        time.sleep(DOWN_S)
        told["while_down"] = {m.name: m.state for m in group.members()}
        switch.dead = False
        back = time.monotonic()
        while group.usable() < 2 and time.monotonic() < back + BACK_S:
            time.sleep(0.02)
        told["back_after_s"] = round(time.monotonic() - back, 2)
        time.sleep(1.0)
        over.set()

    told: dict[str, Any] = {}
    together([*([work] * THREADS), probe, disturb])
    told["errors_for_s"] = round(max(errors) - min(errors), 2) if errors else 0.0
    told["calls"] = {m.name: m.calls for m in group.members()}
    print(json.dumps({"results": dict(results), **told, "usable": group.usable()}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
