"""One or more worker processes over one listening socket: started fresh, restarted when they die, drained on SIGTERM.

A worker that has grown too large is replaced: some PKCS#11 modules leak with every key they unwrap (SoftHSM 2.6.1: 256
bytes), and only a fresh process gives that back.

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
from service.seats import Seats, seats

log: Final = logging.getLogger("skms.supervisor")
BACKOFF_S: Final = (0.1, 0.5, 1.0, 2.0, 5.0)
STOP_S: Final = 25.0


class _Worker:
    """One worker's place: who serves in it, who is about to, and how often workers died young there."""

    def __init__(self, command: list[str], fd: int, seats: Seats, *, memory: int) -> None:
        self._command, self._fd, self._seats, self._memory = command, fd, seats, memory
        self.process: subprocess.Popen[bytes] | None = None
        self._successor: tuple[subprocess.Popen[bytes], int] | None = None  # and where it says that it serves
        self._leaving: list[subprocess.Popen[bytes]] = []
        self._deaths, self._due, self._born = 0, 0.0, 0.0

    def tend(self) -> None:
        """Start the worker if it is due; replace it if it has grown too large."""
        now = time.monotonic()
        self._leaving = [p for p in self._leaving if p.poll() is None]
        if self.process is not None:
            if self.process.poll() is None:
                self._recycle()
                return
            self._deaths = 0 if now - self._born > 60 else self._deaths + 1
            self._due = now + BACKOFF_S[min(self._deaths, len(BACKOFF_S) - 1)]
            log.error("worker ended", extra={"facts": {"status": self.process.returncode}})
            self.process = None
        if now >= self._due:
            self._born = now
            self.process = self._seats.start(self._command, [self._fd])

    def _recycle(self) -> None:
        """Hand over to a fresh process: the old one drains only after the new one serves."""
        assert self.process is not None
        if self._successor is None:
            if self._memory and (used := resident(self.process.pid)) > self._memory:
                log.warning("worker is replaced", extra={"facts": {"resident_mb": used >> 20}})
                reading, writing = os.pipe()
                command = [*self._command, "--ready-fd", str(writing)]
                process = self._seats.start(command, [self._fd, writing])
                os.close(writing)
                os.set_blocking(reading, False)
                self._successor = process, reading
            return
        process, reading = self._successor
        try:
            ready = bool(os.read(reading, 1))
        except BlockingIOError:
            return
        os.close(reading)
        self._successor = None
        if ready:
            self.process.terminate()
            self._leaving.append(self.process)
            self.process, self._born = process, time.monotonic()
        else:  # it ended, or gave up, before it served: the old one goes on, and a later round tries again
            process.kill()
            process.wait()

    def all(self) -> list[subprocess.Popen[bytes]]:
        """Every process that lives here."""
        successor = [] if self._successor is None else [self._successor[0]]
        return [*self._leaving, *([] if self.process is None else [self.process]), *successor]


def resident(pid: int) -> int:
    """Resident memory of a process in bytes; 0 if it has just ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def supervise(config_file: Path, config: Config, *, workers: int) -> int:
    """Serve until SIGTERM or SIGINT; 0 when every worker drained, 1 when one had to be killed."""
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    address = config.listen.host, config.listen.port
    with socket.create_server(address, backlog=2_048) as listener, seats(config.node.state_dir) as places:
        os.set_inheritable(listener.fileno(), True)
        command = [sys.executable, "-m", "service.cli.main", "serve", "--config", str(config_file)]
        command += ["--fd", str(listener.fileno())]
        memory = config.limits.worker_memory_mb << 20
        crew = [_Worker(command, listener.fileno(), places, memory=memory) for _ in range(workers)]
        while not stopping:
            places.clear()
            for worker in crew:
                worker.tend()
            time.sleep(0.05)
        return _drain([p for w in crew for p in w.all()])


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
