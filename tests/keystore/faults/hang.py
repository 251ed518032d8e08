"""What a process does when a call into its module does not come back: `python hang.py DIRECTORY CASE`.

`hung` blocks one C_Sign for ever: others are answered meanwhile, and the process ends with 70 within its limit.
`slow` makes an RSA-4096 pair while the login is lost: the recovery waits for it, and nothing ends.
`stopped` is stopped by SIGSTOP inside a call for longer than the limit: that is not a hang.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from pathlib import Path

from lab import open_lab

from keystore.hsm import Material

LIMIT = 1.0


def main(directory: Path, case: str) -> None:
    lab = open_lab("softhsm2", directory, call_limit=lambda name: 60.0 if name == "GenerateKeyPair" else LIMIT)
    key = lab.known(Material.KDK_512)
    right = lab.hsm.hmac(key.stored, "sha512", b"x")
    inside = threading.Event()
    if case == "slow":
        thread = threading.Thread(target=lambda: lab.hsm.generate(Material.RSA_4096, uuid.uuid4()))
        thread.start()
        time.sleep(0.1)
        lab.hsm._sessions.recovery.report(lab.hsm._sessions, full=True)
        thread.join()
    elif case == "stopped":

        def pause() -> None:
            lab.faults.hooks.clear()
            print("stop me", flush=True)
            time.sleep(0.3)  # the parent stops the process in here

        lab.faults.hooks["Sign"] = pause
    else:

        def hang() -> None:
            if threading.current_thread().name == "stuck":
                inside.set()
                time.sleep(3_600)

        lab.faults.hooks["Sign"] = hang
        threading.Thread(target=lambda: lab.hsm.hmac(key.stored, "sha512", b"y"), name="stuck", daemon=True).start()
        inside.wait()
        for _ in range(50):  # a token that takes calls side by side answers the others
            assert lab.hsm.hmac(key.stored, "sha512", b"x") == right
        print("others answered", flush=True)
        time.sleep(30)
    assert lab.hsm.hmac(key.stored, "sha512", b"x") == right
    print("fine", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
