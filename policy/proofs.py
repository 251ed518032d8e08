"""Proofs about a bundle by Z3: what its charter promises holds for every request there can be, not for those tried.

Cedar's JSON form becomes one formula over a symbolic request. A request that would break a promise is looked for among
all that no rule forbids, whatever tenants permit today or ever; that there is none is the proof, and one that is found is
put to Cedar itself. The same formula tells what a change of the bundle newly allows or denies, and which rules never
decide anything.

What is assumed of a request is what typed code enforces before a policy is asked (`World.assumed`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Final, Literal, TypeAlias

import z3

from policy.bundle import Bundle, Rule, schema
from policy.engine import Policy
from policy.facts import PLACE_SETS, RESERVED_TENANT
from policy.oracle import Oracle
from policy.request import Attest, Caller, InstallationFacts, KeyFacts, PrincipalKind, Request, Resource, TenantFacts

TIMEOUT_MS: Final = 60_000
ELSEWHERE: Final = "elsewhere"  # a place that no registry knows
NOBODY: Final = "nobody"  # a principal, key or text that no policy names
Kind = Literal["Key", "Tenant", "Installation"]
KINDS: Final[tuple[Kind, ...]] = ("Key", "Tenant", "Installation")
_STATES: Final = ("preactive", "active", "suspended", "deactivated", "compromised", "destroyed")
_CONTEXT_SETS: Final = ("via", "caller", "dest", "target", "waivedReach", "waivedEgress")
_BOUND: Final = 1 << 53


class NotEncodable(Exception):
    """A rule uses something that the proofs do not cover; the message names rule and construct."""


# ---- values of a symbolic request ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Number:
    z: z3.ArithRef


@dataclass(frozen=True, slots=True)
class _Text:
    z: z3.ArithRef  # number of the string


@dataclass(frozen=True, slots=True)
class _Ref:
    """An entity: its type is known, which one of the type is symbolic."""

    kind: str
    z: z3.ArithRef


@dataclass(frozen=True, slots=True)
class _Set:
    """A set by its members: `has` tells whether a member of the kind is in it."""

    kind: str  # Place, Tenant, or Text
    members: tuple[tuple[int, z3.BoolRef], ...]  # (number, in the set); complete for places and tenants

    def has(self, number: z3.ArithRef) -> z3.BoolRef:
        return z3.Or([z3.And(number == n, inside) for n, inside in self.members])


Value: TypeAlias = z3.BoolRef | _Number | _Text | _Ref | _Set | Mapping[str, Any]


class _Numbers:
    """A number for each string or entity that is spoken of, kind by kind."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, int]] = {}

    def __call__(self, kind: str, name: str) -> int:
        known = self._of.setdefault(kind, {})
        return known.setdefault(name, len(known))

    def names(self, kind: str) -> list[str]:
        """Every name of a kind, by number."""
        return list(self._of.get(kind, {}))


