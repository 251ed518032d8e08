"""Why a request is decided as it is: every rule that concerns it, every condition with its values, and what would help.

Nothing here decides: `Policy.decide` does, and a change is named as a fix only after it decided otherwise.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from policy.bundle import INSTALLATION_ROLES, ROLES, Bundle, Rule
from policy.compiler import Entity, Est, Scope, fits, part
from policy.engine import Policy
from policy.exceptions import Waiver
from policy.facts import Facts
from policy.grants import RULE as GRANT
from policy.grants import Grant
from policy.request import Attest, Decision, KeyFacts, PrincipalKind, Request
from policy.transfers import Agreement, Crossing, instant
from policy.written import written

MAX_FIXES: Final = 8
_TOGETHER: Final = 3  # facts that are changed at once, at most
_COMPARED: Final = frozenset({"==", "!=", "<", "<=", ">", ">="})
_CALLED: Final = frozenset({"contains", "containsAll", "containsAny"})
_STAFF: Final = ROLES | INSTALLATION_ROLES
_INTERNAL: Final = frozenset({"scheduler"})  # roles that nobody can be given
_UID: Final = re.compile(r'[A-Z]\w*::"')
_ROLE: Final = re.compile(r'Role::"([^"/\\]+)/([^"\\]+)"')


@dataclass(frozen=True, slots=True)
class Leaf:
    """One condition that has no `&&`, `||`, `!` or `if` in it: the value it looked at and what it asks of that.

    `holds` is None if it could not be evaluated by itself, as behind a `has` that is false.
    """

    text: str
    value: Any
    expected: str
    holds: bool | None


@dataclass(frozen=True, slots=True)
class Clause:
    """A `when` or `unless` and its leaves; `holds` says whether it lets the rule apply."""

    kind: str
    text: str
    holds: bool | None
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True, slots=True)
class Told:
    """What became of one rule: it applied if its head names the request and all its clauses hold."""

    rule: Rule
    head: tuple[Leaf, ...]
    clauses: tuple[Clause, ...]

    @property
    def applied(self) -> bool:
        """Whether the rule held for the request."""
        return all(leaf.holds for leaf in self.head) and all(clause.holds for clause in self.clauses)


@dataclass(frozen=True, slots=True)
class Fix:
    """Facts that, changed together, turn the denial into an answer: name -> (value in the request, value needed)."""

    changes: Mapping[str, tuple[Any, Any]]
    request: Request


@dataclass(frozen=True, slots=True)
class Border:
    """A crossing of jurisdictions, the agreement that lets data cross, if any, and all of the key's tenant about it."""

    crossing: Crossing
    agreement: Agreement | None
    agreements: tuple[tuple[Agreement, tuple[str, ...]], ...]  # and why each does not cover the request


@dataclass(frozen=True, slots=True)
class Granted:
    """A grant of the key to the caller: whether it decided, and why it does not cover the request."""

    grant: Grant
    decided: bool
    lacks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """One decision recomputed, the rules that concern its action, and the smallest changes that flip a denial."""

    request: Request
    decision: Decision
    rules: tuple[Told, ...]
    fixes: tuple[Fix, ...]
    transfers: tuple[Border, ...] = ()
    grants: tuple[Granted, ...] = ()
    exceptions: tuple[tuple[Waiver, tuple[str, ...]], ...] = ()  # and why each does not cover the request


def explain(
    policy: Policy, request: Request, *, grants: Iterable[Grant] = (), exceptions: Iterable[Waiver] = ()
) -> Explanation:
    """Decide again and tell everything about it. Facts of a wrong type have no rules: they are denied unasked.

    `grants` are those of the key to the caller, `exceptions` those of the key, live or not.
    """
    decision = policy.decide(request)
    try:
        facts = Facts()
        at = _At(facts.principal(request.caller), facts.resource(request.resource), facts.context(request), request)
    except (TypeError, ValueError):
        return Explanation(request, decision, (), ())
    rules = tuple(_told(rule, at, policy.bundle) for rule in policy.told if _concerns(rule, at, policy.bundle))
    changes = () if decision.allowed else tuple(fixes(policy, request))
    told = tuple(Granted(g, f"{GRANT}/{g.id}" in decision.rules, g.lacks(request)) for g in grants)
    waivers = tuple((w, w.lacks(request)) for w in exceptions)
    return Explanation(request, decision, rules, changes, tuple(_borders(policy, request)), told, waivers)


def _borders(policy: Policy, request: Request) -> Iterator[Border]:
    if isinstance(request.resource, KeyFacts):
        tenant, known = request.resource.tenant, policy.agreements
        for crossing, agreement in known.found(request, tenant, known.crossings(request)):
            yield Border(crossing, agreement, tuple((a, a.lacks(request)) for a in known.of(tenant, crossing)))


