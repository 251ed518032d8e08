"""A real Chromium without a window, driven over its debugging pipe, with a virtual authenticator (CDP domain WebAuthn)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--remote-debugging-pipe",
)
_START = """import fcntl, os, sys
given = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]
for at, one in zip((3, 4), given): os.dup2(one, at)
os.execv(sys.argv[3], sys.argv[3:])
"""  # the browser reads from 3 and writes to 4


class Browser:
    """One page of it. `evaluate` runs JavaScript as if a person had just clicked."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest, self._number, self._session = to, back, b"", 0, ""
        self.log: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                piece = os.read(self._back, 65_536)
                assert piece, "the browser ended"
                self._rest += piece
            one, _, self._rest = self._rest.partition(b"\0")
            said = json.loads(one)
            if said.get("method") in {"Log.entryAdded", "Runtime.exceptionThrown"}:
                self.log.append(one.decode())
            if said.get("id") == self._number:
                assert "error" not in said, said
                return dict(said["result"])

    def authenticator(self, *, verified: bool = True) -> str:
        """A new one in this page's machine; its id."""
        self.call("WebAuthn.enable")
        options = {
            "protocol": "ctap2",
            "transport": "internal",
            "hasResidentKey": True,
            "hasUserVerification": True,
            "isUserVerified": verified,
            "automaticPresenceSimulation": True,
        }
        return str(self.call("WebAuthn.addVirtualAuthenticator", options=options)["authenticatorId"])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, text: str) -> Any:
        done = self.call("Runtime.evaluate", expression=text, userGesture=True, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, text: str, seconds: float = 15) -> Any:
        """Wait until an expression is true; its value."""
        end = time.monotonic() + seconds
        while not (found := self.evaluate(text)):
            assert time.monotonic() < end, (text, self.log, self.evaluate("document.body.innerText"))
            time.sleep(0.05)
        return found


@contextlib.contextmanager
def chromium(directory: Path) -> Iterator[Browser]:
    """A browser for the block, with a profile of its own."""
    its_in, to = os.pipe()
    back, its_out = os.pipe()
    with (directory / "chromium.log").open("ab") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, str(its_in), str(its_out), CHROMIUM, *_FLAGS,
             f"--user-data-dir={directory}/profile"],
            stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, pass_fds=(its_in, its_out), start_new_session=True,
        )  # fmt: skip
    os.close(its_in)
    os.close(its_out)
    try:
        yield Browser(to, back)
    finally:
        os.close(to)
        os.close(back)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
