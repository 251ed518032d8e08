"""A process without a free descriptor, as a flood of connections leaves it: `python descriptors.py VENDOR DIRECTORY`.

A module that opens files then says that keys are not there, or that the device failed, and SoftHSM2 does not look again later.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections import Counter
from pathlib import Path

from lab import open_lab

from keystore.hsm import HsmUnavailable, Material

LASTS_S, BACK_S = 2.0, 30.0


def main(vendor: str, directory: Path) -> None:
    lab = open_lab(vendor, directory)
    key = lab.known(Material.KDK_512)
    right, mac = lab.hsm.hmac(key.stored, "sha512", b"x"), lab.hsm.row_mac(b"row")
    told = Counter[str]()

    def once() -> bool:
        try:
            same = lab.hsm.row_mac(b"row") == mac and lab.hsm.hmac(key.stored, "sha512", b"x") == right
        except HsmUnavailable as error:
            told[type(error).__name__] += 1
            return False
        told["ok" if same else "WRONG"] += 1
        return same

    _, hard = kept = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    taken = list[int]()
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.dup(0))
    until = time.monotonic() + LASTS_S
    while time.monotonic() < until:
        once()
        time.sleep(0.005)
    during = dict(told)
    told.clear()
    resource.setrlimit(resource.RLIMIT_NOFILE, kept)
    for descriptor in taken:
        os.close(descriptor)
    begun = time.monotonic()
    while not once() and time.monotonic() - begun < BACK_S:
        time.sleep(0.02)
    back = time.monotonic() - begun
    fine = all(once() for _ in range(100))
    print(json.dumps({"during": during, "back_s": round(back, 2), "fine": fine, "wrong": told["WRONG"]}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
