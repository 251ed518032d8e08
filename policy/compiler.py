"""Cedar's JSON form (EST) made into Python functions: one function a policy, found by action and scope.

It relies on strict validation against the schema and on facts of exactly the schema's types: int, bool, str, `Record`,
frozenset, and entities as `uid` writes them. On purpose unlike stock Cedar, an error in any policy that is looked at
raises (Cedar skips the policy, and a forbid that is skipped fails open). What lies outside the compiled part of Cedar
is refused at load: extension types (ip, decimal, datetime, duration), tags, templates, actions in a namespace.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, Final, NamedTuple

MAX_DEPTH: Final = 40  # of one condition; CPython's own parser gives up at 200 parentheses
MAX_WILDCARDS: Final = 3
MAX_TEXT: Final = 1024  # characters of a string fact

Est = Mapping[str, Any]
Test = Callable[..., bool]


class Unsupported(Exception):
    """The policy uses something outside the compiled part of Cedar: which, and why it is refused."""


class RuleFailed(Exception):
    """A policy could not be evaluated: the number of the rule (-1: one of several), with the error as cause. It denies."""

    def __init__(self, rule: int) -> None:
        super().__init__(f"rule {rule}")
        self.rule = rule


class Record(dict[str, Any]):
    """A record is a value: hashable, so that a set may hold it."""

    def __hash__(self) -> int:  # type: ignore[override]  # dict has None here, as it can change; a record does not
        return hash(frozenset(self.items()))


class Entity:
    """A principal or resource: its type, attributes, and its ancestors (transitive, itself among them)."""

    __slots__ = ("ancestors", "attrs", "kind", "scopes", "uid")

    def __init__(self, kind: str, name: str, attrs: Mapping[str, Any], parents: Iterable[str] = ()) -> None:
        self.kind, self.uid, self.attrs = kind, uid(kind, name), attrs
        self.ancestors = frozenset(parents) | {self.uid}
        self.scopes: tuple[str | None, ...] = (None, *self.ancestors)  # what a policy's scope may name to mean it


class Action(NamedTuple):
    """An action of the schema: its groups and itself, and what kinds of principals and resources it is for."""

    groups: frozenset[str]
    principals: frozenset[str]
    resources: frozenset[str]


def uid(kind: str, name: str) -> str:
    """An entity as text; the quoted name cannot pass for another type's (`K::"x"` is no prefix of `K::R::"x"`)."""
    return f"{kind}::{json.dumps(name)}"


# ---- what compiled code may call ---------------------------------------------------------------------------------


def _checked(number: int) -> int:
    if -(1 << 63) <= number < 1 << 63:
        return number
    raise OverflowError("outside 64 bits")


def _within(ancestors: frozenset[str], right: str | frozenset[str]) -> bool:
    """Cedar's `in`, whose right side may be known at run time only, as one entity or as a set."""
    return right in ancestors if isinstance(right, str) else not ancestors.isdisjoint(right)


def _get(owner: Any, name: str, pu: str, p: Mapping[str, Any], ku: str, k: Mapping[str, Any]) -> Any:
    if isinstance(owner, Record):
        return owner[name]
    return _attributes(owner, pu, p, ku, k)[name]


def _has(owner: Any, name: str, pu: str, p: Mapping[str, Any], ku: str, k: Mapping[str, Any]) -> bool:
    return name in (owner if isinstance(owner, Record) else _attributes(owner, pu, p, ku, k))


def _attributes(owner: str, pu: str, p: Mapping[str, Any], ku: str, k: Mapping[str, Any]) -> Mapping[str, Any]:
    return p if owner == pu else k if owner == ku else {}


def _up(one: str, *known: str | frozenset[str]) -> frozenset[str]:
    """The ancestors of an entity: of the three that are known (uid, ancestors, uid, …), else itself alone."""
    for at in range(0, len(known), 2):
        if one == known[at]:
            return known[at + 1]  # type: ignore[return-value]  # every second one is the ancestors
    return frozenset((one,))


def _like(text: str, first: str, middle: tuple[str, ...], last: str) -> bool:
    """Whether text is first, then anything around each middle part in order, then last; linear, unlike a regex."""
    at, end = len(first), len(text) - len(last)
    if at > end or not text.startswith(first) or not text.endswith(last):
        return False
    for part in middle:
        at = text.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True