class World:
    """One symbolic request on a resource of one kind, and what is assumed of it."""

    def __init__(self, bundles: Sequence[Bundle], kind: Kind, *, texts: Iterable[str] = ()) -> None:
        """`texts` are strings to tell apart beside those that the policies name."""
        self.kind, self._bundle, self._numbers = kind, bundles[0], _Numbers()
        self.actions = sorted({a for b in bundles for a, about in b.actions.items() if kind in about.resources})
        self._about = bundles[0].actions
        self._rules = [r for b in bundles for r in b.rules.values()]
        registry = bundles[0].registry
        self.places = [*sorted(registry.expand(["approved"])), ELSEWHERE]
        self.tenants = sorted({t for b in bundles for t in b.registry.tenant_names()})
        for place in self.places:
            self._numbers("Place", place)
        for tenant in (*self.tenants, RESERVED_TENANT):
            self._numbers("Tenant", tenant)
        for text in (*_STATES, NOBODY, *texts):
            self._numbers("Text", text)
        self._learn()
        self.action = z3.Int("action")
        self.workload = z3.Bool("principal is Workload")
        self.principal, self.resource = z3.Int("principal"), z3.Int("resource")
        self.tenant = z3.Int("principal.tenant")
        self._within: dict[tuple[str, str, str], z3.BoolRef] = {}
        self.key = self._key_attributes()
        self.context = self._context_attributes()

    def _learn(self) -> None:
        """Give every string and entity of the policies its number, so that sets of strings are complete over them."""
        for kind in ("Workload", "Operator", "Key"):
            self._numbers(kind, NOBODY)
        for literal in (v for rule in self._rules for v in _literals(rule.est)):
            if isinstance(literal, str):
                self._numbers("Text", literal)
            elif isinstance(literal, Mapping):
                self._numbers(literal["type"], literal["id"])

    def number(self, kind: str, name: str) -> int:
        """The number of an entity or (kind Text) of a string."""
        return self._numbers(kind, name)

    def _some(self, kind: str, name: str) -> _Set:
        names = {"Place": self.places, "Tenant": self.tenants}.get(kind) or self._numbers.names(kind)
        return _Set(kind, tuple((self.number(kind, n), z3.Bool(f"{name}[{n}]")) for n in names))

    def _key_attributes(self) -> dict[str, Value]:
        return {
            "tenant": _Ref("Tenant", z3.Int("resource.tenant")),
            "sharedWith": self._some("Tenant", "sharedWith"),
            "tier": _Number(z3.Int("tier")),
            "purposes": self._some("Text", "purposes"),
            "state": _Text(z3.Int("state")),
            **{name: self._some("Place", name) for name in PLACE_SETS},
        }

    def _context_attributes(self) -> dict[str, Value]:
        numbers = {n: _Number(z3.Int(n)) for n in ("callerProof", "approvals", "now")}
        attest = {
            "level": _Number(z3.Int("attest.level")),
            "ageS": _Number(z3.Int("attest.ageS")),
            "tcbOk": z3.Bool("tcbOk"),
        }
        return {
            "hsm": _Ref("Place", z3.Int("hsm")),
            "failover": z3.Bool("failover declared"),
            "purpose": _Text(z3.Int("purpose")),
            "reason": _Text(z3.Int("reason")),
            "attest": attest,
            **numbers,
            **{name: self._some("Place", name) for name in _CONTEXT_SETS},
        }

    # ---- what words mean ---------------------------------------------------------------------------------------------

    def doing(self, *names: str) -> z3.BoolRef:
        """Whether the action is one of these, or in one of these groups."""
        wanted = [n for n, a in enumerate(self.actions) if self._about[a].groups & set(names)]
        return z3.Or([self.action == n for n in wanted])

    def text(self, attribute: Value, *names: str) -> z3.BoolRef:
        """Whether a text is one of these."""
        assert isinstance(attribute, _Text)
        return z3.Or([attribute.z == self.number("Text", n) for n in names])

    def whole(self, attribute: Value) -> z3.ArithRef:
        """A number."""
        assert isinstance(attribute, _Number)
        return attribute.z

    def empty(self, places: Value) -> z3.BoolRef:
        """Whether no place is in a set."""
        assert isinstance(places, _Set)
        return z3.Not(z3.Or([inside for _, inside in places.members]))

    def inside(self, small: Value, large: Value) -> z3.BoolRef:
        """Whether every member of one set is in another."""
        assert isinstance(small, _Set)
        assert isinstance(large, _Set)
        held = dict(large.members)
        return z3.And([z3.Implies(yes, held.get(n, z3.BoolVal(False))) for n, yes in small.members])

    def member(self, of: str, kind: str, name: str) -> z3.BoolRef:
        """Whether the principal or resource is below an entity (or is it)."""
        if of == "action":
            return self.doing(name)
        own_tenant = self.tenant if of == "principal" else self._owner()
        if kind == "Tenant":
            return own_tenant == self.number("Tenant", name)
        if kind == self.kind and of == "resource":
            return self.resource == self.number(kind, name)
        if kind in {"Workload", "Operator"} and of == "principal":
            return z3.And(self.workload == (kind == "Workload"), self.principal == self.number(kind, name))
        if (kind, of) not in {("Role", "principal"), ("KeyRing", "resource")} or (
            of == "resource" and self.kind != "Key"
        ):
            return z3.BoolVal(False)
        return self._within.setdefault((of, kind, name), z3.Bool(f"{of} in {kind}::{name}"))

    def _owner(self) -> z3.ArithRef:
        if self.kind == "Tenant":
            return self.resource
        owner = self.key["tenant"]
        assert isinstance(owner, _Ref)
        return owner.z if self.kind == "Key" else z3.IntVal(-1)

    # ---- what is assumed ---------------------------------------------------------------------------------------------

    def assumed(self) -> list[z3.BoolRef]:
        """What holds of every request that reaches the policies. Call it after the rules were encoded.

        The action is one for this kind of resource and caller (schema); tenants are registered, a role or key ring
        belongs to the tenant in its name (facts); tier 1 to 3, a key's residency within its tier's bound, failover
        within residency (creation); the HSM stands at a registered place (configuration); numbers fit (facts).
        """
        given = [self.action >= 0, self.action < len(self.actions)]
        for number, name in enumerate(self.actions):
            principals = self._about[name].principals
            if principals != {"Workload", "Operator"}:
                given.append(z3.Implies(self.action == number, self.workload == ("Workload" in principals)))
        given.append(z3.Or([self.tenant == self.number("Tenant", t) for t in (*self.tenants, RESERVED_TENANT)]))
        for (of, _, name), inside in self._within.items():
            owner = name.partition("/")[0]
            mine = (self.tenant if of == "principal" else self._owner()) == self.number("Tenant", owner)
            given.append(z3.Implies(inside, mine))
        given += self._names_exist()
        given += self._key_assumed() if self.kind == "Key" else []
        if self.kind == "Tenant":
            given.append(z3.Or([self.resource == self.number("Tenant", t) for t in self.tenants]))
        if self.kind == "Installation":
            given.append(self.resource == self.number("Installation", InstallationFacts().id))
        for value in (*self.context.values(), *self.context["attest"].values()):  # type: ignore[union-attr]  # `attest` is the one record in the context
            if isinstance(value, _Number):
                given.append(z3.And(value.z > -_BOUND, value.z < _BOUND))
        return given

    def _names_exist(self) -> Iterator[z3.BoolRef]:
        texts = len(self._numbers.names("Text"))
        for value in (self.context["purpose"], self.context["reason"], self.key["state"]):
            assert isinstance(value, _Text)
            yield z3.And(value.z >= 0, value.z < texts)
        for kind in ("Workload", "Operator"):
            yield z3.Implies(
                self.workload == (kind == "Workload"),
                z3.And(self.principal >= 0, self.principal < len(self._numbers.names(kind))),
            )

    def _key_assumed(self) -> Iterator[z3.BoolRef]:
        key, registry = self.key, self._bundle.registry
        tier, hsm, owner = self.whole(key["tier"]), self.context["hsm"], self._owner()
        assert isinstance(hsm, _Ref)
        yield z3.And(tier >= 1, tier <= 3)
        yield z3.And(self.resource >= 0, self.resource < len(self._numbers.names("Key")))
        yield self.text(key["state"], *_STATES)
        yield z3.Or([hsm.z == self.number("Place", p) for p in self.places[:-1]])
        yield z3.Or([owner == self.number("Tenant", t) for t in self.tenants])
        yield self.inside(key["failover"], key["residency"])
        for wanted in (1, 2, 3):
            for tenant in self.tenants:
                bound = registry.within_tier(wanted, tenant)
                outside = [yes for n, yes in key["residency"].members if self.places[n] not in bound]  # type: ignore[union-attr]  # the schema says Set<Place>
                here = z3.And(tier == wanted, owner == self.number("Tenant", tenant))
                yield z3.Implies(here, z3.Not(z3.Or(outside)))

    # ---- from a model back to a request ------------------------------------------------------------------------------

    def request(self, model: z3.ModelRef) -> Request:
        """The concrete request that a model describes."""

        def whole(z: z3.ArithRef) -> int:
            return int(model.eval(z, model_completion=True).as_long())

        def true(z: z3.BoolRef) -> bool:
            return bool(z3.is_true(model.eval(z, model_completion=True)))

        def named(kind: str, z: z3.ArithRef) -> str:
            names = self._numbers.names(kind)
            at = whole(z)
            return names[at] if 0 <= at < len(names) else NOBODY

        def some(value: Any) -> frozenset[str]:
            return frozenset(self._numbers.names(value.kind)[n] for n, yes in value.members if true(yes))

        context, kind = self.context, ("Workload" if true(self.workload) else "Operator")
        tenant = named("Tenant", self.tenant)
        roles = [
            n.partition("/")[2]
            for (of, k, n), z in self._within.items()
            if (of, k) == ("principal", "Role") and true(z)
        ]
        attest: Any = context["attest"]
        caller_kind: PrincipalKind = "workload" if kind == "Workload" else "operator"
        caller = Caller(
            id=named(kind, self.principal),
            kind=caller_kind,
            tenant=None if tenant == RESERVED_TENANT else tenant,
            roles=frozenset(roles),
            places=some(context["caller"]),
            proof=whole(self.whole(context["callerProof"])),
            authn="mtls",
        )
        return Request(
            caller=caller,
            action=self.actions[whole(self.action)],
            resource=self._resource(whole, named, some),
            now=whole(self.whole(context["now"])),
            hsm=named("Place", context["hsm"].z),  # type: ignore[union-attr]  # the schema says Place
            via=some(context["via"]),
            waived_reach=some(context["waivedReach"]),
            waived_egress=some(context["waivedEgress"]),
            dest=some(context["dest"]),
            target=some(context["target"]),
            failover=true(context["failover"]),
            purpose=named("Text", context["purpose"].z),  # type: ignore[union-attr]  # the schema says String
            reason=named("Text", context["reason"].z),  # type: ignore[union-attr]  # the schema says String
            approvals=whole(self.whole(context["approvals"])),
            attest=Attest(whole(attest["level"].z), whole(attest["ageS"].z), true(attest["tcbOk"])),
        )

    def _resource(
        self, whole: Callable[[Any], int], named: Callable[[str, Any], str], some: Callable[[Any], frozenset[str]]
    ) -> Resource:
        if self.kind == "Tenant":
            return TenantFacts(named("Tenant", self.resource))
        if self.kind == "Installation":
            return InstallationFacts()
        key: Mapping[str, Any] = self.key
        return KeyFacts(
            id=named("Key", self.resource),
            tenant=named("Tenant", key["tenant"].z),
            tier=whole(key["tier"].z),
            residency=some(key["residency"]),
            execution=some(key["execution"]),
            reach=some(key["reach"]),
            egress=some(key["egress"]),
            failover=some(key["failover"]),
            shared_with=some(key["sharedWith"]),
            purposes=tuple(sorted(some(key["purposes"]))),
            state=named("Text", key["state"].z),
        )


