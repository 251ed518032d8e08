"""Where a worker's processor time goes: shares of functions with all they call, of one request over and over.

`python -m bench.shares [encrypt | batch]` wires a development node in this process, loads it from another one, and looks at
the stack of its event loop each 2 ms of processor time. C functions count as the Python function that called them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, Final

import uvloop

from bench.encrypt import CONTEXT, PLAIN, ROOT
from harness import Lab, lab_of, new_key, prepared
from service.dev import prepare
from service.server import server_of

EVERY_S: Final = 0.002
WARM_S, SECONDS = 2.5, 8.0
SHOWN: Final = 60
ONE: Final = {"plaintext": PLAIN, "context": CONTEXT}


class Sampler:
    """Counts, while it is on, in which functions the main thread is."""

    def __init__(self) -> None:
        self.samples, self.on = 0, False
        self.inside: Counter[str] = Counter()

    def __call__(self, _: int, frame: FrameType | None) -> None:
        """Take one sample: the handler of SIGPROF."""
        if not self.on:
            return
        self.samples += 1
        names = set()
        while frame is not None:
            names.add(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_qualname}")
            frame = frame.f_back
        self.inside.update(names)


def _request(what: str, key: str) -> dict[str, Any]:
    if what == "batch":
        return {
            "path": "/v1/batch/encrypt",
            "body": json.dumps({"items": [{"key": key, **ONE}] * 500}),
            "connections": 8,
        }
    return {"path": f"/v1/keys/{key}/encrypt", "body": json.dumps(ONE), "connections": 64}


async def _loaded(lab: Lab, what: str, port: int, sampler: Sampler) -> tuple[float, float]:
    """Processor seconds of this thread and of the process while the sampler was on."""
    who, spec = lab.files.identities["health-eu-de-1"], lab.files.directory / "load.json"
    asked = {"host": "127.0.0.1", "port": port, "pid": os.getpid(), "method": "POST", "seconds": WARM_S + SECONDS + 1}
    files = {"ca": lab.files.environment["ca_file"], "cert": str(who.cert_file), "key": str(who.key_file)}
    spec.write_text(json.dumps({**asked, **files, **_request(what, await new_key(lab, "AES_256"))}))
    command = (sys.executable, "-m", "bench.load", str(spec))
    client = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    await asyncio.sleep(WARM_S)
    began, sampler.on = (time.thread_time(), time.process_time()), True
    await asyncio.sleep(SECONDS)
    sampler.on = False
    used = time.thread_time() - began[0], time.process_time() - began[1]
    out, _ = await client.communicate()
    if client.returncode or json.loads(out)["failed"]:
        raise SystemExit(f"the load failed: {out.decode()}")
    return used


async def _served(directory: Path, what: str, sampler: Sampler) -> tuple[float, float]:
    prepare(directory, port=0)
    async with lab_of(prepared(directory)) as lab:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = server_of(lab.node.app, host="127.0.0.1", port=0, context=lab.node.tls.context)
            gc.collect()
            gc.freeze()
            serving = asyncio.create_task(server.serve([listening]))
            try:
                return await _loaded(lab, what, listening.getsockname()[1], sampler)
            finally:
                server.should_exit = True
                with contextlib.suppress(asyncio.CancelledError):
                    await serving


def main() -> int:
    """Sample and print."""
    what, sampler = (sys.argv[1:] or ["encrypt"])[0], Sampler()
    with tempfile.TemporaryDirectory() as made, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        signal.signal(signal.SIGPROF, sampler)
        signal.setitimer(signal.ITIMER_PROF, EVERY_S, EVERY_S)
        thread, process = runner.run(_served(Path(made) / "node", what, sampler))
        signal.setitimer(signal.ITIMER_PROF, 0)
    print(
        f"{what}: {sampler.samples} samples; the event loop's thread took {thread / process:.0%} of the process's time"
    )
    for name, count in sampler.inside.most_common(SHOWN):
        print(f"{count / sampler.samples:6.1%} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
