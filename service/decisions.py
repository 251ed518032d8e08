"""Recorded decisions, made again: the facts that a record commits to, under the bundle that it names.

Nothing is guessed. The record has a digest of all facts; what is put together here from the record, the bundle's own
members and the key's row counts only if it has that digest, and else the answer says what is missing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError

from audit.event import DATA_PLANE
from audit.search import Search
from keystore import KeyNotFound
from policy import (
    Caller,
    Decision,
    InstallationFacts,
    KeyFacts,
    Policy,
    Registry,
    Request,
    Resource,
    TenantFacts,
    behind,
)
from policy.exceptions import Waiver, named, waived
from policy.explain import Explanation, explain
from policy.grants import Grant
from policy.signed import RowsDamaged
from policy.written import digest
from service.rows import Applied, AppliedDamaged, Settings

_STATES: Final = ("active", "suspended", "deactivated", "preactive", "compromised", "destroyed")
_APPROVALS: Final = range(6)
_EXAMPLES: Final = 3
_DIFFERENCES: Final = 100
_BUNDLE: Final = "policy-bundle/"
_PREVIOUS: Final = "policy-before/"
_SINCE: Final = "policy-since/"
_DRAFT: Final = "policy-draft/"
_FREEZE: Final = "FREEZE"
HOP: Final = "HOP:"  # how the rule begins that a record names if the way of a request was not proven

Callers = Callable[[Registry, Mapping[str, Any]], Iterable[Caller]]
KeyFactsOf = Callable[[uuid.UUID], KeyFacts]


class BundleLost(Exception):
    """The bundle that a record names is not at hand, or is not what the record names; `digest` is its first 32 hex."""

    def __init__(self, digest: str) -> None:
        super().__init__(
            f"the bundle {digest} is not kept here, or another schema belonged to it: it was applied by another "
            "installation or an earlier release"
        )
        self.digest = digest


class FactsLost(Exception):
    """A recorded decision cannot be made again: the message says which fact is not in the record or no longer at hand."""


class Bundles:
    """Every bundle that was ever in force, whole, by digest; and which one each of them replaced."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._settings = engine, Settings(engine)
        self._loaded = functools.lru_cache(maxsize=4)(self._load)

    def keep(self, connection: Connection, policy: Policy, *, at: int, before: Policy | None = None) -> None:
        """Keep a bundle, in the transaction that puts it in force at `at` (us)."""
        name = policy.digest[:32]
        Settings.put(connection, _BUNDLE + name, _text(policy.bundle.sources))
        if before is None or before.digest != policy.digest:
            Settings.put(connection, _SINCE + name, str(at))
        if before is not None and before.digest != policy.digest:
            Settings.put(connection, _PREVIOUS + name, before.digest[:32])

    def since(self, policy: Policy) -> int | None:
        """When a bundle came into force (us); None if an earlier release kept it."""
        text = self._settings.get(_SINCE + policy.digest[:32])
        return None if text is None else int(text)

    def starting(self, policy: Policy, *, at: int) -> Bundles:
        """These, with the bundle that a node starts with kept; another worker may keep it at once."""
        if self._settings.get(_BUNDLE + policy.digest[:32]) is not None:
            return self
        try:
            with self._engine.begin() as connection:
                self.keep(connection, policy, at=at)
        except IntegrityError:
            pass  # the other worker kept the same bytes
        return self

    def get(self, name: str) -> Policy:
        """A kept bundle by the first 32 hex of its digest, as it decided then; BundleLost."""
        return self._loaded(name)

    def files(self, name: str) -> Mapping[str, bytes]:
        """Its files as they were; BundleLost."""
        return self._files(_BUNDLE + name, name)

    def _files(self, setting: str, name: str) -> Mapping[str, bytes]:
        text = self._settings.get(setting)
        if text is None:
            raise BundleLost(name)
        return {path: data.encode() for path, data in json.loads(text).items()}

    def in_force(self, applied: Applied) -> Policy:
        """The bundle that a quorum put in force. BundleLost, AppliedDamaged, BundleRefused.

        Its files are what was approved. A release with another schema tries them out anew, as it does a directory's.
        """
        files = self.files(applied.digest[:32])
        if content(files) != applied.content:
            raise AppliedDamaged(
                f"the files of the applied bundle {applied.digest[:12]} were changed outside the service"
            )
        found = Policy.stored(files)
        return found if found.digest == applied.digest else Policy.draft(files)

    def ever(self, name: str) -> str:
        """The whole name of a bundle that was in force, by at least 12 hex of its digest; BundleLost."""
        found = [n.removeprefix(_BUNDLE) for n in self._settings.names(_BUNDLE + name[:32])]
        if len(found) != 1:
            raise BundleLost(name)
        return found[0]

    def propose(self, connection: Connection, approval: str, policy: Policy) -> None:
        """Keep a draft that waits for approval, by the id of the request, in the caller's transaction."""
        Settings.put(connection, _DRAFT + approval, _text(policy.bundle.sources))

    def proposed(self, approval: str) -> Mapping[str, bytes]:
        """The files of such a draft; BundleLost."""
        return self._files(_DRAFT + approval, approval)

    def proposals(self) -> list[str]:
        """The requests whose drafts are kept."""
        return [name.removeprefix(_DRAFT) for name in self._settings.names(_DRAFT)]

    @staticmethod
    def withdraw(connection: Connection, approval: str) -> None:
        """Forget a draft, in the caller's transaction."""
        Settings.drop(connection, _DRAFT + approval)

    def forget(self) -> None:
        """Drop what is loaded: the next look is at the database."""
        self._loaded.cache_clear()

    def before(self, policy: Policy) -> str | None:
        """The bundle that a bundle replaced, by name."""
        return self._settings.get(_PREVIOUS + policy.digest[:32])

    def _load(self, name: str) -> Policy:
        found = Policy.stored(self.files(name))
        if found.digest[:32] != name:  # the row was changed, or the schema is another one today
            raise BundleLost(name)
        return found