def _literals(node: Any) -> Iterator[Any]:
    """Every string and entity that a policy names, in its head and its conditions."""
    if isinstance(node, Mapping):
        if "__entity" in node:
            yield node["__entity"]
        elif set(node) == {"type", "id"}:
            yield node
        elif "Value" in node and isinstance(node["Value"], str):
            yield node["Value"]
        else:
            for name, sub in node.items():
                if name != "annotations":
                    yield from _literals(sub)
    elif isinstance(node, list):
        for sub in node:
            yield from _literals(sub)


# ---- a policy as a formula -------------------------------------------------------------------------------------------


class _Encoder:
    """One rule's condition over a world. Cedar is total here: every attribute is mandatory, and no number overflows."""

    def __init__(self, world: World, rule: Rule) -> None:
        self._world, self._rule = world, rule

    def whole(self) -> z3.BoolRef:
        """Whether the rule holds: its head and its conditions."""
        est = self._rule.est
        parts = [
            self._head("principal", est["principal"]),
            self._action(est["action"]),
            self._head("resource", est["resource"]),
        ]
        if any(
            z3.is_false(part) for part in parts
        ):  # of another kind of resource: its conditions are about other facts
            return z3.BoolVal(False)
        for condition in est["conditions"]:
            body = self._true(condition["body"])
            parts.append(body if condition["kind"] == "when" else z3.Not(body))
        return z3.And(parts)

    def _refuse(self, what: str) -> NotEncodable:
        return NotEncodable(f"rule {self._rule.id} ({self._rule.file}, line {self._rule.line}): {what} has no proof")

    def _head(self, of: str, head: Mapping[str, Any]) -> z3.BoolRef:
        parts = []
        if head["op"] == "is":
            parts.append(self._is(of, head["entity_type"]))
            head = {"op": "in", **head["in"]} if "in" in head else {"op": "All"}
        if head["op"] != "All":
            entity = head["entity"]
            entity = entity.get("__entity", entity)
            able = {self._world.kind} if of == "resource" else {"Workload", "Operator"}
            if head["op"] == "==" and entity["type"] not in able:  # a tenant's key is in it, and is not it
                return z3.BoolVal(False)
            parts.append(self._world.member(of, entity["type"], entity["id"]))
        return z3.simplify(z3.And(parts))

    def _is(self, of: str, kind: str) -> z3.BoolRef:
        if of == "resource":
            return z3.BoolVal(kind == self._world.kind)
        return self._world.workload == (kind == "Workload")

    def _action(self, head: Mapping[str, Any]) -> z3.BoolRef:
        if head["op"] == "All":
            return z3.BoolVal(True)
        named = [head["entity"]] if "entity" in head else head["entities"]
        return z3.simplify(self._world.doing(*(e.get("__entity", e)["id"] for e in named)))

    def _true(self, e: Mapping[str, Any]) -> z3.BoolRef:
        value = self._value(e)
        if isinstance(value, bool):
            return z3.BoolVal(value)
        if not isinstance(value, z3.BoolRef):
            raise self._refuse("a condition that is no boolean")
        return value

    def _number(self, e: Mapping[str, Any]) -> z3.ArithRef:
        value = self._value(e)
        if not isinstance(value, _Number):
            raise self._refuse("arithmetic on what is no number")
        return value.z

    def _value(self, e: Mapping[str, Any]) -> Value:
        ((op, a),) = e.items()
        match op:
            case "Value":
                return self._literal(a)
            case "&&" | "||":
                both = self._true(a["left"]), self._true(a["right"])
                return z3.And(both) if op == "&&" else z3.Or(both)
            case "!":
                return z3.Not(self._true(a["arg"]))
            case "if-then-else":
                return z3.If(self._true(a["if"]), self._true(a["then"]), self._true(a["else"]))
            case "==" | "!=":
                same = self._same(self._value(a["left"]), self._value(a["right"]))
                return same if op == "==" else z3.Not(same)
            case "<" | "<=" | ">" | ">=":
                left, right = self._number(a["left"]), self._number(a["right"])
                return {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[op]
            case "+" | "-" | "*":
                left, right = self._number(a["left"]), self._number(a["right"])
                return _Number({"+": left + right, "-": left - right, "*": left * right}[op])
            case "neg":
                return _Number(-self._number(a["arg"]))
            case "." | "has":
                return self._attribute(op, a)
        return self._about_sets(op, a)

    def _literal(self, value: Any) -> Value:
        if isinstance(value, bool):
            return z3.BoolVal(value)
        if isinstance(value, int):
            return _Number(z3.IntVal(value))
        if isinstance(value, str):
            return _Text(z3.IntVal(self._world.number("Text", value)))
        if isinstance(value, Mapping) and "__entity" in value:
            entity = value["__entity"]
            return _Ref(entity["type"], z3.IntVal(self._world.number(entity["type"], entity["id"])))
        raise self._refuse("a literal of this kind")

    def _attribute(self, op: str, a: Mapping[str, Any]) -> Value:
        world, name = self._world, a["attr"]
        owner = a["left"].get("Var")
        known: Mapping[str, Any]
        if owner == "context":
            known = world.context
        elif owner == "resource":
            known = world.key if world.kind == "Key" else {}
        elif owner == "principal":
            known = {"tenant": _Ref("Tenant", world.tenant)}
        else:
            inner = self._value(a["left"])
            if not isinstance(inner, Mapping):
                raise self._refuse("an attribute of another entity")
            known = inner
        if op == "has":
            return z3.BoolVal(name in known)
        if name not in known:
            raise self._refuse(f"the attribute {name}")
        found: Value = known[name]
        return found

    def _about_sets(self, op: str, a: Any) -> Value:
        match op:
            case "Var":
                return self._variable(a)
            case "Set":
                return self._literal_set(a)
            case "contains":
                return self._has(self._value(a["left"]), self._value(a["right"]))
            case "containsAll" | "containsAny":
                large, small = self._value(a["left"]), self._value(a["right"])
                if not (isinstance(large, _Set) and isinstance(small, _Set)) or "Text" in {large.kind, small.kind}:
                    raise self._refuse(f"{op} on anything but places or tenants")
                if op == "containsAll":
                    return self._world.inside(small, large)
                held = dict(large.members)
                return z3.Or([z3.And(yes, held.get(n, z3.BoolVal(False))) for n, yes in small.members])
            case "isEmpty":
                places = self._value(a["arg"])
                if not isinstance(places, _Set) or places.kind == "Text":
                    raise self._refuse("isEmpty on anything but places or tenants")
                return self._world.empty(places)
            case "in":
                return self._member(a["left"], a["right"])
            case "is":
                return self._kind_test(a)
        raise self._refuse(f"`{op}`")

    def _variable(self, name: str) -> Value:
        world = self._world
        if name == "resource":
            return _Ref(world.kind, world.resource)
        if name == "principal":  # its type is symbolic too: only == with an entity is encoded
            return {"principal": True}
        raise self._refuse(f"the bare {name}")

    def _kind_test(self, a: Mapping[str, Any]) -> z3.BoolRef:
        of = a["left"].get("Var")
        if of not in {"principal", "resource"}:
            raise self._refuse("`is` on an attribute")
        test = self._is(of, a["entity_type"])
        return z3.And(test, self._member(a["left"], a["in"])) if "in" in a else test

    def _literal_set(self, items: Sequence[Mapping[str, Any]]) -> _Set:
        found = [self._value(item) for item in items]
        kinds = {v.kind if isinstance(v, _Ref) else "Text" for v in found if isinstance(v, _Ref | _Text)}
        numbers = [v.z.as_long() for v in found if isinstance(v, _Ref | _Text) and z3.is_int_value(v.z)]
        if len(numbers) != len(items) or len(kinds) > 1:
            raise self._refuse("a set of anything but strings or entities")
        return _Set(next(iter(kinds), "Text"), tuple((n, z3.BoolVal(True)) for n in numbers))

    def _has(self, owner: Value, member: Value) -> z3.BoolRef:
        if not isinstance(owner, _Set) or not isinstance(member, _Ref | _Text):
            raise self._refuse("contains on anything but a set of strings or entities")
        kind = member.kind if isinstance(member, _Ref) else "Text"
        return owner.has(member.z) if kind == owner.kind else z3.BoolVal(False)

    def _same(self, left: Value, right: Value) -> z3.BoolRef:
        for one, other in ((left, right), (right, left)):
            if isinstance(one, Mapping):
                if "principal" not in one or not isinstance(other, _Ref) or not z3.is_int_value(other.z):
                    raise self._refuse("== of records")
                kind = (
                    z3.BoolVal(False)
                    if other.kind not in {"Workload", "Operator"}
                    else self._is("principal", other.kind)
                )
                return z3.And(kind, self._world.principal == other.z)
        if type(left) is not type(right) and not (isinstance(left, z3.BoolRef) and isinstance(right, z3.BoolRef)):
            return z3.BoolVal(False)  # in Cedar values of two types are never equal
        if isinstance(left, _Set) and isinstance(right, _Set):
            if "Text" in {left.kind, right.kind}:
                raise self._refuse("== on sets of strings")
            return z3.And(self._world.inside(left, right), self._world.inside(right, left))
        if isinstance(left, _Ref) and isinstance(right, _Ref) and left.kind != right.kind:
            return z3.BoolVal(False)
        a: Any = left if isinstance(left, z3.BoolRef) else left.z  # type: ignore[union-attr]  # sets and records are answered above
        b: Any = right if isinstance(right, z3.BoolRef) else right.z  # type: ignore[union-attr]  # sets and records are answered above
        return a == b

    def _member(self, left: Mapping[str, Any], right: Mapping[str, Any]) -> z3.BoolRef:
        of = left.get("Var")
        named = right.get("Set", [right])
        if of is None or any("Value" not in one for one in named):
            raise self._refuse("`in` on anything but principal, action or resource and entities named in the rule")
        entities = [one["Value"]["__entity"] for one in named]
        return z3.Or([self._world.member(of, e["type"], e["id"]) for e in entities])


class Formula:
    """A bundle over a world: which requests it allows."""

    def __init__(self, bundle: Bundle, world: World) -> None:
        self.world = world
        self.rules: dict[str, z3.BoolRef] = {}
        self._forbids: dict[str, bool] = {}
        for rule in bundle.rules.values():
            holds = _Encoder(world, rule).whole()
            if not z3.is_false(holds):
                self.rules[rule.id], self._forbids[rule.id] = holds, rule.effect == "forbid"

    def any_of(self, effect: Literal["permit", "forbid"], *, but: str = "") -> z3.BoolRef:
        """Whether a rule of an effect holds, one left out."""
        wanted = effect == "forbid"
        return z3.Or([z for name, z in self.rules.items() if self._forbids[name] is wanted and name != but])

    def allowed(self) -> z3.BoolRef:
        """Whether the request is allowed."""
        return z3.And(self.any_of("permit"), z3.Not(self.any_of("forbid")))

    def decides(self, name: str) -> z3.BoolRef:
        """Whether without this rule the decision would be another; for a forbid, whatever permits there may ever be."""
        if self._forbids[name]:
            return z3.And(self.rules[name], z3.Not(self.any_of("forbid", but=name)))
        return z3.And(self.rules[name], z3.Not(self.any_of("permit", but=name)), z3.Not(self.any_of("forbid")))


# ---- what the charter promises ---------------------------------------------------------------------------------------

_USE_STATES: Final = ("preactive", "compromised", "destroyed")
_REFUSED_REASONS: Final = ("vendor-initiated", "third-party-data-request", "unspecified")
_QUORUM: Final = ("destroy", "setPolicy", "replicate", "export")


@dataclass(frozen=True, slots=True)
class Promise:
    """A promise: no request that is `bad` is ever allowed. `code` is the check of the charter that keeps it."""

    name: str
    code: str
    bad: Callable[[World], z3.BoolRef]
    about: Kind = "Key"


def _not_in(place: str, sets: str) -> Callable[[World], z3.BoolRef]:
    def bad(w: World) -> z3.BoolRef:
        at, held = w.context[place], w.key[sets]
        assert isinstance(at, _Ref)
        assert isinstance(held, _Set)
        return z3.Not(held.has(at.z))

    return bad


def _loose(
    places: str, sets: str, *, doing: tuple[str, ...] = (), tier: int | None = None
) -> Callable[[World], z3.BoolRef]:
    """A place set that is empty or not within a set of the key, for some actions and perhaps one tier."""

    def bad(w: World) -> z3.BoolRef:
        small = w.context[places]
        return z3.And(
            w.doing(*doing) if doing else z3.BoolVal(True),
            w.whole(w.key["tier"]) == tier if tier is not None else z3.BoolVal(True),
            z3.Or(w.empty(small), z3.Not(w.inside(small, w.key[sets]))),
        )

    return bad


def _unwaived(places: str, sets: str, waived: str, *, doing: tuple[str, ...] = ()) -> Callable[[World], z3.BoolRef]:
    """As `_loose`, where no exception covers the places either."""
    loose = _loose(places, sets, doing=doing)
    return lambda w: z3.And(
        loose(w), z3.Or(w.empty(w.context[places]), z3.Not(w.inside(w.context[places], w.context[waived])))
    )


def _tier(w: World, tier: int) -> z3.BoolRef:
    return w.whole(w.key["tier"]) == tier


def _foreign(w: World) -> z3.BoolRef:
    owner, shared = w.key["tenant"], w.key["sharedWith"]
    assert isinstance(owner, _Ref)
    assert isinstance(shared, _Set)
    return z3.And(w.tenant != owner.z, z3.Not(shared.has(w.tenant)))


def _foreign_admin(w: World) -> z3.BoolRef:
    owner = w.key["tenant"]
    assert isinstance(owner, _Ref)
    return z3.And(w.doing("admin", "move"), w.tenant != owner.z)


def _stale_tee(w: World) -> z3.BoolRef:
    attest: Any = w.context["attest"]
    fresh = z3.And(attest["level"].z >= 2, attest["tcbOk"], attest["ageS"].z <= 300)
    return z3.And(_tier(w, 1), w.doing("release"), z3.Not(fresh))


def _failover(w: World) -> z3.BoolRef:
    at, held = w.context["hsm"], w.key["failover"]
    assert isinstance(at, _Ref)
    assert isinstance(held, _Set)
    return z3.And(held.has(at.z), z3.Not(w.context["failover"]))


def _purpose(w: World) -> z3.BoolRef:
    purposes, purpose = w.key["purposes"], w.context["purpose"]
    assert isinstance(purposes, _Set)
    assert isinstance(purpose, _Text)
    return z3.And(w.doing("use"), z3.Not(purposes.has(purpose.z)))


PROMISES: Final[tuple[Promise, ...]] = (
    Promise("an HSM outside the key's residency acts", "SOV-RESIDENCY", _not_in("hsm", "residency")),
    Promise("plaintext passes outside execution, or nobody knows where", "SOV-EXECUTION", _loose("via", "execution")),
    Promise("a tier 1 caller may be outside reach", "SOV-CALLER-PLACE", _loose("caller", "reach", tier=1)),
    Promise(
        "a caller may be outside reach and no exception covers it",
        "SOV-CALLER-PLACE",
        _unwaived("caller", "reach", "waivedReach"),
    ),
    Promise("a tenant without a share uses the key", "SOV-TENANT", _foreign),
    Promise("another tenant administers or moves the key", "SOV-TENANT", _foreign_admin),
    Promise(
        "another tenant's settings or lists are touched", "SOV-TENANT", lambda w: w.tenant != w.resource, about="Tenant"
    ),
    Promise("tier 1 is released without a fresh TEE", "SOV-ATTEST", _stale_tee),
    Promise("tier 1 is exported", "SOV-EXPORT", lambda w: z3.And(_tier(w, 1), w.doing("export"))),
    Promise("the caller's place is proven below 3", "SOV-PROOF", lambda w: w.whole(w.context["callerProof"]) < 3),
    Promise(
        "the caller's place is proven below 4 for tier 1",
        "SOV-PROOF",
        lambda w: z3.And(_tier(w, 1), w.whole(w.context["callerProof"]) < 4),
    ),
    Promise(
        "a key that is preactive, compromised or destroyed is used",
        "KEY-STATE",
        lambda w: z3.And(w.doing("use"), w.text(w.key["state"], *_USE_STATES)),
    ),
    Promise("a copy becomes usable outside residency", "SOV-MOVE", _loose("target", "residency", doing=("move",))),
    Promise(
        "what cannot be undone happens with fewer than two approvals",
        "SOV-QUORUM",
        lambda w: z3.And(w.doing(*_QUORUM), w.whole(w.context["approvals"]) < 2),
    ),
    Promise(
        "what cannot be undone happens to tier 1 with fewer than three approvals",
        "SOV-QUORUM",
        lambda w: z3.And(_tier(w, 1), w.doing(*_QUORUM), w.whole(w.context["approvals"]) < 3),
    ),
    Promise(
        "tier 1 is released or moved to outside egress",
        "SOV-DESTINATION",
        _loose("dest", "egress", doing=("release", "move"), tier=1),
    ),
    Promise(
        "a key is released or moved to outside egress and no exception covers it",
        "SOV-DESTINATION",
        _unwaived("dest", "egress", "waivedEgress", doing=("release", "move")),
    ),
    Promise("a failover HSM acts without a declared failover", "SOV-FAILOVER", _failover),
    Promise(
        "tier 1 or 2 is released because a vendor or a third party wants it",
        "SOV-REASON",
        lambda w: z3.And(
            w.whole(w.key["tier"]) < 3,
            w.doing("release"),
            w.text(w.context["reason"], *_REFUSED_REASONS),
        ),
    ),
    Promise("a key is used for a purpose that is not its own", "SOV-PURPOSE", _purpose),
    Promise(
        "a key protects while it is not active",
        "KEY-STATE",
        lambda w: z3.And(w.doing("protect"), z3.Not(w.text(w.key["state"], "active"))),
    ),
)
DEVELOPMENT_WAIVES: Final = frozenset(
    {"tier 1 is released without a fresh TEE", "the caller's place is proven below 4 for tier 1"}
)


@dataclass(frozen=True, slots=True)
class Proof:
    """What became of one promise: `refuted` is a request that breaks it; `unknown` if the solver gave up in time."""

    promise: Promise
    seconds: float
    refuted: Request | None = None
    unknown: bool = False

    @property
    def holds(self) -> bool:
        """Whether it is proved."""
        return self.refuted is None and not self.unknown


@dataclass(frozen=True, slots=True)
class Change:
    """A request that one bundle allows and another denies."""

    newly: Literal["allowed", "denied"]
    kind: Kind
    witness: Request


@dataclass(slots=True)
class Idle:
    """Rules that never decide: `dead` hold for no request, `redundant` change no decision beside the others."""

    dead: list[str] = field(default_factory=list)
    redundant: list[str] = field(default_factory=list)


def prove(bundle: Bundle, promises: Iterable[Promise] = PROMISES) -> list[Proof]:
    """Look for a request that breaks each promise and that no rule forbids: no permit can break it then.

    A development charter waives what it says it waives. NotEncodable if a rule about keys has no formula.
    """
    waived = DEVELOPMENT_WAIVES if bundle.development else frozenset()
    proofs = []
    for kind, some in itertools.groupby(sorted(promises, key=lambda p: KINDS.index(p.about)), lambda p: p.about):
        # What a promise speaks of must be known, also where the bundle no longer mentions it.
        world = World([bundle], kind, texts=_REFUSED_REASONS)
        formula = Formula(bundle, world)
        forbidden, permitted = formula.any_of("forbid"), formula.any_of("permit")
        solver = _solver(world, z3.Not(forbidden))
        proofs += [_prove(solver, world, p, permitted) for p in some if p.name not in waived]
    return proofs


def _solver(world: World, *given: z3.BoolRef) -> z3.Solver:
    solver = z3.Solver()
    solver.set("timeout", TIMEOUT_MS)
    solver.set("random_seed", 1)
    solver.add(*world.assumed(), *given)
    return solver


def _prove(solver: z3.Solver, world: World, promise: Promise, permitted: z3.BoolRef) -> Proof:
    began = time.perf_counter()
    solver.push()
    try:
        solver.add(promise.bad(world))
        answer = solver.check()
        took = time.perf_counter() - began
        if answer == z3.unsat:
            return Proof(promise, took)
        if answer == z3.unknown:
            return Proof(promise, took, unknown=True)
        # Told by the request that says most: one that is permitted today, and needs no exception.
        return Proof(promise, took, refuted=_plain(solver, world, permitted))
    finally:
        solver.pop()


def _plain(solver: z3.Solver, world: World, *wishes: z3.BoolRef) -> Request:
    """A request of the solver's last answer that meets as many wishes as can be; to do without exceptions is the first."""
    model = solver.model()
    solver.push()
    unwaived = z3.And(world.empty(world.context["waivedReach"]), world.empty(world.context["waivedEgress"]))
    for wish in (unwaived, *wishes):
        if solver.check(wish) == z3.sat:
            model = solver.model()
            solver.add(wish)
    solver.pop()
    return world.request(model)


def difference(old: Bundle, new: Bundle) -> list[Change]:
    """What a change of the bundle means: for each kind of resource, one request newly allowed and one newly denied."""
    found = []
    for kind in KINDS:
        world = World([old, new], kind)
        before, after = Formula(old, world).allowed(), Formula(new, world).allowed()
        solver = _solver(world, before != after)
        for newly, side in (("allowed", after), ("denied", before)):
            solver.push()
            solver.add(side)
            if solver.check() == z3.sat:
                found.append(Change(newly, kind, _plain(solver, world)))  # type: ignore[arg-type]  # `newly` is one of the two literals in the loop's head
            solver.pop()
    return found


def idle(bundle: Bundle) -> Idle:
    """Rules that never decide anything, whatever is asked."""
    lives: set[str] = set()
    decides: set[str] = set()
    for kind in KINDS:
        world = World([bundle], kind)
        formula = Formula(bundle, world)
        solver = _solver(world)
        for name in formula.rules:
            for reached, wanted in ((lives, formula.rules[name]), (decides, formula.decides(name))):
                if name not in reached and solver.check(wanted) != z3.unsat:
                    reached.add(name)
    names = list(bundle.rules)
    return Idle([n for n in names if n not in lives], [n for n in names if n in lives and n not in decides])


# ---- for people ------------------------------------------------------------------------------------------------------


def told(policy: Policy, before: Policy | None = None) -> dict[str, Any]:
    """Proofs, idle rules and, beside an earlier bundle, what the change means: plain values for a report.

    `decided` is what both engines say to a request today; `unforbidden` whether Cedar itself finds no rule against it.
    """
    proofs = prove(policy.bundle)
    rest = idle(policy.bundle)
    shown: dict[str, Any] = {
        "proved": sum(p.holds for p in proofs),
        "seconds": round(sum(p.seconds for p in proofs), 2),
        "refuted": [
            {
                "promise": p.promise.name,
                "code": p.promise.code,
                "request": plain(p.refuted),
                **_engines(policy, p.refuted),
            }
            for p in proofs
            if p.refuted is not None
        ],
        "undecided": [p.promise.name for p in proofs if p.unknown],
        "dead_rules": rest.dead,
        "redundant_rules": rest.redundant,
    }
    if before is not None:
        shown["changes"] = [
            {"newly": c.newly, "resource": c.kind, "request": plain(c.witness), **_engines(policy, c.witness)}
            for c in difference(before.bundle, policy.bundle)
        ]
    return shown


def _engines(policy: Policy, request: Request) -> dict[str, Any]:
    decision = policy.decide(request)
    decided = "allow" if decision.allowed else "deny"
    return {
        "decided": decided if policy.agrees(request, decision) else "engines disagree",
        "by": list(decision.rules) or [decision.rule_code],
        "unforbidden": unforbidden(policy.bundle, request),
    }


def unforbidden(bundle: Bundle, request: Request) -> bool:
    """Whether Cedar itself, given a permit for everything, allows the request: then no rule forbids it."""
    return Oracle(bundle.text + "\npermit (principal, action, resource);", schema()).decide(request).allowed


def plain(value: object) -> Any:
    """A request as plain values."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.name != "evidence"}
    if isinstance(value, frozenset | tuple):
        return sorted(plain(v) for v in value)
    return value
