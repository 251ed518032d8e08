"""Telling the service manager how the node is (sd_notify(3)); without one, nobody is told."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final

_OURS: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Manager:
    """The service manager that started this process. Takes its variables away: workers have nothing to tell it."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        address, period, pid = (environment.pop(name, "") for name in _OURS)
        self._address = "\0" + address[1:] if address.startswith("@") else address
        meant = pid in {"", str(os.getpid())}
        self._period = int(period) / 3e6 if period.isdigit() and meant else 0.0  # thrice as often as it wants
        self._due = 0.0
        self._ready = False

    def ready(self) -> None:
        """Every worker serves: told once, and again until the manager has taken it."""
        if not self._ready:
            self._ready = self._tell("READY=1")

    def alive(self) -> None:
        """Nothing hangs: told as often as the manager wants to hear it."""
        if self._period and time.monotonic() >= self._due:
            self._due = time.monotonic() + self._period
            self._tell("WATCHDOG=1")

    def stopping(self) -> None:
        """Workers are told to drain."""
        self._tell("STOPPING=1")

    def _tell(self, state: str) -> bool:
        """Whether the manager, if there is one, has it. One that is away, or busy, is no reason to serve no more."""
        if self._address:
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                    sender.setblocking(False)
                    sender.sendto(state.encode(), self._address)
            except OSError:  # its queue is full (net.unix.max_dgram_qlen), or it starts again
                return False
        return True
