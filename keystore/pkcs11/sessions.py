"""Sessions, login, cached handles and recovery of one token.

One *home* session logs in, owns every unwrapped key and is never lent; work runs on a pool of sessions opened without a
PIN. Nobody calls C_Logout. Every handle belongs to an *epoch*: a new login or initialisation starts the next one and
empties all caches, because the numbers start again and an old one would be another tenant's key. A cached key is pinned
while it is used; its last user destroys it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from keystore.hsm import HsmFault, HsmUnavailable, InvalidCiphertext
from keystore.pkcs11.binding import USER_STATES, Module, Session
from keystore.pkcs11.errors import CkError, Fault, classify

T = TypeVar("T")

POOL_WAIT_S: Final = 2.0
DRAIN_S: Final = 15.0  # RSA-4096 generation took 4.8 s at worst; a shorter drain would kill healthy processes
CACHE_KEYS: Final = 512
CACHE_TTL_S: Final = 900.0
HUNG_EXIT: Final = 70  # for the supervisor: a call hangs in the vendor's code


class _Stopped(Exception):
    """One attempt failed: in which class, and why."""

    def __init__(self, fault: Fault, error: CkError | None) -> None:
        super().__init__(str(error))
        self.fault, self.error = fault, error


class _Recovering(Exception):
    """The gate is shut."""


class Gate:
    """Many callers inside, or one recoverer."""

    def __init__(self) -> None:
        self._changed, self._inside, self._shut = threading.Condition(), 0, False

    def __enter__(self) -> None:
        with self._changed:
            if self._shut:
                raise _Recovering
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def close(self, timeout: float) -> bool:
        """Let nobody in any more; whether everybody left in time."""
        with self._changed:
            self._shut = True
            return self._changed.wait_for(lambda: self._inside == 0, timeout)

    def open(self) -> None:
        """Let callers in again."""
        with self._changed:
            self._shut = False


@dataclass(slots=True)
class Pinned:
    """An unwrapped key in the cache."""

    handle: int
    epoch: int
    expires: float
    users: int = 1
    dead: bool = False


@dataclass(frozen=True, slots=True)
class Unwrap:
    """How to get a key into the token: called with the home session, at most once per cache miss."""

    name: bytes
    load: Callable[[Session], int]


@contextlib.contextmanager
def start_lock(path: Path | None) -> Iterator[None]:
    """Exclusive among all processes of the node, for C_Initialize and C_Login of modules that need it."""
    if path is None:
        yield
        return
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class TokenSessions:
    """The sessions of one token in this process. States: DOWN -> UP; UP -> DOWN, LOCKED, or process exit."""

    def __init__(
        self,
        module: Module,
        *,
        label: str,
        serial: str | None,
        pin: Callable[[], bytes],
        size: int,
        read_only: bool,
        lock: Path | None,
        cache: int = CACHE_KEYS,
        exit_process: Callable[[int], object] = os._exit,
    ) -> None:
        self.module, self._label, self._serial, self._pin = module, label, serial, pin
        self.size, self._read_only, self._lock_path, self._cache_size = size, read_only, lock, cache
        self._exit = exit_process
        self.state, self.epoch = "DOWN", 0
        self.firmware, self.serial = "", ""
        self._gate, self._lock, self._maintenance = Gate(), threading.RLock(), threading.Lock()
        self._retry_at, self._backoff = 0.0, 0.05
        self._idle: list[Session] = []
        self._opened = 0
        self._slots = threading.BoundedSemaphore(size)
        self._cache: OrderedDict[bytes, Pinned] = OrderedDict()
        self._tokens: dict[bytes, int] = {}

    # ---- life --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Find the token and log in; HsmUnavailable with the reason otherwise. A wrong PIN is tried exactly once."""
        try:
            with start_lock(self._lock_path):
                self._up([])
        except CkError as error:
            self.state = "LOCKED" if classify(error) is Fault.PIN else "DOWN"
            raise self._unusable(error) from error

    def _unusable(self, error: CkError) -> HsmUnavailable:
        if self.state == "LOCKED":
            return HsmUnavailable(
                f"token {self._label!r} refused its PIN ({error.name}); not tried again: check the PIN file, then restart"
            )
        return HsmUnavailable(f"token {self._label!r} cannot be used: {error}")

    def _up(self, old: list[Session]) -> None:
        """Log in; only with the gate shut, or before the first caller."""
        slot, token = self.module.find_slot(self._label, self._serial)
        self.slot = slot
        self.serial = token.serial.decode("ascii", "replace").strip()
        self.firmware = ".".join(str(n) for n in token.firmware_version)
        home = self.module.open(slot, write=True)
        try:
            home.login(self._pin())
        except CkError:
            home.close()
            raise
        self.home = home
        self.epoch += 1  # from here on no number obtained earlier may be used
        self._idle, self._opened = [], 0
        self._tokens, self._cache = {}, OrderedDict()
        self._slots = threading.BoundedSemaphore(self.size)
        self.state, self._backoff = "UP", 0.05
        for session in old:  # after the new login: the application never has zero sessions
            if session.handle != home.handle:
                session.close()

    def _recover(self, seen: int, *, full: bool) -> None:
        """Log in again, or re-initialise the module; HsmUnavailable if that fails or somebody else is at it."""
        if not self._maintenance.acquire(blocking=False):
            raise HsmUnavailable("the HSM connection is being recovered")
        try:
            if self.epoch != seen and self.state == "UP":
                return
            if time.monotonic() < self._retry_at:
                raise HsmUnavailable("the HSM connection is down; the next attempt follows shortly")
            if not self._gate.close(DRAIN_S):
                self._exit(HUNG_EXIT)  # a call hangs in the vendor's code, and C_Finalize would hang behind it
            with start_lock(self._lock_path):
                if full:
                    self.state = "DOWN"
                    self.module.reinitialize()
                # Numbers start again after C_Finalize: a session from before must never be closed.
                self._up([] if full else [self.home, *self._idle])
        except CkError as error:
            self.state = "LOCKED" if classify(error) is Fault.PIN else "DOWN"
            self._retry_at, self._backoff = time.monotonic() + self._backoff, min(self._backoff * 2, 30.0)
            raise self._unusable(error) from error
        finally:
            self._gate.open()
            self._maintenance.release()

    def close(self) -> None:
        """Close the pool. Never C_Logout; the module ends with the process."""
        with self._lock:
            for session in self._idle:
                session.close()
            self._idle = []

    # ---- sessions and handles ------------------------------------------------------------------------------------

    def _borrow(self) -> Session:
        if not self._slots.acquire(timeout=POOL_WAIT_S):
            raise HsmUnavailable("all HSM sessions are busy")
        try:
            with self._lock:
                if self._idle:
                    return self._idle.pop()
            made = self.module.open(self.slot, write=not self._read_only)
            with self._lock:
                self._opened += 1
            return made
        except CkError as error:
            self._slots.release()
            fault = classify(error)
            raise _Stopped(Fault.DEVICE if fault is Fault.CALLER else fault, error) from error

    def _give(self, session: Session, *, reusable: bool) -> None:
        with self._lock:
            if reusable:
                self._idle.append(session)
            else:
                session.close()
                self._opened -= 1
        self._slots.release()

    def token_object(self, name: bytes, find: Callable[[Session], int]) -> int:
        """The handle of a token object, looked up once per epoch."""
        with self._lock:
            if name not in self._tokens:
                self._tokens[name] = find(self.home)
            return self._tokens[name]

    def logged_in(self) -> bool:
        """Whether the home session still is: a search while logged out answers CKR_OK and finds nothing."""
        with self._lock:
            return self.home.state() in USER_STATES

    def _pin_key(self, key: Unwrap) -> Pinned:
        now = time.monotonic()
        with self._lock:
            entry = self._cache.get(key.name)
            if entry is not None and entry.expires > now:
                self._cache.move_to_end(key.name)
                entry.users += 1
                return entry
            if entry is not None:
                self._drop(key.name)
            entry = Pinned(key.load(self.home), self.epoch, now + CACHE_TTL_S)
            self._cache[key.name] = entry
            if len(self._cache) > self._cache_size:
                self._drop(next(iter(self._cache)))
            return entry

    def _drop(self, name: bytes) -> None:
        entry = self._cache.pop(name, None)
        if entry is not None:
            entry.dead = True
            self._destroy_unused(entry)

    def _release(self, entry: Pinned) -> None:
        with self._lock:
            entry.users -= 1
            self._destroy_unused(entry)

    def _destroy_unused(self, entry: Pinned) -> None:
        if entry.dead and entry.users <= 0 and entry.epoch == self.epoch:
            self.module.quietly("DestroyObject", self.home.handle, entry.handle)

    def forget(self, name: bytes) -> None:
        """Drop a key from the cache at once; a running user finishes and then destroys it."""
        with contextlib.suppress(_Recovering), self._gate, self._lock:
            self._drop(name)

    @property
    def cached(self) -> int:
        """Keys in the cache."""
        return len(self._cache)

    @property
    def opened(self) -> int:
        """Sessions of the pool that are open."""
        return self._opened

    # ---- running -------------------------------------------------------------------------------------------------

    def run(
        self,
        act: Callable[[Session, int], T],
        *,
        key: Unwrap | None = None,
        judges_input: bool = False,
        attempts: int = 3,
    ) -> T:
        """Run `act` with a pool session and the key's handle (0 without a key); it may run again.

        `judges_input` says that a refusal may be the caller's fault: then it is InvalidCiphertext. On our own keys and
        digests it never is: HsmFault. Anything temporary is HsmUnavailable.
        """
        suspected, last = False, "the HSM connection is being recovered"
        for _ in range(attempts):
            if self.state == "LOCKED":
                raise HsmUnavailable(f"token {self._label!r} is locked: check its PIN, then restart")
            seen = self.epoch
            if self.state == "DOWN":
                self._recover(seen, full=True)
            try:
                with self._gate:
                    seen = self.epoch
                    return self._once(act, key, judges_input=judges_input, suspected=suspected)
            except _Recovering:
                time.sleep(0.02)
                continue
            except _Stopped as stopped:
                fault, last = stopped.fault, str(stopped.error)
                error = stopped.error
            match fault:
                case Fault.CALLER if judges_input:
                    raise InvalidCiphertext
                case Fault.CALLER:
                    raise HsmFault(error.name if error is not None else "CKR_GENERAL_ERROR")
                case Fault.PIN:
                    self.state = "LOCKED"
                    raise HsmUnavailable(f"token {self._label!r} is locked: check its PIN, then restart")
                case Fault.AMBIGUOUS:
                    suspected = True
                case Fault.LOGIN | Fault.DEVICE:
                    with contextlib.suppress(HsmUnavailable):
                        self._recover(seen, full=fault is Fault.DEVICE)
                case Fault.BUSY:
                    time.sleep(0.02)
        raise HsmUnavailable(last)

    def _once(
        self,
        act: Callable[[Session, int], T],
        key: Unwrap | None,
        *,
        judges_input: bool,
        suspected: bool,
    ) -> T:
        session, entry, reusable = self._borrow(), None, False
        acting = False
        try:
            if key is not None:
                entry = self._pin_key(key)
            acting = True
            made = act(session, 0 if entry is None else entry.handle)
            reusable = True
            return made
        except CkError as error:
            fault = classify(error)
            reusable = not acting or fault in {Fault.CALLER, Fault.STALE}
            if fault in {Fault.CALLER, Fault.AMBIGUOUS}:
                fault = self._blame(fault, judges_input=judges_input and acting, suspected=suspected)
            elif fault is Fault.SESSION and not acting:
                fault = Fault.LOGIN  # it is the home session that died
            elif fault is Fault.STALE:
                with self._lock:
                    if key is not None:
                        self._cache.pop(key.name, None)
                    self._tokens.clear()
            raise _Stopped(fault, error) from error
        finally:
            if entry is not None:
                self._release(entry)
            self._give(session, reusable=reusable)

    def _blame(self, fault: Fault, *, judges_input: bool, suspected: bool) -> Fault:
        """The code blames the input: first ask the token for something that it must be able to do."""
        try:
            with self._lock:
                self.home.random(8)
                if self.home.state() not in USER_STATES:
                    return Fault.LOGIN  # NSS logged out: C_SignInit says CKR_KEY_SIZE_RANGE
        except CkError:
            return Fault.DEVICE
        if judges_input:
            return Fault.AMBIGUOUS if fault is Fault.AMBIGUOUS and not suspected else Fault.CALLER
        return Fault.CALLER if fault is Fault.CALLER or suspected else Fault.AMBIGUOUS
