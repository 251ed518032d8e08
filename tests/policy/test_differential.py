"""The compiled policies against Cedar itself: random policies over the real schema, random facts, no difference.

`POLICY_ORACLE_REQUESTS=1000000 pytest tests/policy/test_differential.py` asks more (`make policy-oracle`). A request in
which Cedar reports an error must be denied by the compiled policies, by their error or by a forbid.
"""

from __future__ import annotations

import json
import os
import random
from typing import Any

import cedarpy
import pytest

from cedar_engines import REGISTRY, Asked, Engines, facts, key, principal
from policy.bundle import SHIPPED, schema, schema_actions
from policy.compiler import Entity

REQUESTS = int(os.environ.get("POLICY_ORACLE_REQUESTS", "100000"))
SEED = int(os.environ.get("POLICY_ORACLE_SEED", "1"))
PARTS = 4
CHARTER = (SHIPPED / "charter/00-charter.cedar").read_text()
SHIPPED_TEXT = CHARTER + (SHIPPED / "tenants/health/00-roles.cedar").read_text()
PLACES = sorted(REGISTRY.expand(["approved"]))
TENANTS = ["health", "defence", "institute"]
PURPOSES = ["inference", "training", "research", "sign", "tr*ing", "tr\ning", 'x" || true //', ""]
STATES = ["preactive", "active", "active", "active", "suspended", "deactivated", "compromised", "destroyed"]
ROLES = ["health/workload", "health/operator", "health/officer", "defence/workload", "institute/x"]
KEY_SETS = ["residency", "execution", "reach", "egress", "failover"]
CONTEXT_SETS = ["via", "caller", "dest", "target", "waivedReach", "waivedEgress"]
ACTIONS = sorted(name for name, a in schema_actions().items() if "Key" in a.resources)
LIT = json.dumps


