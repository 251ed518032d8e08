"""One or more worker processes over one listening socket: started fresh, restarted when they die, drained on SIGTERM.

Workers are new interpreters, not forks: a PKCS#11 module must not be inherited.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from service.config import Config

log: Final = logging.getLogger("skms.supervisor")
BACKOFF_S: Final = (0.1, 0.5, 1.0, 2.0, 5.0)
STOP_S: Final = 25.0


class _Worker:
    """One worker and how often it died young."""

    def __init__(self, command: list[str], fd: int) -> None:
        self._command, self._fd = command, fd
        self.process: subprocess.Popen[bytes] | None = None
        self._deaths, self._due, self._born = 0, 0.0, 0.0

    def tend(self) -> None:
        """Start the worker if it is due."""
        now = time.monotonic()
        if self.process is not None:
            if self.process.poll() is None:
                return
            self._deaths = 0 if now - self._born > 60 else self._deaths + 1
            self._due = now + BACKOFF_S[min(self._deaths, len(BACKOFF_S) - 1)]
            log.error("worker ended", extra={"facts": {"status": self.process.returncode}})
            self.process = None
        if now >= self._due:
            self._born = now
            self.process = subprocess.Popen(self._command, pass_fds=(self._fd,))


def supervise(config_file: Path, config: Config, *, workers: int) -> int:
    """Serve until SIGTERM or SIGINT; 0 when every worker drained, 1 when one had to be killed."""
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    with socket.create_server((config.listen.host, config.listen.port), backlog=2_048) as listener:
        os.set_inheritable(listener.fileno(), True)
        command = [sys.executable, "-m", "service.cli.main", "serve", "--config", str(config_file)]
        command += ["--fd", str(listener.fileno())]
        crew = [_Worker(command, listener.fileno()) for _ in range(workers)]
        while not stopping:
            for worker in crew:
                worker.tend()
            time.sleep(0.05)
        return _drain([w.process for w in crew if w.process is not None])


def _drain(processes: list[subprocess.Popen[bytes]]) -> int:
    for process in processes:
        process.terminate()
    deadline, status = time.monotonic() + STOP_S, 0
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            status = 1
    return status
