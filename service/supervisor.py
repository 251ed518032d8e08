"""One or more worker processes over one listening socket: started fresh, restarted when they die, drained on SIGTERM.

A worker that has grown too large is replaced: some PKCS#11 modules leak with every key they unwrap (SoftHSM 2.6.1: 256
bytes), and only a fresh process gives that back.

Workers are new interpreters, not forks: a PKCS#11 module must not be inherited.
"""

from __future__ import annotations

import contextlib
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
from service.loglines import configure_logging
from service.notify import Manager
from service.seats import Seats, seats

log: Final = logging.getLogger("skms.supervisor")
BACKOFF_S: Final = (0.1, 0.5, 1.0, 2.0, 5.0)
STOP_S: Final = 25.0
HANG_S: Final = 10.0  # a worker that is not heard for so long does nothing any more


class _Process:
    """A worker process, and what is heard of it: that it serves, and from then on each second that it does not hang."""

    def __init__(self, seats: Seats, command: list[str], fd: int) -> None:
        self._hearing, telling = os.pipe()
        os.set_blocking(self._hearing, False)
        try:
            self.popen = seats.start([*command, "--ready-fd", str(telling)], [fd, telling])
        except BaseException:
            os.close(self._hearing)
            raise
        finally:
            os.close(telling)
        self.born = self._heard = time.monotonic()
        self.serves = False

    def hear(self) -> bool:
        """Whether it lives; from then on `serves` is known."""
        with contextlib.suppress(BlockingIOError):
            if os.read(self._hearing, 65_536):
                self.serves, self._heard = True, time.monotonic()
        return self.popen.poll() is None

    def hangs(self) -> bool:
        """Whether it served and is not heard any more."""
        return self.serves and time.monotonic() - self._heard > HANG_S

    def forget(self) -> None:
        """It has ended, or may end unheard."""
        os.close(self._hearing)


class _Worker:
    """One worker's place: who serves in it, who is about to, and how often workers died young there."""

    def __init__(self, command: list[str], fd: int, seats: Seats, *, memory: int) -> None:
        self._command, self._fd, self._seats, self._memory = command, fd, seats, memory
        self.process: _Process | None = None
        self._successor: _Process | None = None
        self._leaving: list[subprocess.Popen[bytes]] = []
        self._deaths, self._due = 0, 0.0

    def tend(self) -> None:
        """Start the worker if it is due; replace it if it has grown too large."""
        now = time.monotonic()
        self._leaving = [p for p in self._leaving if p.poll() is None]
        if self.process is not None:
            if self.process.hear():
                self._recycle(self.process)
                return
            self._deaths = 0 if now - self.process.born > 60 else self._deaths + 1
            self._due = now + BACKOFF_S[min(self._deaths, len(BACKOFF_S) - 1)]
            log.error("worker ended", extra={"facts": {"status": self.process.popen.returncode}})
            self.process.forget()
            self.process = None
        if now >= self._due:
            self.process = _Process(self._seats, self._command, self._fd)

    def serves(self) -> bool:
        """Whether a worker here takes requests."""
        return self.process is not None and self.process.serves

    def hangs(self) -> bool:
        """Whether the worker here does nothing any more."""
        return self.process is not None and self.process.hangs()

    def _recycle(self, process: _Process) -> None:
        """Hand over to a fresh process: the old one drains only after the new one serves."""
        successor = self._successor
        if successor is None:
            if self._memory and (used := resident(process.popen.pid)) > self._memory:
                log.warning("worker is replaced", extra={"facts": {"resident_mb": used >> 20}})
                self._successor = _Process(self._seats, self._command, self._fd)
        elif not successor.hear():  # it ended: the old one goes on, and a later round tries again
            successor.forget()
            self._successor = None
        elif successor.serves:
            process.popen.terminate()
            process.forget()
            self._leaving.append(process.popen)
            self.process, self._successor = successor, None

    def all(self) -> list[subprocess.Popen[bytes]]:
        """Every process that lives here."""
        return [*self._leaving, *(p.popen for p in (self.process, self._successor) if p is not None)]


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
    configure_logging(config.log.level)
    manager = Manager(os.environ)
    address = config.listen.host, config.listen.port
    with socket.create_server(address, backlog=2_048) as listener, seats(config.node.state_dir) as places:
        os.set_inheritable(listener.fileno(), True)
        command = [sys.executable, "-P", "-m", "service.cli.main", "serve", "--config", str(config_file)]
        command += ["--fd", str(listener.fileno()), "--among", str(workers)]
        memory = config.limits.worker_memory_mb << 20
        crew = [_Worker(command, listener.fileno(), places, memory=memory) for _ in range(workers)]
        while not stopping:
            places.clear()
            for worker in crew:
                worker.tend()
            if all(worker.serves() for worker in crew):
                manager.ready()
            if not any(worker.hangs() for worker in crew):
                manager.alive()
            time.sleep(0.05)
        manager.stopping()
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
