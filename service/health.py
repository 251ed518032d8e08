"""Whether this node can serve: database, HSM canaries, audit log, policy. `/readyz` is 503 first when draining."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from keystore import Hsm
from service.kms import Kms

CANARY_PERIOD_S: Final = 10.0
STALE_COMMIT_S: Final = 180.0  # a `mark` is due every 60 s even when nothing happens


class Health:
    """Readiness of one node; canaries run in the background, answering never touches an HSM."""

    def __init__(self, kms: Kms, hsms: Mapping[str, Hsm], *, ping: Callable[[], None]) -> None:
        self._kms, self._hsms, self._ping = kms, hsms, ping
        self._canary: dict[str, tuple[bool, str]] = {}

    async def watch(self) -> None:
        """Run every HSM's canary each 10 s, for ever."""
        while True:
            await self.check_hsms()
            await asyncio.sleep(CANARY_PERIOD_S)

    async def check_hsms(self) -> None:
        """Run every HSM's canary once, off the event loop and with a deadline."""
        for region, hsm in self._hsms.items():
            try:
                await asyncio.wait_for(asyncio.to_thread(hsm.canary), 5.0)
                self._canary[region] = (True, "ok")
            except Exception as error:  # a canary that fails for any reason means: not ready
                self._canary[region] = (False, type(error).__name__)

    async def ready(self, *, full: bool) -> tuple[bool, dict[str, Any]]:
        """(ready, details). Only the platform role sees which part is not."""
        kms = self._kms
        checks: dict[str, tuple[bool, str]] = {
            "draining": (not kms.draining, "draining" if kms.draining else "no"),
            "audit": (kms.log.state == "RUNNING", kms.log.state),
            "audit_age": (kms.log.last_commit_age_s() < STALE_COMMIT_S, "last commit"),
            "database": await self._database(),
        }
        checks |= {f"hsm/{region}": self._canary.get(region, (False, "not checked yet")) for region in self._hsms}
        ready = all(ok for ok, _ in checks.values())
        answer: dict[str, Any] = {"status": "ready" if ready else "not_ready"}
        answer["policy"] = kms.policy.digest[:12]
        if kms.policy.development:
            answer["development_charter"] = True
        if full:
            answer["checks"] = {name: {"ok": ok, "detail": detail} for name, (ok, detail) in checks.items()}
        return ready, answer

    async def _database(self) -> tuple[bool, str]:
        started = time.monotonic()
        try:
            await asyncio.wait_for(asyncio.to_thread(self._ping), 2.0)
        except Exception as error:  # whatever the driver says, the node cannot serve
            return False, type(error).__name__
        return True, f"{(time.monotonic() - started) * 1e3:.0f} ms"
