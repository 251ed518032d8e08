"""What a service manager hears of a supervisor and its workers, over a real socket."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness import served, start
from service.notify import Manager


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "notify"))
        yield made


def heard(manager: socket.socket, wanted: str, *, seconds: float = 60) -> list[str]:
    """What is heard up to a message."""
    found, deadline = list[str](), time.monotonic() + seconds
    while wanted not in found:
        manager.settimeout(max(0.01, deadline - time.monotonic()))
        found.append(manager.recv(1_000).decode())
    return found


def silent(manager: socket.socket, seconds: float, *, within: float) -> None:
    """Wait until nothing is heard for some time."""
    deadline = time.monotonic() + within
    manager.settimeout(seconds)
    try:
        while time.monotonic() < deadline:
            manager.recv(1_000)
    except TimeoutError:
        return
    pytest.fail("it still says that nothing hangs")


def test_ready_watchdog_and_stopping(tmp_path: Path, manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "1500000")
    log = tmp_path / "node.log"
    with served(tmp_path / "node", "--workers", "2") as node:
        early = heard(manager, "READY=1")
        assert log.read_text().count('"event": "serving"') == 2
        assert set(early) <= {"WATCHDOG=1", "READY=1"}
        heard(manager, "WATCHDOG=1")
        workers = psutil.Process(node.process.pid).children()
        assert len(workers) == 2
        assert all("NOTIFY_SOCKET" not in worker.environ() for worker in workers)
        workers[1].suspend()
        silent(manager, 4, within=60)
        workers[1].resume()
        heard(manager, "WATCHDOG=1")
        os.kill(workers[0].pid, signal.SIGKILL)  # a worker that ends is started again: no reason to end the others
        deadline = time.monotonic() + 60
        while log.read_text().count('"event": "serving"') < 3:
            assert time.monotonic() < deadline, "no other worker came"
            heard(manager, "WATCHDOG=1")
        node.process.terminate()
        assert "READY=1" not in heard(manager, "STOPPING=1"), "told twice"
        assert node.process.wait(60) == 0


def test_it_is_not_ready_while_a_worker_cannot_serve(
    tmp_path: Path, manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path / "node"):
        pass
    (tmp_path / "node" / "pki" / "server.key").write_text("broken")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with pytest.raises(RuntimeError, match=r"server\.pem: cannot be used"):
        start(tmp_path / "node", timeout=8)
    told = list[str]()
    manager.setblocking(False)
    try:
        while True:
            told.append(manager.recv(1_000).decode())
    except BlockingIOError:
        pass
    assert told == ["STOPPING=1"]


def test_an_abstract_address_and_another_process_s_watchdog(tmp_path: Path) -> None:
    name = f"skms-{os.getpid()}-{tmp_path.name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind("\0" + name)
        made.settimeout(10)
        environment = {"NOTIFY_SOCKET": "@" + name, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1", "HOME": "/"}
        told = Manager(environment)
        assert environment == {"HOME": "/"}
        told.alive()  # meant for process 1
        told.ready()
        assert made.recv(100) == b"READY=1"
    told.stopping()  # nobody is there any more: that is no error


def test_a_manager_that_is_busy_or_away_hears_of_it_later(tmp_path: Path) -> None:
    at = tmp_path / "notify"
    told = Manager({"NOTIFY_SOCKET": str(at)})
    told.ready()  # nobody is there yet
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(at))
        made.setblocking(False)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, pytest.raises(BlockingIOError):
            other.setblocking(False)
            while True:
                other.sendto(b"noise", str(at))
        told.ready()  # its queue is full
        with pytest.raises(BlockingIOError):
            while True:
                assert made.recv(100) == b"noise"
        told.ready()
        assert made.recv(100) == b"READY=1"
        told.ready()
        with pytest.raises(BlockingIOError):
            made.recv(100)


def test_without_a_manager_nobody_is_told() -> None:
    before = psutil.Process().num_fds()
    told = Manager(environment := {"HOME": "/"})
    told.ready()
    told.alive()
    told.stopping()
    assert environment == {"HOME": "/"}
    assert psutil.Process().num_fds() == before
