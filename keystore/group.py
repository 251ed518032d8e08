"""Several HSMs of one region as one: balanced by load, failing over, drained and exchanged without a refused request.

Every member holds the same root KEK and the same row-MAC key, so a key row works on each of them. A call goes to the
member with the least work ahead of it; when a member cannot do it, the next one does, each at most once. Only the HSM's
own troubles are reasons for that: a wrong ciphertext or a damaged row is an answer, and ten thousand of them change
nothing (A-09).
"""

from __future__ import annotations

import contextlib
import enum
import hmac
import itertools
import statistics
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from keystore.hsm import (
    Hsm,
    HsmEmpty,
    HsmFault,
    HsmLocked,
    HsmStatus,
    HsmTimeout,
    HsmUnavailable,
    Importer,
    InvalidCiphertext,
    Material,
    OaepHash,
    RowDamaged,
    SelfTestFailed,
    SignScheme,
    StoredKey,
    UnsupportedByHsm,
    Wrapped,
    importer_of,
)

T = TypeVar("T")

DEADLINE_S: Final = 10.0  # after it no further member is tried
HANG_S: Final = 1.0  # a call inside for longer says that others would queue behind it
SOFT_FAILURES: Final = 3  # failures in a row of a member that calls itself UP, before it is left out
_SPEED_ROUNDS: Final = 5
_QUICK_US: Final = 25.0  # below it a difference in speed is noise
_ABOUT: Final = 1.5


class Admin(enum.StrEnum):
    """What operators want of a member."""

    ACTIVE = "active"
    FALLBACK = "fallback"  # used only when no active member can
    DRAINED = "drained"  # gets no calls


class GroupWouldBeEmpty(Exception):
    """The change would leave a region without a usable HSM."""


class NoSuchHsm(Exception):
    """No HSM of this name in the node's configuration."""


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """What an operator may see of one member. Counters are those of this process."""

    name: str
    region: str
    admin: Admin
    state: str  # UP, DOWN, LOCKED, SUSPECT, EMPTY (lacks the installation's keys) or FOREIGN (holds others)
    in_flight: int
    calls: int
    errors: Mapping[str, int]  # by CKR name or kind of failure
    failovers: int  # calls that another member had to take over
    last_error: str
    speed_us: float  # of one HMAC
    token: HsmStatus | None  # None until it was opened


class _Foreign(HsmUnavailable):
    """The token holds keys of this installation's names that are not the group's."""


class _JustDrained(Exception):
    """The member was drained between being chosen and being asked."""


class _Member:
    """One HSM and what the group knows of it."""

    def __init__(self, name: str, open_hsm: Callable[[], Hsm]) -> None:
        self.name, self.open = name, open_hsm
        self.hsm: Hsm | None = None
        self.admin = Admin.ACTIVE
        self.closed_state = "DOWN"  # while it is not open
        self.suspect = False
        self.failures = 0  # in a row
        self.inside: dict[object, float] = {}  # running calls and when they began, oldest first
        self.making = 0  # running calls that make keys: these may take long
        self.calls = self.failovers = 0
        self.errors: Counter[str] = Counter()
        self.last_error = ""
        self.speed_us = 0.0
        self.lacks: set[uuid.UUID] = set()  # root KEKs that it was found not to hold
        self.behind = False  # it does not hold the current root KEK: it opens what it can and makes no keys
        self.probing = threading.Lock()

    @property
    def in_flight(self) -> int:
        return len(self.inside) + self.making

    @property
    def state(self) -> str:
        if self.hsm is None:
            return self.closed_state
        state = self.hsm.state
        return "SUSPECT" if state == "UP" and self.suspect else state

    def usable(self) -> bool:
        return self.hsm is not None and not self.suspect and self.hsm.state == "UP"

    def hangs(self, now: float) -> bool:
        with contextlib.suppress(StopIteration, RuntimeError):  # others come and go meanwhile
            return now - next(iter(self.inside.values())) > HANG_S
        return False

    def can(self, key: StoredKey | None) -> bool:
        if self.hsm is None or key is None:
            return self.hsm is not None
        return key.kek not in self.lacks and self.hsm.missing(key.material) is None

    def measured(self, us: float) -> None:
        """Note how long one HMAC took."""
        self.speed_us = us if self.speed_us == 0 else (self.speed_us + us) / 2

    def load(self) -> float:
        """How long a call would about take here, after those that are running."""
        return (self.in_flight + 1) * max(_QUICK_US, self.speed_us)


