"""Exit drills: one HSM exchanged for another under load, proven key by key, measured from the audit log.

A drill is a row that some worker moves on while it holds the drill's lease; after that worker's death another one goes on
where the row says. Steps: `verify` every key version on the new HSM, `observe` after the switch, `confirm`. Until it is
confirmed, an abort puts everything back in one transaction.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection

from audit.log import Change, ChangeFailed, Unavailable
from audit.search import Found
from keystore import Admin, Exchange, HsmUnavailable, NoSuchHsm, Plan, Proof
from service.kms import Ask, Kms
from service.outcome import HsmStateInvalid, NotFound, RequestInvalid
from service.rows import Lease, LeaseLost, NoSuchOperation, Operation, OperationMoved, Operations

log: Final = logging.getLogger("skms.drills")
KIND: Final = "drill"
LEASE_S: Final = 10
KEYS_PER_CHUNK: Final = 20
ROUNDS: Final = 50  # of catching up with keys that change, before the drill gives up
SWITCH_US: Final = 2_000_000  # how long after the switch a request counts as `switch` in the report
DATA_PLANE: Final = frozenset(
    {"encrypt", "decrypt", "rewrap", "data_key", "unwrap_data_key", "sign", "verify", "mac", "verify_mac", "random"}
)


class KeysChanged(Exception):
    """A key changed between its proof and the switch: it is proven first."""


@dataclass(frozen=True, slots=True)
class ExitDrill:
    """What is asked for: `rate` key versions a second are proven, `observe_s` seconds are watched after the switch.

    The report compares with the `window_s` seconds before the drill.
    """

    source: str
    target: str
    observe_s: int = 30
    rate: int = 500
    window_s: int = 60


class Drills:
    """Drills of this installation: what callers ask of them, and the job that moves them on."""

    def __init__(
        self,
        kms: Kms,
        operations: Operations,
        lease: Lease,
        *,
        owner: str,
        clock: Callable[[], int],
        period_s: float = 0.25,
    ) -> None:
        self._kms, self._operations, self._lease = kms, operations, lease
        self._owner, self._clock, self._period = owner, clock, period_s
        kms.hsm_changes_allowed = self.guard

    # ---- asked -----------------------------------------------------------------------------------------------------

    async def start(self, ask: Ask, wanted: ExitDrill, *, operation_id: str) -> Operation:
        """Begin an exit drill, if the new HSM is up and supports every kind of key in use."""
        made: list[Operation] = []

        def plan() -> Plan:
            drill = self._planned(wanted, operation_id)
            made.append(drill)

            def write(connection: Connection) -> None:
                self._operations.insert(connection, drill)
                others = [o for o in self._operations.running(connection, KIND) if o.id != drill.id]
                if any(o.parameters["region"] == drill.parameters["region"] for o in others):
                    raise HsmStateInvalid(f"drill {others[0].id} runs in this region: end it first")

            return Plan(key=None, write=write, applied=lambda: None)

        parameters = {
            "from": wanted.source,
            "to": wanted.target,
            "observe_s": wanted.observe_s,
            "rate": wanted.rate,
            "drill": operation_id,
        }
        await self._kms.change_installation(ask, "start_drill", "hsmDrill", parameters, plan)
        return made[0]

    def _planned(self, wanted: ExitDrill, operation_id: str) -> Operation:
        if wanted.source == wanted.target:
            raise RequestInvalid(("/to", "same", "name two HSMs"))
        group = self._kms.fleet.group_of(wanted.source)
        try:
            members = {name: group.member(name) for name in (wanted.source, wanted.target)}
        except NoSuchHsm:
            raise RequestInvalid(("/to", "other_region", f"name an HSM of region {group.region}")) from None
        if told := self._kms.compliance.spread(self._kms.policy.registry, group.region, wanted.target):
            raise HsmStateInvalid(f"material would leave its key's residency: {told}")
        exchange = self._exchange(wanted.source, wanted.target)
        epoch, now = exchange.epoch(), self._clock()
        token = members[wanted.source].token
        try:
            total = exchange.check()
        except HsmUnavailable as error:
            raise HsmStateInvalid(str(error)) from None
        parameters = {
            "from": wanted.source,
            "to": wanted.target,
            "region": group.region,
            "vendor": token.vendor if token is not None else "unknown",
            "observe_s": wanted.observe_s,
            "rate": wanted.rate,
            "window_s": wanted.window_s,
            "admin": {name: str(member.admin) for name, member in members.items()},
        }
        position = {"after": None, "epoch": epoch, "rounds": 0}
        return Operation(operation_id, KIND, "running", "verify", parameters, position, 0, total, {}, now, now)

    async def show(self, ask: Ask, operation_id: str, *, op: str = "get_drill") -> Operation:
        """One drill."""
        return await self._kms.read_installation(ask, op, "hsmDrill", lambda: self._get(operation_id))

    async def every(self, ask: Ask) -> list[Operation]:
        """All drills, newest first."""
        return await self._kms.read_installation(
            ask, "list_drills", "hsmDrill", lambda: self._operations.find(kind=KIND, limit=500)
        )

    async def report(self, ask: Ask, operation_id: str) -> dict[str, Any]:
        """What the audit log says of a drill."""
        return await self._kms.read_installation(
            ask, "drill_report", "hsmDrill", lambda: self._report(self._get(operation_id))
        )

    async def abort(self, ask: Ask, operation_id: str) -> Operation:
        """End a drill before it is confirmed: both HSMs are wanted as they were, nothing is lost."""

        def plan() -> Plan:
            drill = self._running(operation_id)
            back = {name: Admin(admin) for name, admin in drill.parameters["admin"].items()}
            outcome = {**drill.outcome, "seconds": self._seconds(drill), "why": "aborted"}
            return self._ending(drill, "cancelled", back if drill.step != "verify" else {}, outcome)

        return await self._end(ask, "abort_drill", operation_id, plan)

    async def confirm(self, ask: Ask, operation_id: str) -> Operation:
        """Accept the exchange: the old HSM is drained, and may leave the configuration."""

        def plan() -> Plan:
            drill = self._running(operation_id)
            if drill.step != "confirm":
                raise HsmStateInvalid(f"drill {drill.id} is at step {drill.step}: it can be confirmed after `observe`")
            left = {drill.parameters["from"]: Admin.DRAINED}
            return self._ending(drill, "succeeded", left, {**drill.outcome, "seconds": self._seconds(drill)})

        return await self._end(ask, "confirm_drill", operation_id, plan)

    async def _end(self, ask: Ask, op: str, operation_id: str, plan: Callable[[], Plan]) -> Operation:
        await self._kms.change_installation(ask, op, "hsmDrill", {"drill": operation_id}, plan)
        return await asyncio.to_thread(self._get, operation_id)

    def _ending(self, drill: Operation, state: str, admin: Mapping[str, Admin], outcome: Mapping[str, Any]) -> Plan:
        write_admin, applied = self._kms.fleet.plan(admin) if admin else (lambda _: None, lambda: None)

        def write(connection: Connection) -> None:
            try:
                self._operations.move(connection, drill, state=state, outcome=outcome)
            except OperationMoved as moved:
                raise HsmStateInvalid(f"{moved}: look at it again") from None
            write_admin(connection)

        return Plan(key=None, write=write, applied=applied)

    def guard(self, hsm: str) -> None:
        """HsmStateInvalid while a drill has this HSM."""
        for drill in self._operations.find(kind=KIND, state="running"):
            if hsm in {drill.parameters["from"], drill.parameters["to"]}:
                raise HsmStateInvalid(f"drill {drill.id} has HSM {hsm}: confirm or abort it first")

    def _get(self, operation_id: str) -> Operation:
        try:
            return self._operations.get(operation_id)
        except NoSuchOperation:
            raise NotFound("no such drill") from None

    def _running(self, operation_id: str) -> Operation:
        drill = self._get(operation_id)
        if drill.state != "running":
            raise HsmStateInvalid(f"drill {drill.id} has {drill.state} already")
        return drill

    # ---- the job ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Move the drills on, for ever."""
        while True:
            await asyncio.sleep(self._period)
            try:
                await self.once()
            except Exception as error:  # the database may be away; the next round tries again
                log.warning("drill round failed", extra={"facts": {"error": type(error).__name__}})

    async def once(self) -> None:
        """Move each running drill on by a step or a chunk, if this worker holds or gets its lease."""
        for drill in await asyncio.to_thread(self._operations.find, kind=KIND, state="running"):
            if drill.step == "confirm":
                continue  # an operator's turn
            name = f"drill/{drill.id}"
            epoch = await asyncio.to_thread(self._lease.acquire, name, self._owner, LEASE_S)
            if epoch is None:
                continue
            try:
                await self._advance(drill, (name, epoch))
            except (OperationMoved, LeaseLost) as gone:  # aborted, or another worker's by now
                log.info("drill moved on elsewhere", extra={"facts": {"drill": drill.id, "reason": str(gone)}})
            except HsmUnavailable as error:  # an HSM is away for a moment: the drill waits, and may be aborted
                log.warning("drill waits", extra={"facts": {"drill": drill.id, "reason": str(error)}})

    async def _advance(self, drill: Operation, lease: tuple[str, int]) -> None:
        if drill.step == "observe":
            if self._clock() >= drill.position["switched_at"] + drill.parameters["observe_s"] * 1_000_000:
                figures = await asyncio.to_thread(self._figures, drill)
                await self._step(drill, lease, "observed", step="confirm", outcome=figures)
            return
        exchange = self._exchange(drill.parameters["from"], drill.parameters["to"])
        while True:
            begun = self._clock()
            renewed = await asyncio.to_thread(self._lease.acquire, lease[0], self._owner, LEASE_S)
            if renewed != lease[1]:
                raise LeaseLost(f"lease {lease[0]} moved on")
            proofs, position, switching = await asyncio.to_thread(self._prove, drill, exchange)
            if not await self._recorded(drill, lease, proofs):
                return
            done = min(drill.total, drill.done + len(proofs)) if not switching else drill.total
            drill = await asyncio.to_thread(self._operations.save, drill, lease, done=done, position=position)
            if switching:
                if await self._switched(drill, lease, exchange):
                    return
                if position["rounds"] > ROUNDS:
                    await self._failed(drill, lease, "keys_change_too_fast")
                    return
            due = len(proofs) / drill.parameters["rate"] - (self._clock() - begun) / 1e6
            await asyncio.sleep(max(0.0, due))

    def _prove(self, drill: Operation, exchange: Exchange) -> tuple[list[Proof], dict[str, Any], bool]:
        """(proofs of the next keys, the position after them, whether all keys are proven then)."""
        position = dict(drill.position)
        if position["after"] != "end":
            after = position["after"]
            proofs, last = exchange.chunk(None if after is None else uuid.UUID(after), KEYS_PER_CHUNK)
            position["after"] = "end" if last is None else str(last)
            return (proofs or exchange.secrets()) if last is None else proofs, position, False
        # Keys that were made or changed since the drill began. What changes during this round is found by the next one.
        now = exchange.epoch()
        proofs = exchange.changed(position["epoch"])
        return proofs, {**position, "epoch": now, "rounds": position["rounds"] + 1}, True

    async def _recorded(self, drill: Operation, lease: tuple[str, int], proofs: Sequence[Proof]) -> bool:
        """Record each proof; whether none is against the exchange."""
        target = drill.parameters["to"]
        records = [
            self._kms.admin_record(
                "drill_key",
                intent=drill.id,
                tenant=proof.tenant,
                key=str(proof.key),
                kver=proof.number,
                hsm=target,
                region=drill.parameters["region"],
                out="error" if proof.wrong else "ok",
                why=proof.wrong or None,
            )
            for proof in proofs
        ]
        for at in range(0, len(records), 256):
            await self._kms.log.append_many(records[at : at + 256])
        wrong = [f"{p.key}/{p.number}: {p.wrong}" for p in proofs if p.wrong]
        if wrong:
            await self._failed(drill, lease, "mismatch", mismatches=wrong[:100])
        return not wrong

    async def _switched(self, drill: Operation, lease: tuple[str, int], exchange: Exchange) -> bool:
        """Make the new HSM the active one and the old one its fallback, if no key changed since its proof."""
        wanted = {drill.parameters["to"]: Admin.ACTIVE, drill.parameters["from"]: Admin.FALLBACK}
        write_admin, applied = await asyncio.to_thread(self._kms.fleet.plan, wanted)
        position = {**drill.position, "switched_at": self._clock()}

        def write(connection: Connection) -> None:
            write_admin(connection)  # from here on no other change commits before this one
            if exchange.open_changes(connection, drill.position["epoch"]):
                raise KeysChanged(f"keys of region {drill.parameters['region']} changed meanwhile")

        try:
            await self._step(drill, lease, "switched", write, applied, step="observe", position=position)
        except KeysChanged:
            return False
        return True

    async def _failed(self, drill: Operation, lease: tuple[str, int], why: str, **outcome: Any) -> None:
        figures = {**outcome, "why": why, "seconds": self._seconds(drill)}
        await self._step(drill, lease, why, state="failed", outcome=figures)

    async def _step(
        self,
        drill: Operation,
        lease: tuple[str, int],
        why: str,
        write: Callable[[Connection], None] = lambda _: None,
        applied: Callable[[], None] = lambda: None,
        **changes: Any,
    ) -> None:
        """Record a step and take it, in one transaction."""

        def both(connection: Connection) -> None:
            Lease.fence(connection, *lease)
            write(connection)
            self._operations.move(connection, drill, **changes)

        out = "error" if changes.get("state") == "failed" else "ok"
        record = self._kms.admin_record("drill_step", intent=drill.id, hsm=drill.parameters["to"], out=out, why=why)
        try:
            await self._kms.log.append(record, change=Change(both, applied))
        except ChangeFailed as failed:
            raise failed.__cause__ or Unavailable("the step was undone") from None

    def _exchange(self, source: str, target: str) -> Exchange:
        return self._kms.fleet.exchange(self._kms.keystore, source, target)

    # ---- the figures -------------------------------------------------------------------------------------------------

    def _figures(self, drill: Operation) -> dict[str, Any]:
        """What is kept of a drill beside its records: time to exit, requests, refused requests, keys."""
        report = self._report(drill)
        return {
            "seconds": self._seconds(drill),
            "keys": report["keys"]["versions"],
            "requests": report["requests"],
            "refused": sum(report["refused"].values()),
        }

    def _seconds(self, drill: Operation) -> float:
        return (self._clock() - drill.created_at) / 1e6

    def _report(self, drill: Operation) -> dict[str, Any]:
        end = drill.updated_at if drill.state != "running" else self._clock()
        since = drill.created_at - drill.parameters["window_s"] * 1_000_000
        counted = measure(self._kms.search.scan(since=since, until=end), drill, until=end)
        shown = {n: drill.parameters[n] for n in ("from", "to", "region", "vendor")}
        return {"id": drill.id, "state": drill.state, "step": drill.step, **shown, **counted}


