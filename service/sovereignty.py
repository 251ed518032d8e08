"""Gathers what the figures of `policy.sovereignty` are counted from, and says of each where it can be counted again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from keystore import EXTERNAL, Key, KeyNotFound, KeyState
from policy import Caller, Policy, Request, sovereignty
from policy.places import SystemEntry
from policy.rows import FreezeRows
from policy.sovereignty import Control, Diversity, Drill, Exit, Held, Stop, System
from service.kms import Ask, Kms, facts_of
from service.rows import Operations

_FRESH_S: Final = 60.0  # metrics are counted no more often
UNKNOWN: Final = "unknown"  # the supplier of an HSM for which the configuration names none
QUERIES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "critical_systems": "systems of charter.yaml; GET /v1/keys/{key}, /v1/compliance, /v1/exceptions, /v1/audit/status",
        "exit": "GET /v1/drills, and GET /v1/drills/{id}/report for each: counted from the audit records of its time",
        "suppliers": "GET /v1/compliance: keys by tier and home, HSMs and their suppliers; GET /v1/hsms",
        "containment": "GET /v1/freezes, and GET /v1/freezes/{id} for each",
        "deployments": "no attestation and no evaluation is recorded by this release: none counts",
    }
)


@dataclass(frozen=True, slots=True)
class Figures:
    """All figures at a time (us), under a policy, and how far the log reached by then."""

    at: int
    policy: str
    checkpoint: tuple[int, str] | None  # size and root hash
    systems: tuple[System, ...]
    control: Control
    exits: tuple[Exit, ...]
    diversity: Diversity
    containment: sovereignty.Containment
    nodes: int


class Sovereignty:
    """The figures of one installation, as this node sees it. Calls the database."""

    def __init__(self, kms: Kms, operations: Operations, freezes: FreezeRows, *, clock: Callable[[], int]) -> None:
        self._kms, self._operations, self._freezes, self._clock = kms, operations, freezes, clock
        self._latest: tuple[float, Figures] | None = None

    async def report(self, ask: Ask) -> Figures:
        """The figures, for the installation's own people."""
        return await self._kms.read_installation(ask, "get_sovereignty", "readCompliance", self.figures)

    def lately(self) -> Figures:
        """The figures of at most a minute ago."""
        if self._latest is None or time.monotonic() - self._latest[0] > _FRESH_S:
            self._latest = time.monotonic(), self.figures()
        return self._latest[1]

    def figures(self) -> Figures:
        """The figures now."""
        now, bundle = self._clock(), self._kms.policy
        systems = tuple(
            System(name, about.tenant, about.critical, self._gaps(bundle, about, now))
            for name, about in sorted(bundle.registry.systems.items())
        )
        drills = [
            Drill(
                d.parameters["vendor"],
                d.state == "succeeded",
                float(d.outcome.get("seconds", 0)),
                int(d.outcome.get("refused", 0)),
                d.updated_at,
            )
            for d in self._operations.find(kind="drill", limit=1_000)
            if d.state != "running"
        ]
        reached = [(freeze, self._freezes.reach(freeze)) for freeze, _ in self._freezes.every()]
        # Of one whose workers are long gone nobody can tell any more how long they took.
        stops = [Stop(f.at, r.contained_at, f.drill, f.began) for f, r in reached if r.acknowledged or r.silent]
        held = self._held()
        vendors = {supplier for h in held for supplier in h.suppliers}
        return Figures(
            at=now,
            policy=bundle.digest[:12],
            checkpoint=self._kms.log.checkpoint,
            systems=systems,
            control=sovereignty.control(systems),
            exits=sovereignty.exits(drills, vendors=vendors, now=now),
            diversity=sovereignty.diversity(held, approved=bundle.registry.suppliers),
            containment=sovereignty.containment(stops, now=now),
            nodes=len(self._freezes.serving()),
        )

    def _held(self) -> list[Held]:
        """The keys of the regions that this node has HSMs of."""
        supplied, groups = self._kms.bars.hsms(), self._kms.fleet.groups
        found = []
        for kind, count in self._kms.keystore.placed(None):
            group = groups.get(kind.home)
            if group is not None:
                names = [supplied.get(hsm) or UNKNOWN for hsm in group.names if hsm in supplied]
                found.append(Held(kind.tier, count, tuple(names)))
        return found

    def _gaps(self, bundle: Policy, about: SystemEntry, now: int) -> tuple[str, ...]:
        """The criteria that a system does not meet."""
        keys: list[Key] = []
        gaps: set[str] = set()
        for name in about.stores.values():
            try:
                key = self._kms.keystore.find(about.tenant, name)
            except KeyNotFound:
                gaps.add("mapped")
                continue
            if key.state is not KeyState.ACTIVE or key.delete_at is not None:
                gaps.add("mapped")
            keys.append(key)
        for key in keys:
            if self._kms.bars.verdict(bundle.registry, key, now).gaps:
                gaps.add("residency")
            if key.origin == EXTERNAL:
                gaps.add("sole_control")
            if released_to_vendors(bundle, key, now):
                gaps.add("reason")
        open_ids = {key for kind in ("reach", "egress") for w in self._kms.exceptions.live_now(kind) for key in w.keys}
        if open_ids & {str(key.id) for key in keys} or not self._kms.exceptions.trusted:
            gaps.add("no_exception")
        if not self._verified():
            gaps.add("verified")
        return tuple(name for name in sovereignty.CRITERIA if name in gaps)

    def _verified(self) -> bool:
        log = self._kms.log
        return log.state == "RUNNING" and log.checkpoint is not None and log.exposed_s < sovereignty.DAY_S


def released_to_vendors(bundle: Policy, key: Key, now: int) -> bool:
    """Whether the policy lets anybody decrypt with a key for a reason that is the vendor's, with the best facts there are."""
    facts = replace(facts_of(key, key.latest_number), state=str(KeyState.ACTIVE))
    places = bundle.registry.expand(["approved"])
    return any(
        bundle.decide(
            Request(
                caller=Caller("", "workload", key.tenant, frozenset({"workload"}), frozenset({place}), 5, "mtls"),
                action="decrypt",
                resource=facts,
                now=now // 1_000_000,
                hsm=key.home,
                via=frozenset({key.home}),
                dest=frozenset({place}),
                purpose=key.purposes[0] if key.purposes else "",
                reason="vendor-initiated",
            )
        ).allowed
        for place in sorted(places)
    )


async def follow(figures: Sovereignty, *, period_s: float = _FRESH_S) -> None:
    """Count them each minute, for ever, so that whoever reads the metrics waits for nothing."""
    while True:
        await asyncio.to_thread(figures.lately)
        await asyncio.sleep(period_s)
