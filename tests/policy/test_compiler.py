"""The compiled policies: traps that strict validation lets through, what is refused at load, and that errors deny."""

from __future__ import annotations

import json
import shutil
import threading
import time
import uuid
from collections import Counter
from pathlib import Path

import cedarpy
import pytest

from cedar_engines import Engines, facts, key, principal
from policy import BundleRefused, Policy, selftest
from policy.bundle import SHIPPED, read, schema
from policy.compiler import Action, Compiler, Entity, Unsupported, _like, uid
from policy.oracle import Oracle, Slices
from policy.request import KeyFacts

SMALL = cedarpy.Schema.from_str(
    "namespace K { entity R; } entity G; entity K {p: Set<G>}; entity U in [G] {b: Bool, n: Long, s: String};"
    "action d in [g] appliesTo {principal: [U], resource: [K, K::R], context: {}}; action g;"
)
ACTIONS = {"d": Action(frozenset({"d", "g"}), frozenset({"U"}), frozenset({"K", "K::R"}))}
USER = Entity("U", "a", {"b": True, "n": 2**63 - 1, "s": 'U::"a"'}, [uid("G", "g")])
THING, OTHER = Entity("K", "k", {"p": frozenset()}), Entity("K::R", "r", {})
ROLES = "tenants/health/00-roles.cedar"
OFFICER = '  - {id: "mtls:eu-de-1.gov.example:/health/people/x", role: "officer", person: "health-p9"}'


def small(condition: str) -> Engines:
    text = f'@id("p") permit (principal, action, resource) when {{ {condition} }};'
    return Engines(text, by=SMALL, actions=ACTIONS)


