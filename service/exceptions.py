"""Exceptions as officers ask for them, a quorum signs them, and one officer takes them back: docs/exceptions.md."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import msgspec
from sqlalchemy import Connection

from keystore import Key, KeyNotFound, Plan, RowDamaged
from policy.exceptions import ExceptionRefused, Waiver
from policy.rows import SignedRows
from policy.signed import MOST_ERROR_US, RowGone
from service.approvals import Asked, GroupRule
from service.following import Following
from service.kms import Ask, Kms
from service.outcome import ApprovalClosed, NotFound, RequestInvalid
from service.quorum import Kind, Quorum
from service.quorum import Standing as Requested

EXCEPTION: Final = "create_exception"
OFFICER: Final = "role:data-protection-officer"  # the group of approvers of whom one signs every exception
NEEDED: Final = 2
MOST_KEYS: Final = 100
State = Literal["live", "not_yet", "ended", "revoked"]


@dataclass(frozen=True, slots=True)
class NewException:
    """What is to be waived: as in `Waiver`. `keys` by id or alias, `begins` None means now."""

    keys: tuple[str, ...]
    kind: str
    places: tuple[str, ...]
    purpose: str
    legal_basis: str
    legal_ref: str
    ends: int
    begins: int | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """An exception and what became of it."""

    waiver: Waiver
    state: State


class Excepting:
    """The exceptions of this installation, as callers ask about them."""

    def __init__(self, kms: Kms, rows: SignedRows, quorum: Quorum, following: Following) -> None:
        self._kms, self._rows, self._quorum, self._following = kms, rows, quorum, following
        kms.decisions.exceptions = lambda key: [w for w in self._every() if key in w.keys]
        signs = (GroupRule((OFFICER,)),)
        quorum.executes(
            EXCEPTION,
            Kind("requestException", self._signed, needed=lambda _: NEEDED, outdated=self._outdated, rules=signs),
        )

    async def request(self, ask: Ask, new: NewException) -> Requested:
        """Ask for an exception: it counts once two have signed it, a data-protection officer among them.

        RequestInvalid names the field that cannot be, KeyNotFound stands for any key that is not the tenant's.
        """

        def wanted() -> tuple[str | None, Mapping[str, object]]:
            if ask.caller.tenant is None:
                raise KeyNotFound("the installation's own roles have no keys")
            return ask.caller.tenant, self._wanted(ask.caller.tenant, new)

        return await self._quorum.ask(ask, EXCEPTION, wanted)

    async def revoke(self, ask: Ask, exception_id: str) -> None:
        """Take an exception back, here at once and on every other worker within a second; NotFound if it is not in force."""

        def decide(_: str) -> str:
            self._found(ask, exception_id, revoked=False)
            return exception_id

        def plan(_: str) -> Plan:
            def write(connection: Connection) -> None:
                try:
                    self._rows.revoke(connection, exception_id, by=ask.caller.id, at=self._kms.exceptions.time().now)
                except RowGone:  # somebody else was first
                    raise NotFound("no such exception in force") from None

            def applied() -> None:
                self._kms.exceptions.revoke(exception_id)
                self._following.wake()

            return Plan(key=None, write=write, applied=applied)

        parameters, facts = {"exception": exception_id}, {"exc": exception_id}
        await self._kms.change_own(ask, "revoke_exception", "revokeException", parameters, decide, plan, facts=facts)

    async def every(self, ask: Ask) -> list[Standing]:
        """The exceptions of the caller's tenant, or all for the installation's own people, newest first."""

        def read() -> list[Standing]:
            found = [w for w in self._every() if ask.caller.tenant in {None, w.tenant}]
            return [self._standing(w) for w in sorted(found, key=lambda w: (-w.at, w.id))]

        return await self._kms.read_own(ask, "list_exceptions", "readExceptions", read)

    async def show(self, ask: Ask, exception_id: str) -> Standing:
        """One exception, with what was signed and by whom; NotFound."""
        return await self._kms.read_own(
            ask, "get_exception", "readExceptions", lambda: self._standing(self._found(ask, exception_id))
        )

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _every(self) -> list[Waiver]:
        return [Waiver.of(row) for row in self._rows.read().rows]

    def _found(self, ask: Ask, exception_id: str, *, revoked: bool = True) -> Waiver:
        for waiver in self._every():
            mine = ask.caller.tenant in {None, waiver.tenant}
            if waiver.id == exception_id and mine and (revoked or waiver.revoked_at is None):
                return waiver
        raise NotFound("no such exception")

    def _standing(self, waiver: Waiver) -> Standing:
        at = self._kms.exceptions.time()
        state: State = "live" if waiver.live(at) else "not_yet" if at.now < waiver.begins + at.error else "ended"
        return Standing(waiver, "revoked" if waiver.revoked_at is not None else state)

    def _wanted(self, tenant: str, new: NewException) -> Mapping[str, object]:
        """What is signed: everything in its one spelling, so that no later change of names or groups widens it."""
        at = self._kms.exceptions.time()
        if at.error > MOST_ERROR_US:
            raise RequestInvalid(
                ("/not_after", "clock_unsure", "this node's clock is too far off to end anything by it")
            )
        if not 1 <= len(new.keys) <= MOST_KEYS:
            raise RequestInvalid(("/keys", "out_of_range", f"1 to {MOST_KEYS} keys"))
        keys = [self._kms.keystore.find(tenant, name) for name in new.keys]
        places = self._kms.places("/places", new.places) if new.places else frozenset[str]()
        waiver = Waiver(
            id="",
            tenant=tenant,
            keys=tuple(sorted({str(key.id) for key in keys})),
            kind=new.kind,
            places=tuple(sorted(places)),
            purpose=new.purpose,
            legal_basis=new.legal_basis,
            legal_ref=new.legal_ref,
            begins=at.now if new.begins is None else new.begins,
            ends=new.ends,
            tier=min(key.tier for key in keys),
        )
        self._fits(waiver, keys, now=at.now)
        return {
            "keys": list(waiver.keys),
            "kind": waiver.kind,
            "places": list(waiver.places),
            "purpose": waiver.purpose,
            "legal_basis": waiver.legal_basis,
            "legal_ref": waiver.legal_ref,
            "not_before": waiver.begins,
            "not_after": waiver.ends,
            "tier": waiver.tier,
        }

    def _fits(self, waiver: Waiver, keys: Sequence[Key], *, now: int) -> None:
        try:
            waiver.refuse([key.tier for key in keys], now=now)
        except ExceptionRefused as refused:
            raise RequestInvalid((refused.pointer, refused.code, str(refused))) from None
        if waiver.legal_basis not in self._kms.policy.registry.legal_bases:
            raise RequestInvalid(("/legal_basis", "not_allowed", "one of the charter's legal_bases"))
        if any(waiver.purpose not in key.purposes for key in keys):
            raise RequestInvalid(("/purpose", "not_allowed", "a purpose of each of the keys"))

    # ---- executed --------------------------------------------------------------------------------------------------

    def _signed(self, asked: Asked, approvals: Mapping[str, str]) -> Plan:
        """Put an exception in force as it was asked for and approved; ApprovalClosed if it cannot be any more."""
        if (
            asked.tenant is None
            or self._kms.decisions.caller(self._kms.policy.registry, asked.requester, asked.tenant) is None
        ):
            raise ApprovalClosed("who asked is no member any more, so nobody asks for this: ask again")
        if why := self._outdated(asked):
            raise ApprovalClosed(f"request {asked.id} is outdated: {why}")
        at = self._kms.exceptions.time().now
        waiver = dataclasses.replace(_waiver(asked), at=at, request=asked.to_json(), approvals=dict(approvals))

        def applied() -> None:
            self._kms.exceptions.add(waiver)
            self._following.wake()

        return Plan(key=None, write=lambda c: self._rows.put(c, waiver.row()), applied=applied)

    def _outdated(self, asked: Asked) -> str:
        waiver, at = _waiver(asked), self._kms.exceptions.time()
        if at.error > MOST_ERROR_US:
            return "this node's clock is too far off to end anything by it"
        try:
            keys = [self._kms.keystore.by_id(uuid.UUID(key)) for key in waiver.keys]
        except (KeyNotFound, RowDamaged):
            return "the row of a key cannot be read: look at the node's alarms"
        if any(key.tenant != asked.tenant for key in keys):
            return "a key is of another tenant"
        try:
            self._fits(waiver, keys, now=at.now)
        except RequestInvalid as invalid:
            return "; ".join(f"{pointer[1:]}: {detail}" for pointer, _, detail in invalid.errors)
        return ""


def _waiver(asked: Asked) -> Waiver:
    """The exception that a request asks for."""
    p = asked.parameters
    keys, places = msgspec.convert(p["keys"], tuple[str, ...]), msgspec.convert(p["places"], tuple[str, ...])
    return Waiver(
        id=asked.id,
        tenant=str(asked.tenant),
        keys=keys,
        kind=str(p["kind"]),
        places=places,
        purpose=str(p["purpose"]),
        legal_basis=str(p["legal_basis"]),
        legal_ref=str(p["legal_ref"]),
        begins=int(str(p["not_before"])),
        ends=int(str(p["not_after"])),
        tier=int(str(p["tier"])),
    )
