"""What needs more than one person: asked by one, approved by others with keys of their own, executed once by the service.

Approvals are signatures over the digest of the exact request (`service.approvals`); who hands them in does not matter. The
one that completes the quorum executes the request, in the transaction that stores it: two at once cannot both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection

from keystore import Plan
from service.approvals import Approval, ApprovalRefused, Approver, Asked, check
from service.kms import Ask, Kms
from service.outcome import ApprovalClosed, NotFound
from service.rows import ApprovalRows, StoredApproval

OPEN: Final = "open"
# Executes a request in the caller's transaction, with the proof to be stored; what it returns runs after COMMIT.
Execute = Callable[[Connection, Asked, Mapping[str, object]], Callable[[], None]]


@dataclass(frozen=True, slots=True)
class Rule:
    """Who approves, how many it takes, and for how long a request may collect them."""

    approvers: tuple[Approver, ...]
    needed: int
    lifetime_s: int
    installation: str


@dataclass(frozen=True, slots=True)
class Standing:
    """A request and how it stands: open, executed, cancelled or expired; `approvers` are those who count now."""

    asked: Asked
    state: str
    approvers: tuple[str, ...]
    needed: int


class Quorum:
    """The requests of this installation. `clock` gives microseconds."""

    def __init__(self, kms: Kms, rows: ApprovalRows, rule: Rule, *, clock: Callable[[], int]) -> None:
        self._kms, self._rows, self._rule, self._clock = kms, rows, rule, clock
        self._execute: dict[str, Execute] = {}

    def executes(self, kind: str, execute: Execute) -> None:
        """How requests of a kind are executed."""
        self._execute[kind] = execute

    async def ask(
        self, ask: Ask, kind: str, action: str, wanted: Callable[[], tuple[str | None, Mapping[str, object]]]
    ) -> Standing:
        """Store a request for others to approve, if the caller may ask; ApprovalRefused if nobody could approve it.

        `wanted` gives the tenant it concerns and its parameters; its id is the decision's.
        """
        made: list[Asked] = []

        def decide(decision: str) -> Asked:
            tenant, parameters = wanted()
            now, rule = self._clock(), self._rule
            expires = now + rule.lifetime_s * 1_000_000
            asked = Asked(decision, rule.installation, kind, tenant, parameters, ask.caller.id, now, expires)
            able = [a for a in rule.approvers if not self._unfit(a, asked)]
            if len(able) < rule.needed:
                raise ApprovalRefused(
                    f"{len(able)} approvers may approve this and {rule.needed} must: see [[approvals.approver]]"
                )
            made.append(asked)
            return asked

        def plan(asked: Asked) -> Plan:
            new = StoredApproval(asked.id, asked.tenant, asked.to_json(), OPEN, {}, asked.created)
            return Plan(key=None, write=lambda c: self._rows.insert(c, new), applied=lambda: None)

        await self._kms.change_own(ask, kind, action, {"kind": kind}, decide, plan)
        return Standing(made[0], OPEN, (), self._rule.needed)

    async def sign(self, ask: Ask, approval_id: str, approver: str, signature: bytes) -> Standing:
        """Add a signature, and execute the request if that completes the quorum.

        NotFound, ApprovalClosed, ApprovalRefused; whatever the execution raises undoes the signature too.
        """
        after: list[Callable[[], None]] = []

        def write(connection: Connection) -> None:
            stored = self._opened(self._rows.held(connection, approval_id), ask)
            asked = Asked.of(stored.content)
            self._signed(asked, stored, Approval(approver, asked.kind, asked.digest(), signature))
            changed = dataclasses.replace(stored, approvals={**stored.approvals, approver: signature.hex()})
            counted = self._counted(asked, changed)
            if len(counted) >= self._rule.needed:
                proof = {"request": asked.to_json(), "approvals": {n: changed.approvals[n] for n in counted}}
                after.append(self._execute[asked.kind](connection, asked, proof))
                changed = dataclasses.replace(changed, state="executed")
            self._rows.update(connection, changed)

        def applied() -> None:
            for run in after:
                run()

        parameters = {"approval": approval_id, "approver": approver, "signature": signature.hex()}
        plan = Plan(key=None, write=write, applied=applied)
        await self._kms.change_own(
            ask, "sign_approval", "approve", parameters, lambda _: None, lambda _: plan, approval=approval_id
        )
        return self._found(ask, approval_id)

    async def cancel(self, ask: Ask, approval_id: str) -> Standing:
        """Withdraw a request before it is executed: whoever may ask for such a thing may."""

        def write(connection: Connection) -> None:
            stored = self._opened(self._rows.held(connection, approval_id), ask)
            self._rows.update(connection, dataclasses.replace(stored, state="cancelled"))

        plan = Plan(key=None, write=write, applied=lambda: None)
        await self._kms.change_own(
            ask,
            "cancel_approval",
            "liftFreeze",
            {"approval": approval_id},
            lambda _: None,
            lambda _: plan,
            approval=approval_id,
        )
        return self._found(ask, approval_id)

    async def show(self, ask: Ask, approval_id: str) -> Standing:
        """One request; NotFound."""
        return await self._kms.read_own(ask, "get_approval", "readApprovals", lambda: self._found(ask, approval_id))

    async def every(self, ask: Ask) -> list[Standing]:
        """The requests of the caller's tenant, or all for the installation's own people, newest first."""

        def read() -> list[Standing]:
            return [self._standing(stored) for stored in self._rows.list(ask.caller.tenant)]

        return await self._kms.read_own(ask, "list_approvals", "readApprovals", read)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _found(self, ask: Ask, approval_id: str) -> Standing:
        return self._standing(self._visible(self._rows.get(approval_id), ask))

    @staticmethod
    def _visible(stored: StoredApproval | None, ask: Ask) -> StoredApproval:
        if stored is None or ask.caller.tenant not in {None, stored.tenant}:
            raise NotFound("no such request")
        return stored

    def _opened(self, found: StoredApproval | None, ask: Ask) -> StoredApproval:
        stored = self._visible(found, ask)
        state = self._standing(stored).state
        if state != OPEN:
            raise ApprovalClosed(f"request {stored.id} is {state}")
        return stored

    def _standing(self, stored: StoredApproval) -> Standing:
        asked = Asked.of(stored.content)
        late = stored.state == OPEN and self._clock() > asked.expires
        counted = self._counted(asked, stored)
        return Standing(asked, "expired" if late else stored.state, counted, self._rule.needed)

    def _counted(self, asked: Asked, stored: StoredApproval) -> tuple[str, ...]:
        """Who approves as of now: an approver who left the configuration, or whose key did, counts no more."""
        found = []
        for name, signature in sorted(stored.approvals.items()):
            try:
                self._fit(asked, Approval(name, asked.kind, asked.digest(), bytes.fromhex(signature)))
            except ApprovalRefused:
                continue
            found.append(name)
        return tuple(found)

    def _signed(self, asked: Asked, stored: StoredApproval, new: Approval) -> None:
        """ApprovalRefused unless this is one more approver's right signature over exactly this request."""
        signer = self._fit(asked, new)
        raw = signer.key.public_bytes_raw()
        others = [a for a in self._rule.approvers if a.name in stored.approvals]
        if any(a.name == signer.name or a.key.public_bytes_raw() == raw for a in others):
            raise ApprovalRefused(f"{signer.name} has approved already: each officer counts once")

    def _fit(self, asked: Asked, approval: Approval) -> Approver:
        approver = check(approval, self._rule.approvers, kind=asked.kind, digest=asked.digest())
        if why := self._unfit(approver, asked):
            raise ApprovalRefused(f"{approver.name} {why}")
        return approver

    def _unfit(self, approver: Approver, asked: Asked) -> str:
        """Why somebody may not approve this; empty if nothing speaks against it."""
        if not approver.identities:
            return "has no identities in [[approvals.approver]]: nobody could tell whether it is the one who asks"
        if asked.requester in approver.identities or self._persons([asked.requester]) & self._persons(
            approver.identities
        ):
            return "asked for this, and does not approve it"
        if approver.tenants and asked.tenant not in approver.tenants:
            return "does not approve for this tenant"
        return ""

    def _persons(self, identities: Sequence[str]) -> set[tuple[str | None, str]]:
        """The humans behind identities, by the members lists of the policy."""
        members = (self._kms.policy.registry.member(i) for i in identities)
        return {(m.tenant, m.person) for m in members if m is not None}