def content(files: Mapping[str, bytes]) -> str:
    """What names the files of a bundle whatever schema they belong to: hex SHA-256."""
    return hashlib.sha256(_text(files).encode()).hexdigest()


def _text(files: Mapping[str, bytes]) -> str:
    return json.dumps({path: data.decode() for path, data in files.items()}, sort_keys=True)


@dataclass(slots=True)
class Difference:
    """Decisions of one caller on one key that a draft would make otherwise; `examples` are decision ids."""

    key: str | None
    caller: str
    action: str
    was: tuple[str, ...]  # deciding rules
    becomes: tuple[str, ...]
    newly: str  # allowed, denied; or by other rules
    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Replay:
    """A recorded period, decided again: `identical` under the recorded bundles, `unmade` by why that could not be told."""

    decisions: int = 0
    identical: int = 0
    changed: list[str] = field(default_factory=list)  # decision ids that were not identical: none, ever
    unmade: dict[str, int] = field(default_factory=dict)
    newly_allowed: int = 0
    newly_denied: int = 0
    differences: list[Difference] = field(default_factory=list)
    radius: dict[str, dict[str, int]] = field(default_factory=dict)  # by key, caller and rule: decisions that differ


class Decisions:
    """Recorded decisions of this installation."""

    def __init__(self, search: Search, bundles: Bundles, *, callers: Callers, key_facts: KeyFactsOf) -> None:
        self._search, self.bundles = search, bundles
        self._callers, self._key_facts = callers, key_facts
        # What a key's bounds were at a version of its row: the values that later changes replaced, newest first.
        self.earlier_bounds: Callable[[uuid.UUID, int], Iterable[Mapping[str, Any]]] = lambda _key, _version: ()
        self.exceptions: Callable[[str], Iterable[Waiver]] = lambda _key: ()  # of a key, live or not
        self.grants: Callable[[str, str], Iterable[Grant]] = (
            lambda _key, _caller: ()
        )  # of a key to a caller, live or not

    def caller(self, registry: Registry, identity: str, tenant: str) -> Caller | None:
        """Who an identity of a tenant is in a registry's eyes; None if it is nobody there, or cannot be told."""
        found = list(self._callers(registry, {"actor": identity, "tenant": tenant}))
        return found[0] if len(found) == 1 and found[0].tenant == tenant else None

    def record(self, decision: str, *, tenant: str | None) -> dict[str, Any] | None:
        """The record of a decision, a tenant's own or (None) any; None if there is none."""
        return self._search.decision(decision, tenant=tenant)

    def explained(self, record: Mapping[str, Any]) -> Explanation:
        """A recorded decision, made again with every rule and condition. BundleLost, FactsLost."""
        policy = self.bundles.get(self._policy_of(record))
        request = self.request(record, policy)
        key = str(record.get("key", ""))
        grants: Iterable[Grant] = ()
        waivers: Iterable[Waiver] = ()
        with contextlib.suppress(RowsDamaged):  # what the rules say is told all the same
            grants, waivers = (self.grants(key, request.caller.id), self.exceptions(key)) if key else ((), ())
        told = explain(policy, request, grants=grants, exceptions=waivers)
        if not same(record, told.decision.allowed, told.decision.rules):
            raise FactsLost("made again, the decision is another one: the record or this release is not what it was")
        return told

    def request(self, record: Mapping[str, Any], policy: Policy) -> Request:
        """The request that a record's digest commits to. FactsLost."""
        wanted = record.get("facts")
        if wanted is None:
            raise FactsLost(_undecided(record))
        for request in self._possible(record, policy):
            if digest(request) == wanted:
                return request
        raise FactsLost(
            "the facts have another digest than the record names: the caller's membership, its token or issuer, or the "
            "key's row is not what it was, or the operation had a fact that records do not keep (the target of a move)"
        )

    def replay(self, *, tenant: str | None, since: int, until: int, draft: Policy | None = None) -> Replay:
        """Decide again what was decided between two times (us), a tenant's own or (None) all; also under a draft bundle.

        Under the draft, callers have the roles that its members give them. Differences are told most frequent first.
        """
        made, seen = Replay(), dict[tuple[str, str, str], Request | str]()
        groups: dict[tuple[Any, ...], Difference] = {}
        for found in self._search.scan(since=since, until=until):
            record = found.record
            if record["kind"] == "outcome" or "facts" not in record or tenant not in {None, record.get("tenant")}:
                continue  # an outcome repeats its intent's decision
            made.decisions += 1
            request = self._again(record, seen)
            if isinstance(request, str):
                made.unmade[request] = made.unmade.get(request, 0) + 1
                continue
            decision = self.bundles.get(record["pol"]).decide(request)
            if same(record, decision.allowed, decision.rules):
                made.identical += 1
            else:
                made.changed = [*made.changed, str(record["id"])][:_EXAMPLES]
            if draft is not None:
                self._compare(made, groups, record, request, decision, draft)
        made.differences = sorted(groups.values(), key=lambda d: -d.count)[:_DIFFERENCES]
        made.radius = _radius(groups.values())
        return made

    def _again(self, record: Mapping[str, Any], seen: dict[tuple[str, str, str], Request | str]) -> Request | str:
        """The request of a record, or why there is none; looked for once for all records of the same facts."""
        named = str(record["facts"]), str(record.get("actor")), str(record["pol"])
        if named not in seen:
            try:
                seen[named] = self.request(record, self.bundles.get(named[2]))
            except (BundleLost, FactsLost) as error:
                seen[named] = str(error)
        request = seen[named]
        return request if isinstance(request, str) else replace(request, now=int(record["ts"]) // 1_000_000)

    def _compare(
        self,
        made: Replay,
        groups: dict[tuple[Any, ...], Difference],
        record: Mapping[str, Any],
        request: Request,
        was: Decision,
        draft: Policy,
    ) -> None:
        becomes = draft.decide(replace(request, caller=self._under(draft, record, request.caller)))
        if (was.allowed, set(was.rules)) == (becomes.allowed, set(becomes.rules)):
            return
        newly = "by other rules"
        if was.allowed is not becomes.allowed:
            newly = "allowed" if becomes.allowed else "denied"
            made.newly_allowed += becomes.allowed
            made.newly_denied += was.allowed
        told = was.rules or (was.rule_code,), becomes.rules or (becomes.rule_code,)
        named = record.get("key"), str(record.get("actor")), request.action, *told, newly
        group = groups.setdefault(named, Difference(*named))
        group.count += 1
        if len(group.examples) < _EXAMPLES:
            group.examples.append(str(record["id"]))

    def _under(self, draft: Policy, record: Mapping[str, Any], caller: Caller) -> Caller:
        """The caller in a draft's eyes; without a role there if the draft does not know it any more."""
        found = list(self._callers(draft.registry, record))
        if len(found) != 1:
            return caller if found else replace(caller, roles=frozenset())
        return replace(caller, kind=found[0].kind, tenant=found[0].tenant, roles=found[0].roles)

    def _policy_of(self, record: Mapping[str, Any]) -> str:
        if "pol" not in record:
            raise FactsLost("the record names no bundle")
        return str(record["pol"])

    def _possible(self, record: Mapping[str, Any], policy: Policy) -> Iterator[Request]:
        """Every request that the record can be of, the usual ones first: the digest tells which one it was."""
        callers = list(self._callers(policy.registry, record))
        if not callers:
            raise FactsLost(
                "who the caller was cannot be told: the actor is erased, or its credential is not known here"
            )
        places = sorted(policy.registry.expand(["approved"]))
        key = self._key(record)
        declared = frozenset(record.get("dest", ()))
        grant = str(record.get("grant", "")) if record.get("op") in DATA_PLANE else ""
        waivers: tuple[Waiver, ...] = ()
        if "exc" in record and record.get("op") in DATA_PLANE:
            waivers = named(str(record["exc"]), self.exceptions(str(record.get("key"))))
        passed, origin = frozenset(record.get("via", ())), frozenset(record.get("orig", ()))
        for caller in (behind(c, origin) for c in callers):
            tenant = policy.registry.tenant(caller.tenant) if caller.tenant is not None else None
            usual = tenant.default_reason if tenant is not None else "unspecified"
            for resource, approvals in itertools.product(_resources(caller, key), _APPROVALS):
                for via in _first(str(record.get("region", "")), places):
                    base = Request(
                        caller=caller,
                        action="",
                        resource=resource,
                        now=int(record["ts"]) // 1_000_000,
                        hsm=str(record["region"]) if isinstance(resource, KeyFacts) else via,
                        via=passed | {via},
                        purpose=_purpose(record, resource),
                        reason=str(record.get("reason", usual)),
                        approvals=approvals,
                        grant=grant,
                        waived_reach=waived(waivers, "reach"),
                        waived_egress=waived(waivers, "egress"),
                    )
                    yield from _actions(base, policy, caller.places | declared)

    def _key(self, record: Mapping[str, Any]) -> KeyFacts | None:
        if "key" not in record or "region" not in record:
            return None
        key = uuid.UUID(record["key"])
        try:
            found = self._key_facts(key)
        except KeyNotFound:
            raise FactsLost(f"the row of key {record['key']} is not there any more") from None
        for was in self.earlier_bounds(key, int(record["kv"])) if "kv" in record else ():
            found = replace(found, **was)
        return found


def _radius(differences: Iterable[Difference]) -> dict[str, dict[str, int]]:
    """How many decisions newly allowed or denied touch each key and caller, and by which rules; most first."""
    found: dict[str, Counter[str]] = {"key": Counter(), "caller": Counter(), "rule": Counter()}
    for one in differences:
        if one.newly in {"allowed", "denied"}:
            found["key"][one.key or "-"] += one.count
            found["caller"][one.caller] += one.count
            for rule in {*one.was, *one.becomes}:
                found["rule"][rule] += one.count
    return {name: dict(counted.most_common(_DIFFERENCES)) for name, counted in found.items()}


def same(record: Mapping[str, Any], allowed: bool, rules: tuple[str, ...]) -> bool:
    """Whether a record tells of this decision: by the same rules, and denied by policy only if it was denied."""
    told = tuple(record.get("rule", ()))
    return told == rules or (told in {(), ("DEFAULT",)} and not rules and not allowed)


def _undecided(record: Mapping[str, Any]) -> str:
    told = str(record.get("rule", [_FREEZE])[0])
    if told != _FREEZE and not told.startswith(HOP):
        return "the record has no digest of the facts: it was written by a release that kept none"
    why = record.get("why") or record.get("out") or "nothing"
    return f"no policy was asked: typed code ended this request before ({why})"


def _resources(caller: Caller, key: KeyFacts | None) -> Iterator[Resource]:
    if key is not None:
        yield from (replace(key, state=state) for state in _STATES)
        return
    if caller.tenant is not None:
        yield TenantFacts(caller.tenant)
    yield InstallationFacts()


def _purpose(record: Mapping[str, Any], resource: Resource) -> str:
    if not isinstance(resource, KeyFacts):
        return ""
    if "purpose" in record:
        return str(record["purpose"])
    return resource.purposes[0] if len(resource.purposes) == 1 else ""


def _first(name: str, places: list[str]) -> list[str]:
    return [name, *(p for p in places if p != name)] if name in places else places


def _actions(base: Request, policy: Policy, dest: frozenset[str]) -> Iterator[Request]:
    for (
        name,
        action,
    ) in policy.bundle.actions.items():  # also those that are not for this kind of resource: asked in vain
        yield replace(base, action=name)
        if action.groups & {"release", "move"}:
            yield replace(base, action=name, dest=dest)
