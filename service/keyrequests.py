"""Changes of keys that no one person makes: one asks, others approve, the service executes exactly that once.

How many must approve stands in the charter's rule alone: the policy decides again when the last signature comes, with the
number of distinct persons who count then, and with who asked as it is known then.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from sqlalchemy import Connection

from keystore import FENCES, Bounds, Key, KeyDestroyed, KeyNotFound, KeyState, Plan, RowDamaged, StaleKey
from service.approvals import ApprovalRefused, Asked
from service.kms import Ask, Kms
from service.outcome import ApprovalClosed, TierNotMet
from service.quorum import Kind, Quorum, Standing

DESTROY: Final = "destroy_key"
SET_POLICY: Final = "set_key_policy"


class KeyRequests:
    """What of a key's administration takes a quorum."""

    def __init__(self, kms: Kms, quorum: Quorum) -> None:
        self._kms, self._quorum = kms, quorum
        self._executed_as(DESTROY, "destroy", lambda key, _: kms.keystore.plan_destroy(key, approved=True))
        self._executed_as(SET_POLICY, "setPolicy", self._bounded)
        kms.decisions.earlier_bounds = self._earlier

    # ---- asked -----------------------------------------------------------------------------------------------------

    async def destroy(self, ask: Ask, key: str) -> Standing:
        """Ask for the destruction of every copy of a key without a waiting time. KeyDestroyed if it was destroyed."""

        def wanted(found: Key) -> Mapping[str, object]:
            if found.state is KeyState.DESTROYED:
                raise KeyDestroyed(f"key {found.id} was destroyed")
            return _named(ask, found)

        return await self._quorum.ask_of_key(ask, DESTROY, key, {}, wanted)

    async def set_policy(self, ask: Ask, key: str, bounds: Bounds) -> Standing:
        """Ask for other bounds of a key: tier, places, purposes, fences. InputRefused, TierNotMet as at its creation."""

        def wanted(found: Key) -> Mapping[str, object]:
            self._fits(found, bounds)
            was = Bounds.of(found).shown()
            becomes = bounds.shown()
            return {**_named(ask, found), "from": {name: was[name] for name in becomes}, "to": becomes}

        return await self._quorum.ask_of_key(ask, SET_POLICY, key, bounds.shown(), wanted)

    def _fits(self, key: Key, bounds: Bounds) -> None:
        if missing := self._kms.tier_missing(bounds.on(key)):
            raise TierNotMet(missing)

    # ---- executed --------------------------------------------------------------------------------------------------

    def _bounded(self, key: Key, asked: Asked) -> Plan:
        bounds = msgspec.convert(asked.parameters["to"], Bounds)
        self._fits(key, bounds)
        return self._kms.keystore.plan_bounds(key, bounds)

    def _earlier(self, key: uuid.UUID, version: int) -> list[Mapping[str, Any]]:
        """What changes of bounds since a version of a key's row took away, newest first."""
        done = [a for a in self._quorum.executed(SET_POLICY, str(key)) if _version(a) >= version]
        done.sort(key=_version, reverse=True)
        bounds = [msgspec.convert(asked.parameters["from"], Bounds) for asked in done]
        # The fences are no fact of a decision: the keystore holds them whatever a policy says.
        return [{name: getattr(was, name) for name in was.shown() if name not in FENCES} for was in bounds]

    def _executed_as(self, kind: str, action: str, plan: Callable[[Key, Asked], Plan]) -> None:
        def prepare(asked: Asked, approvals: Mapping[str, str]) -> Plan | None:
            key = self._key(asked)
            if not self._approved(asked, action, key, len(approvals)):
                return None
            made = plan(key, asked)

            def write(connection: Connection) -> None:
                # The plan may have waited for its HSM: neither a freeze nor a new bundle is overtaken.
                if not self._approved(asked, action, key, len(approvals)):
                    raise ApprovalRefused("the policy changed meanwhile and asks for more approvals")
                try:
                    made.write(connection)
                except StaleKey:
                    raise ApprovalClosed(f"request {asked.id} is outdated: {_CHANGED}") from None

            return Plan(made.key, write, made.applied)

        self._quorum.executes(
            kind,
            Kind(
                action,
                prepare,
                needed=lambda asked: self._needed(asked, action),
                outdated=self._outdated,
                region=lambda asked: self._key(asked).home,
                key=lambda asked: str(asked.parameters["key"]),
            ),
        )

    def _approved(self, asked: Asked, action: str, key: Key, count: int) -> bool:
        reason = str(asked.parameters["reason"])
        return self._kms.approved(asked.requester, action, key, approvals=count, reason=reason)

    def _key(self, asked: Asked) -> Key:
        """The key of a request, of whatever version; KeyNotFound."""
        found = self._kms.keystore.by_id(uuid.UUID(str(asked.parameters["key"])))
        if found.tenant != asked.tenant:
            raise KeyNotFound("no such key")
        return found

    def _needed(self, asked: Asked, action: str) -> int:
        try:
            return self._kms.approvals_needed(asked.requester, action, self._key(asked))
        except (KeyNotFound, RowDamaged):  # told as outdated
            return 0

    def _outdated(self, asked: Asked) -> str:
        try:
            return "" if self._key(asked).kv == asked.parameters["version"] else _CHANGED
        except (KeyNotFound, RowDamaged):
            return "the row of its key cannot be read: look at the node's alarms"


_CHANGED: Final = "the key was changed since: look at it, then ask again"


def _version(asked: Asked) -> int:
    return int(str(asked.parameters["version"]))


def _named(ask: Ask, key: Key) -> dict[str, Any]:
    """Which key, in which version of its row: what is signed is void once anything about the key has changed."""
    reason = ask.reason or "unspecified"
    return {"key": str(key.id), "version": key.kv, "tier": key.tier, "state": key.api_state, "reason": reason}
