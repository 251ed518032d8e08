"""Sessions, login and cached handles of one token.

One *home* session logs in, owns every unwrapped key and is never lent; work runs on a pool of sessions opened without a
PIN. Nobody calls C_Logout. Every handle belongs to an *epoch*: a new login or initialisation starts the next one and
empties all caches, because the numbers start again and an old one would be another tenant's key. A cached key is pinned
while it is used; its last user destroys it.

A caller never repairs anything: it reports what it met to the module's recoverer (`recovery.py`), waits a moment, and
tries again or answers that the HSM is unavailable.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from keystore.hsm import HsmEmpty, HsmFault, HsmLocked, HsmUnavailable, InvalidCiphertext
from keystore.pkcs11.binding import CKU_USER, USER_STATES, Session
from keystore.pkcs11.errors import CkError, Fault, classify
from keystore.pkcs11.recovery import LAST_BACKOFF_S, Recovering, Recovery, start_lock

log: Final = logging.getLogger("skms.hsm")
T = TypeVar("T")

POOL_WAIT_S: Final = 2.0
RECOVERY_WAIT_S: Final = 0.5  # how long a call waits for a recovery that has just begun; after that it fails at once
BUSY_WAIT_S: Final = 0.02
ATTEMPTS: Final = 3  # at two, one storm in 25 met the same ambiguous fault twice and blamed who had not erred
CACHE_KEYS: Final = 512
CACHE_TTL_S: Final = 900.0
DEVICE_ERROR: Final = 0x30
DEVICE_MEMORY: Final = 0x31
GONE: Final = frozenset({0xB0, 0xB3})  # SESSION_CLOSED, SESSION_HANDLE_INVALID


class _Stopped(Exception):
    """One attempt failed: in which class, and why; `judged` says that what was refused is the caller's input."""

    def __init__(self, fault: Fault, error: CkError, *, judged: bool = False) -> None:
        super().__init__(str(error))
        self.fault, self.error, self.judged = fault, error, judged

    def verdict(self) -> InvalidCiphertext | HsmFault:
        """What the refusal says: on our own keys and digests never that the caller erred."""
        return InvalidCiphertext() if self.judged else HsmFault(self.error.name)


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


