"""A token behind `p11-kit server` that is killed, restarted or stopped: `python remote.py DIRECTORY killed|stopped`.

`killed`: server and connections are killed under load and started again at once, ten times, then once more with two
seconds between; this process goes on.
`stopped`: they are stopped by SIGSTOP under load; the calls inside hang, and this process must end with 70.
The last line is a JSON object. What p11-kit 0.24.1 can pass is HMAC, so HMACs of the row-MAC key are computed.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

from lab import together

import softhsm
from keystore.hsm import HsmUnavailable
from keystore.pkcs11 import Pkcs11Hsm, TokenConfig, recovery
from keystore.pkcs11.binding import Module
from keystore.pkcs11.token import connect

CLIENT = next(Path("/usr/lib").rglob("pkcs11/p11-kit-client.so"))
THREADS, DOWN_S, AT_ONCE = 8, 2.0, 10


def serve(directory: Path, tokens: softhsm.SoftHsm) -> subprocess.Popen[bytes]:
    socket = directory / "p11"
    socket.unlink(missing_ok=True)
    command = ["p11-kit", "server", "--foreground", "--name", str(socket), "--provider", str(tokens.module), "pkcs11:"]
    environment = {**os.environ, **tokens.environment}
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet, start_new_session=True)
    (directory / "server.pid").write_text(str(server.pid))
    while not socket.exists():
        time.sleep(0.005)
    return server


def main(directory: Path, case: str) -> None:
    tokens = softhsm.bring_up(directory / "softhsm", ["skms-remote"])
    local = TokenConfig(
        name="remote",
        region="eu-de-1",
        vendor="softhsm2",
        module=tokens.module,
        token_label="skms-remote",
        pin_file=tokens.pin_file("skms-remote"),
        lock_dir=directory / "locks",
        installation=uuid.UUID(int=12),
        environment=tokens.environment,
    )
    making = "import sys, pickle; from keystore.pkcs11 import initialise; initialise(pickle.load(sys.stdin.buffer))"
    subprocess.run([sys.executable, "-c", making], input=pickle.dumps(local), check=True)
    server = serve(directory, tokens)
    os.environ["P11_KIT_SERVER_ADDRESS"] = f"unix:path={directory / 'p11'}"
    client = Module(str(CLIENT))
    recovery.recovery_of(client, call_limit=lambda _: 3.0 if case == "stopped" else 15.0, lock=None)
    remote = dataclasses.replace(local, vendor="p11-kit", module=CLIENT)
    hsm = Pkcs11Hsm(remote, connect(remote, client))
    right = {n: hsm.row_mac(b"%d" % n) for n in range(50)}
    results: collections.Counter[str] = collections.Counter()
    count, over, successes = itertools.count(), threading.Event(), list[float]()

    def work() -> None:
        while not over.is_set():
            number = next(count) % 50
            try:
                results["ok" if hsm.row_mac(b"%d" % number) == right[number] else "WRONG"] += 1
                successes.append(time.monotonic())
            except HsmUnavailable:
                results["unavailable"] += 1
                time.sleep(0.05)
            except Exception as error:
                results[f"EXCEPTION {type(error).__name__}"] += 1

    def killed_for(running: subprocess.Popen[bytes], down_s: float) -> tuple[subprocess.Popen[bytes], float]:
        """The next server, and when it came; returns when calls succeed again."""
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        time.sleep(down_s)
        following, back = serve(directory, tokens), time.monotonic()
        while not [s for s in successes[-50:] if s > back] and time.monotonic() < back + 30:
            time.sleep(0.01)
        return following, back

    def disturb() -> None:
        time.sleep(1.0)
        running = server
        if case == "stopped":
            os.killpg(running.pid, signal.SIGSTOP)
            time.sleep(30)
        for _ in range(AT_ONCE):  # each may cut an answer between its header and its body
            running, _ = killed_for(running, 0.0)
        _, back = killed_for(running, DOWN_S)
        told["back_after_s"] = round(min(s for s in successes if s > back) - back, 2)
        time.sleep(1.0)
        over.set()
        told["after"] = len([s for s in successes if s > back])

    told: dict[str, float] = {}
    together([*([work] * THREADS), disturb])
    print(json.dumps({"results": dict(results), **told, "state": hsm.state}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