_GLOBALS: Final[dict[str, Any]] = {
    "__builtins__": {},
    "checked": _checked,
    "frozenset": frozenset,
    "get": _get,
    "has": _has,
    "like": _like,
    "record": Record,
    "up": _up,
    "within": _within,
}
# principal, resource, context: attributes; uids of the three; their ancestors.
_ARGUMENTS: Final = "p,k,c,pu,ku,au,pa,ka,aa"
_NAMES: Final = {"principal": "pu", "action": "au", "resource": "ku", "context": "c"}
_ATTRIBUTES: Final = {"principal": "p", "resource": "k", "context": "c"}
_ANCESTORS: Final = {"principal": "pa", "resource": "ka", "action": "aa"}
_OPERATORS: Final = {op: f"({{left}} {op} {{right}})" for op in ("==", "!=", "<", "<=", ">", ">=")} | {
    **{op: f"checked({{left}} {op} {{right}})" for op in "+-*"},
    "neg": "checked(-({arg}))",
    "!": "(not {arg})",
    "isEmpty": "(not {arg})",
    "contains": "({right} in {left})",
    "containsAll": "({right} <= {left})",
    "containsAny": "(not {left}.isdisjoint({right}))",
    "if-then-else": "({then} if {if} else {else})",
}


# ---- one policy --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scope:
    """What a policy's head says of its principal or resource: a type, and one entity by == or in."""

    kind: str | None
    entity: str | None
    exact: bool  # by ==


@dataclass(frozen=True, slots=True)
class Compiled:
    """One policy, ready to be indexed. `test` is its conditions; the rest of its head is the index's."""

    forbids: bool
    principal: Scope
    resource: Scope
    actions: frozenset[str] | None  # None: every action
    action_groups: bool  # whether `actions` are by `in`, so that groups count
    expression: str
    constants: tuple[Any, ...]  # K0, K1, … of the expression
    test: Test

    def concerns(self, name: str, action: Action) -> bool:
        """Whether the policy's head names an action, itself or by a group of its."""
        if self.actions is None:
            return True
        return not self.actions.isdisjoint(action.groups) if self.action_groups else name in self.actions


class Compiler:
    """Compiles policies; those of the same shape share their code and differ in the constants bound to it."""

    def __init__(self) -> None:
        self._codes: dict[str, CodeType] = {}

    def compile(self, policy: Est) -> Compiled:
        """One policy of the EST. Unsupported names what it uses that is not compiled."""
        source = _Source()
        principal, resource = _scope(policy["principal"]), _scope(policy["resource"])
        tests = [
            f"({source.bind(scope.entity)} == {name})"
            for scope, name in ((principal, "pu"), (resource, "ku"))
            if scope.exact
        ]
        for condition in policy["conditions"]:
            body = source.of(condition["body"], 0)
            tests.append({"when": "{}", "unless": "(not {})"}[condition["kind"]].format(body))
        effect = {"forbid": True, "permit": False}[policy["effect"]]
        actions, grouped = _actions(policy["action"])
        expression, constants = " and ".join(tests) or "True", tuple(source.constants)
        test = self._function(expression, constants)
        return Compiled(effect, principal, resource, actions, grouped, expression, constants, test)

    def any_of(self, rules: Sequence[Compiled]) -> Test:
        """One function that tells whether any of the rules holds: a call each is most of what a small rule costs."""
        parts: list[str] = []
        constants: list[Any] = []
        for rule in rules:
            shift = len(constants)
            shifted = re.sub(r"\bK(\d+)", lambda m, by=shift: f"K{int(m[1]) + by}", rule.expression)  # type: ignore[misc]  # mypy infers no lambda with a default
            parts.append(f"({shifted})")
            constants += rule.constants
        return self._function(" or ".join(parts), constants)

    def _function(self, expression: str, constants: Sequence[Any]) -> Test:
        names = ",".join(f"K{n}" for n in range(len(constants)))
        text = f"lambda {names}: lambda {_ARGUMENTS}: {expression}"
        code = self._codes.get(text)
        if code is None:
            code = self._codes[text] = compile(text, "<compiled policy>", "eval")
        # Only our own names and operators stand in the text (see `_Source`), and it runs without builtins.
        made: Test = eval(code, _GLOBALS)(*constants)  # noqa: S307 - our own text, see above
        return made


def part(expression: Est) -> Callable[..., Any]:
    """A part of a condition as a function of the facts, for telling what it is worth; it decides nothing."""
    source = _Source()
    text = source.of(expression, 0)
    return Compiler()._function(text, source.constants)


