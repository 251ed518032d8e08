"""What needs more than one person: asked by one, approved by others with keys of their own, executed once by the service.

Approvals are signatures over the digest of the exact request (`service.approvals`); who hands them in does not matter. The
one that completes the quorum executes the request, in the transaction that stores it: two at once cannot both. What an
execution needs of an HSM is prepared before that transaction, and void if the request changed meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection

from keystore import Key, Plan
from policy import Registry
from service.approvals import (
    Approval,
    ApprovalRefused,
    Approver,
    Asked,
    AuthenticatorCloned,
    GroupRule,
    check,
    revocation,
)
from service.kms import APPROVAL_REQUIRED, Ask, Kms
from service.outcome import ApprovalClosed, NotFound
from service.rows import ApprovalRows, CounterMoved, StoredApproval
from service.webauthn import Assertion, counter_name

alarm: Final = logging.getLogger("skms.alarm")

OPEN: Final = "open"
OUTDATED: Final = "outdated"  # what it is about was changed since: what was signed is not what would be done
REVOKED: Final = "revoked:"  # before the signature of an approver who took the approval back
ATTEMPTS: Final = 8  # at a signature while others change the same request
NAMED: Final = 14  # approvers that a record names beside the request and its digest


class _Moved(Exception):
    """Somebody else changed the request since it was read."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How requests of a kind are withdrawn and executed.

    `prepare` gets the approvals that count (approver -> signature in hex) and makes the plan that carries the request
    out; None while the rules want more of them, and whatever it raises refuses the signature. `needed` tells how many
    they want, `outdated` why the request can never be executed any more, `region` whose HSM `prepare` reaches.
    """

    action: str  # who may do this may ask for such a request, and withdraw it
    prepare: Callable[[Asked, Mapping[str, str]], Plan | None]
    needed: Callable[[Asked], int] = lambda _: 0
    outdated: Callable[[Asked], str] = lambda _: ""
    region: Callable[[Asked], str | None] = lambda _: None
    key: Callable[[Asked], str | None] = lambda _: None  # the key that it is about
    rules: tuple[GroupRule, ...] = ()  # groups of which somebody approves, beside those of the configuration


@dataclass(frozen=True, slots=True)
class Rule:
    """Who approves, how many it takes, and for how long a request may collect them."""

    approvers: tuple[Approver, ...]
    needed: int
    lifetime_s: int
    installation: str
    groups: tuple[GroupRule, ...] = ()


@dataclass(frozen=True, slots=True)
class Standing:
    """A request and how it stands: open, executed, cancelled, expired or outdated; `approvers` are those who count now.

    `missing` are the groups of which somebody must approve yet.
    """

    asked: Asked
    state: str
    approvers: tuple[str, ...]
    needed: int
    missing: tuple[str, ...]


@dataclass(slots=True)
class _Made:
    """A request in the making, and what its records tell."""

    asked: Asked | None = None
    needed: int = 0
    missing: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def standing(self) -> Standing:
        if self.asked is None:
            raise RuntimeError("nothing was asked for")
        return Standing(self.asked, OPEN, (), self.needed, self.missing)


class Quorum:
    """The requests of this installation. `clock` gives microseconds."""

    def __init__(self, kms: Kms, rows: ApprovalRows, rule: Rule, *, clock: Callable[[], int]) -> None:
        self._kms, self._rows, self._rule, self._clock = kms, rows, rule, clock
        self._kinds: dict[str, Kind] = {}

    def executes(self, kind: str, how: Kind) -> None:
        """How requests of a kind are executed."""
        self._kinds[kind] = how

    async def ask(
        self,
        ask: Ask,
        kind: str,
        wanted: Callable[[], tuple[str | None, Mapping[str, object]]],
        *,
        op: str | None = None,
        store: Callable[[Connection, str], None] | None = None,
    ) -> Standing:
        """Store a request for others to approve, if the caller may ask; ApprovalRefused if nobody could approve it.

        `wanted` gives the tenant it concerns and its parameters; its id is the decision's. With `store`, which gets the id
        in the transaction that stores the request, `wanted` may take long: it runs beside the event loop.
        """
        made, name, action = _Made(), op or kind, self._kinds[kind].action

        def decide(decision: str) -> Asked:
            tenant, parameters = wanted()
            return self._made(made, ask, kind, decision, tenant, parameters, _named(parameters))

        def storing(decision: str) -> Plan:
            asked = decide(decision)
            return self._stored(asked, lambda c: None if store is None else store(c, asked.id))

        parameters, facts = {"kind": kind}, made.facts
        if store is None:
            await self._kms.change_own(ask, name, action, parameters, decide, self._stored, facts=facts)
        else:
            await self._kms.change_own(ask, name, action, parameters, lambda d: d, storing, facts=facts)
        return made.standing()

    async def ask_of_key(
        self,
        ask: Ask,
        kind: str,
        key: str,
        parameters: Mapping[str, object],
        wanted: Callable[[Key], Mapping[str, object]],
    ) -> Standing:
        """As `ask`, for a change of a key that the policy allows once enough approve: how many, its rules say.

        `parameters` are what the caller asked for, `wanted` makes of them what is signed.
        """
        made = _Made()

        def decide(decision: str, found: Key, needed: int) -> Asked:
            asked = self._made(made, ask, kind, decision, found.tenant, wanted(found), needed)
            made.facts["why"] = APPROVAL_REQUIRED
            return asked

        action = self._kinds[kind].action
        await self._kms.ask_of_key(ask, kind, action, key, parameters, decide, self._stored, facts=made.facts)
        return made.standing()

    async def sign(self, ask: Ask, approval_id: str, approver: str, signature: bytes) -> Standing:
        """Add a signature, and execute the request if that completes the quorum.

        NotFound, ApprovalClosed, ApprovalRefused; whatever the execution raises undoes the signature too.
        """

        def signed(asked: Asked, seen: StoredApproval) -> str:
            self._signed(asked, seen, Approval(approver, asked.kind, asked.digest(), signature))
            return signature.hex()

        region = await asyncio.to_thread(self._region, approval_id, ask)
        return await self._approve(ask, "sign_approval", approval_id, approver, signature, signed, region=region)

    async def revoke(self, ask: Ask, approval_id: str, approver: str, signature: bytes) -> Standing:
        """Take an approval back by its approver's signature; the request goes on without it, and without that person.

        NotFound, ApprovalClosed, ApprovalRefused.
        """

        def revoked(asked: Asked, seen: StoredApproval) -> str:
            kind = revocation(asked.kind)
            check(
                Approval(approver, kind, asked.digest(), signature),
                self._rule.approvers,
                kind=kind,
                digest=asked.digest(),
            )
            if seen.approvals.get(approver, REVOKED).startswith(REVOKED):
                raise ApprovalRefused(f"{approver} has not approved this, or has taken it back already")
            return REVOKED + signature.hex()  # it stays, so that the approval cannot be handed in again

        return await self._approve(ask, "revoke_approval", approval_id, approver, signature, revoked)

    async def _approve(
        self,
        ask: Ask,
        op: str,
        approval_id: str,
        approver: str,
        signature: bytes,
        accepted: Callable[[Asked, StoredApproval], str],
        *,
        region: str | None = None,
    ) -> Standing:
        """Store what `accepted` makes of an approver's signature, and execute the request if enough count then."""
        facts: dict[str, Any] = {"appr": (approval_id,)}

        def plan(_: None) -> Plan:
            seen = self._opened(self._rows.get(approval_id), ask)
            asked = Asked.of(seen.content)
            changed = dataclasses.replace(seen, approvals={**seen.approvals, approver: accepted(asked, seen)})
            self._risen(None, approver, signature)
            officers = self._counted(asked, changed)
            counted = {officer.name: changed.approvals[officer.name] for officer in officers}
            facts["appr"] = (approval_id, asked.digest(), *counted)[: NAMED + 2]
            execution = None
            enough = len(counted) >= self._needed(asked) and not self._missing(asked, officers)
            if approver in counted and enough:
                execution = self._kinds[asked.kind].prepare(asked, counted)
            if execution is not None:
                changed = dataclasses.replace(changed, state="executed")

            def write(connection: Connection) -> None:
                if self._rows.held(connection, approval_id) != seen:
                    raise _Moved
                self._opened(seen, ask)  # its time may have come to an end meanwhile
                self._risen(connection, approver, signature)
                if execution is not None:
                    execution.write(connection)
                self._rows.update(connection, changed)

            if execution is None:
                return Plan(key=None, write=write, applied=lambda: None)
            return Plan(key=execution.key, write=write, applied=execution.applied)

        parameters = {"approval": approval_id, "approver": approver, "signature": signature.hex()}
        for _ in range(ATTEMPTS):
            try:
                await self._kms.change_own(
                    ask, op, "approve", parameters, lambda _: None, plan, facts=facts, region=region
                )
            except (_Moved, CounterMoved):
                continue
            return self._found(ask, approval_id)
        raise ApprovalClosed(f"request {approval_id} is changing: look at it and hand the signature in again")

    async def cancel(self, ask: Ask, approval_id: str) -> Standing:
        """Withdraw a request before it is executed: whoever may ask for such a thing may."""

        def write(connection: Connection) -> None:
            stored = self._opened(self._rows.held(connection, approval_id), ask, withdrawing=True)
            self._rows.update(connection, dataclasses.replace(stored, state="cancelled"))

        plan = Plan(key=None, write=write, applied=lambda: None)
        op, parameters, facts = "cancel_approval", {"approval": approval_id}, {"appr": (approval_id,)}
        how, key = await asyncio.to_thread(self._about, approval_id, ask)
        if how is not None and key is not None:
            await self._kms.ask_of_key(
                ask,
                op,
                how.action,
                key,
                parameters,
                lambda *_: None,
                lambda _: plan,
                facts=facts,
                withdrawing=True,
            )
        else:
            action = "readApprovals" if how is None else how.action  # of one that cannot be seen: that it is not there
            await self._kms.change_own(ask, op, action, parameters, lambda _: None, lambda _: plan, facts=facts)
        return self._found(ask, approval_id)

    async def show(self, ask: Ask, approval_id: str) -> Standing:
        """One request; NotFound."""
        return await self._kms.read_own(ask, "get_approval", "readApprovals", lambda: self._found(ask, approval_id))

    async def every(self, ask: Ask) -> list[Standing]:
        """The requests of the caller's tenant, or all for the installation's own people, newest first."""

        def read() -> list[Standing]:
            return [self._standing(stored) for stored in self._rows.list(ask.caller.tenant)]

        return await self._kms.read_own(ask, "list_approvals", "readApprovals", read)

    def executed(self, kind: str, key: str) -> list[Asked]:
        """The requests of a kind about a key that were executed."""
        asked = [Asked.of(stored.content) for stored in self._rows.executed(f'"key":"{key}"')]
        return [a for a in asked if a.kind == kind and a.parameters.get("key") == key]

    def reachable(self, requester: str, registry: Registry, *, kind: str) -> bool:
        """Whether enough approvers could approve what somebody asks for the installation, by the members of a policy."""
        asked = Asked("", self._rule.installation, kind, None, {}, requester, 0, 0)
        able = (a for a in self._rule.approvers if not self._unfit(a, asked, registry))
        people = _distinct(able, registry)
        return len(people) >= self._needed(asked) and not self._missing(asked, people)

    def open(self, approval_id: str) -> bool:
        """Whether a request still collects approvals."""
        stored = self._rows.get(approval_id)
        return stored is not None and self._standing(stored).state == OPEN

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _made(
        self,
        made: _Made,
        ask: Ask,
        kind: str,
        decision: str,
        tenant: str | None,
        parameters: Mapping[str, object],
        wanted: int,
    ) -> Asked:
        now, rule = self._clock(), self._rule
        expires = now + rule.lifetime_s * 1_000_000
        asked = Asked(decision, rule.installation, kind, tenant, parameters, ask.caller.id, now, expires)
        needed = max(wanted, self._needed(asked))
        able = _distinct((a for a in rule.approvers if not self._unfit(a, asked, self._registry)), self._registry)
        if not rule.approvers:
            raise ApprovalRefused(
                f"no approvers are configured: name at least {needed} in [[approvals.approver]] on every node"
            )
        if len(able) < needed:
            raise ApprovalRefused(
                f"{len(able)} approvers may approve this and {needed} must: see [[approvals.approver]]"
            )
        if lacking := self._missing(asked, able):
            raise ApprovalRefused(
                f"nobody of {lacking[0]} may approve this beside the others, and one must: see [[approvals.rule]]"
            )
        made.asked, made.needed, made.missing = asked, needed, self._missing(asked, ())
        made.facts["appr"] = (asked.id, asked.digest())
        return asked

    def _stored(self, asked: Asked, store: Callable[[Connection], None] = lambda _: None) -> Plan:
        new = StoredApproval(asked.id, asked.tenant, asked.to_json(), OPEN, {}, asked.created)

        def write(connection: Connection) -> None:
            self._rows.insert(connection, new)
            store(connection)

        return Plan(key=None, write=write, applied=lambda: None)

    def _about(self, approval_id: str, ask: Ask) -> tuple[Kind | None, str | None]:
        """What kind of request it is, and the key it is about; one that the caller may not see is like one never made."""
        asked = self._known(approval_id, ask)
        how = None if asked is None else self._kinds.get(asked.kind)
        return how, None if asked is None or how is None else how.key(asked)

    def _region(self, approval_id: str, ask: Ask) -> str | None:
        """The region whose HSM the execution of a request reaches."""
        asked = self._known(approval_id, ask)
        return None if asked is None or asked.kind not in self._kinds else self._kinds[asked.kind].region(asked)

    def _known(self, approval_id: str, ask: Ask) -> Asked | None:
        with contextlib.suppress(NotFound):  # which is told once the caller's right to ask was decided
            return Asked.of(self._visible(self._rows.get(approval_id), ask).content)
        return None

    def _found(self, ask: Ask, approval_id: str) -> Standing:
        return self._standing(self._visible(self._rows.get(approval_id), ask))

    @staticmethod
    def _visible(stored: StoredApproval | None, ask: Ask) -> StoredApproval:
        if stored is None or ask.caller.tenant not in {None, stored.tenant}:
            raise NotFound("no such request")
        return stored

    def _opened(self, found: StoredApproval | None, ask: Ask, *, withdrawing: bool = False) -> StoredApproval:
        stored = self._visible(found, ask)
        state = self._standing(stored).state
        if state not in ({OPEN, OUTDATED} if withdrawing else {OPEN}):
            why = self._outdated(Asked.of(stored.content)) if state == OUTDATED else ""
            raise ApprovalClosed(f"request {stored.id} is {state}{why and ': '}{why}")
        return stored

    def _standing(self, stored: StoredApproval) -> Standing:
        asked, state = Asked.of(stored.content), stored.state
        how = self._kinds.get(asked.kind)
        if state == OPEN and self._clock() > asked.expires:
            state = "expired"
        elif state == OPEN and self._outdated(asked):
            state = OUTDATED
        needed = max(self._needed(asked), 0 if how is None else how.needed(asked))
        officers = self._counted(asked, stored)
        return Standing(asked, state, tuple(a.name for a in officers), needed, self._missing(asked, officers))

    def _needed(self, asked: Asked) -> int:
        """How many approvals it takes at the least, whatever the rules of a kind ask for."""
        return max(self._rule.needed, _named(asked.parameters), *(len(r.places) for r in self._rules(asked)))

    def _missing(self, asked: Asked, officers: Sequence[Approver]) -> tuple[str, ...]:
        """The groups of which somebody must approve beside these officers."""
        return tuple(name for rule in self._rules(asked) for name in rule.unfilled(officers))

    def _rules(self, asked: Asked) -> list[GroupRule]:
        how = self._kinds.get(asked.kind)
        own = () if how is None else how.rules
        return [rule for rule in (*self._rule.groups, *own) if rule.concerns(asked.kind, asked.tenant)]

    def _outdated(self, asked: Asked) -> str:
        how = self._kinds.get(asked.kind)
        return "this release executes no such request" if how is None else how.outdated(asked)

    def _counted(self, asked: Asked, stored: StoredApproval) -> list[Approver]:
        """Who approves as of now: an approver who left the configuration, or whose key did, counts no more."""
        found = []
        for name, signature in sorted(stored.approvals.items()):
            if signature.startswith(REVOKED):
                continue
            try:
                found.append(self._fit(asked, Approval(name, asked.kind, asked.digest(), bytes.fromhex(signature))))
            except ApprovalRefused:
                continue
        return _distinct(found, self._registry)

    def _signed(self, asked: Asked, stored: StoredApproval, new: Approval) -> None:
        """ApprovalRefused unless this is one more approver's right signature over exactly this request."""
        signer = self._fit(asked, new)
        for other in (a for a in self._rule.approvers if a.name in stored.approvals):
            if _one_person(signer, other, self._registry):
                if stored.approvals[other.name].startswith(REVOKED):
                    raise ApprovalRefused(f"{signer.name} took the approval back: it takes a new request")
                raise ApprovalRefused(f"{signer.name} has approved already: each officer counts once")

    def _fit(self, asked: Asked, approval: Approval) -> Approver:
        approver = check(approval, self._rule.approvers, kind=asked.kind, digest=asked.digest())
        if why := self._unfit(approver, asked, self._registry):
            raise ApprovalRefused(f"{approver.name} {why}")
        return approver

    def _risen(self, connection: Connection | None, approver: str, signature: bytes) -> None:
        """AuthenticatorCloned unless an assertion's counter is above all before it; kept in the caller's transaction."""
        credential = next((a.credential for a in self._rule.approvers if a.name == approver), None)
        if credential is None:
            return
        name, count = counter_name(credential), Assertion.of(signature).counter
        before = self._rows.counter(connection, name)
        if count == before == 0:  # it does not count
            return
        if count <= before:
            facts = {"approver": approver, "counter": count, "before": before}
            alarm.critical("an approver's authenticator may have been cloned", extra={"facts": facts})
            raise AuthenticatorCloned(
                f"{approver}'s authenticator counts {count}, and did {before} before: it may have been cloned, so take "
                f"its credential out of [[approvals.approver]] unless you know better; a newer assertion counts"
            )
        if connection is not None:
            self._rows.count(connection, name, count, before=before)

    def _unfit(self, approver: Approver, asked: Asked, registry: Registry) -> str:
        """Why somebody may not approve this; empty if nothing speaks against it."""
        if not approver.identities:
            return "has no identities in [[approvals.approver]]: nobody could tell whether it is the one who asks"
        one, other = _persons(registry, [asked.requester]), _persons(registry, approver.identities)
        if asked.requester in approver.identities or one & other:
            return "asked for this, and does not approve it"
        if approver.tenants and asked.tenant not in approver.tenants:
            return "does not approve for this tenant"
        return ""

    @property
    def _registry(self) -> Registry:
        return self._kms.policy.registry


def _named(parameters: Mapping[str, object]) -> int:
    """How many approvals a request says that it needs: what is signed says it too. 0 if it says nothing."""
    return int(str(parameters.get("needed", 0)))


def _persons(registry: Registry, identities: Sequence[str]) -> set[tuple[str | None, str]]:
    """The humans behind identities, by the members lists of a policy."""
    members = (registry.member(i) for i in identities)
    return {(m.tenant, m.person) for m in members if m is not None}


def _one_person(a: Approver, b: Approver, registry: Registry) -> bool:
    return a.same_as(b) or bool(_persons(registry, a.identities) & _persons(registry, b.identities))


def _distinct(approvers: Iterable[Approver], registry: Registry) -> list[Approver]:
    """One of each person: neither a second key nor a second login makes somebody two."""
    found: list[Approver] = []
    for approver in approvers:
        if not any(_one_person(approver, other, registry) for other in found):
            found.append(approver)
    return found