def shown(explanation: Explanation) -> dict[str, Any]:
    """An explanation as plain values, for an answer."""
    decision = explanation.decision
    return {
        "decision": {
            "allowed": decision.allowed,
            "code": decision.code or None,
            "rule": decision.rule_code or None,
            "rules": list(decision.rules),
            "policy": decision.digest,
        },
        "request": written(explanation.request),
        "rules": [_shown_rule(told) for told in explanation.rules],
        "fixes": [
            {name: {"is": before, "needs": after} for name, (before, after) in fix.changes.items()}
            for fix in explanation.fixes
        ],
        "transfers": [_shown_border(border) for border in explanation.transfers],
        "grants": [_shown_grant(told) for told in explanation.grants],
        "exceptions": [
            {
                "id": w.id,
                "kind": w.kind,
                "places": list(w.places),
                "purpose": w.purpose,
                "legal_basis": w.legal_basis,
                "legal_ref": w.legal_ref,
                "not_before": instant(w.begins // 1_000_000),
                "not_after": instant(w.ends // 1_000_000),
                "lacks": list(lacks),
            }
            for w, lacks in explanation.exceptions
        ],
    }


def _shown_grant(told: Granted) -> dict[str, Any]:
    grant = told.grant
    context = "equals" if grant.context_equals is not None else "subset" if grant.context_subset is not None else "any"
    return {
        "id": grant.id,
        "operations": list(grant.operations),
        "purpose": grant.purpose,
        "context": context,
        "max_uses": grant.max_uses,
        "granter": grant.granter,
        "not_after": instant(grant.ends // 1_000_000),
        "decided": told.decided,
        "lacks": list(told.lacks),
    }


def _shown_border(border: Border) -> dict[str, Any]:
    here, there = border.crossing
    return {
        "from": here,
        "to": there,
        "agreement": None if border.agreement is None else border.agreement.id,
        "agreements": [
            {
                "id": a.id,
                "legal_basis": a.legal_basis,
                "legal_ref": a.legal_ref,
                "purposes": sorted(a.purposes),
                "not_before": instant(a.begins),
                "not_after": instant(a.ends),
                "lacks": list(lacks),
            }
            for a, lacks in border.agreements
        ],
    }


def _shown_rule(told: Told) -> dict[str, Any]:
    rule = told.rule
    return {
        "id": rule.id,
        "effect": rule.effect,
        "code": rule.code or None,
        "file": rule.file,
        "line": rule.line,
        "applied": told.applied,
        "head": [_shown_leaf(leaf) for leaf in told.head],
        "clauses": [
            {"kind": c.kind, "text": c.text, "holds": c.holds, "leaves": [_shown_leaf(leaf) for leaf in c.leaves]}
            for c in told.clauses
        ],
    }


def _shown_leaf(leaf: Leaf) -> dict[str, Any]:
    return {"text": leaf.text, "value": leaf.value, "expected": leaf.expected, "holds": leaf.holds}


# ---- rules and their conditions --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _At:
    """The facts of one request as compiled rules want them."""

    principal: Entity
    resource: Entity
    context: Mapping[str, Any]
    request: Request

    def arguments(self, bundle: Bundle) -> tuple[Any, ...]:
        p, k = self.principal, self.resource
        action = self.request.action
        groups = frozenset(f'Action::"{g}"' for g in bundle.groups[action])
        return p.attrs, k.attrs, self.context, p.uid, k.uid, f'Action::"{action}"', p.ancestors, k.ancestors, groups


def _concerns(rule: Rule, at: _At, bundle: Bundle) -> bool:
    """Whether the rule is about this action and these kinds, and no other tenant's: its rules are nobody else's to read.

    The rest of the rule's head is told as leaves.
    """
    own, path = at.request.caller.tenant, rule.file.split("/")
    if path[0] == "tenants" and own is not None and path[1] != own:
        return False
    if path[0] == "keys" and rule.compiled.resource.entity != at.resource.uid:
        return False
    compiled, action = rule.compiled, bundle.actions.get(at.request.action)
    if action is None or at.principal.kind not in action.principals or at.resource.kind not in action.resources:
        return False
    return (
        compiled.concerns(at.request.action, action)
        and fits(compiled.principal, at.principal.kind)
        and fits(compiled.resource, at.resource.kind)
    )


def _told(rule: Rule, at: _At, bundle: Bundle) -> Told:
    arguments = at.arguments(bundle)
    head = (
        *_head("principal", rule.compiled.principal, at.principal),
        *_head("resource", rule.compiled.resource, at.resource),
    )
    return Told(rule, head, tuple(_clause(c, arguments) for c in rule.est["conditions"]))


def _head(name: str, scope: Scope, entity: Entity) -> Iterator[Leaf]:
    if scope.entity is None:
        return
    word = "==" if scope.exact else "in"
    holds = entity.uid == scope.entity if scope.exact else scope.entity in entity.ancestors
    value = entity.uid if scope.exact else sorted(entity.ancestors)
    yield Leaf(f"{name} {word} {scope.entity}", value, f"{word} {scope.entity}", holds)


def _clause(condition: Mapping[str, Any], arguments: tuple[Any, ...]) -> Clause:
    kind, body = condition["kind"], condition["body"]
    found = _value(body, arguments)
    holds = None if not isinstance(found, bool) else found is (kind == "when")
    return Clause(kind, said(body), holds, tuple(_leaf(e, arguments) for e in _leaves(body)))


def _leaves(e: Est) -> Iterator[Est]:
    ((op, a),) = e.items()
    if op in {"&&", "||"}:
        yield from _leaves(a["left"])
        yield from _leaves(a["right"])
    elif op == "!":
        yield from _leaves(a["arg"])
    elif op == "if-then-else":
        for name in ("if", "then", "else"):
            yield from _leaves(a[name])
    else:
        yield e


def _leaf(e: Est, arguments: tuple[Any, ...]) -> Leaf:
    ((op, a),) = e.items()
    found = _value(e, arguments)
    holds = found if isinstance(found, bool) else None
    if op in _COMPARED | _CALLED | {"in"}:
        right = _spelled(_value(a["right"], arguments))
        return Leaf(said(e), _plain(_value(a["left"], arguments)), f"{op} {right}", holds)
    if op == "isEmpty":
        return Leaf(said(e), _plain(_value(a["arg"], arguments)), "isEmpty", holds)
    if op == "has":
        return Leaf(said(e), None, f"has {a['attr']}", holds)
    if op in {"like", "is"}:
        return Leaf(said(e), _plain(_value(a["left"], arguments)), said(e).partition(f" {op} ")[2], holds)
    return Leaf(said(e), _plain(found), "true", holds)


_FAILED: Final = object()


def _value(e: Est, arguments: tuple[Any, ...]) -> Any:
    """What a part of a condition is worth; `_FAILED` where it has no value by itself."""
    try:
        return part(e)(*arguments)
    except (KeyError, TypeError, ArithmeticError):  # an attribute that is not there, behind a false guard
        return _FAILED


def _plain(value: Any) -> Any:
    if value is _FAILED:
        return None
    if isinstance(value, frozenset):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, Mapping):
        return {name: _plain(v) for name, v in value.items()}
    return value


def _spelled(value: Any) -> str:
    """A value as Cedar spells it, an entity by its uid."""
    if isinstance(value, frozenset):
        return "[" + ", ".join(sorted(map(_spelled, value))) + "]"
    if isinstance(value, str):
        return value if _UID.match(value) else json.dumps(value)
    return json.dumps(_plain(value))


def said(e: Est) -> str:
    """A condition of Cedar's JSON form as Cedar text."""
    ((op, a),) = e.items()
    if op == "Var":
        return str(a)
    if op == "Value":
        if isinstance(a, dict):
            about = a["__entity"]
            return f"{about['type']}::{json.dumps(about['id'])}"
        return json.dumps(a)
    if op == "Set":
        return "[" + ", ".join(map(said, a)) + "]"
    if op == "Record":
        return "{" + ", ".join(f"{json.dumps(n)}: {said(v)}" for n, v in a.items()) + "}"
    if op in {"!", "neg"}:
        return f"{'!' if op == '!' else '-'}{_inner(a['arg'])}"
    if op == "isEmpty":
        return f"{_inner(a['arg'])}.isEmpty()"
    if op in _CALLED:
        return f"{_inner(a['left'])}.{op}({said(a['right'])})"
    if op == ".":
        return f"{_inner(a['left'])}.{a['attr']}"
    if op == "has":
        return f"{_inner(a['left'])} has {a['attr']}"
    if op == "like":
        pattern = "".join("*" if p == "Wildcard" else p["Literal"] for p in a["pattern"])
        return f"{_inner(a['left'])} like {json.dumps(pattern)}"
    if op == "is":
        inside = f" in {said(a['in'])}" if "in" in a else ""
        return f"{_inner(a['left'])} is {a['entity_type']}{inside}"
    if op == "if-then-else":
        return f"if {said(a['if'])} then {said(a['then'])} else {said(a['else'])}"
    return f"{_inner(a['left'])} {op} {_inner(a['right'])}"


def _inner(e: Est) -> str:
    ((op, _),) = e.items()
    text = said(e)
    return text if op in {"Var", "Value", "Set", "Record", ".", "isEmpty", "!"} or op in _CALLED else f"({text})"


# ---- what would help -------------------------------------------------------------------------------------------------


def fixes(policy: Policy, request: Request) -> Iterator[Fix]:
    """The smallest sets of changed facts with which the policy allows the request, at most eight; none if none is found.

    Only facts that somebody can change are tried: who asks and from where, what is declared, the key's state, which HSM
    and node act, approvals, attestation. The key's own bounds are not: to widen them is another decision.
    """
    changes = list(_changes(policy.bundle, request))
    for size in range(1, _TOGETHER + 1):
        found = []
        for some in itertools.combinations(changes, size):
            if len({name for name, _ in some}) < size:
                continue  # one fact has one value
            changed = request
            for name, value in some:
                changed = _with(changed, name, value)
            if policy.decide(changed).allowed:
                found.append(Fix({n: (_told_fact(_fact(request, n)), _told_fact(v)) for n, v in some}, changed))
                if len(found) == MAX_FIXES:
                    break
        if found:
            yield from found
            return


def _changes(bundle: Bundle, request: Request) -> Iterator[tuple[str, Any]]:
    caller, key = request.caller, request.resource
    for kind, role in _roles(bundle, request):
        yield "caller.role", (kind, role)
    if caller.scopes is not None and request.action not in caller.scopes:
        yield "caller.scopes", caller.scopes | {request.action}
    if not isinstance(key, KeyFacts):
        return
    yield from (("caller.places", frozenset({place})) for place in sorted(key.reach) if {place} != caller.places)
    yield from (("caller.proof", proof) for proof in (3, 4) if proof > caller.proof)
    yield from (("hsm", place) for place in sorted(key.residency) if place != request.hsm)
    yield from (("via", frozenset({place})) for place in sorted(key.execution) if {place} != request.via)
    groups = bundle.groups.get(request.action, frozenset())
    if groups & {"release", "move"}:
        yield from (("dest", frozenset({place})) for place in sorted(key.egress) if {place} != request.dest)
    if "move" in groups and request.target != key.residency:
        yield "target", key.residency
    yield from (("purpose", purpose) for purpose in key.purposes if purpose != request.purpose)
    if request.reason != "customer-initiated":
        yield "reason", "customer-initiated"
    if key.state != "active":
        yield "key.state", "active"
    yield from (("approvals", count) for count in (2, 3) if count > request.approvals)
    if request.attest.level < 2 or not request.attest.tcb_ok or request.attest.age_s > 300:
        yield "attest", Attest(level=2, age_s=0, tcb_ok=True)
    if key.failover and not request.failover:
        yield "failover", True


def _roles(bundle: Bundle, request: Request) -> Iterator[tuple[PrincipalKind, str]]:
    """Roles that the bundle speaks of in the caller's tenant, as the kind of principal that the action is for."""
    action, caller = bundle.actions.get(request.action), request.caller
    own = caller.tenant or "installation"
    names = sorted({role for tenant, role in _ROLE.findall(bundle.text) if tenant == own})
    kinds: tuple[PrincipalKind, ...] = ("workload", "operator")
    for kind in kinds:
        if action is not None and kind.capitalize() in action.principals:
            for role in names:
                if (role in _STAFF) is (kind == "operator") and role not in _INTERNAL and caller.roles != {role}:
                    yield kind, role


def _fact(request: Request, name: str) -> Any:
    caller = request.caller
    match name:
        case "caller.role":
            return caller.kind, ", ".join(sorted(caller.roles))
        case "caller.places" | "caller.proof" | "caller.scopes":
            return getattr(caller, name.removeprefix("caller."))
        case "key.state":
            return getattr(request.resource, "state", None)
    return getattr(request, name)


def _with(request: Request, name: str, value: Any) -> Request:
    caller = request.caller
    match name:
        case "caller.role":
            return replace(request, caller=replace(caller, kind=value[0], roles=frozenset({value[1]})))
        case "caller.places" | "caller.proof" | "caller.scopes":
            return replace(request, caller=replace(caller, **{name.removeprefix("caller."): value}))
        case "key.state":
            assert isinstance(request.resource, KeyFacts)
            return replace(request, resource=replace(request.resource, state=value))
    changed: dict[str, Any] = {name: value}
    return replace(request, **changed)


def _told_fact(value: Any) -> Any:
    if isinstance(value, Attest):
        return {"level": value.level, "age_s": value.age_s, "tcb_ok": value.tcb_ok}
    if isinstance(value, frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value