class HsmGroup:
    """The HSMs of one region as one `keystore.Hsm`. Thread-safe.

    `openers` open each member: a token that passed its self-test, or HsmUnavailable, HsmEmpty, SelfTestFailed. New keys
    are made only while at least `minimum` members are up and hold the current root KEK. `proven` tells whether an HSM
    holds the keys of this installation, as far as that can be told without another member. `timer` (s) measures how quick
    a member is.
    """

    def __init__(
        self,
        region: str,
        openers: Mapping[str, Callable[[], Hsm]],
        *,
        minimum: int = 1,
        proven: Callable[[Hsm], bool] = lambda _: True,
        deadline_s: float = DEADLINE_S,
        monotonic: Callable[[], float] = time.monotonic,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._region, self._minimum, self._proven = region, minimum, proven
        self._deadline, self._monotonic, self._timer = deadline_s, monotonic, timer
        self._members = [_Member(name, opener) for name, opener in openers.items()]
        self._alone = len(self._members) == 1
        self._lock = threading.Lock()
        self._turn = itertools.count()
        self._fast = False
        self._root_version: int | None = None

    # ---- members ---------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Open the members one after the other; the first one's error if not one of them can be used."""
        first: Exception | None = None
        for member in self._members:
            try:
                self.probe(member.name)
            except (HsmUnavailable, HsmFault, SelfTestFailed) as error:
                first = first or error
        if first is not None and not any(m.hsm is not None for m in self._members):
            raise first

    @property
    def names(self) -> tuple[str, ...]:
        """The members, in the order of the configuration."""
        return tuple(m.name for m in self._members)

    def members(self) -> list[MemberStatus]:
        """The state of each member, without calling a token."""
        return [
            MemberStatus(
                name=m.name,
                region=self._region,
                admin=m.admin,
                state=m.state,
                in_flight=m.in_flight,
                calls=m.calls,
                errors=dict(m.errors),
                failovers=m.failovers,
                last_error=m.last_error,
                speed_us=m.speed_us,
                token=None if m.hsm is None else m.hsm.status(),
            )
            for m in self._members
        ]

    def member(self, name: str) -> MemberStatus:
        """One member's state; NoSuchHsm."""
        return self.members()[self.names.index(self._member(name).name)]

    def on(self, name: str) -> Hsm:
        """One member's own HSM, for what must be asked of exactly this one; HsmUnavailable while it is not up."""
        member = self._member(name)
        if member.hsm is None or not member.usable():
            raise HsmUnavailable(f"HSM {name} is {member.state}: {member.last_error or 'not open'}")
        return member.hsm

    def apply(self, wanted: Mapping[str, Admin]) -> None:
        """Take over what operators want of each member; a member that is not named is active."""
        with self._lock:
            for member in self._members:
                was, member.admin = member.admin, wanted.get(member.name, Admin.ACTIVE)
                if was is Admin.DRAINED is not member.admin:
                    member.suspect = True  # nobody looked at it meanwhile: its canary comes first
            self._measure_up()

    def use_root(self, version: int) -> None:
        """As `Hsm.use_root`, on every member; one that does not hold it makes no keys until it does."""
        self._root_version = version
        for member in self._members:
            if member.hsm is not None:
                self._follow_root(member, member.hsm)

    def _follow_root(self, member: _Member, hsm: Hsm) -> None:
        if self._root_version is None:
            return
        try:
            hsm.use_root(self._root_version)
            member.behind = False
        except (HsmUnavailable, HsmFault) as error:
            member.behind = True
            self._noted(member, error)

    def serving(self, wanted: Mapping[str, Admin]) -> list[str]:
        """The members that could serve if operators wanted this."""
        return [m.name for m in self._members if m.usable() and wanted.get(m.name, Admin.ACTIVE) is not Admin.DRAINED]

    def usable(self) -> int:
        """How many members take calls now."""
        now = self._monotonic()
        return sum(m.admin is not Admin.DRAINED and m.usable() and not m.hangs(now) for m in self._members)

    def out(self) -> list[str]:
        """Members that should serve and do not: what a probe may bring back. A locked one stays out."""
        return [
            m.name for m in self._members if m.admin is not Admin.DRAINED and not m.usable() and m.state != "LOCKED"
        ]

    def probe(self, name: str) -> None:
        """Ask a member through the real path whether it works, and let it in or leave it out accordingly.

        Raises what is wrong with it. Nothing while another probe of it runs.
        """
        member = self._member(name)
        if not member.probing.acquire(blocking=False):
            return
        try:
            if member.hsm is None:
                self._admit(member)
            else:
                member.hsm.canary()
                self._time(member, member.hsm, 1)
                if member.behind:
                    self._follow_root(member, member.hsm)
            member.suspect, member.failures = False, 0
            member.lacks.clear()
        except BaseException as error:
            self._noted(member, error)
            member.suspect = True
            raise
        finally:
            member.probing.release()
            with self._lock:
                self._measure_up()

    def suspect(self, name: str, why: str) -> None:
        """Leave a member out until a probe of it succeeds."""
        member = self._member(name)
        member.suspect, member.last_error = True, why

    def _member(self, name: str) -> _Member:
        for member in self._members:
            if member.name == name:
                return member
        raise NoSuchHsm(f"no HSM {name!r} in region {self._region}")

    def _admit(self, member: _Member) -> None:
        """Open a member and prove that it holds the group's keys."""
        try:
            hsm = member.open()
        except HsmLocked:
            member.closed_state = "LOCKED"
            raise
        except HsmEmpty:
            member.closed_state = "EMPTY"
            raise
        except BaseException:
            member.closed_state = "DOWN"
            raise
        try:
            if not self._proven(hsm):
                raise _Foreign(f"HSM {hsm.name} holds keys of another ceremony: no row of this installation is its own")
            reference = next((m.hsm for m in self._members if m.hsm is not None and m.usable()), None)
            if reference is not None:
                _prove_same_keys(reference, hsm)
            self._time(member, hsm, _SPEED_ROUNDS)
            self._follow_root(member, hsm)
        except BaseException as error:
            member.closed_state = "FOREIGN" if isinstance(error, _Foreign) else "DOWN"
            hsm.close()
            raise
        member.hsm = hsm

    def _time(self, member: _Member, hsm: Hsm, rounds: int) -> None:
        times = []
        for _ in range(rounds):
            begun = self._timer()
            hsm.row_mac(b"speed")
            times.append((self._timer() - begun) * 1e6)
        member.measured(statistics.median(times))

    def _measure_up(self) -> None:
        """Inline calls only if every active member is quick; if none is open, threads are the safe choice."""
        active = [m for m in self._members if m.admin is Admin.ACTIVE and m.hsm is not None]
        self._fast = bool(active) and all(m.hsm is not None and m.hsm.fast for m in active)

    # ---- choosing and failing over -----------------------------------------------------------------------------------

    def _next(self, tried: list[_Member], key: StoredKey | None, *, making: bool = False) -> _Member | None:
        """The member to ask next; each at most once, those that failed only when there is nobody else."""
        if self._alone:
            only = self._members[0]
            lost = tried or only.hsm is None or only.admin is Admin.DRAINED or (making and only.behind)
            return None if lost else only
        now = self._monotonic()
        for rank in (Admin.ACTIVE, Admin.FALLBACK):
            able = [
                m
                for m in self._members
                if m.admin is rank
                and m not in tried
                and m.usable()
                and not m.hangs(now)
                and m.can(key)
                and not (making and m.behind)
            ]
            if able:
                return able[0] if len(able) == 1 else self._lightest(able)
        for member in self._members:  # everybody failed lately: better a late answer than none
            lost = member in tried or member.admin is Admin.DRAINED or not member.can(key) or (making and member.behind)
            if not lost and member.state != "LOCKED" and not member.hangs(now):
                return member
        return None

    def _lightest(self, able: list[_Member]) -> _Member:
        """The member with the least work ahead; those that are about as light take turns, so that each stays warm."""
        loads = [m.load() for m in able]
        most, turn = min(loads) * _ABOUT, next(self._turn)
        light = [m for m, load in zip(able, loads, strict=True) if load <= most]
        return light[turn % len(light)]

    def _run(self, act: Callable[[Hsm], T], key: StoredKey | None = None, *, making: bool = False) -> T:
        """Let one member act, or the next one if it cannot. Whatever it answers about the input is the answer."""
        tried: list[_Member] = []
        unavailable: HsmUnavailable | None = None
        fault: HsmFault | None = None
        begun = self._monotonic()
        while (member := self._next(tried, key, making=making)) is not None:
            if tried:
                if self._monotonic() - begun > self._deadline:
                    break
                tried[-1].failovers += 1
            tried.append(member)
            try:
                return self._ask(member, act, making=making)
            except _JustDrained:
                continue
            except HsmUnavailable as error:
                self._failed(member, error, key)
                unavailable = error
            except HsmFault as error:
                self._failed(member, error, key)
                fault = error
        raise unavailable or fault or self._nobody(key)

    def _ask(self, member: _Member, act: Callable[[Hsm], T], *, making: bool) -> T:
        assert member.hsm is not None
        mark = object()
        member.calls += 1
        if making:
            with self._lock:
                member.making += 1
        else:
            member.inside[mark] = self._monotonic()
        try:
            if member.admin is Admin.DRAINED:  # looked at again now that the call is seen: drained means no call at all
                raise _JustDrained
            made = act(member.hsm)
        finally:
            if making:
                with self._lock:
                    member.making -= 1
            else:
                del member.inside[mark]
        member.failures = 0
        return made

    def _failed(self, member: _Member, error: HsmUnavailable | HsmFault, key: StoredKey | None) -> None:
        self._noted(member, error)
        if isinstance(error, HsmEmpty) and key is not None:
            member.lacks.add(key.kek)  # it works, and lacks one root KEK: only keys under that go elsewhere
            return
        member.failures += 1
        if isinstance(error, HsmTimeout) or member.failures >= SOFT_FAILURES:
            member.suspect = True

    def _noted(self, member: _Member, error: BaseException) -> None:
        code = getattr(error, "ckr", "") or type(error).__name__
        member.errors[code] += 1
        member.last_error = code if getattr(error, "ckr", "") else f"{type(error).__name__}: {error}"

    def _nobody(self, key: StoredKey | None) -> HsmUnavailable | UnsupportedByHsm:
        if key is not None:
            serving = [m.hsm for m in self._members if m.hsm is not None and m.admin is not Admin.DRAINED]
            reasons = [r for hsm in serving if (r := hsm.missing(key.material)) is not None]
            if serving and len(reasons) == len(serving):
                return UnsupportedByHsm(reasons[0])
        states = ", ".join(f"{m.name} {m.admin} {m.state}" for m in self._members)
        return HsmUnavailable(f"no HSM of region {self._region} can be used just now ({states})")

    # ---- keystore.Hsm --------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The member's name, or the region's if there are several."""
        return self._members[0].name if self._alone else f"group-{self._region}"

    @property
    def region(self) -> str:
        """The place where all members stand."""
        return self._region

    @property
    def state(self) -> str:
        """UP while at least one member can be used."""
        if self._alone:
            return self._members[0].state.replace("SUSPECT", "UP")
        return "UP" if self.usable() else "DOWN"

    @property
    def fast(self) -> bool:
        """Whether every active member is quick enough for the event loop."""
        return self._fast

    def missing(self, material: Material) -> str | None:
        """What any member that may have to serve lacks: a key must work on all of them."""
        for member in self._members:
            if member.hsm is not None and member.admin is not Admin.DRAINED:
                reason = member.hsm.missing(material)
                if reason is not None:
                    return reason if self._alone else f"HSM {member.name}: {reason}"
        return None

    def generate(self, material: Material, object_id: uuid.UUID) -> Wrapped:
        """As `Hsm.generate`; HsmUnavailable while fewer members than the minimum could hold the new key."""
        if (reason := self.missing(material)) is not None:
            raise UnsupportedByHsm(reason)
        self.enough()
        return self._run(lambda hsm: hsm.generate(material, object_id), making=True)

    def enough(self) -> None:
        """HsmUnavailable unless new key material would be usable on at least the minimum of members."""
        if self._minimum <= 1:
            return
        up = [m for m in self._members if m.admin is not Admin.DRAINED and m.usable() and not m.behind]
        roots = Counter(m.hsm.status().root_kek for m in up if m.hsm is not None)
        agreeing = max(roots.values(), default=0)
        if agreeing < self._minimum:
            raise HsmUnavailable(
                f"HSM group of region {self._region}: {agreeing} of {len(self._members)} members are up and hold the "
                f"current root KEK ({', '.join(m.name for m in up) or 'none'}), and no key is made with fewer than "
                f"{self._minimum}: bring a member back (`skms hsm status`), or lower `minimum` in [[hsm_group]]"
            )

    def opens(self, oaep: OaepHash) -> bool:
        """As `Importer.opens`: whether every member that may have to serve does."""
        serving = [m.hsm for m in self._members if m.hsm is not None and m.admin is not Admin.DRAINED]
        return bool(serving) and all(isinstance(hsm, Importer) and hsm.opens(oaep) for hsm in serving)

    def admit_wrapped(
        self,
        transport: StoredKey,
        oaep: OaepHash,
        wrapped: bytes,
        material: Material,
        object_id: uuid.UUID,
        *,
        inner: bytes | None,
        public: bytes,
    ) -> Wrapped:
        """As `Importer.admit_wrapped`; refused as `generate` is while the group is below its minimum."""
        self.enough()
        return self._run(
            lambda hsm: importer_of(hsm).admit_wrapped(
                transport, oaep, wrapped, material, object_id, inner=inner, public=public
            ),
            transport,
            making=True,
        )

    def admit_clear(self, material: Material, clear: bytes, object_id: uuid.UUID, *, public: bytes) -> Wrapped:
        """As `Importer.admit_clear`; refused as `generate` is while the group is below its minimum."""
        self.enough()
        return self._run(
            lambda hsm: importer_of(hsm).admit_clear(material, clear, object_id, public=public), making=True
        )

    def row_mac(self, data: bytes) -> bytes:
        """As `Hsm.row_mac`."""
        return self._run(lambda hsm: hsm.row_mac(data))

    def check_row(self, binding: bytes, mac: bytes) -> None:
        """As `Hsm.check_row`."""
        self._run(lambda hsm: hsm.check_row(binding, mac))

    def hmac(self, key: StoredKey, algorithm: str, data: bytes) -> bytes:
        """As `Hsm.hmac`."""
        return self._run(lambda hsm: hsm.hmac(key, algorithm, data), key)

    def gcm_seal(self, key: StoredKey, aad: bytes, data: bytes) -> tuple[bytes, bytes]:
        """As `Hsm.gcm_seal`; another member takes a fresh IV."""
        return self._run(lambda hsm: hsm.gcm_seal(key, aad, data), key)

    def gcm_open(self, key: StoredKey, iv: bytes, aad: bytes, data: bytes) -> bytes:
        """As `Hsm.gcm_open`."""
        return self._run(lambda hsm: hsm.gcm_open(key, iv, aad, data), key)

    def sign(self, key: StoredKey, scheme: SignScheme, data: bytes) -> bytes:
        """As `Hsm.sign`."""
        return self._run(lambda hsm: hsm.sign(key, scheme, data), key)

    def random(self, length: int) -> bytes:
        """As `Hsm.random`."""
        return self._run(lambda hsm: hsm.random(length))

    def audit_public_key(self) -> bytes:
        """The audit key of the member that would sign now; each member has its own."""
        return self._run(lambda hsm: hsm.audit_public_key())

    def audit_public_keys(self) -> dict[str, bytes]:
        """The audit key of each open member."""
        found = {}
        for member in self._members:
            if member.hsm is not None:
                with contextlib.suppress(HsmUnavailable, HsmFault):
                    found[member.name] = member.hsm.audit_public_key()
        return found

    def audit_sign(self, statement: bytes) -> bytes:
        """Sign with the audit key of the first member that can; any of the group's keys may verify it."""
        return self._run(lambda hsm: hsm.audit_sign(statement))

    def forget(self, object_id: uuid.UUID) -> None:
        """Evict a key from every member's cache, whatever state the member is in."""
        for member in self._members:
            if member.hsm is not None:
                with contextlib.suppress(HsmUnavailable, HsmFault):
                    member.hsm.forget(object_id)

    def canary(self) -> None:
        """Prove that the group can serve."""
        self._run(lambda hsm: hsm.canary())

    def status(self) -> HsmStatus:
        """The status of the member that would be asked next, or of one that is open."""
        member = self._next([], None) or next((m for m in self._members if m.hsm is not None), None)
        if member is None or member.hsm is None:
            raise self._nobody(None)
        return member.hsm.status()

    def close(self) -> None:
        """Close every member."""
        for member in self._members:
            if member.hsm is not None:
                member.hsm.close()


def _prove_same_keys(reference: Hsm, candidate: Hsm) -> None:
    """_Foreign unless a key made by one HSM works, to the same result, on the other: one root KEK, one row-MAC key."""
    object_id = uuid.uuid4()
    made = reference.generate(Material.HMAC_256, object_id)
    binding = b"skms/group/canary" + object_id.bytes + made.blob
    key = StoredKey(
        object_id, Material.HMAC_256, made.blob, made.mechanism, made.kek, b"", binding, reference.row_mac(binding)
    )
    try:
        same = hmac.compare_digest(
            reference.hmac(key, "sha256", object_id.bytes), candidate.hmac(key, "sha256", object_id.bytes)
        )
    except (HsmEmpty, RowDamaged, InvalidCiphertext, HsmFault):
        same = False
    finally:
        _forget(object_id, (reference, candidate))
    if not same:
        raise _Foreign(
            f"HSM {candidate.name} holds other keys than HSM {reference.name} of the same region: "
            "take it into the group with `skms hsm join`"
        )


def _forget(object_id: uuid.UUID, hsms: Iterable[Hsm]) -> None:
    for hsm in hsms:
        with contextlib.suppress(HsmUnavailable, HsmFault):
            hsm.forget(object_id)
