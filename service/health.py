"""Whether this node can serve: database, HSM canaries, audit log, policy. `/readyz` is 503 first when draining."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any, Final

from audit.log import Unavailable
from keystore import Admin, Fleet, HsmGroup
from policy.freeze import LEASES
from service.kms import Kms

CANARY_PERIOD_S: Final = 10.0
RETRY_S: Final = 1.0  # how often an HSM that is out is asked whether it is back
CANARY_DEADLINE_S: Final = 5.0
STALE_COMMIT_S: Final = 180.0  # a `mark` is due every 60 s even when nothing happens


class Health:
    """Readiness of one node; canaries run in the background, answering never touches an HSM.

    An HSM that is out is probed by this task alone: callers go to the other members of its group.
    """

    def __init__(self, kms: Kms, fleet: Fleet, *, ping: Callable[[], None]) -> None:
        self._kms, self._fleet, self._ping = kms, fleet, ping
        self._canary: dict[str, tuple[bool, str]] = {}

    async def watch(self) -> None:
        """Run every HSM's canary each 10 s, and each second those of HSMs that are out, for ever."""
        due = time.monotonic() + CANARY_PERIOD_S
        while True:
            await asyncio.sleep(RETRY_S)
            everyone = time.monotonic() >= due
            if everyone:
                due = time.monotonic() + CANARY_PERIOD_S
            await self.check_hsms(everyone=everyone)

    async def check_hsms(self, *, everyone: bool) -> None:
        """Run canaries once, side by side, off the event loop and each with a deadline."""
        chosen = [
            (group, member.name)
            for group in self._fleet
            for member in group.members()
            if member.admin is not Admin.DRAINED and (everyone or member.name in group.out())
        ]
        await asyncio.gather(*(self._check(group, name) for group, name in chosen))

    async def _check(self, group: HsmGroup, name: str) -> None:
        opened = group.member(name).token is not None
        try:
            await asyncio.wait_for(asyncio.to_thread(group.probe, name), CANARY_DEADLINE_S)
            found = (True, "ok")
            if not opened and group.member(name).token is not None:
                await asyncio.to_thread(self._fleet.remember_audit_keys)
        except Exception as error:  # a canary that fails for any reason means: this HSM does not serve
            if isinstance(error, TimeoutError):
                group.suspect(name, "the canary did not answer in time")
            found = (False, type(error).__name__)
        was = self._canary.get(name)
        self._canary[name] = found
        if was is not None and was[0] != found[0]:
            with contextlib.suppress(Unavailable):  # readiness tells of the log; the canaries go on
                await self._kms.note("hsm_back" if found[0] else "hsm_lost", hsm=name)

    async def ready(self, *, full: bool) -> tuple[bool, dict[str, Any]]:
        """(ready, details). Only the platform role sees which part is not."""
        kms = self._kms
        checks: dict[str, tuple[bool, str]] = {
            "draining": (not kms.draining, "draining" if kms.draining else "no"),
            "audit": (kms.log.state == "RUNNING", " ".join(filter(None, (kms.log.state, kms.log.reason)))),
            "audit_age": (kms.log.last_commit_age_s() < STALE_COMMIT_S, "last commit"),
            "database": await self._database(),
            "freezes": self._freezes(),
        }
        checks |= {f"hsm/{group.region}": self._group(group) for group in self._fleet}
        ready = all(ok for ok, _ in checks.values())
        answer: dict[str, Any] = {"status": "ready" if ready else "not_ready"}
        answer["policy"] = kms.policy.digest[:12]
        if kms.policy.development:
            answer["development_charter"] = True
        if kms.shadow.mismatch:
            answer["policy_oracle"] = (
                "mismatch: only what both engines allow is allowed; start this node again and report it"
            )
        if full:
            answer["checks"] = {name: {"ok": ok, "detail": detail} for name, (ok, detail) in checks.items()}
            oracle = f"{kms.shadow.checked} decisions checked, {kms.shadow.mismatches} different"
            answer["checks"]["policy_oracle"] = {"ok": not kms.shadow.mismatch, "detail": oracle}
        return ready, answer

    def _group(self, group: HsmGroup) -> tuple[bool, str]:
        """A region is ready while one of its HSMs can serve."""
        told = []
        for member in group.members():
            _, said = self._canary.get(member.name, (False, "not checked yet"))
            told.append(f"{member.name} {member.admin} {member.state} {said}")
        return group.usable() > 0, "; ".join(told)

    def _freezes(self) -> tuple[bool, str]:
        """Whether the node knows what is frozen; the strictest lease counts."""
        known, age = self._kms.freezes, self._kms.freezes.age_s
        told = "not read" if age is None else f"{len(known.now.freezes)} in force, read {age:.1f} s ago"
        return age is not None and age <= min(LEASES.values()), known.damaged or told

    async def _database(self) -> tuple[bool, str]:
        started = time.monotonic()
        try:
            await asyncio.wait_for(asyncio.to_thread(self._ping), 2.0)
        except Exception as error:  # whatever the driver says, the node cannot serve
            return False, type(error).__name__
        return True, f"{(time.monotonic() - started) * 1e3:.0f} ms"