TRAPS = {
    "1 literals fold by type: a number": "1 == true",
    "1 literals fold by type: not": "1 != true",
    "1 literals fold by type: a negative number": "-1 == true",
    "1 literals fold by type: an entity": r'U::"a" == "U::\"a\""',
    "1 entities of two types": 'U::"a" == G::"a"',
    "2 is K": "resource is K",
    "2 is K::R": "resource is K::R",
    "2 is K in": 'resource is K in K::"k"',
    "3 in a set known at run time": 'principal in (if principal.b then [G::"g"] else [G::"h"])',
    "3 in an entity known at run time": 'principal in (if principal.b then G::"h" else G::"g")',
    "6 a string that looks like an entity": r'principal.s == "U::\"a\"" && principal == U::"a"',
    "7 like, a star that is none": r'"*" like "\*" && !("a" like "\*")',
    "7 like, no part twice": '!("aba" like "ab*ba")',
    "7 like, parts in order": '"xaybz" like "*a*b*" && !("xbyaz" like "*a*b*")',
    "code in a string": r'principal != U::"\"+open(0)+\"" && "\\" != "\n"',
    "code in an attribute": 'principal has "b\\"]) or (True"',
    "overflow": "principal.n + 1 > 0",
    "overflow that nothing looks at": "principal.n + 1 != 0",
    "overflow by sign": "-(0 - principal.n - 1) > 0",
    "an error behind an and": "principal.b && principal.n * 2 > 0",
    "no error before an and": "!principal.b && principal.n * 2 > 0",
    "an unknown entity's attribute": 'resource is K && K::"k" == resource',
    "action in its group": 'action in Action::"g" && action == Action::"d"',
    "records": "{a: 1, b: [1, 2]} == {b: [2, 1, 1], a: 1}",
    "sets of sets": "[[1], [2, 3]].contains([3, 2])",
    "literal sets": "[1, 2] == [2, 1, 1] && [1] != [2] && ![[1]].contains([2])",
    "sets of facts": "[principal.n, 1].contains(principal.n) && [principal.n].containsAny([1, principal.n])",
    "a set holds all": "[principal.n, 1].containsAll([1]) && ![1].containsAll([principal.n, 1])",
    "an empty set": "resource is K && resource.p.isEmpty() && ![principal.n].isEmpty()",
    "records of facts": "{a: principal.n, b: 1}.a == principal.n && {a: principal.n} != {a: 1}",
    "records in sets": "[{a: principal.n}].contains({a: principal.n}) && ![{a: 1}].contains({a: principal.n})",
    "a record has what it has": '{a: principal.n} has a && (if principal.b then principal else U::"z") has n',
    "an entity nobody knows has nothing": 'U::"z" has n',
    "an attribute of an entity nobody knows": 'U::"z".n > 0',
    "an attribute of the principal by another way": '(if principal.b then principal else U::"z").n > 0',
    "an attribute of the resource by another way": '(if principal.b then K::"k" else K::"z").p.isEmpty()',
    "an entity is in itself": 'U::"z" in U::"z" && !(U::"z" in U::"a") && U::"z" in [U::"y", U::"z"]',
    "an entity nobody knows is in nothing else": 'U::"z" in G::"g"',
    "the principal by another way is in its group": '(if principal.b then principal else U::"z") in G::"g"',
    "the principal by another way is not in another": '(if principal.b then principal else U::"z") in G::"h"',
    "the resource by another way is in itself": '(if principal.b then K::"k" else K::"z") in K::"k"',
    "the action in one of several": 'action in [Action::"d", Action::"g"] && action != Action::"g"',
    "is of the principal": "principal is U && !(resource is K && resource is K::R)",
    "is in of the principal": 'principal is U in G::"g" && !(principal is U in G::"h")',
    "like, a part at the beginning": '"ab" like "*a*" && "ab" like "a*" && "ab" like "*b"',
    "like, a part after the other": '"ab" like "*ab*b*"',
    "like, parts that touch": '"abab" like "*ab*ab*" && !("aba" like "*ab*ab*")',
    "like, the last part once": '"xab" like "*ab*b"',
    "like, two stars": '"ab" like "a**b" && "a" like "**"',
    "like of a fact": r'principal.s like "U::*\"a\"" && !(principal.s like "U*b")',
    "the largest number": "principal.n * 1 > 0 && principal.n - 1 < principal.n",
    "the smallest number": "0 - principal.n - 1 < 0",
    "below the smallest number": "0 - principal.n - 2 < 0",
    "a negative number": "-principal.n < 0 && -1 < 0",
    "comparisons": "1 < principal.n && principal.n <= principal.n && !(principal.n < principal.n) && principal.n >= 1",
    "if": "(if principal.b then 1 else 2) == 1 && (if !principal.b then 1 else 2) == 2",
    "or": "!principal.b || principal.n > 0",
    "no error behind an or": "principal.b || principal.n * 2 > 0",
    "an error before an or": "principal.n * 2 > 0 || principal.b",
    "and of or": "(principal.b || !principal.b) && (!principal.b || principal.b) && principal.b",
    "truth": "true && !false && (principal.b == true) && !(principal.b == false)",
}
HEADS = [
    *(f"{p}, action, resource" for p in ('principal == U::"a"', 'principal == U::"b"', 'principal == U::"A"')),
    *(f"{p}, action, resource" for p in ('principal in G::"g"', 'principal in G::"h"', 'principal in U::"a"')),
    *(f"principal is U{p}, action, resource" for p in ("", ' in G::"g"', ' in G::"h"')),
    *(f"principal, action {a}, resource" for a in ('== Action::"d"', 'in [Action::"d"]', 'in Action::"g"')),
    *(f"principal, action, {r}" for r in ('resource == K::"k"', 'resource == K::"z"', 'resource == K::R::"r"')),
    *(f"principal, action, {r}" for r in ('resource in K::"k"', "resource is K", 'resource is K::R in K::R::"r"')),
    'principal == U::"a", action == Action::"d", resource == K::"k"',
    'principal in G::"h", action == Action::"d", resource == K::"k"',
    'principal == U::"a", action in Action::"g", resource in K::R::"r"',
]


@pytest.mark.parametrize("head", HEADS)
def test_both_engines_agree_on_whom_a_head_means(head: str) -> None:
    everyone = '@id("a") permit (principal, action, resource);'
    for text in (f'@id("p") permit ({head});', everyone + f'@id("f") forbid ({head}) when {{ principal.n > 0 }};'):
        engines = Engines(text, by=SMALL, actions=ACTIONS)
        for resource in (THING, OTHER):
            assert engines.differ((USER, "d", resource, {})) is None


def test_all_conditions_of_a_rule_must_hold() -> None:
    for more, allowed in (("when", True), ("unless", False)):
        text = f'@id("p") permit (principal, action, resource) when {{ principal.b }} {more} {{ principal.n > 0 }};'
        engines = Engines(text, by=SMALL, actions=ACTIONS)
        assert engines.ours(USER, "d", THING, {}).allowed is allowed
        assert engines.differ((USER, "d", THING, {})) is None


