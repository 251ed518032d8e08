"""One module's way back to work: its gate, its only recoverer, and the watchdog over its calls.

C_Initialize and C_Finalize belong to the module, so all tokens of a module share one gate. A caller that meets a lost
login or a sick device reports it and leaves the gate; the recoverer shuts the gate, waits until nobody is inside, logs
in again or re-initialises the module, and opens it. C_Finalize with a thread inside crashed SoftHSM 4 times of 4, and a
handle from before it is somebody else's key after it.

A call that hangs in the vendor's code blocks the whole module, C_Finalize too. Nothing in the process can mend that:
the watchdog ends the process with status 70, and the supervisor starts another.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from keystore.pkcs11.binding import Module
from keystore.pkcs11.errors import CkError

log: Final = logging.getLogger("skms.hsm")

HUNG_EXIT: Final = 70  # EX_SOFTWARE: for the supervisor
FIRST_BACKOFF_S: Final = 0.05
LAST_BACKOFF_S: Final = 5.0  # an HSM that is back is in use again within this time
WATCH_S: Final = 0.1
DRAIN_SLACK_S: Final = 5.0


@contextlib.contextmanager
def start_lock(path: Path | None) -> Iterator[None]:
    """Exclusive among all processes of the node, for C_Initialize and C_Login of modules that need it."""
    if path is None:
        yield
        return
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Recovering(Exception):
    """The gate is shut."""


class Gate:
    """Many callers inside, or one recoverer."""

    def __init__(self) -> None:
        self._changed, self._inside, self._shut = threading.Condition(), 0, False

    def __enter__(self) -> None:
        with self._changed:
            if self._shut:
                raise Recovering
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            if self._shut:
                self._changed.notify_all()

    def close(self, timeout: float) -> bool:
        """Let nobody in any more; whether everybody left within `timeout` seconds."""
        with self._changed:
            self._shut = True
            return self._changed.wait_for(lambda: self._inside == 0, timeout)

    def open(self) -> None:
        """Let callers in again."""
        with self._changed:
            self._shut = False
            self._changed.notify_all()

    def wait(self, timeout: float) -> None:
        """Wait until the gate is open, at most `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._shut, timeout)


class Token(Protocol):
    """What the recoverer needs of one token of its module."""

    label: str
    state: str

    def up(self, *, initialised: bool) -> None:
        """Log in anew and start the next epoch, or raise. `initialised`: the module was, just now.

        Called by the recoverer alone, with the gate shut.
        """

    def failed(self, error: Exception) -> None:
        """Take note that this token cannot be used: DOWN, or LOCKED if it refused its PIN."""


@dataclass(slots=True)
class _Need:
    """What one token waits for."""

    token: Token
    full: bool  # re-initialise the module; else a new login will do
    due: float
    failures: int = 0


class Recovery:
    """The recoverer of one module.

    `call_limit` gives the seconds after which a call to a function counts as hung; `lock` is the file that the node's
    processes lock round C_Initialize and C_Login, if the module needs that.
    """

    def __init__(
        self,
        module: Module,
        *,
        call_limit: Callable[[str], float],
        lock: Path | None = None,
        exit_process: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.module, self.gate, self.lock = module, Gate(), lock
        self._call_limit, self._exit, self._clock = call_limit, exit_process, clock
        self._changed, self._alone = threading.Condition(), threading.Lock()
        self._tokens: list[Token] = []
        self._needs: dict[int, _Need] = {}
        self._started = False
        self.hung: str | None = None  # the function that hangs, from the moment the watchdog saw it

    # ---- for tokens ----------------------------------------------------------------------------------------------

    def attach(self, token: Token) -> None:
        """Take a token under care: it is logged in again whenever the module is re-initialised."""
        with self._changed:
            self._tokens.append(token)
            if not self._started:
                self._started = True
                for name, work in (("recover", self._recover_for_ever), ("watch", self._watch_for_ever)):
                    threading.Thread(target=work, name=f"hsm-{name}", daemon=True).start()

    def detach(self, token: Token) -> None:
        """Forget a token."""
        with self._changed:
            self._tokens = [t for t in self._tokens if t is not token]
            self._needs.pop(id(token), None)

    def report(self, token: Token, *, full: bool) -> None:
        """Ask for a new login or, with `full`, for a re-initialisation. Returns at once."""
        with self._changed:
            need = self._needs.get(id(token))
            if need is None:
                self._needs[id(token)] = _Need(token, full, self._clock())
            else:
                need.full = need.full or full
            self._changed.notify_all()

    def await_change(self, done: Callable[[], bool], timeout: float) -> bool:
        """Wait until `done` holds, looked at after every recovery; whether it does."""
        with self._changed:
            return self._changed.wait_for(done, timeout)

    # ---- the recoverer -------------------------------------------------------------------------------------------

    def _recover_for_ever(self) -> None:
        while True:
            with self._changed:
                due = min((n.due for n in self._needs.values()), default=None)
                if due is None or due > self._clock():
                    self._changed.wait(None if due is None else max(0.001, due - self._clock()))
                    continue
                needs = [n for n in self._needs.values() if n.due <= self._clock()]
            try:
                self._recover(needs)
            except Exception:  # the recoverer must outlive whatever a vendor's module does
                log.exception("HSM recovery failed", extra={"facts": {"module": self.module.path}})
                with self._changed:
                    for need in needs:
                        need.due = self._clock() + LAST_BACKOFF_S

    def _recover(self, needs: list[_Need]) -> None:
        with self.exclusive(), start_lock(self.lock):
            self._up(needs)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Be alone in the module: the gate is shut and nobody is inside.

        A slow call (key generation) is waited for; one that hangs is the watchdog's, which ends the process.
        """
        slowest = max(self._call_limit(name) for name in ("GenerateKeyPair", "Login", "Sign"))
        with self._alone:
            if not self.gate.close(slowest + DRAIN_SLACK_S):
                self._die("a call that no limit covers")
            try:
                yield
            finally:
                self.gate.open()
                with self._changed:
                    self._changed.notify_all()

    def _up(self, needs: list[_Need]) -> None:
        """Bring the tokens back; with the gate shut and nobody inside."""
        with self._changed:
            tokens = list(self._tokens)
        full = any(n.full for n in needs)
        asked = {id(n.token): n for n in needs}
        if full:
            try:
                self.module.reinitialize()
            except CkError as error:
                for token in tokens:
                    self._settle(token, asked.get(id(token)), error, full=True)
                return
        for token in tokens if full else [n.token for n in needs]:
            if token.state == "LOCKED":
                self._settle(token, asked.get(id(token)), None, full=False)
                continue
            try:
                token.up(initialised=full)
            except Exception as error:  # a token that is not up again is down, whatever the reason
                # A token that is gone must not make its neighbours restart at each try: every other one logs in only.
                others = any(t.state == "UP" for t in tokens if t is not token)
                failures = asked[id(token)].failures if id(token) in asked else 0
                self._settle(token, asked.get(id(token)), error, full=not others or failures % 2 == 0)
            else:
                self._settle(token, asked.get(id(token)), None, full=False)

    def _settle(self, token: Token, need: _Need | None, error: Exception | None, *, full: bool) -> None:
        if error is not None:
            token.failed(error)
        with self._changed:
            if error is None or token.state == "LOCKED":
                self._needs.pop(id(token), None)
                return
            if need is None:
                need = _Need(token, full, 0.0)
            need.failures += 1
            need.full = full
            need.due = self._clock() + min(FIRST_BACKOFF_S * 2 ** min(need.failures - 1, 10), LAST_BACKOFF_S)
            if any(t is token for t in self._tokens):
                self._needs[id(token)] = need

    # ---- the watchdog --------------------------------------------------------------------------------------------

    def _watch_for_ever(self) -> None:
        """Count the time of each call by our own ticks: a process that was stopped (SIGSTOP) did not hang meanwhile."""
        seen: dict[tuple[str, float], float] = {}
        while self.hung is None:
            before = self._clock()
            time.sleep(WATCH_S)
            ticked = min(self._clock() - before, 2 * WATCH_S)
            seen = {call: seen.get(call, 0.0) + ticked for call in self.module.calls_inside()}
            for (name, _), inside in seen.items():
                if inside > self._call_limit(name):
                    self._die(f"C_{name}")

    def _die(self, what: str) -> None:
        self.hung = what
        log.critical(
            "an HSM call hangs; this process ends, the supervisor starts another",
            extra={"facts": {"module": self.module.path, "call": what, "status": HUNG_EXIT}},
        )
        self._exit(HUNG_EXIT)


_recoveries: dict[int, Recovery] = {}
_recoveries_lock = threading.Lock()


def recovery_of(module: Module, *, call_limit: Callable[[str], float], lock: Path | None) -> Recovery:
    """The one recoverer of a module in this process, made by the first of its tokens."""
    with _recoveries_lock:
        if id(module) not in _recoveries:
            _recoveries[id(module)] = Recovery(module, call_limit=call_limit, lock=lock)
        return _recoveries[id(module)]