class TokenSessions:
    """The sessions of one token in this process. States: DOWN -> UP; UP -> DOWN or LOCKED."""

    def __init__(
        self,
        recovery: Recovery,
        *,
        label: str,
        serial: str | None,
        pin: Callable[[], bytes],
        size: int,
        read_only: bool,
        cache: int = CACHE_KEYS,
        user_type: int = CKU_USER,
        bad_input: frozenset[int] = frozenset(),
    ) -> None:
        self.recovery, self.module = recovery, recovery.module
        self.label, self._serial, self._pin = label, serial, pin
        self.size, self._read_only, self._cache_size = size, read_only, cache
        self._user_type, self._bad_input = user_type, bad_input
        self.state, self.epoch = "DOWN", 0
        self.last_error = ""  # name of the last CK_RV that took the token down
        self.firmware, self.serial = "", ""
        self.slot = 0
        self.home: Session  # from the first login on
        self._down_since = 0.0
        self._lock = threading.RLock()
        self._idle: list[Session] = []
        self._opened = 0
        self._slots = threading.BoundedSemaphore(size)
        self._cache: OrderedDict[bytes, Pinned] = OrderedDict()
        self._tokens: dict[bytes, int] = {}
        # Objects that were found once: from when on the absence of each is a fault of the module.
        self._fault_from: dict[bytes, float] = {}
        self.unwraps = 0  # keys loaded into the token so far: what a module that leaks per unwrap has leaked

    # ---- life --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Find the token and log in; HsmUnavailable with the reason otherwise. A wrong PIN is tried exactly once."""
        if self.state == "LOCKED":
            raise self._refused()
        self.recovery.gate.wait(POOL_WAIT_S)
        try:
            with self.recovery.gate, start_lock(self.recovery.lock):
                self.up(initialised=True)
        except Recovering:
            raise HsmUnavailable(f"token {self.label!r} cannot be used: its module is being recovered") from None
        except CkError as error:
            self.failed(error)
            raise self._refused() from error
        self.recovery.attach(self)

    def up(self, *, initialised: bool) -> None:
        """Log in; only with the gate shut, or before the first caller."""
        # Numbers start again after C_Finalize: a session from before must never be closed.
        old = [] if initialised or self.epoch == 0 else [self.home, *self._idle]
        slot, token = self.module.find_slot(self.label, self._serial)
        home = self.module.open(slot, write=True)
        try:
            home.login(self._pin(), self._user_type)
        except CkError:
            home.close()
            raise
        self.slot, self.home = slot, home
        self.serial = token.serial.decode("ascii", "replace").strip()
        self.firmware = ".".join(str(n) for n in token.firmware_version)
        self.epoch += 1  # from here on no number obtained earlier may be used
        self._idle, self._opened = [], 0
        self._tokens, self._cache = {}, OrderedDict()
        self._slots = threading.BoundedSemaphore(self.size)
        for session in old:  # after the new login: the application never has zero sessions
            if session.handle != home.handle:
                session.close_if_of(slot)
        if self.state != "UP":
            log.info("HSM token is up", extra={"facts": {"token": self.label, "epoch": self.epoch}})
        self.state = "UP"

    def failed(self, error: Exception) -> None:
        """Take note that the token cannot be used: LOCKED if it refused its PIN, else DOWN."""
        self.last_error = error.name if isinstance(error, CkError) else type(error).__name__
        locked = isinstance(error, CkError) and classify(error) is Fault.PIN
        if self.state == "UP" or locked:
            self._down_since = time.monotonic()
            facts = {"token": self.label, "error": str(error)}
            log.error("HSM token refused its PIN" if locked else "HSM token is down", extra={"facts": facts})
        self.state = "LOCKED" if locked else "DOWN"

    def _refused(self) -> HsmUnavailable:
        """Why the token cannot be used just now."""
        if self.state == "LOCKED":
            return HsmLocked(
                f"token {self.label!r} refused its PIN ({self.last_error}); not tried again: check the PIN file, "
                "then restart",
                ckr=self.last_error,
            )
        return HsmUnavailable(f"token {self.label!r} cannot be used: {self.last_error}", ckr=self.last_error)

    def close(self) -> None:
        """Close the pool. Never C_Logout; the module ends with the process."""
        self.recovery.detach(self)
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

    def _give(self, session: Session, *, reusable: bool, valid: bool = True) -> None:
        with self._lock:
            if reusable:
                self._idle.append(session)
            else:
                if valid:  # else its number may be another session's by now
                    session.close()
                self._opened -= 1
        self._slots.release()

    def token_object(self, name: bytes, find: Callable[[Session], int]) -> int:
        """The handle of a token object, looked up once per epoch. HsmEmpty if the token does not hold it."""
        with self._lock:
            if name not in self._tokens:
                try:
                    self._tokens[name] = find(self.home)
                except HsmEmpty as missing:
                    # SoftHSM2 that got no file descriptor for an object's file says so, and never looks at that file again.
                    if time.monotonic() < self._fault_from.get(name, math.inf):
                        raise
                    self._fault_from[name] = time.monotonic() + LAST_BACKOFF_S
                    raise CkError(DEVICE_ERROR, "C_FindObjects") from missing
                self._fault_from.setdefault(name, 0.0)
            return self._tokens[name]

    def logged_in(self) -> bool:
        """Whether the home session still is: a search while logged out answers CKR_OK and finds nothing."""
        try:
            with self._lock:
                return self.home.state() in USER_STATES
        except CkError:
            return False

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
            self.unwraps += 1
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
        with contextlib.suppress(Recovering), self.recovery.gate, self._lock:  # gate shut: all of it is emptied anyway
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
    ) -> T:
        """Run `act` with a pool session and the key's handle (0 without a key); it may run again.

        `judges_input` says that a refusal may be the caller's fault: then it is InvalidCiphertext. On our own keys and
        digests it never is: HsmFault. Anything temporary is HsmUnavailable, and nothing was executed then.
        """
        until = time.monotonic() + RECOVERY_WAIT_S
        attempts = ATTEMPTS
        while True:
            self._await_up(until)
            try:
                with self.recovery.gate:
                    seen = self.epoch
                    return self._once(act, key, judges_input=judges_input)
            except Recovering:
                if time.monotonic() >= until:
                    raise HsmUnavailable(f"token {self.label!r}: the HSM connection is being recovered") from None
                self.recovery.gate.wait(max(0.0, until - time.monotonic()))
                continue
            except _Stopped as met:
                stopped, last = met, met.error
            attempts -= 1
            match stopped.fault:
                case Fault.CALLER:
                    raise stopped.verdict()
                case Fault.AMBIGUOUS if attempts == 0:
                    raise stopped.verdict()  # every time, from a token that is well: it was the input
                case Fault.PIN:
                    self.failed(last)
                    raise self._refused()
                case Fault.LOGIN | Fault.DEVICE:
                    self._report(seen, last, full=stopped.fault is Fault.DEVICE)
                    self.recovery.await_change(
                        lambda was=seen: self.epoch != was or self.state != "UP",  # type: ignore[misc]  # mypy infers no lambda with a default
                        max(0.0, until - time.monotonic()),
                    )
                case Fault.BUSY:
                    time.sleep(BUSY_WAIT_S)
            if attempts == 0:
                raise HsmUnavailable(f"token {self.label!r} cannot be used: {last}", ckr=last.name)

    def _await_up(self, until: float) -> None:
        """Return once the token is up; wait only for a recovery that has just begun, never for a token that is gone."""
        if self.state == "DOWN":
            patience = min(until, self._down_since + RECOVERY_WAIT_S) - time.monotonic()
            self.recovery.await_change(lambda: self.state != "DOWN", max(0.0, patience))
        if self.state != "UP":
            raise self._refused()

    def _report(self, seen: int, error: CkError, *, full: bool) -> None:
        """Ask for recovery, unless one has happened since this call began."""
        if self.epoch == seen:
            self.last_error = error.name
            self.recovery.report(self, full=full)

    def _once(
        self,
        act: Callable[[Session, int], T],
        key: Unwrap | None,
        *,
        judges_input: bool,
    ) -> T:
        session, entry = self._borrow(), None
        reusable, valid, acting = False, True, False
        try:
            if key is not None:
                entry = self._pin_key(key)
            acting = True
            made = act(session, 0 if entry is None else entry.handle)
            reusable = True
            return made
        except CkError as error:
            fault = classify(error, self._bad_input)
            reusable = not acting or fault in {Fault.CALLER, Fault.STALE}
            if fault in {Fault.CALLER, Fault.AMBIGUOUS}:
                fault = self._blame(fault)
            elif fault is Fault.SESSION:
                valid = error.rv not in GONE
                if error.session == self.home.handle or not self.logged_in():
                    fault = Fault.LOGIN  # the home session is not usable any more, or all are gone
            elif fault is Fault.STALE:
                self._stale(key)
            elif error.rv == DEVICE_MEMORY:
                self._make_room()
            raise _Stopped(fault, error, judged=judges_input and acting) from error
        finally:
            if entry is not None:
                self._release(entry)
            self._give(session, reusable=reusable, valid=valid)

    def _stale(self, key: Unwrap | None) -> None:
        """A handle was refused: look up and unwrap anew."""
        with self._lock:
            if key is not None:
                self._drop(key.name)
            self._tokens.clear()

    def _make_room(self) -> None:
        """The token's memory is full: give back half of what is unwrapped there."""
        with self._lock:
            for name in list(self._cache)[: max(1, len(self._cache) // 2)]:
                self._drop(name)

    def _blame(self, fault: Fault) -> Fault:
        """The code blames the input: first ask the token for something that it must be able to do."""
        try:
            with self._lock:
                self.home.random(8)
                if self.home.state() not in USER_STATES:
                    return Fault.LOGIN  # NSS logged out: C_SignInit says CKR_KEY_SIZE_RANGE
        except CkError:
            return Fault.DEVICE
        return fault
