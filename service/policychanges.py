"""Changes of the policy by a quorum: planned, asked for by one officer, approved by others, in force everywhere at once.

What approvers sign names the new bundle, the one it replaces and the change before it, so that an approval counts for exactly
this step. The draft is checked when it is asked for and again before the last signature; that one stores it whole and
names it as the one in force, in one transaction. Every worker follows what stands there, and every start begins with it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from sqlalchemy import Connection

import policy.plan
from keystore import Plan
from policy import BundleRefused, LockedOut, Policy
from policy.lockout import Lost, holders, lowered, parted, strictest
from service.approvals import Asked
from service.decisions import BundleLost, content
from service.kms import POLICY_SETTING, Ask, Kms
from service.outcome import PolicyStale
from service.quorum import Kind, Quorum, Standing
from service.rows import Applied, Settings

POLICY: Final = "policy"
CHANGE: Final = "changePolicy"
_VERSION: Final = re.compile(rb"^(?P<name>\"version\"|'version'|version)(?P<colon>\s*:\s*)[0-9]+", re.MULTILINE)


class PolicyChanges:
    """The policy of this installation, as officers change it. `clock` gives microseconds."""

    def __init__(self, kms: Kms, settings: Settings, *, quorum: Quorum, clock: Callable[[], int]) -> None:
        self._kms, self._settings, self._quorum, self._clock = kms, settings, quorum, clock
        self._bundles = kms.decisions.bundles
        quorum.executes(POLICY, Kind(CHANGE, self._prepared))

    async def plan(
        self, ask: Ask, files: Mapping[str, bytes], *, period: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """What a draft comes to against the bundle in force, and in a recorded period (us) if one is named.

        The period is a question of its own, for those who may simulate. BundleRefused if the draft cannot be used; nothing
        of it stays.
        """

        def read() -> dict[str, Any]:
            now = self._kms.policy
            self._within(ask.caller.tenant, now.bundle.sources, files)
            draft = self._draft(files, now)
            return policy.plan.told(now, draft, now=self._clock() // 1_000_000, given_up=self._kms.without_keys)

        told = await self._kms.read_own(ask, "plan_policy", CHANGE, read)
        if period is None:
            return told
        replay = await self._kms.simulate_policy(ask, files, since=period[0], until=period[1])
        return told | {"replay": dataclasses.asdict(replay)}

    async def apply(self, ask: Ask, files: Mapping[str, bytes], *, replaces: str | None = None) -> Standing:
        """Ask for a draft to be put in force; `replaces` is the digest of the bundle that it was planned against.

        BundleRefused, LockedOut, PolicyStale, ApprovalRefused.
        """
        return await self._ask(ask, "apply_policy", lambda _: files, replaces)

    async def rollback(self, ask: Ask, *, to: str | None = None, replaces: str | None = None) -> Standing:
        """Ask for the content of the bundle before, or of a named one, under a new version; as `apply`, and BundleLost."""

        def files(now: Policy) -> Mapping[str, bytes]:
            name = self._before(now) if to is None else self._bundles.ever(to)
            if name is None:
                raise PolicyStale("no bundle was in force before this one: there is nothing to go back to")
            return under(self._bundles.files(name), now.version + 1)

        return await self._ask(ask, "rollback_policy", files, replaces)

    async def _ask(
        self, ask: Ask, op: str, files: Callable[[Policy], Mapping[str, bytes]], replaces: str | None
    ) -> Standing:
        drafts: list[Policy] = []
        closed: list[str] = []

        def wanted() -> tuple[str | None, Mapping[str, object]]:
            now = self._kms.policy
            if replaces is not None and not now.digest.startswith(replaces):
                raise PolicyStale(f"the plan was made for bundle {replaces[:12]}, in force is {now.digest[:12]}")
            wished, tenant = files(now), ask.caller.tenant
            self._within(tenant, now.bundle.sources, wished)
            draft = self._draft(wished, now)
            if tenant is not None and draft.version != now.version + 1:  # the highest would be the last change of all
                raise BundleRefused("charter.yaml", 0, f"version {now.version + 1} is the next: a tenant skips none")
            self._check_lock_out(now, draft)
            changed = policy.plan.files(now.bundle.sources, wished)
            unproved = _proved(draft)
            if unproved and any(change.path.startswith("charter/") for change in changed):
                raise BundleRefused("charter", 0, f"a charter is not changed unproved: {unproved}")
            drafts.append(draft)
            closed.extend(old for old in self._bundles.proposals() if not self._quorum.open(old))
            applied = self._kms.applied.get()
            return tenant, {
                "bundle": draft.digest,
                "version": draft.version,
                "replaces": now.digest,
                "after": None if applied is None else applied.approval,
                "files": {change.path: change.change for change in changed},
                "unproved": unproved,
                "needed": self._needed(now, draft),
            }

        def store(connection: Connection, approval: str) -> None:
            for old in closed:
                self._bundles.withdraw(connection, old)
            self._bundles.propose(connection, approval, drafts[0])

        return await self._quorum.ask(ask, POLICY, wanted, op=op, store=store)

    # ---- inside ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _draft(files: Mapping[str, bytes], now: Policy) -> Policy:
        """A draft that was read, checked and tried out as a reload does; it is another bundle than the one in force."""
        draft = Policy.draft(files, after=now)
        if draft.digest == now.digest:
            raise PolicyStale("this is the bundle in force: there is nothing to change")
        if draft.development is not now.development:
            raise BundleRefused("charter.yaml", 0, "a node does not change between a development charter and another")
        return draft

    @staticmethod
    def _within(tenant: str | None, now: Mapping[str, bytes], draft: Mapping[str, bytes]) -> None:
        """A tenant's officer changes the tenant's own files, and of the charter the version alone. BundleRefused."""
        if tenant is None:
            return
        for change in policy.plan.files(now, draft):
            if change.path == "charter.yaml" and change.change == "changed":
                was, becomes = (under(side, 1)["charter.yaml"] for side in (now, draft))
                if was == becomes:
                    continue
            elif change.path.startswith(f"tenants/{tenant}/"):
                continue
            raise BundleRefused(change.path, 0, f"an officer of tenant {tenant} changes files of tenants/{tenant} only")

    def _before(self, now: Policy) -> str | None:
        """What the bundle in force replaced, by name: also where a release with another schema names it anew."""
        applied = self._kms.applied.get()
        return self._bundles.before(now) if applied is None else applied.replaces[:32]

    def _needed(self, now: Policy, draft: Policy) -> int:
        """As many as the rules in force ask for at most, if the charter changes or a person becomes two.

        As many as they ask for what a draft asks fewer for; else 0, which is no more than always.
        """
        seconds = self._clock() // 1_000_000
        changes = policy.plan.files(under(now.bundle.sources, 1), under(draft.bundle.sources, 1))
        charter = any(change.path.startswith(("charter/", "charter.yaml")) for change in changes)
        if charter or parted(now.registry, draft.registry):
            return strictest(now, now=seconds)
        return lowered(now, draft, now=seconds)

    def _check_lock_out(self, now: Policy, draft: Policy) -> None:
        """LockedOut also if nobody who may ask for the next change would find enough approvers beside herself."""
        self._kms.check_lock_out(draft)
        seconds = self._clock() // 1_000_000
        before, after = (
            [
                one
                for one in holders(p, now=seconds)[None, CHANGE]
                if self._quorum.reachable(one, p.registry, kind=POLICY)
            ]
            for p in (now, draft)
        )
        if before and not after:
            raise LockedOut((Lost(None, CHANGE, tuple(before)),))

    def _prepared(self, asked: Asked, approvals: Mapping[str, str]) -> Plan:
        """The draft of a request, which was tried out when it was asked for, against what is in force now.

        PolicyStale, BundleLost, LockedOut.
        """
        now, seen = self._kms.policy, self._settings.get(POLICY_SETTING)
        after = self._kms.applied.get()
        wanted = asked.parameters
        if wanted["replaces"] != now.digest or wanted["after"] != (None if after is None else after.approval):
            raise PolicyStale(f"it was asked for bundle {str(wanted['replaces'])[:12]}, in force is {now.digest[:12]}")
        draft = Policy.stored(self._bundles.proposed(asked.id))
        if draft.digest != wanted["bundle"]:
            raise BundleLost(str(wanted["bundle"])[:32])
        self._check_lock_out(now, draft)

        def write(connection: Connection) -> None:
            if self._kms.policy is not now:
                raise PolicyStale("another bundle was put in force meanwhile")
            self._unmoved(connection, seen)
            self._kms.applied.put(
                connection,
                Applied(
                    digest=draft.digest,
                    version=draft.version,
                    content=content(draft.bundle.sources),
                    replaces=now.digest,
                    approval=asked.id,
                    request=asked.digest(),
                    signers=tuple(sorted(approvals)),
                    at=self._clock(),
                ),
                after=after,
            )
            Settings.put(connection, POLICY_SETTING, draft.digest)
            self._bundles.keep(connection, draft, at=self._clock(), before=now)
            self._bundles.withdraw(connection, asked.id)

        return Plan(key=None, write=write, applied=lambda: self._kms.in_force(draft, draft.digest))

    def _unmoved(self, connection: Connection, seen: str | None) -> None:
        """PolicyStale if a reload came between."""
        if Settings.value(connection, POLICY_SETTING) != seen:
            raise PolicyStale("another bundle was put in force meanwhile")


def _proved(draft: Policy) -> str:
    """BundleRefused if a promise of the charter is broken; what could not be told, for those who approve."""
    from policy import proofs  # loads Z3, which a node needs for nothing else

    try:
        found = proofs.prove(draft.bundle)
    except proofs.NotEncodable as error:
        return str(error)
    for proof in found:
        if proof.refuted is not None:
            raise BundleRefused(
                "charter", 0, f"{proof.promise.code}: {proof.promise.name}; `skms policy plan` shows how"
            )
    return ", ".join(p.promise.name for p in found if p.unknown)


def under(files: Mapping[str, bytes], version: int) -> Mapping[str, bytes]:
    """The same bundle with another version in its charter.yaml, which stays as it is otherwise."""
    text = files["charter.yaml"]
    changed, count = _VERSION.subn(rb"\g<name>\g<colon>%d" % version, text, count=1)
    if count != 1:
        raise BundleRefused("charter.yaml", 0, "no line begins with `version:`: write the version on a line of its own")
    return {**files, "charter.yaml": changed}
