"""What a bundle is tried out with before it counts: its own cases, and random requests made of its own words."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from policy.bundle import Bundle
from policy.places import Registry
from policy.request import Attest, Caller, InstallationFacts, KeyFacts, PrincipalKind, Request, Resource, TenantFacts

REQUESTS: Final = 500
REQUESTS_A_TENANT: Final = 50  # where only the files of few tenants changed
WHOLE_EVERY: Final = 20  # one in so many is asked of the whole bundle, the others of the rules that can concern them
_STATES: Final = ("preactive", "active", "active", "active", "suspended", "deactivated", "compromised", "destroyed")
_REASONS: Final = ("customer-initiated", "customer-initiated", "unspecified", "vendor-initiated")


def case(given: Mapping[str, Any], registry: Registry) -> Request:
    """The request that a case of `cases/*.yaml` describes.

    AttributeError, KeyError, TypeError, ValueError or UnknownPlace if it describes none.
    """

    def places(name: str, default: tuple[str, ...] = ()) -> frozenset[str]:
        return registry.expand(given.get(name, default))

    who = given["caller"]
    facts = TenantFacts(given["tenant"]) if "tenant" in given else _key(given["key"], registry)
    attest = given.get("attest", (0, 0, False))
    caller = Caller(
        id=who.get("id", "mtls:case:/case"),
        kind=who["kind"],
        tenant=who["tenant"],
        roles=frozenset(who["roles"]),
        places=registry.expand(who.get("places", ())),
        proof=who.get("proof", 4),
        authn="mtls",
    )
    return Request(
        caller=caller,
        action=given["action"],
        resource=facts,
        now=given.get("now", 1_800_000_000),
        hsm=given.get("hsm", "eu-de-1"),
        via=places("via", (given.get("hsm", "eu-de-1"),)),
        dest=places("dest"),
        target=places("target"),
        failover=given.get("failover", False),
        purpose=given.get("purpose", "default"),
        reason=given.get("reason", "customer-initiated"),
        approvals=given.get("approvals", 0),
        waived_reach=places("waived_reach"),
        waived_egress=places("waived_egress"),
        attest=Attest(*attest),
    )


def _key(key: Mapping[str, Any], registry: Registry) -> KeyFacts:
    return KeyFacts(
        id=key.get("id", "case"),
        tenant=key["tenant"],
        tier=key["tier"],
        residency=registry.expand(key["residency"]),
        execution=registry.expand(key.get("execution", key["residency"])),
        reach=registry.expand(key.get("reach", key["residency"])),
        egress=registry.expand(key.get("egress", key["residency"])),
        failover=registry.expand(key.get("failover", ())),
        shared_with=frozenset(key.get("shared_with", ())),
        purposes=tuple(key.get("purposes", ("default",))),
        state=key.get("state", "active"),
    )


def changed(bundle: Bundle, known: Bundle) -> frozenset[str] | None:
    """The tenants whose rules alone differ; None if more does, so that anybody may be decided otherwise."""
    if not bundle.registry.says_the_same(known.registry):
        return None
    names = bundle.files.keys() | known.files.keys()
    differ = {name for name in names - {"charter.yaml"} if bundle.files.get(name) != known.files.get(name)}
    owners = [name.split("/")[:2] for name in differ if not name.startswith("cases/")]  # all cases are tried anyway
    return frozenset(owner[1] for owner in owners) if all(owner[0] == "tenants" for owner in owners) else None


def requests(bundle: Bundle, count: int = REQUESTS, *, among: frozenset[str] | None = None) -> Iterator[Request]:
    """Random requests, the same ones for the same bundle: most within reach of a permit, some far from it.

    Callers are of the tenants `among`, if it is given, and so are most keys.
    """
    rng = random.Random(bundle.digest)  # noqa: S311 - repeatable on purpose; nothing here is secret
    words = _Words(rng, bundle, among)
    for _ in range(count):
        yield words.request()


class _Words:
    """The tenants, roles, places, keys and strings that a bundle speaks of."""

    def __init__(self, rng: random.Random, bundle: Bundle, among: frozenset[str] | None) -> None:
        text = bundle.text
        self._rng, self._actions = rng, bundle.actions
        self._names = sorted(bundle.actions)
        self._places = sorted(bundle.registry.expand(["approved"]))
        self._tenants = sorted(bundle.registry.tenant_names())
        self._callers_of = self._tenants if among is None else sorted(among)
        roles = {"workload", "operator", "officer", *re.findall(r'Role::"[^"/]*/([^"\\]+)"', text)}
        self._roles = sorted(roles)
        self._keys = ["some", *sorted(set(re.findall(r'Key::"([^"\\]+)"', text)))]
        self._callers = ["mtls:a:/t/x", *sorted(set(re.findall(r'(?:Workload|Operator)::"([^"\\]+)"', text)))]
        self._strings = ["default", "", *sorted(set(re.findall(r'(?<![:\w(])"([^"\\]*)"', text)))[:64]]

    def request(self) -> Request:
        """One question."""
        rng = self._rng
        name = rng.choice(self._names)
        action, inside, tenant = self._actions[name], rng.random() < 0.7, rng.choice(self._callers_of)
        key = self._key(tenant if rng.random() < 0.8 else rng.choice(self._tenants))

        def near(of: frozenset[str]) -> frozenset[str]:
            return self._some(sorted(of), 1) if inside else self._some(self._places, 0)

        kinds: Sequence[PrincipalKind] = [k for k in ("workload", "operator") if k.capitalize() in action.principals]
        caller = Caller(
            id=rng.choice(self._callers),
            kind=rng.choice(kinds) if inside else rng.choice(("workload", "operator")),
            tenant=tenant if rng.random() < 0.9 else None,
            roles=frozenset(rng.sample(self._roles, rng.randint(0, min(3, len(self._roles))))),
            places=near(key.reach),
            proof=rng.choice((0, 2, 3, 4, 4, 5)),
            authn="mtls",
        )
        resources: dict[str, Resource] = {
            "Key": key,
            "Tenant": TenantFacts(key.tenant),
            "Installation": InstallationFacts(),
        }
        return Request(
            caller=caller,
            action=name,
            resource=resources[rng.choice(sorted(action.resources))],
            now=rng.choice((1, 1_800_000_000, 2_000_500_000)),
            hsm=min(near(key.residency), default=""),
            via=near(key.execution),
            dest=near(key.egress),
            target=near(key.residency),
            failover=rng.random() < 0.5,
            waived_reach=near(key.reach) if rng.random() < 0.2 else frozenset(),
            waived_egress=near(key.egress) if rng.random() < 0.2 else frozenset(),
            purpose=rng.choice(key.purposes) if inside else rng.choice(self._strings),
            reason=rng.choice(_REASONS),
            approvals=rng.randint(0, 4),
            attest=Attest(rng.randint(0, 3), rng.choice((10, 300, 301)), rng.random() < 0.8),
        )

    def _key(self, tenant: str) -> KeyFacts:
        rng, places = self._rng, self._places
        return KeyFacts(
            id=rng.choice(self._keys),
            tenant=tenant,
            tier=rng.randint(1, 3),
            residency=self._some(places, 1),
            execution=self._some(places, 1),
            reach=self._some(places, 1),
            egress=self._some(places, 1),
            failover=self._some(places, 0) if rng.random() < 0.3 else frozenset(),
            shared_with=self._some(self._tenants, 0) if rng.random() < 0.3 else frozenset(),
            purposes=tuple(rng.sample(self._strings, rng.randint(1, min(3, len(self._strings))))),
            state=rng.choice(_STATES),
        )

    def _some(self, names: Sequence[str], least: int) -> frozenset[str]:
        return frozenset(self._rng.sample(names, self._rng.randint(least, min(len(names), max(least, 4)))))