class Writer:
    """Writes random Cedar text; each method yields an expression of one type of the schema."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def pick(self, *options: str) -> str:
        return self.rng.choice(options)

    def place(self, depth: int) -> str:
        simple = ("context.hsm", "principal.home", f'Place::"{self.pick(*PLACES)}"')
        if depth > 0:
            return self.pick(*simple, f"(if {self.bool(depth - 1)} then {simple[0]} else {simple[1]})")
        return self.pick(*simple)

    def places(self, depth: int) -> str:
        if depth > 0 and self.rng.random() < 0.15:
            return f"(if {self.bool(depth - 1)} then {self.places(0)} else {self.places(0)})"
        listed = ", ".join(self.place(0) for _ in range(self.rng.randint(1, 4)))
        return self.pick(f"resource.{self.pick(*KEY_SETS)}", f"context.{self.pick(*CONTEXT_SETS)}", f"[{listed}]")

    def long(self, depth: int) -> str:
        if depth > 0 and self.rng.random() < 0.4:
            left, right = self.long(depth - 1), self.long(depth - 1)
            chosen = f"(if {self.bool(depth - 1)} then {left} else {right})"
            return self.pick(f"({left} + {right})", f"({left} - {right})", f"({left} * {right})", f"(-{left})", chosen)
        names = ("resource.tier", "principal.clearance", "context.approvals", "context.callerProof", "context.now")
        more = ("context.attest.level", "context.attest.ageS", *map(str, (0, 1, 2, 3, 300, 2**63 - 1, -(2**63))))
        return self.pick(*names, *more)

    def string(self) -> str:
        return self.pick("context.purpose", "context.reason", "resource.state", *map(LIT, PURPOSES))

    def group(self) -> str:
        return self.pick(f'Role::"{self.pick(*ROLES)}"', f'Tenant::"{self.pick(*TENANTS)}"')

    def atom(self, depth: int) -> str:
        pick, places, long = self.pick, self.places, self.long
        patterns = (LIT("tr*ing"), LIT("*"), LIT("*e*"), LIT(""), r'"tr\*ing"', LIT("*r*n*"))
        two = ", ".join(LIT(x) for x in self.rng.sample(PURPOSES, 2))
        makers = (
            lambda: f"{long(depth + 1)} {pick('<', '<=', '>', '>=', '==', '!=')} {long(depth)}",
            lambda: f"{self.string()} {pick('==', '!=')} {self.string()}",
            lambda: f"{self.string()} like {pick(*patterns)}",
            lambda: f"{places(depth)}.{pick('containsAll', 'containsAny')}({places(depth)})",
            lambda: f"{places(depth)}.contains({self.place(depth)})",
            lambda: f"{places(depth)} {pick('==', '!=')} {places(depth)}",
            lambda: f"{places(depth)}.isEmpty()",
            lambda: f"[{two}].contains(context.purpose)",
            lambda: (
                "resource.purposes." + pick("contains(context.purpose)", "isEmpty()", "containsAny([context.purpose])")
            ),
            lambda: f"[{long(0)}, {long(0)}].contains({long(depth)})",
            lambda: f"{self.place(depth)} {pick('==', '!=')} {self.place(depth)}",
            lambda: f"principal.tenant {pick('==', '!=')} {pick('resource.tenant', 'principal.tenant')}",
            lambda: f"resource.sharedWith.contains({pick('principal.tenant', 'resource.tenant')})",
            lambda: f"principal in {self.group()}",
            lambda: f'principal in [Role::"{pick(*ROLES)}", Role::"{pick(*ROLES)}"]',
            lambda: f"principal in {pick('resource.tenant', 'resource.sharedWith')}",
            lambda: f'principal in (if {self.bool(0)} then [Role::"{pick(*ROLES)}"] else [Role::"{pick(*ROLES)}"])',
            lambda: f"resource in {pick('principal.tenant', 'resource', 'KeyRing::' + LIT('r1'))}",
            lambda: f"action {pick('==', 'in')} Action::{LIT(pick(*ACTIONS, 'use', 'release', 'move'))}",
            lambda: f"action in [Action::{LIT(pick('use', 'admin'))}, Action::{LIT(pick('move', 'process'))}]",
            lambda: f"principal is {pick('Workload', 'Operator')}{pick('', f' in {self.group()}')}",
            lambda: pick(
                "principal has clearance", "context has attest", "resource has nothing", "context.attest has level"
            ),
            lambda: f"context.attest == {{level: {pick('2', long(0))}, ageS: 10, tcbOk: {pick('true', self.bool(0))}}}",
            lambda: pick("context.failover", "principal.critical", "context.attest.tcbOk", "true"),
            lambda: pick("1 == true", "0 != false", '"a" != 1', r'Tenant::"t" == "Tenant::\"t\""'),
        )
        return self.rng.choice(makers)()

    def bool(self, depth: int) -> str:
        if depth <= 0 or self.rng.random() < 0.3:
            return f"({self.atom(max(depth, 0))})"
        left, right = self.bool(depth - 1), self.bool(depth - 1)
        chosen = f"(if {left} then {right} else {self.bool(depth - 1)})"
        return self.pick(f"({left} && {right})", f"({left} || {right})", f"(!{left})", chosen)

    def policy(self, number: int) -> str:
        tenant, pick = f'Tenant::"{self.pick(*TENANTS)}"', self.pick
        one, other = (LIT(f"{c}{self.rng.randrange(4)}") for c in "wk")
        who = pick(
            *("principal", "principal", "principal is Workload", "principal is Operator"),
            *(f"principal in {self.group()}", f"principal is Workload in {tenant}", f"principal == Workload::{one}"),
        )
        named = f"Action::{LIT(pick(*ACTIONS))}"
        act = pick(
            "action", "action", 'action in Action::"use"', f"action == {named}", f'action in [Action::"admin", {named}]'
        )
        what = pick(
            *("resource is Key", "resource is Key", 'resource is Key in KeyRing::"r1"'),
            *(f"resource is Key in {tenant}", f"resource == Key::{other}"),
        )
        effect, word = pick("permit", "permit", "permit", "forbid"), pick("when", "unless")
        condition = self.bool(self.rng.randint(0, 3))
        return f"@id({LIT(f'x{number}')}) {effect} ({who}, {act}, {what}) {word} {{ {condition} }};\n"


class World:
    """Random people, keys and requests: most within a key's place sets, so that permits are reached too."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.people, self.keys = [self._person(n) for n in range(16)], [self._key(n) for n in range(16)]

    def some(self, low: int, high: int) -> list[str]:
        return self.rng.sample(PLACES, self.rng.randint(low, min(high, len(PLACES))))

    def _person(self, number: int) -> Entity:
        rng = self.rng
        kind, name = rng.choice([("Workload", f"w{number}"), ("Operator", f"o{number}")])
        roles, tenant = rng.sample(ROLES, rng.randint(0, 3)), rng.choice(TENANTS)
        if rng.random() < 0.7:
            roles.append(f"{tenant}/{kind.lower()}")
        home, clearance, critical = rng.choice(PLACES), rng.randint(0, 4), rng.random() < 0.5
        return principal(kind, name, tenant, home, roles, clearance, critical)

    def _key(self, number: int) -> Entity:
        rng = self.rng
        made = key(
            f"k{number}",
            rng.choice(TENANTS),
            rng.randint(1, 3),
            self.some(2, 6),
            purposes=rng.sample(PURPOSES, 3),
            reach=self.some(2, 6),
            egress=self.some(2, 6),
            failover=self.some(0, 3),
            shared=rng.sample(TENANTS, rng.randint(0, 2)),
            state=rng.choice(STATES),
        )
        ring = [r'KeyRing::"r1"'] if rng.random() < 0.4 else []
        return Entity("Key", f"k{number}", made.attrs, [*made.ancestors, *ring])

    def request(self) -> Asked:
        rng, one = self.rng, self.rng.choice(self.keys)
        inside, who = rng.random() < 0.7, rng.choice(self.people)

        def of(name: str) -> list[str]:
            held = sorted(u[8:-1] for u in one.attrs[name])
            return rng.sample(held, rng.randint(1, len(held))) if inside else self.some(0, 4)

        context: dict[str, Any] = facts(
            hsm=of("residency")[0] if inside else rng.choice(PLACES),
            via=of("execution"),
            caller=of("reach"),
            dest=of("egress"),
            target=of("residency"),
            proof=rng.choice([0, 2, 3, 4, 4, 5]),
            failover=rng.random() < 0.6,
            waived=self.some(0, 8),
            approvals=rng.randint(0, 4),
            purpose=rng.choice(sorted(one.attrs["purposes"]) if inside else PURPOSES),
            reason=rng.choice(["customer-initiated"] * 3 + ["vendor-initiated", "unspecified"]),
            now=rng.choice([1_999_999_999, 2_000_000_000, 2_002_591_999, 2_002_592_000]),
            attest=(rng.choice([0, 2, 3]), rng.choice([10, 100, 300, 301]), rng.random() < 0.8),
        )
        fitting = [a for a in ACTIONS if who.kind in schema_actions()[a].principals]
        return who, rng.choice(fitting if rng.random() < 0.9 else ACTIONS), one, context


@pytest.mark.parametrize("part", range(PARTS))
def test_random_policies_and_requests_are_decided_as_cedar_decides(part: int) -> None:
    rng = random.Random(SEED * 1_000 + part)
    asked = allowed = policies = turn = 0
    while asked < REQUESTS // PARTS:
        turn += 1
        writer, world, text = Writer(rng), World(rng), "" if turn % 3 == 0 else SHIPPED_TEXT
        for number in range(0 if turn % 4 == 0 else rng.choice((3, 8, 40))):
            policy = writer.policy(number)
            if cedarpy.validate_policies(policy, schema()).validation_passed:
                text, policies = text + policy, policies + 1
        engines = Engines(text or SHIPPED_TEXT)
        engines.know([*world.people, *world.keys])
        for _ in range(1_000):
            request = world.request()
            asked += 1
            allowed += engines.ours(*request).allowed
            assert engines.differ(request) is None, text
    print(f"part {part}: {asked} requests, {allowed} allowed, {policies} random policies, none decided otherwise")
    assert allowed > asked / 100
    assert policies > turn
