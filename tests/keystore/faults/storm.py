"""Encrypt and decrypt under a storm of faults and say what came of it: `python storm.py VENDOR DIRECTORY PAIRS`.

Eight threads use 40 keys through a cache of 20 while 0.4 % of the C calls answer one of eight error codes, and every
second the application is logged out, loses all its sessions, finds the module finalised, or for a moment its token gone.
Every result is checked against the same computation outside. There are PAIRS of them, and more until three such losses
have begun. The last line is a JSON object with the counts.
"""

from __future__ import annotations

import collections
import hmac
import itertools
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from lab import Known, Lab, open_lab, together

from keystore.hsm import HsmUnavailable, InvalidCiphertext, Material

THREADS, KEYS, RATE = 8, 40, 0.004
LOSSES = 3  # begun at least, however quick the machine: so two of them were done under load


class Storm:
    def __init__(self, lab: Lab, pairs: int) -> None:
        self.lab, self.pairs = lab, pairs
        self.results: collections.Counter[str] = collections.Counter()
        self.rogue: collections.Counter[str] = collections.Counter()
        self.seconds: list[float] = []
        self.count, self.lock, self.over = itertools.count(), threading.Lock(), threading.Event()
        self.keys = [lab.known(Material.AES_256 if n % 2 else Material.KDK_512) for n in range(KEYS)]

    def pair(self, key: Known) -> str:
        """One protect and one process operation, each compared with what it must be."""
        hsm, data = self.lab.hsm, os.urandom(64)
        if key.stored.material is Material.KDK_512:
            right = hmac.digest(key.value, data, "sha512")
            return (
                "ok"
                if hsm.hmac(key.stored, "sha512", data) == right == hsm.hmac(key.stored, "sha512", data)
                else "WRONG"
            )
        iv, sealed = hsm.gcm_seal(key.stored, b"aad", data)
        if (
            AESGCM(key.value).decrypt(iv, sealed, b"aad") != data
            or hsm.gcm_open(key.stored, iv, b"aad", sealed) != data
        ):
            return "WRONG"
        if random.random() < 0.02:
            try:
                hsm.gcm_open(key.stored, iv, b"aad", sealed[:-1] + bytes([sealed[-1] ^ 1]))
                return "FORGERY ACCEPTED"
            except InvalidCiphertext:
                self.results["forgeries refused"] += 1
        return "ok"

    def work(self) -> None:
        while next(self.count) < self.pairs or self.rogue.total() < LOSSES:
            begun = time.perf_counter()
            try:
                outcome = self.pair(random.choice(self.keys))
            except HsmUnavailable:
                outcome = "unavailable"
                time.sleep(0.05)
            except InvalidCiphertext:
                outcome = "FALSE 4xx"
            except Exception as error:
                outcome = f"EXCEPTION {type(error).__name__}: {error}"
            with self.lock:
                self.results[outcome] += 1
                self.seconds.append(time.perf_counter() - begun)

    def disturb(self) -> None:
        """Real loss, in turn."""
        acts = itertools.cycle(("log_out", "close_all_sessions", "finalize", "log_out", "close_all_sessions", "token"))
        while not self.over.wait(1.0):
            act = next(acts)
            self.rogue[act] += 1
            if act == "token":
                self.lab.remove_token()
                time.sleep(0.3)
                self.lab.restore_token()
            else:
                getattr(self.lab, act)()

    def run(self) -> dict[str, object]:
        self.lab.faults.rate = RATE
        rogue = threading.Thread(target=self.disturb)
        rogue.start()
        together([self.work] * THREADS)
        self.over.set()
        rogue.join()
        self.lab.faults.rate = 0.0
        deadline = time.monotonic() + 10
        while self.lab.hsm.state != "UP" and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        self.seconds.sort()
        status = self.lab.hsm.status()
        return {
            "results": dict(self.results),
            "injected": dict(self.lab.faults.made),
            "rogue": dict(self.rogue),
            "epochs": status.epoch,
            "sessions_open": status.sessions_open,
            "sessions_max": status.sessions_max,
            "p50_ms": round(self.seconds[len(self.seconds) // 2] * 1e3, 2),
            "p99_ms": round(self.seconds[int(len(self.seconds) * 0.99)] * 1e3, 1),
            "all_keys_fine": all(self.pair(k) == "ok" for k in self.keys),
        }


if __name__ == "__main__":
    print(json.dumps(Storm(open_lab(sys.argv[1], Path(sys.argv[2])), int(sys.argv[3])).run()), flush=True)
    os._exit(0)