@dataclass(slots=True)
class _Phase:
    """Requests of one span of time."""

    since: int
    until: int
    requests: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    took: list[int] = field(default_factory=list)

    def shown(self) -> dict[str, Any]:
        cuts = statistics.quantiles(self.took, n=100, method="inclusive") if len(self.took) > 1 else []
        return {
            "from_us": self.since,
            "to_us": self.until,
            "requests": self.requests,
            "refused": dict(self.refused),
            "p50_us": round(cuts[49]) if cuts else None,
            "p99_us": round(cuts[98]) if cuts else None,
        }


def measure(records: Iterable[Found], drill: Operation, *, until: int) -> dict[str, Any]:
    """The figures of a drill, from audit records alone; `logs` names those that were read, to count them again.

    A refused request is a data-plane operation that ended with an error of the HSM (`hsm_…`) from the drill's begin on.
    """
    begun, switched = drill.created_at, drill.position.get("switched_at", until)
    phases = {
        "before": _Phase(begun - drill.parameters["window_s"] * 1_000_000, begun),
        "verify": _Phase(begun, switched),
        "switch": _Phase(switched, min(until, switched + SWITCH_US)),
        "after": _Phase(min(until, switched + SWITCH_US), until),
    }
    logs: dict[str, list[int]] = {}
    proven: dict[tuple[str, int], bool] = {}
    steps = []
    for found in records:
        span = logs.setdefault(found.log, [found.seq, found.seq, 0])
        span[1], span[2] = found.seq, span[2] + 1
        record = found.record
        if record.get("intent") == drill.id and record.get("op") == "drill_key":
            proven[record["key"], record.get("kver", 0)] = record["out"] == "ok"
        elif record.get("intent") == drill.id and record.get("op") == "drill_step":
            steps.append(
                {"step": record["why"], "out": record["out"], "log": found.log, "seq": found.seq, "t": found.t}
            )
        elif record["kind"] == "op" and record.get("op") in DATA_PLANE:
            phase = next((p for p in phases.values() if p.since <= found.t < p.until), None)
            if phase is not None:
                _count(phase, record)
    during = [phases[name] for name in ("verify", "switch", "after")]
    refused: Counter[str] = sum((p.refused for p in during), Counter())
    return {
        "started_us": begun,
        "switched_us": drill.position.get("switched_at"),
        "ended_us": until,
        "seconds": (until - begun) / 1e6,
        "keys": {
            "versions": sum(proven.values()),
            "keys": len({key for key, _ in proven}),
            "mismatches": [f"{key}/{number}" for (key, number), right in proven.items() if not right],
        },
        "requests": sum(p.requests for p in during),
        "refused": dict(refused),
        "phases": {name: phase.shown() for name, phase in phases.items()},
        "steps": steps,
        "logs": [{"log": log, "first": s[0], "last": s[1], "records": s[2]} for log, s in sorted(logs.items())],
    }


def _count(phase: _Phase, record: Mapping[str, Any]) -> None:
    phase.requests += 1
    why = record.get("why", "")
    if record["out"] == "error" and why.startswith("hsm_"):
        phase.refused[why] += 1
    elif record["out"] == "ok" and "us" in record:
        phase.took.append(record["us"])