class _Source:
    """The Python expression of a condition: names and operators of ours; every literal is a bound constant."""

    def __init__(self) -> None:
        self.constants: list[Any] = []

    def bind(self, constant: Any) -> str:
        self.constants.append(constant)
        return f"K{len(self.constants) - 1}"

    def of(self, e: Est, depth: int) -> str:
        if depth > MAX_DEPTH:
            raise Unsupported(f"a condition is nested deeper than {MAX_DEPTH}")
        ((op, a),) = e.items()
        if _constant(e):
            return repr(a) if isinstance(a, bool) else self.bind(_value(e))
        if op in {"==", "!="} and _constant(a["left"]) and _constant(a["right"]):
            return repr((_typed(a["left"]) == _typed(a["right"])) is (op == "=="))
        if op in {"&&", "||"}:  # a long chain is flattened: parentheses must not nest
            word = " and " if op == "&&" else " or "
            return "(" + word.join(self.of(part, depth + 1) for part in _chain(e, op)) + ")"
        if op in _OPERATORS:
            return _OPERATORS[op].format(**{part: self.of(sub, depth + 1) for part, sub in a.items()})
        return self._other(op, a, depth + 1)

    def _other(self, op: str, a: Any, depth: int) -> str:
        match op:
            case "Var":
                return _NAMES[a]
            case "in":
                return self._member(a["left"], a["right"], depth)
            case "Set":
                return "frozenset((" + "".join(self.of(v, depth) + "," for v in a) + "))"
            case "Record":
                return "record({" + ",".join(f"{self.bind(n)}:{self.of(v, depth)}" for n, v in a.items()) + "})"
            case "." | "has":
                return self._attribute(op, a["left"], a["attr"], depth)
            case "like":
                return self._like(a["left"], a["pattern"], depth)
            case "is":
                test = f"{self.of(a['left'], depth)}.startswith({self.bind(a['entity_type'] + '::' + chr(34))})"
                return f"({test} and {self._member(a['left'], a['in'], depth)})" if "in" in a else f"({test})"
        raise Unsupported(f"{op!r} is not compiled (neither are ip, decimal, datetime, duration and tags)")

    def _attribute(self, op: str, owner: Est, name: str, depth: int) -> str:
        known, bound = _ATTRIBUTES.get(owner.get("Var", "")), self.bind(name)
        if known is not None:
            return f"{known}[{bound}]" if op == "." else f"({bound} in {known})"
        return f"{'get' if op == '.' else 'has'}({self.of(owner, depth)}, {bound}, pu, p, ku, k)"

    def _member(self, left: Est, right: Est, depth: int) -> str:
        ancestors = _ANCESTORS.get(left.get("Var", ""))
        if ancestors is None:
            ancestors = f"up({self.of(left, depth)}, pu, pa, ku, ka, au, aa)"
        if "Var" in right or isinstance(right.get("Value"), dict):
            return f"({self.of(right, depth)} in {ancestors})"
        return f"within({ancestors}, {self.of(right, depth)})"

    def _like(self, left: Est, pattern: Sequence[Any], depth: int) -> str:
        parts = [""]
        for piece in pattern:
            if piece == "Wildcard":
                parts.append("")
            else:
                parts[-1] += piece["Literal"]
        if len(parts) - 1 > MAX_WILDCARDS:
            raise Unsupported(f"a `like` has more than {MAX_WILDCARDS} wildcards")
        text = self.of(left, depth)
        if len(parts) == 1:
            return f"({text} == {self.bind(parts[0])})"
        bound = ", ".join(self.bind(x) for x in (parts[0], tuple(filter(None, parts[1:-1])), parts[-1]))
        return f"like({text}, {bound})"


def _chain(e: Est, op: str) -> Iterator[Est]:
    """The parts of a chain of one operator, from left to right, however it is nested."""
    waiting = [e]
    while waiting:
        part = waiting.pop()
        if op in part:
            waiting += (part[op]["right"], part[op]["left"])
        else:
            yield part


def _constant(e: Est) -> bool:
    return "Value" in e or ("Set" in e and all(map(_constant, e["Set"])))


def _value(e: Est) -> Any:
    if "Set" in e:
        return frozenset(map(_value, e["Set"]))
    literal = e["Value"]
    if isinstance(literal, dict):
        return _entity(literal.get("__entity"))
    if type(literal) in {bool, int, str}:
        return literal
    raise Unsupported("a literal of this kind is not compiled")


def _typed(e: Est) -> Any:
    """A literal with its type: in Python 1 == True, and an entity is text; in Cedar none of these are equal."""
    if "Set" in e:
        return frozenset(map(_typed, e["Set"]))
    return type(e["Value"]), _value(e)


def _entity(about: Any) -> str:
    if not isinstance(about, dict):
        raise Unsupported("an extension value is not compiled")
    if about["type"].endswith("::Action"):
        raise Unsupported("actions in a namespace are not compiled")
    return uid(about["type"], about["id"])


def _scope(head: Est) -> Scope:
    kind, exact = None, head["op"] == "=="
    if head["op"] == "is":
        kind = head["entity_type"]
        head = {"op": "in", **head["in"]} if "in" in head else {"op": "All"}
    if head["op"] == "All":
        return Scope(kind, None, exact=False)
    if "slot" in head or "entity" not in head:
        raise Unsupported("templates are not compiled")
    return Scope(kind, _entity(head["entity"]), exact)