def test_every_rule_that_holds_is_told_and_no_other() -> None:
    """Beside one another are forbids for everyone, which are first asked together, and such as mean some alone."""
    forbids = {"n": "principal.n < 0", "b": "principal.b", "k": "resource is K", "r": "resource is K::R"}
    text = "".join(f'@id("{i}") forbid (principal, action, resource) when {{ {c} }};' for i, c in forbids.items())
    text += '@id("u") forbid (principal == U::"a", action, resource) unless { resource is K };'
    text += '@id("p") permit (principal, action, resource);'
    engines = Engines(text, by=SMALL, actions=ACTIONS)
    for resource, rules in ((THING, {"b", "k"}), (OTHER, {"b", "r", "u"})):
        assert engines.ours(USER, "d", resource, {}).rules == rules
        assert engines.differ((USER, "d", resource, {})) is None
    nobody = Entity("U", "c", {"b": False, "n": 1, "s": ""})
    quiet = Engines(text.replace("resource is", "principal.b && resource is"), by=SMALL, actions=ACTIONS)
    assert quiet.ours(nobody, "d", THING, {}).rules == {"p"}
    assert quiet.differ((nobody, "d", THING, {})) is None


@pytest.mark.parametrize(
    ("before", "inner", "after", "levels"),
    [
        ("!(", "true", ")", 40),
        ("(if principal.b then ", "true", " else false)", 40),
        ("(if ", "principal.b", " then true else false)", 40),
        ("(principal.b && (principal.b || ", "principal.b", "))", 20),
        ("(1 + ", "1", ")", 39),
        ("[", "principal.n", "]", 39),
        ("{a: ", "principal.n", "}", 39),
    ],
)
def test_a_condition_is_nested_forty_levels_deep_and_no_deeper(
    before: str, inner: str, after: str, levels: int
) -> None:
    def nested(count: int) -> str:
        text = before * count + inner + after * count
        return text if inner in {"true", "principal.b"} else f"{text} == {text}"

    policies = [
        json.loads(cedarpy.policies_to_json_str(f"permit (principal, action, resource) when {{ {nested(n)} }};"))
        for n in (levels, levels + 1)
    ]
    fits, deep = (p["staticPolicies"]["policy0"] for p in policies)
    Compiler().compile(fits)
    with pytest.raises(Unsupported, match="nested deeper than 40"):
        Compiler().compile(deep)


@pytest.mark.parametrize("name", sorted(TRAPS))
def test_both_engines_agree_on(name: str) -> None:
    engines = small(TRAPS[name])
    for resource in (THING, OTHER):
        assert engines.differ((USER, "d", resource, {})) is None


def test_trap_1_folding_is_by_type_and_not_by_luck() -> None:
    assert not small("1 == true").ours(USER, "d", THING, {}).allowed
    assert small("1 != true").ours(USER, "d", THING, {}).allowed


def test_stock_cedar_allows_past_a_forbid_that_errs_and_both_of_ours_deny() -> None:
    text = (
        '@id("p") permit (principal, action, resource);'
        '@id("f") forbid (principal, action, resource is K) unless { !resource.p.isEmpty() };'
    )
    ghost = Entity("K", "unknown", {})
    question = {
        "principal": {"type": "U", "id": "a"},
        "action": {"type": "Action", "id": "d"},
        "resource": {"type": "K", "id": "unknown"},
        "context": {},
    }
    stock = cedarpy.is_authorized(question, text, [], SMALL)
    assert stock.allowed
    assert stock.diagnostics.errors
    engines = Engines(text, by=SMALL, actions=ACTIONS)
    assert engines.ours(USER, "d", ghost, {}).error
    assert not engines.cedar(USER, "d", ghost, {}).allowed


def test_A_10_any_forbid_beats_any_number_of_permits() -> None:
    permits = "".join(f'@id("p{n}") permit (principal, action, resource);' for n in range(5))
    engines = Engines(permits + '@id("f") forbid (principal, action, resource);', by=SMALL, actions=ACTIONS)
    assert engines.ours(USER, "d", THING, {}).rules == {"f"}


def test_A_11_an_identity_with_wildcards_is_only_itself() -> None:
    text = '@id("p") permit (principal == Workload::"mtls:a:/health/*", action == Action::"encrypt", resource is Key);'
    engines = Engines(text)
    for name, allowed in (("mtls:a:/health/*", True), ("mtls:a:/health/x", False), ("mtls:a:/health/", False)):
        asked = (
            principal("Workload", name, "health", "eu-de-1"),
            "encrypt",
            key("k", "health", 2, ["DE"], purposes=["x"]),
        )
        assert engines.ours(*asked, facts()).allowed is allowed
        assert engines.differ((*asked, facts())) is None


