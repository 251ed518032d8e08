"""Grants as officers make and take them back: docs/grants.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from sqlalchemy import Connection

from keystore import Key, KeyUsage, Plan
from keystore.envelope import refuse_context
from policy.grants import LONGEST_US, Grant
from policy.rows import GrantUses, SignedRows
from policy.signed import MOST_ERROR_US, RowGone
from service.following import Following
from service.kms import Ask, Kms
from service.outcome import NotFound, RequestInvalid

ACTION: Final = "grant"
MOST: Final = 10_000  # live grants of a tenant: every worker holds them all
# What can be granted of a key, by its usage: Cedar actions of the group `use`.
OPERATIONS: Final[Mapping[KeyUsage, frozenset[str]]] = {
    KeyUsage.ENCRYPT: frozenset({"encrypt", "decrypt", "generateDataKey", "unwrap", "rewrap", "reEncrypt"}),
    KeyUsage.SIGN: frozenset({"sign", "verify"}),
    KeyUsage.MAC: frozenset({"mac", "verifyMac"}),
}
State = Literal["live", "ended", "used_up", "revoked"]


@dataclass(frozen=True, slots=True)
class NewGrant:
    """What is to be granted: as in `Grant`; `ends` in us, `purpose` None means the key's only one."""

    grantee: str
    operations: tuple[str, ...]
    ends: int
    purpose: str | None = None
    context_equals: Mapping[str, str] | None = None
    context_subset: Mapping[str, str] | None = None
    max_uses: int | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """A grant, how often it was used, and what became of it."""

    grant: Grant
    uses: int
    state: State


class Granting:
    """The grants of this installation, as callers ask about them."""

    def __init__(self, kms: Kms, rows: SignedRows, uses: GrantUses, following: Following) -> None:
        self._kms, self._rows, self._uses, self._following = kms, rows, uses, following
        kms.decisions.grants = lambda key, caller: [g for g in self._every(key) if g.grantee == caller]

    async def create(self, ask: Ask, key: str, new: NewGrant) -> Standing:
        """Grant a caller of the tenant the use of a key; RequestInvalid names the field that cannot be."""
        made: list[Grant] = []
        facts: dict[str, str] = {}

        def decide(decision: str, found: Key) -> Grant:
            made.append(self._granted(ask, decision, found, new))
            facts["grant"] = decision
            return made[0]

        def plan(grant: Grant) -> Plan:
            def write(connection: Connection) -> None:
                self._rows.put(connection, grant.row())
                if grant.max_uses is not None:
                    self._uses.begin(connection, grant.id)

            def applied() -> None:
                self._kms.grants.add(grant)
                self._following.wake()

            return Plan(key=None, write=write, applied=applied)

        parameters = {
            "grantee": new.grantee,
            "operations": list(new.operations),
            "ends": new.ends,
            "purpose": new.purpose,
            "context_equals": new.context_equals,
            "context_subset": new.context_subset,
            "max_uses": new.max_uses,
        }
        await self._kms.change_of_key(ask, "create_grant", ACTION, key, parameters, decide, plan, facts=facts)
        return self._standing(made[0])

    async def revoke(self, ask: Ask, key: str, grant_id: str) -> None:
        """Take a grant back, on this worker at once and on every other within a second; NotFound if it is not in force."""

        def decide(_: str, found: Key) -> str:
            if all(g.id != grant_id or g.revoked_at is not None for g in self._every(str(found.id))):
                raise NotFound("no such grant in force")
            return grant_id

        def plan(_: str) -> Plan:
            def write(connection: Connection) -> None:
                try:
                    self._rows.revoke(connection, grant_id, by=ask.caller.id, at=self._kms.grants.time().now)
                except RowGone:  # somebody else was first
                    raise NotFound("no such grant in force") from None

            def applied() -> None:
                self._kms.grants.revoke(grant_id)
                self._following.wake()

            return Plan(key=None, write=write, applied=applied)

        facts = {"grant": grant_id}
        await self._kms.change_of_key(
            ask, "revoke_grant", ACTION, key, {"grant": grant_id}, decide, plan, facts=facts, passing=True
        )

    async def every(self, ask: Ask, key: str) -> list[Standing]:
        """The grants of a key, newest first; those whose end is long past are gone."""

        def read(found: Key) -> list[Standing]:
            for grant_id, count in self._uses.read().items():
                self._kms.grants.used(grant_id, count)
            return [self._standing(g) for g in sorted(self._every(str(found.id)), key=lambda g: (-g.at, g.id))]

        return await self._kms.read_of_key(ask, "list_grants", "readGrants", key, read)

    def _every(self, key: str) -> list[Grant]:
        return [g for g in map(Grant.of, self._rows.read().rows) if g.key == key]

    def _standing(self, grant: Grant) -> Standing:
        uses = self._kms.grants.uses(grant.id)
        state: State = "live" if grant.live(self._kms.grants.time()) else "ended"
        if grant.max_uses is not None and uses >= grant.max_uses:
            state = "used_up"
        return Standing(grant, uses, "revoked" if grant.revoked_at is not None else state)

    def _granted(self, ask: Ask, decision: str, key: Key, new: NewGrant) -> Grant:
        """The grant, if it can be; whether the granter may is decided."""
        tenant, known = key.tenant, self._kms.grants
        grantee = self._kms.decisions.caller(self._kms.policy.registry, new.grantee, tenant)
        if grantee is None or grantee.kind != "workload":
            raise RequestInvalid(("/grantee", "not_a_workload", "a workload of the key's own tenant, by its id"))
        able = OPERATIONS.get(key.usage, frozenset())
        if not new.operations or not set(new.operations) <= able or len(set(new.operations)) < len(new.operations):
            raise RequestInvalid(("/operations", "not_allowed", f"each once: {', '.join(sorted(able)) or 'none'}"))
        purpose = new.purpose or (key.purposes[0] if len(key.purposes) == 1 else "")
        if purpose not in key.purposes:
            raise RequestInvalid(("/purpose", "not_allowed", "one of the key's purposes"))
        self._conditions(key, new)
        at = known.time()
        if at.error > MOST_ERROR_US:
            raise RequestInvalid(
                ("/expires_at", "clock_unsure", "this node's clock is too far off to end anything by it")
            )
        if not at.now < new.ends <= at.now + LONGEST_US:
            raise RequestInvalid(("/expires_at", "out_of_range", "in the future, at most 365 days from now"))
        if sum(g.tenant == tenant for g in known.rows.values()) >= MOST:
            raise RequestInvalid(("", "too_many", f"a tenant has at most {MOST} grants: revoke some"))
        return Grant(
            id=decision,
            tenant=tenant,
            key=str(key.id),
            grantee=new.grantee,
            operations=tuple(sorted(new.operations)),
            purpose=purpose,
            ends=new.ends,
            granter=ask.caller.id,
            at=at.now,
            context_equals=new.context_equals,
            context_subset=new.context_subset,
            max_uses=new.max_uses,
        )

    @staticmethod
    def _conditions(key: Key, new: NewGrant) -> None:
        named = {"/context_equals": new.context_equals, "/context_subset": new.context_subset}
        given = {pointer: context for pointer, context in named.items() if context is not None}
        if len(given) > 1:
            raise RequestInvalid(("/context_subset", "not_allowed", "either context_equals or context_subset"))
        for pointer, context in given.items():
            refuse_context(context)
            if key.usage is not KeyUsage.ENCRYPT:
                raise RequestInvalid((pointer, "not_allowed", "only operations that encrypt or decrypt have a context"))