def _actions(head: Est) -> tuple[frozenset[str] | None, bool]:
    if head["op"] == "All":
        return None, False
    named = [head["entity"]] if "entity" in head else head["entities"]
    if any(e["type"] != "Action" for e in named):
        raise Unsupported("actions in a namespace are not compiled")
    return frozenset(e["id"] for e in named), head["op"] == "in"


# ---- all of them -------------------------------------------------------------------------------------------------

_Tests = tuple[tuple[int, Test], ...]  # (number of the rule, test)


class _Bucket(NamedTuple):
    """The policies of one scope."""

    hit: Test | None  # whether any of the forbids holds, where asking that first pays
    forbids: _Tests
    permits: _Tests


_Table = dict[str | None, dict[str | None, _Bucket]]  # scope of the resource -> of the principal -> policies


class Index:
    """Policies by action, kinds and scope. Nothing in it changes once it is made: a reload makes another."""

    def __init__(self, rules: Sequence[Compiled], actions: Mapping[str, Action]) -> None:
        """`rules` in the order in which deciding ones are told; a rule's number is its place there."""
        self._tables: dict[tuple[str, str, str], tuple[str, frozenset[str], _Table]] = {}
        compiler = Compiler()
        by_head: dict[tuple[frozenset[str] | None, bool, str | None, str | None], list[tuple[int, Compiled]]] = {}
        for number, rule in enumerate(rules):  # few heads stand over all rules: each is matched once, not each rule
            head = rule.actions, rule.action_groups, rule.principal.kind, rule.resource.kind
            by_head.setdefault(head, []).append((number, rule))
        made: dict[tuple[int, ...], _Table] = {}
        for name, action in actions.items():
            able = [found for found in by_head.values() if found[0][1].concerns(name, action)]
            groups = frozenset(uid("Action", g) for g in action.groups)
            for kind in action.principals:
                for resource in action.resources:
                    fitting = [f for f in able if fits(f[0][1].principal, kind) and fits(f[0][1].resource, resource)]
                    here = sorted((x for found in fitting for x in found), key=_number)
                    numbers = tuple(map(_number, here))
                    table = made.get(numbers)
                    if table is None:
                        table = made[numbers] = _table(here, compiler)
                    self._tables[name, kind, resource] = (uid("Action", name), groups, table)

    def evaluate(
        self, principal: Entity, action: str, resource: Entity, context: Mapping[str, Any]
    ) -> tuple[bool, tuple[int, ...]]:
        """(allowed, numbers of the deciding rules): any forbid wins, no permit denies. Raises RuleFailed."""
        found = self._tables.get((action, principal.kind, resource.kind))
        if found is None:
            return False, ()  # this action is not for this kind of principal or resource
        au, aa, table = found
        p, pu, pa = principal.attrs, principal.uid, principal.ancestors
        k, ku, ka = resource.attrs, resource.uid, resource.ancestors
        buckets = []
        for scope in resource.scopes:
            by_principal = table.get(scope)
            if by_principal is not None:
                for inner in principal.scopes:
                    bucket = by_principal.get(inner)
                    if bucket is not None:
                        buckets.append(bucket)
        hits: list[int] = []
        rule = -1
        try:
            for hit, forbids, _ in buckets:
                if hit is None or hit(p, k, context, pu, ku, au, pa, ka, aa):
                    for rule, test in forbids:
                        if test(p, k, context, pu, ku, au, pa, ka, aa):
                            hits.append(rule)
                    if hit is not None and not hits:
                        raise ArithmeticError("the forbids together and each alone differ")
            if hits:
                return False, tuple(sorted(hits))
            for _, _, permits in buckets:
                for rule, test in permits:
                    if test(p, k, context, pu, ku, au, pa, ka, aa):
                        hits.append(rule)
        except Exception as error:
            raise RuleFailed(rule) from error
        return bool(hits), tuple(sorted(hits))


def _number(numbered: tuple[int, Compiled]) -> int:
    return numbered[0]


def fits(scope: Scope, kind: str) -> bool:
    """Whether a scope can mean an entity of this kind."""
    return scope.kind is None or scope.kind == kind


def _table(rules: Iterable[tuple[int, Compiled]], compiler: Compiler) -> _Table:
    grown: dict[tuple[str | None, str | None], list[tuple[int, Compiled]]] = {}
    for number, rule in rules:
        grown.setdefault((rule.resource.entity, rule.principal.entity), []).append((number, rule))
    made: _Table = {}
    for (resource, principal), found in grown.items():
        forbids, permits = [x for x in found if x[1].forbids], [x for x in found if not x[1].forbids]
        for_everyone = resource is None and principal is None and 1 < len(forbids) <= 64
        made.setdefault(resource, {})[principal] = _Bucket(
            compiler.any_of([r for _, r in forbids]) if for_everyone else None,
            tuple((n, r.test) for n, r in forbids),
            tuple((n, r.test) for n, r in permits),
        )
    return made