@pytest.mark.parametrize(
    ("text", "first", "middle", "last", "found"),
    [
        ("abc", "a", (), "c", True),
        ("ac", "a", ("b",), "c", False),
        ("a" * 1024, "", ("a",) * 2, "b", False),
        ("", "", (), "", True),
        ("ab", "ab", (), "b", False),
        ("tr\ning", "tr", (), "ing", True),
        ("abc", "", ("a", "b", "c"), "", True),
        ("abc", "", ("b", "a"), "", False),
        ("aba", "ab", (), "ba", False),
        ("abba", "ab", (), "ba", True),
        ("abb", "a", ("b",), "b", True),
        ("ab", "a", ("b",), "b", False),
        ("xa", "a", (), "", False),
    ],
)
def test_trap_7_like_is_linear_and_right(
    text: str, first: str, middle: tuple[str, ...], last: str, found: bool
) -> None:
    assert _like(text, first, middle, last) is found


REFUSED = {
    "ip": ('ip("10.0.0.1").isLoopback()', "not compiled"),
    "decimal": ('decimal("1.0") == decimal("1.00")', "not compiled"),
    "datetime": ('datetime("2024-01-01") < datetime("2025-01-01")', "not compiled"),
    "duration": ('duration("1h") < duration("2h")', "not compiled"),
    "tags": ('principal.hasTag("x")', "not compiled"),
    "four wildcards": ('context.purpose like "*a*b*c*"', "wildcards"),
    "nested too deeply": ("!" * 0 + "(if context.failover then " * 45 + "true" + " else false)" * 45, "nested deeper"),
    "a decimal in a set": ('[decimal("1.0")].contains(decimal("1.00"))', "not compiled"),
    "an action in a namespace": ('action in NS::Action::"use"', "namespace"),
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    copied = tmp_path / "bundle"
    shutil.copytree(SHIPPED, copied)
    return copied


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_compiled_is_refused_with_file_line_and_reason(bundle: Path, name: str) -> None:
    condition, reason = REFUSED[name]
    rules = bundle / ROLES
    lines = rules.read_text().count("\n")
    head = (
        '// a ; in a comment\n@id("x") @layer("tenant") @code("X-YZ") forbid (principal, action == Action::"encrypt", '
    )
    rules.write_text(rules.read_text() + f'{head}resource in Tenant::"health") when {{ {condition} }};\n')
    with pytest.raises(BundleRefused) as caught:
        Policy.load(bundle)
    assert (caught.value.file, caught.value.line) == (ROLES, lines + 2)
    assert reason in caught.value.reason


@pytest.mark.parametrize("head", ['== NS::Action::"d"', 'in [Action::"d", NS::Action::"d"]'])
def test_an_action_in_a_namespace_is_no_action_of_the_schema(head: str) -> None:
    est = json.loads(cedarpy.policies_to_json_str(f"permit (principal, action {head}, resource);"))
    with pytest.raises(Unsupported, match="namespace"):
        Compiler().compile(est["staticPolicies"]["policy0"])


def test_trap_4_a_template_is_refused_and_not_lost(bundle: Path) -> None:
    rules = bundle / ROLES
    rules.write_text(
        rules.read_text() + '@id("x") @layer("tenant") forbid (principal == ?principal, action, resource);'
    )
    with pytest.raises(BundleRefused, match="lost"):
        Policy.load(bundle)


def test_a_chain_of_a_thousand_is_no_nesting() -> None:
    terms = " || ".join(f"principal.n == {n}" for n in range(150))
    engines = small(terms)
    assert engines.differ((USER, "d", THING, {})) is None


def test_trap_5_a_reload_while_others_decide_never_skips_a_rule() -> None:
    """Nothing of an index is edited: whoever decides while another one is made sees all of its own."""
    permits = "".join(f'@id("p{n}") permit (principal, action, resource);' for n in range(50))
    text = permits + '@id("f") forbid (principal, action, resource);'
    now = [Engines(text, by=SMALL, actions=ACTIONS)]
    over, seen, begun = threading.Event(), set[bool](), threading.Barrier(4)

    def decide() -> None:
        begun.wait()
        while not over.is_set():
            seen.add(now[0].ours(USER, "d", THING, {}).allowed)

    threads = [threading.Thread(target=decide) for _ in range(3)]
    for thread in threads:
        thread.start()
    begun.wait()
    until = time.monotonic() + 0.5
    while not seen or time.monotonic() < until:
        now[0] = Engines(text, by=SMALL, actions=ACTIONS)
    over.set()
    for thread in threads:
        thread.join()
    assert seen == {False}


def test_files_that_did_not_change_are_not_compiled_again(bundle: Path) -> None:
    first = Policy.load(bundle)
    rules = bundle / ROLES
    rules.write_text(rules.read_text() + "// changed\n")
    charter = bundle / "charter.yaml"
    charter.write_text(charter.read_text().replace("version: 1", "version: 2", 1))
    second = Policy.load(bundle, after=first)
    same = {path for path, part in second._bundle.parts.items() if part is first._bundle.parts[path]}
    assert same == set(first._bundle.parts) - {ROLES}
    assert second.digest == Policy.load(bundle).digest


def test_what_can_concern_a_resource_decides_as_the_whole_bundle_does(bundle: Path) -> None:
    """The self-test asks Cedar of a tenant's own rules and the common ones: no other rule may have a say."""
    key = str(uuid.uuid4())
    (bundle / "keys").mkdir()
    (bundle / f"keys/{key}.cedar").write_text(
        '@id("k.stop") @layer("key") @code("KEY-STOP") '
        f'forbid (principal, action in Action::"use", resource == Key::"{key}");'
    )
    found = read(bundle)
    whole = Oracle(found.text, schema())
    slices = Slices({path: part.text for path, part in found.parts.items()}, schema())
    deciding: Counter[str] = Counter()
    for request in selftest.requests(found, 1_500):
        opinion = whole.decide(request)
        assert slices.of(request.resource).decide(request) == opinion
        deciding.update(found.rules[rule].file.split("/")[0] for rule in opinion.rules)
    assert min(deciding[layer] for layer in ("charter", "installation", "tenants", "keys")) > 10, deciding


def test_a_bundle_takes_over_what_did_not_change_and_keeps_nothing_else(bundle: Path) -> None:
    first = Policy.load(bundle)
    second = Policy.load(bundle, known=first)
    assert first._slices is not None
    assert second._slices is not None
    assert second._slices._made
    assert all(first._slices._made[text] is oracle for text, oracle in second._slices._made.items())
    roles = bundle / "tenants/health/00-roles.cedar"
    roles.write_text(roles.read_text() + "// changed\n")
    third = Policy.load(bundle, known=second)
    assert third._slices is not None
    taken = [text for text, oracle in third._slices._made.items() if oracle is second._slices._made.get(text)]
    assert taken
    assert not any("health" in text for text in taken)
    assert third._slices._known == {}


@pytest.mark.parametrize(
    ("file", "added", "among"),
    [
        ("charter.yaml", "# the version rises with every change", frozenset()),
        ("tenants/health/00-roles.cedar", "// of one tenant", frozenset({"health"})),
        ("tenants/defence/10-more.cedar", "// of one tenant", frozenset({"defence"})),
        ("cases/more.yaml", "cases: []", frozenset()),
        ("tenants/health/members.yaml", OFFICER, None),
        ("charter/00-charter.cedar", "// of everybody", None),
        ("installation/more.cedar", "// of everybody", None),
        (f"keys/{uuid.UUID(int=1)}.cedar", "// of a key, which any tenant may have", None),
    ],
)
def test_a_reload_tries_out_the_tenants_whose_rules_changed(
    bundle: Path, file: str, added: str, among: frozenset[str] | None
) -> None:
    before = read(bundle)
    charter = (bundle / "charter.yaml").read_text()
    (bundle / "charter.yaml").write_text(charter.replace("version: 1\n", "version: 2\n"))
    path = bundle / file
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + added + "\n")
    after = read(bundle, known=before)
    assert (before.version, after.version) == (1, 2)
    assert selftest.changed(after, before) == selftest.changed(before, after) == among


def test_a_place_or_a_tenant_more_may_decide_anybody_otherwise(bundle: Path) -> None:
    before, path = read(bundle), bundle / "charter.yaml"
    for old, new in (("tenants:\n", 'tenants:\n  extra: {home: "DE"}\n'), ("development: false", "development: true")):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        assert selftest.changed(read(bundle), before) is None
        path.write_text(text)


def test_requests_among_tenants_are_asked_by_their_callers(bundle: Path) -> None:
    asked = list(selftest.requests(read(bundle), 200, among=frozenset({"health"})))
    assert {r.caller.tenant for r in asked} == {"health", None}
    assert sum(r.resource.tenant == "health" for r in asked if isinstance(r.resource, KeyFacts)) > 50
