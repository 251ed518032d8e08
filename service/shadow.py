"""The oracle in service: a sample of the decisions is made again by Cedar itself, on a thread of its own.

One in a thousand, chosen by a hash of the decision's id, which no caller chooses. Both must always agree; once they do
not, this worker allows only what both engines allow, until it is started again, and says so in log, metric and `/readyz`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from policy import Decision, Policy, Request

log: Final = logging.getLogger("skms.policy")

ONE_IN: Final = 1_000
_WAITING: Final = 64  # samples; more than that means the oracle is slow, and the sample gets thinner


class Shadow:
    """Decides, and has a sample of the decisions checked. `one_in` is how many decisions one sample stands for."""

    def __init__(self, *, one_in: int = ONE_IN) -> None:
        self._one_in = one_in
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy-oracle")
        self._room = threading.Semaphore(_WAITING)
        self.checked = 0
        self.mismatches = 0

    @property
    def mismatch(self) -> bool:
        """Whether the engines ever came to different decisions here."""
        return self.mismatches > 0

    def decide(self, policy: Policy, request: Request, decision_id: str) -> Decision:
        """The policy's decision. After a mismatch it allows only what Cedar allows too."""
        if self.mismatches:
            return policy.decide_twice(request)
        decision = policy.decide(request)
        if zlib.crc32(decision_id.encode()) % self._one_in == 0 and self._room.acquire(blocking=False):
            with contextlib.suppress(RuntimeError):  # closed: the node is stopping
                self._thread.submit(self._check, policy, request, decision, decision_id)
        return decision

    def close(self) -> None:
        """Finish the checks that wait."""
        self._thread.shutdown(wait=True)

    def _check(self, policy: Policy, request: Request, decision: Decision, decision_id: str) -> None:
        why = "different decisions"
        try:
            agreed = policy.agrees(request, decision)
        except Exception as error:  # an oracle that fails has not agreed
            agreed, why = False, type(error).__name__
        self._room.release()
        self.checked += 1
        if not agreed:
            self.mismatches += 1
            facts = {"decision": decision_id, "action": request.action, "policy": policy.digest, "why": why}
            log.critical("policy engines disagree: only what both allow is allowed from now on", extra={"facts": facts})
