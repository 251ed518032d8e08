"""Freezes on this installation: what officers ask, how every worker comes to obey, and how fast all of them did.

A thread of each worker reads the stored freezes five times a second. What changed is taken over on the event loop, between
two requests, and acknowledged after that: no result that the freeze stops leaves after the acknowledgement.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from audit.event import DATA_PLANE
from audit.log import Change, ChangeFailed
from audit.search import Found
from keystore import Key, KeyNotFound, Plan
from policy import Freeze, InForce, Scope
from policy.freeze import HALT
from policy.rows import BEAT_S, FreezeRows, FreezeRowsDamaged, Reach
from service.approvals import Asked
from service.kms import Ask, Kms
from service.mark import Mark, MarkDamaged
from service.outcome import NotFound, RequestInvalid
from service.quorum import Kind, Quorum, Standing

log: Final = logging.getLogger("skms.containment")
alarm: Final = logging.getLogger("skms.alarm")
LIFT: Final = "lift_freeze"
CANARY: Final = "canary"  # the tag of keys that exist to be stopped in drills
PERIOD_S: Final = 0.2
WAIT_S: Final = 2.0  # how long an answer waits for the acknowledgements of all workers
LOOK_S: Final = 0.02
BEATS_KEPT_S: Final = 3 * BEAT_S  # a worker that could not say for so long that it lives confirms nothing
LOOK_BACK_US: Final = 24 * 3_600 * 1_000_000  # where the last success is looked for
PAGES: Final = 20
PAGE: Final = 500
_STOPPED: Final[Mapping[str, frozenset[str]]] = {  # operations of the audit log; a rewrap may be to another key
    HALT: DATA_PLANE,
    "no-release": frozenset({"decrypt", "unwrap_data_key", "rewrap"}),
    "admin-only": DATA_PLANE - {"random"},
}
_TAG: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}=.{0,256}")


@dataclass(frozen=True, slots=True)
class NewFreeze:
    """What is to be stopped, and why: `kind` and `value` of its scope, `reason` a code, `mode` one of `MODES`.

    `began` (microseconds): when what it answers to began, if that is known.
    """

    kind: str
    value: str
    reason: str
    drill: bool = False
    mode: str = HALT
    began: int | None = None


@dataclass(frozen=True, slots=True)
class Contained:
    """A freeze and what came of it. `last_success` is the newest use in its scope that succeeded before it was contained."""

    freeze: Freeze
    lifted_at: int | None
    reach: Reach
    last_success: Found | None


class Containment:
    """The freezes, as one worker obeys them and as callers ask about them. `clock` gives us, `monotonic` seconds."""

    def __init__(
        self,
        kms: Kms,
        rows: FreezeRows,
        *,
        quorum: Quorum,
        worker: str,
        clock: Callable[[], int],
        monotonic: Callable[[], float],
        mark: Mark,
        period_s: float = PERIOD_S,
    ) -> None:
        self._kms, self._rows, self.quorum, self._worker = kms, rows, quorum, worker
        self._clock, self._monotonic, self._period = clock, monotonic, period_s
        self._mark = mark
        self._acknowledged = -1
        self._beat_at = 0.0
        self._changed = asyncio.Event()
        self._ended, self._wake = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        quorum.executes(LIFT, Kind("liftFreeze", self._lifted))

    # ---- asked -----------------------------------------------------------------------------------------------------

    async def freeze(self, ask: Ask, wanted: NewFreeze) -> Contained:
        """Stop everything in a scope, on every worker; the answer waits a moment for all of them to obey."""
        return await self._contained((await self._stop(ask, "freeze", wanted)).id)

    async def drill(self, ask: Ask, key: str) -> Contained:
        """Freeze a canary key, see how long every worker takes to obey, and lift that again without a quorum."""
        drill = await self._stop(ask, "freeze_drill", NewFreeze("key", key, "drill", drill=True))
        ask.remember = None  # the answer is stored with the freeze
        try:
            await self._contained(drill.id)
        finally:
            end = Plan(
                key=None,
                write=lambda c: self._rows.end_drills(c, drill, officer=ask.caller.id, at=self._clock()),
                applied=self._wake.set,
            )
            parameters = {"freeze": drill.id}
            await self._kms.change_own(ask, "lift_drill", "freeze", parameters, lambda _: None, lambda _: end)
        return await self._contained(drill.id)

    async def _stop(self, ask: Ask, op: str, wanted: NewFreeze) -> Freeze:
        made: list[Freeze] = []

        def decide(decision: str) -> Freeze:
            tenant = ask.caller.tenant
            scope = self._scope(tenant, wanted)
            who, at, began = ask.caller.id, self._clock(), wanted.began
            if began is not None and not 0 <= began <= at:
                raise RequestInvalid(("/began", "out_of_range", "when the incident began: not in the future"))
            return Freeze(decision, 0, scope, tenant, wanted.reason, who, at, wanted.drill, wanted.mode, began)

        def plan(freeze: Freeze) -> Plan:
            made.append(freeze)

            def applied() -> None:
                self._kms.freezes.add(freeze)
                self._wake.set()

            return Plan(key=None, write=lambda c: self._rows.put(c, freeze), applied=applied)

        parameters = dataclasses.asdict(wanted)
        await self._kms.change_own(ask, op, "freeze", parameters, decide, plan)
        return made[0]

    async def stop(self, tenant: str, scope: Scope, *, reason: str) -> Freeze:
        """Stop something of a tenant that nobody asked to stop: the node found it itself. Only a quorum lifts that."""
        officer = f"internal:{self._kms.node}:scheduler"
        freeze = Freeze(str(uuid.uuid4()), 0, scope, tenant, reason, officer, self._clock())
        key = {"key": scope.value} if scope.kind == "key" else {}
        record = self._kms.admin_record("freeze", tenant=tenant, out="ok", why=reason, actor=officer, **key)

        def applied() -> None:
            self._kms.freezes.add(freeze)
            self._wake.set()

        try:
            await self._kms.log.append(record, change=Change(lambda c: self._rows.put(c, freeze), applied))
        except ChangeFailed as failed:
            raise failed.__cause__ or failed from None
        return freeze

    async def every(self, ask: Ask) -> list[tuple[Freeze, int | None]]:
        """The freezes of the caller's tenant, or all for the installation's own people, newest first."""
        return await self._kms.read_own(ask, "list_freezes", "readFreezes", lambda: list(self._visible(ask)))

    async def show(self, ask: Ask, freeze_id: str) -> Contained:
        """One freeze, how far it got and what succeeded last in its scope; NotFound."""

        def read() -> Contained:
            for freeze, lifted_at in self._visible(ask):
                if freeze.id == freeze_id:
                    return self._report(freeze, lifted_at)
            raise NotFound("no such freeze")

        return await self._kms.read_own(ask, "get_freeze", "readFreezes", read)

    async def lift(self, ask: Ask, freeze_id: str) -> Standing:
        """Ask for the lift of a freeze: it is done once enough approvers have signed exactly that. NotFound."""

        def wanted() -> tuple[str | None, Mapping[str, object]]:
            for freeze, lifted_at in self._visible(ask):
                if freeze.id == freeze_id and lifted_at is None:
                    scope = {"kind": freeze.scope.kind, "value": freeze.scope.value}
                    about = {"freeze": freeze.id, "scope": scope, "mode": freeze.mode, "since": freeze.at}
                    return freeze.tenant, about
            raise NotFound("no such freeze in force")

        return await self.quorum.ask(ask, LIFT, wanted)

    def _lifted(self, asked: Asked, approvals: Mapping[str, str]) -> Plan:
        """Lift a freeze as it was asked and approved; FreezeGone if somebody else's lift came first."""
        proof = {"request": asked.to_json(), "approvals": dict(approvals)}

        def write(connection: Connection) -> None:
            freeze_id = str(asked.parameters["freeze"])
            self._rows.lift(connection, freeze_id, officer=asked.requester, at=self._clock(), approvals=proof)

        return Plan(key=None, write=write, applied=self._wake.set)

    def _visible(self, ask: Ask) -> Iterator[tuple[Freeze, int | None]]:
        tenant = ask.caller.tenant
        return (found for found in self._rows.every() if tenant is None or found[0].tenant == tenant)

    def _scope(self, tenant: str | None, wanted: NewFreeze) -> Scope:
        """The scope in its one spelling; a foreign key or tenant gives the same answer as none."""
        value = wanted.value
        match wanted.kind:
            case "everything":
                if tenant is not None or value:
                    raise RequestInvalid(("/scope", "not_allowed", "everything has no value: a tenant freezes itself"))
            case "tenant":
                if self._kms.policy.registry.tenant(value) is None or tenant not in {None, value}:
                    raise NotFound("no such tenant")
            case "key":
                found = self._key(tenant, value)
                if wanted.drill and found.tags.get(CANARY) != "true":
                    raise RequestInvalid(("/key", "no_canary", f"a drill stops keys with the tag {CANARY}=true only"))
                value = str(found.id)
            case "region":
                self._kms.places("/scope/value", [value])
            case "tier":
                if value not in {"1", "2", "3"}:
                    raise RequestInvalid(("/scope/value", "out_of_range", "1, 2 or 3"))
            case "tag":
                if _TAG.fullmatch(value) is None:
                    raise RequestInvalid(("/scope/value", "malformed", "NAME=VALUE"))
            case "hsm":
                self._kms.fleet.group_of(value)
            case "caller":
                if not value.isprintable() or not 1 <= len(value) <= 512:
                    raise RequestInvalid(("/scope/value", "malformed", "the id that `skms whoami` shows"))
            case _:
                raise RequestInvalid(("/scope/kind", "not_allowed", "no such kind of scope"))
        return Scope(wanted.kind, value)

    def _key(self, tenant: str | None, name: str) -> Key:
        if tenant is not None:
            return self._kms.keystore.find(tenant, name)
        try:
            return self._kms.keystore.by_id(uuid.UUID(name))
        except ValueError:
            raise KeyNotFound("no such key") from None

    async def _contained(self, freeze_id: str) -> Contained:
        """The report once every worker obeys, or as it stands after a moment."""
        until = self._monotonic() + WAIT_S
        while True:
            found = await asyncio.to_thread(self._rows.find, freeze_id)
            if found is None:
                raise FreezeRowsDamaged(f"freeze {freeze_id} is missing")
            reach = await asyncio.to_thread(self._rows.reach, found[0])
            if reach.contained_at is not None or self._monotonic() > until:
                return await asyncio.to_thread(self._report, *found)
            await asyncio.sleep(LOOK_S)

    def _report(self, freeze: Freeze, lifted_at: int | None) -> Contained:
        reach = self._rows.reach(freeze)
        return Contained(freeze, lifted_at, reach, self._last_success(freeze, reach.contained_at or self._clock()))

    def _last_success(self, freeze: Freeze, until: int) -> Found | None:
        """From the audit log: the newest use that it stops and that succeeded, of the day before."""
        scope = freeze.scope
        wanted = {"out": "ok", "tenant": scope.value if scope.kind == "tenant" else freeze.tenant}
        if scope.kind in {"key", "caller"}:
            wanted["key" if scope.kind == "key" else "actor"] = scope.value
        after: tuple[str, int] | None = None
        for _ in range(PAGES):
            page = self._kms.search.records(
                since=freeze.at - LOOK_BACK_US, until=until, after=after, limit=PAGE, **wanted
            )
            for found in page:
                if found.record.get("op") in _STOPPED[freeze.mode] and self._in_scope(scope, found.record):
                    return found
            if len(page) < PAGE:
                return None
            after = (page[-1].log, page[-1].seq)
        return None

    def _in_scope(self, scope: Scope, record: Mapping[str, Any]) -> bool:
        if record["kind"] != "op" or record.get("dry"):
            return False
        match scope.kind:
            case "region":
                places = {record[n] for n in ("region", "creg") if n in record}
                return scope.value in self._kms.policy.registry.around(places)
            case "tier":
                return str(record.get("tier")) == scope.value
            case "hsm":
                return bool(record.get("region") == self._kms.fleet.group_of(scope.value).region)
            case "tag":
                name, _, value = scope.value.partition("=")
                with contextlib.suppress(KeyNotFound):
                    return (
                        "key" in record and self._kms.keystore.by_id(uuid.UUID(record["key"])).tags.get(name) == value
                    )
                return False
            case _:
                return True  # searched for already

    # ---- obeying ---------------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Read the freezes before the first request, and have a thread read them from now on."""
        await asyncio.to_thread(self._rows.enlist, self._worker, self._kms.node)
        self._beat_at = self._monotonic()
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._round, loop)
        self._thread = threading.Thread(target=self._follow, args=(loop,), name="freezes", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop reading: this worker serves no more."""
        self._ended.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)
        with contextlib.suppress(Exception):  # the database may be away; the lease ends by itself
            self._rows.leave(self._worker)

    async def run(self) -> None:
        """Say that this worker lives, and acknowledge what it has taken over, for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._period)
            self._changed.clear()
            try:
                await self._say()
            except Exception as error:  # the database may be away; the next round tries again
                log.warning("freezes not acknowledged", extra={"facts": {"error": type(error).__name__}})

    async def _say(self) -> None:
        now = self._monotonic()
        if now >= self._beat_at + BEAT_S:
            await asyncio.to_thread(self._rows.beat, self._worker)
            self._beat_at = now
        epoch = self._kms.freezes.now.epoch
        if epoch > self._acknowledged:
            with contextlib.suppress(IntegrityError):  # it was said, and the answer was lost
                await asyncio.to_thread(self._rows.acknowledge, self._worker, epoch)
            self._acknowledged = epoch

    def _follow(self, loop: asyncio.AbstractEventLoop) -> None:
        while not self._ended.is_set():
            self._wake.wait(self._period)
            self._wake.clear()
            if not self._ended.is_set():
                self._round(loop)

    def _round(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read what changed. What cannot be read lets the lease run out; what cannot be believed ends it."""
        freezes = self._kms.freezes
        at = self._monotonic()
        try:
            extent, known = self._rows.extent(), freezes.now.epoch
            if at > self._beat_at + BEATS_KEPT_S:
                raise TimeoutError("this worker could not say that it lives")
            if freezes.age_s is not None and extent == (known, known):
                freezes.confirm(at)
                return
            if extent[0] < (least := max(known, self._mark.value())):
                raise FreezeRowsDamaged(
                    f"freeze {least} was there and is missing: restore the database, or remove {self._mark.path} if it "
                    f"was set back on purpose"
                )
            now = self._rows.read()
            asyncio.run_coroutine_threadsafe(self._obey(at, now), loop).result(timeout=10)
            self._remember(now.epoch)
        except (FreezeRowsDamaged, MarkDamaged) as damaged:
            if freezes.damaged != str(damaged):
                alarm.critical(
                    "stored freezes were changed outside the service", extra={"facts": {"why": str(damaged)}}
                )
            freezes.distrust(str(damaged))
        except Exception as error:  # whatever it is, the lease goes on running
            log.warning("freezes could not be read", extra={"facts": {"error": type(error).__name__}})

    def _remember(self, epoch: int) -> None:
        try:
            self._mark.rise(epoch)
        except OSError as error:  # a full disk keeps nobody from obeying
            facts = {"file": str(self._mark.path), "error": type(error).__name__}
            log.warning("the newest freeze is not remembered on this node", extra={"facts": facts})

    async def _obey(self, at: float, now: InForce) -> None:
        # On the event loop: whatever was decided by the old freezes has been sent, or is looked at again.
        self._kms.freezes.confirm(at, now)
        self._changed.set()
