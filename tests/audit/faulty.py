"""Faults that are real: system calls that fail or hang, a connection cut at COMMIT, server processes that stop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from straced import straced


@contextlib.contextmanager
def injected(pid: int, calls: str, fault: str) -> Iterator[None]:
    """For the block, system calls of a process end as `fault` says (strace's `inject=`)."""
    with straced(pid, calls, "-e", f"inject={calls}:{fault}"):
        yield


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """SIGSTOP for the block."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Proxy:
    """A TCP port in front of a server's socket that can cut a connection exactly at COMMIT.

    `cuts` says how: `before` the server sees it, `after` it has answered, `while` it works on it. Afterwards so many
    connections as `refusals` says are cut at their first statement.
    """

    def __init__(self, target: Path) -> None:
        self._target = str(target)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cuts: list[str] = []
        self.refusals = 0
        self.done: list[str] = []
        self._open: list[socket.socket] = []
        self._muted: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._open:
            self._cut(one)
        for thread in self._threads:
            thread.join(5)

    def _start(self, act: object, *arguments: socket.socket) -> None:
        thread = threading.Thread(target=act, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._target)
            self._open += [client, server]
            self._start(self._forward, client, server)
            self._start(self._back, server, client)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                if self.refusals and not self.cuts and b"FOR UPDATE" in data:
                    self.refusals -= 1
                    self.done.append("refused")
                    break
                how = self.cuts.pop(0) if b"COMMIT\0" in data and self.cuts else ""
                if how:
                    self.done.append(how)  # first: once it is cut, the client comes again at once
                if how == "before":
                    break
                if how == "after":
                    self._muted.append(client)
                if how == "while":
                    self._cut(client)
                server.sendall(data)
                if how:
                    time.sleep(0.2 if how == "after" else 0)  # for the answer that is not passed on
                    break
        self._cut(client)
        self._cut(server)

    def _back(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if client not in self._muted:
                    client.sendall(data)
        self._cut(client)

    def _cut(self, one: socket.socket) -> None:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()
