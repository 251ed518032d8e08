"""Loading: what is refused, with file, line and reason; what the digest covers; what a failed reload leaves in force."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from policy import BundleRefused, Caller, KeyFacts, Policy, Request
from policy.bundle import SHIPPED, Bundle, made, read, schema_actions, write_development
from policy.signatures import Signer

ROLES = "tenants/health/00-roles.cedar"
PERMIT = '@id("x.y") @layer("{layer}") permit (principal, action, resource{scope}){when};'


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    copied = tmp_path / "bundle"
    shutil.copytree(SHIPPED, copied)
    return copied


def append(bundle: Path, file: str, text: str) -> None:
    path = bundle / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + "\n" + text + "\n")


def edit(bundle: Path, file: str, old: str, new: str) -> None:
    text = (bundle / file).read_text()
    assert old in text
    (bundle / file).write_text(text.replace(old, new, 1))


REFUSED = {
    "permit in the charter": (
        "charter/00-charter.cedar",
        PERMIT.format(layer="charter", scope="", when=""),
        "only forbids",
    ),
    "forbid without a code": (
        "charter/00-charter.cedar",
        '@id("x") @layer("charter") forbid (principal, action, resource);',
        "@code",
    ),
    "has in the charter": (
        "charter/00-charter.cedar",
        '@id("x") @layer("charter") @code("X-YZ") forbid (principal, action, resource is Key) when { resource has tier };',
        "has",
    ),
    "no id": (ROLES, '@layer("tenant") forbid (principal, action, resource in Tenant::"health");', "@id"),
    "an id twice": (
        ROLES,
        '@id("health.operator-create") @layer("tenant") @code("X-YZ") forbid (principal, action, resource in Tenant::"health");',
        "stands in",
    ),
    "a tenant rule for everyone": (ROLES, PERMIT.format(layer="tenant", scope="", when=""), "pinned"),
    "a rule for another tenant": (
        ROLES,
        PERMIT.format(layer="tenant", scope=' in Tenant::"defence"', when=""),
        "pinned",
    ),
    "a permit that does not test the tenant": (
        ROLES,
        PERMIT.format(layer="tenant", scope=' in Tenant::"health"', when=""),
        "principal.tenant",
    ),
    "a tenant test that an or makes void": (
        ROLES,
        PERMIT.format(
            layer="tenant",
            scope=' in Tenant::"health"',
            when=' when { principal.tenant == Tenant::"health" || principal.critical }',
        ),
        "principal.tenant",
    ),
    "wrong layer": (
        ROLES,
        '@id("x") @layer("charter") forbid (principal, action, resource in Tenant::"health");',
        "@layer",
    ),
    "unknown attribute": (
        ROLES,
        '@id("x") @layer("tenant") @code("X-YZ") forbid (principal, action == Action::"encrypt", resource in Tenant::"health")'
        " when { resource.colour == 5 };",
        "x:",
    ),
    "a Long compared with a String": (
        ROLES,
        '@id("x") @layer("tenant") @code("X-YZ") forbid (principal, action == Action::"encrypt", resource in Tenant::"health")'
        ' when { context.now < "soon" };',
        "x:",
    ),
    "template": (ROLES, '@id("x") @layer("tenant") forbid (principal == ?principal, action, resource);', "emplate"),
    "unknown obligation": (
        ROLES,
        '@id("x") @layer("tenant") @obligation("dance") permit (principal, action, resource in Tenant::"health")'
        ' when { principal.tenant == Tenant::"health" };',
        "obligation",
    ),
    "not Cedar": (ROLES, "permit everything", "not Cedar"),
    "a key rule for another key": (
        "keys/6f1c0000-0000-4000-8000-000000000001.cedar",
        '@id("x") @layer("key") @code("X-YZ") forbid (principal, action, resource == Key::"other");',
        "must be == Key",
    ),
    "a file elsewhere": ("notes.txt", "hello", "no such file"),
    "an unknown tenant's folder": ("tenants/nobody/00.cedar", "", "charter.yaml"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_wrong_bundle_is_refused_with_file_and_reason(bundle: Path, name: str) -> None:
    file, text, reason = REFUSED[name]
    append(bundle, file, text)
    with pytest.raises(BundleRefused) as caught:
        Policy.load(bundle)
    assert caught.value.file == file
    assert reason in str(caught.value)


def test_the_line_is_named(bundle: Path) -> None:
    lines = (bundle / ROLES).read_text().count("\n")
    append(bundle, ROLES, REFUSED["a tenant rule for everyone"][1])
    with pytest.raises(BundleRefused) as caught:
        Policy.load(bundle)
    assert caught.value.line == lines + 2


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('jurisdiction: "NO"', "jurisdiction: NO", "quote"),
        ("version: 1", "version: 0", "version"),
        ("version: 1", "version: true", "version"),
        ("  health:", "  root:", "tenant name"),
        ("  health:", "  Health:", "tenant name"),
        ("  health:", '  "..":', "tenant name"),
        ("  health:", '  "he\u0430lth":', "tenant name"),
        ('home: "DE", default', 'home: "XX", default', "home"),
        ("places: ", "places:\n  atlantis: 5\n#", "atlantis"),
        ("tiers:", "surprise: 1\ntiers:", "surprise"),
        ('trust_domain: "eu-de-2.gov.example"', 'trust_domain: "eu-de-1.gov.example"', "trust domain"),
    ],
)
def test_A_07_a_wrong_charter_is_refused(bundle: Path, old: str, new: str, reason: str) -> None:
    edit(bundle, "charter.yaml", old, new)
    with pytest.raises(BundleRefused) as caught:
        Policy.load(bundle)
    assert caught.value.file in {"charter.yaml", "tenants/health/00-roles.cedar"}
    assert reason in str(caught.value) or caught.value.file != "charter.yaml"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('role: "operator"', 'role: "workload"'),
        ('role: "operator"', 'role: "platform"'),
        ("/health/people/operator-1", "/defence/people/operator-1"),
        ("/health/people/operator-1", "/health/people/*"),
        ("/health/people/officer-1", "/health/people/operator-1"),
        (', person: "health-p1"', ""),
    ],
)
def test_wrong_members_are_refused(bundle: Path, old: str, new: str) -> None:
    edit(bundle, "tenants/health/members.yaml", old, new)
    with pytest.raises(BundleRefused, match="members"):
        Policy.load(bundle)


def test_a_case_that_comes_out_otherwise_refuses_the_bundle(bundle: Path) -> None:
    edit(
        bundle,
        "charter/00-charter.cedar",
        "resource.execution.containsAll(context.via)",
        "resource.execution.containsAny(context.via)",
    )
    with pytest.raises(BundleRefused, match="French hop"):
        Policy.load(bundle)


def test_the_digest_covers_every_byte_and_the_version_must_rise(bundle: Path) -> None:
    first = Policy.load(bundle)
    assert Policy.load(bundle).digest == first.digest
    assert Policy.load(bundle, after=first).digest == first.digest
    append(bundle, ROLES, "// a comment")
    with pytest.raises(BundleRefused, match="version must rise"):
        Policy.load(bundle, after=first)
    edit(bundle, "charter.yaml", "version: 1", "version: 2")
    second = Policy.load(bundle, after=first)
    assert second.digest != first.digest
    assert second.version == 2


# ---- one file at a time: what is wrong, and in which line ------------------------------------------------------------


WHOLE = read(SHIPPED)
SOURCES = dict(WHOLE.sources)
CHARTER, MEMBERS, PLATFORM = "charter.yaml", "tenants/health/members.yaml", "installation/members.yaml"
KEY_FILE = "keys/6f1c0000-0000-4000-8000-000000000001.cedar"
ANY = "(principal, action, resource is Key)"
HEALTH = '(principal, action, resource in Tenant::"health")'
OWN = 'when { principal.tenant == Tenant::"health" }'


def rule(
    name: str = "x", *, layer: str = "tenant", notes: str = '@code("X-YZ")', body: str = f"forbid {HEALTH}"
) -> str:
    return f'@id("{name}") @layer("{layer}") {notes}\n{body};\n'


def with_(path: str, text: str) -> dict[str, bytes]:
    """The shipped files with text added to one of them, or with a new one that holds it."""
    return {**SOURCES, path: SOURCES.get(path, b"") + text.encode()}


def taken(files: dict[str, bytes]) -> Bundle:
    return made(files, known=WHOLE)  # what did not change is not read again


def refused(files: dict[str, bytes]) -> BundleRefused:
    with pytest.raises(BundleRefused) as caught:
        taken(files)
    return caught.value


def line_of(files: dict[str, bytes], path: str, text: str) -> int:
    """The last line that begins with a text."""
    lines = files[path].decode().splitlines()
    return max(n for n, line in enumerate(lines, 1) if line.strip().startswith(text))


RULES: dict[str, tuple[str, str, str]] = {
    "no @id": (ROLES, f'@layer("tenant")\nforbid {HEALTH};', "@id"),
    "an empty @id": (ROLES, rule(""), "@id"),
    "an @id of 129 characters": (ROLES, rule("x" * 129), "@id"),
    "an @id with a space": (ROLES, rule("x y"), "@id"),
    "the name of a check in typed code": (ROLES, rule("SOV-TRANSFER/x"), "typed code"),
    "the name of a grant": (ROLES, rule("GRANT/x"), "names of grants"),
    "another folder's layer": (ROLES, rule(layer="installation"), "@layer must be 'tenant'"),
    "no layer": (ROLES, f'@id("x") @code("X-YZ")\nforbid {HEALTH};', "@layer must be 'tenant'"),
    "half disclosed": (ROLES, rule(notes='@code("X-YZ") @disclose("half")'), "@disclose"),
    "an unknown annotation": (ROLES, rule(notes='@code("X-YZ") @note("x")'), "unknown annotation @note"),
    "an unknown obligation": (ROLES, rule(notes='@code("X-YZ") @obligation("x")'), "no-cache, seal-to-recipient"),
    "a forbid without a code": (ROLES, rule(notes=""), "a forbid needs a @code"),
    "a code in small letters": (ROLES, rule(notes='@code("x-yz")'), "a forbid needs a @code"),
    "a code of two letters": (ROLES, rule(notes='@code("XY")'), "a forbid needs a @code"),
    "a permit in the charter": (
        "charter/00-charter.cedar",
        rule(layer="charter", notes="", body=f"permit {ANY}"),
        "only forbids",
    ),
    "a guard deep in a rule of the charter": (
        "charter/00-charter.cedar",
        rule(layer="charter", body=f"forbid {ANY} when {{ context.failover || !(resource has tier) }}"),
        "no `has`",
    ),
    "an installation's rule about keys": (
        "installation/00-platform.cedar",
        rule(layer="installation", body=f"forbid {ANY}"),
        'resource must be Installation::"installation"',
    ),
    "an installation's rule about a tenant": (
        "installation/00-platform.cedar",
        rule(layer="installation", body=f"forbid {HEALTH}"),
        'resource must be Installation::"installation"',
    ),
    "a key's rule for all that is in it": (
        KEY_FILE,
        rule(layer="key", body=f'forbid (principal, action, resource in Key::"{KEY_FILE[5:-6]}")'),
        "must be == Key",
    ),
    "a key's rule for its tenant": (KEY_FILE, rule(layer="key"), "must be == Key"),
    "a tenant's rule for everyone's keys": (ROLES, rule(body=f"forbid {ANY}"), "pinned"),
    "a tenant's rule for another one": (
        ROLES,
        rule(body='forbid (principal, action, resource is Key in Tenant::"defence")'),
        "pinned",
    ),
    "a tenant's rule for another one's ring": (
        ROLES,
        rule(body='forbid (principal, action, resource in KeyRing::"defence/ring")'),
        "pinned",
    ),
    "a tenant's rule for one key": (
        ROLES,
        rule(body='forbid (principal, action, resource == Key::"health/")'),
        "pinned",
    ),
    "a permit for everyone of that role name": (ROLES, rule(notes="", body=f"permit {HEALTH}"), "must test principal"),
    "a permit that tests another tenant": (
        ROLES,
        rule(notes="", body=f'permit {HEALTH} when {{ principal.tenant == Tenant::"defence" }}'),
        "must test principal",
    ),
    "a permit unless it is the tenant": (
        ROLES,
        rule(notes="", body=f'permit {HEALTH} unless {{ principal.tenant == Tenant::"health" }}'),
        "must test principal",
    ),
    "a permit that tests another attribute": (
        ROLES,
        rule(notes="", body=f'permit {HEALTH} when {{ resource.tenant == Tenant::"health" }}'),
        "must test principal",
    ),
    "a template": (
        ROLES,
        rule(body="forbid (principal, action, resource in ?resource)"),
        "templates are not supported",
    ),
    "what is not compiled": (ROLES, rule(body=f'forbid {HEALTH} when {{ ip("::1").isLoopback() }}'), "x: "),
    "what the schema does not know": (ROLES, rule(body=f"forbid {HEALTH} when {{ resource.colour == 5 }}"), "x: "),
    "what is no policy": (ROLES, '@id("x")\npermit everything;', "not Cedar"),
}


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_wrong_rule_is_refused_in_its_line_wherever_it_stands(name: str) -> None:
    path, text, reason = RULES[name]
    layer = {"charter": "charter", "installation": "installation", "keys": "key", "tenants": "tenant"}[
        path.split("/")[0]
    ]
    scope = {
        "charter": ANY,
        "installation": '(principal, action, resource == Installation::"installation")',
        "key": f'(principal, action, resource == Key::"{KEY_FILE[5:-6]}")',
        "tenant": HEALTH,
    }[layer]
    good = [rule(f"good.{n}", layer=layer, body=f"forbid {scope}") for n in range(20)]
    marked = "\n// here\n" + text + "// there\n"
    for others in ([marked], [*good[:7], marked, *good[7:]]):
        files = with_(path, "\n".join(others))
        found = refused(files)
        assert (found.file, found.line) == (path, line_of(files, path, "// here") + 1)
        assert reason in found.reason


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (ROLES, rule("x" * 128)),
        (ROLES, rule("a.B_9:/@-", notes='@code("XYZ") @disclose("code")')),
        (ROLES, rule(notes=f'@code("{"X" * 40}") @disclose("none")')),
        (ROLES, rule(body='forbid (principal, action, resource in KeyRing::"health/ring")')),
        (ROLES, rule(body='forbid (principal, action, resource is Key in Tenant::"health")')),
        (ROLES, rule(body='forbid (principal, action, resource == Tenant::"health")')),
        (ROLES, rule(notes="", body=f"permit {HEALTH} {OWN}")),
        (ROLES, rule(notes="", body=f'permit {HEALTH} when {{ Tenant::"health" == principal.tenant }}')),
        (ROLES, rule(notes="", body=f"permit {HEALTH} when {{ context.failover && {OWN[7:-2]} && true }}")),
        (ROLES, rule(notes="", body=f"permit {HEALTH} when {{ context.failover }} {OWN}")),
        (ROLES, rule(notes='@obligation("audit-intent")', body=f"permit {HEALTH} {OWN}")),
        (KEY_FILE, rule(layer="key", body=f'forbid (principal, action, resource == Key::"{KEY_FILE[5:-6]}")')),
    ],
)
def test_a_rule_that_speaks_of_its_own_alone_is_taken(path: str, text: str) -> None:
    files = with_(path, text)
    (found,) = [r for r in taken(files).rules.values() if r.id not in WHOLE.rules]
    assert (found.file, found.line) == (path, line_of(files, path, "@id"))
    assert found.effect in text
    assert found.layer == (2 if path == KEY_FILE else 1)
    assert found.disclosed == ('@disclose("code")' in text)
    assert found.obligations == ({"audit-intent"} if "audit-intent" in text else frozenset())


def test_what_a_rule_says_of_itself_is_what_is_told_of_it() -> None:
    rules = WHOLE.rules
    assert (rules["charter.residency"].code, rules["charter.residency"].disclosed) == ("SOV-RESIDENCY", True)
    assert (rules["charter.tenant"].code, rules["charter.tenant"].disclosed) == ("SOV-TENANT", False)
    assert (rules["health.scheduler"].code, rules["health.scheduler"].disclosed) == ("", False)
    assert [rules[n].layer for n in ("charter.proof", "installation.staff", "health.scheduler")] == [0, 0, 1]


def test_a_name_that_stands_twice_is_refused_where_it_stands_again() -> None:
    files = with_("tenants/health/01-more.cedar", "\n" + rule("health.scheduler"))
    found = refused(files)
    assert (found.file, found.line) == ("tenants/health/01-more.cedar", 2)
    assert found.reason == f"@id 'health.scheduler' stands in {ROLES}"


def test_line_ends_of_windows_are_taken_and_a_bare_carriage_return_is_not() -> None:
    assert "x" in taken(with_(ROLES, "\r\n" + rule().replace("\n", "\r\n"))).rules
    found = refused(with_(ROLES, "// \r" + rule()))
    assert (found.file, found.line, found.reason) == (ROLES, 0, "a carriage return that ends no line")


def test_a_semicolon_in_a_string_or_a_comment_ends_no_policy() -> None:
    text = rule("one", body=f'forbid {HEALTH} // ; "\nwhen {{ context.purpose == "a;\\";//b" }}') + rule("two")
    files = with_(ROLES, text)
    rules = taken(files).rules
    assert rules["two"].line - rules["one"].line == 3


def test_a_bundle_of_no_policies_or_no_charter_is_none(bundle: Path) -> None:
    bare = {CHARTER: SOURCES[CHARTER]}
    assert "no policies" in refused(bare).reason
    assert "no policies" in refused({**bare, "charter/00.cedar": b" \n"}).reason
    assert refused({ROLES: SOURCES[ROLES]}).file == CHARTER
    (bundle / CHARTER).unlink()
    for directory in (bundle, bundle / "nowhere"):
        with pytest.raises(BundleRefused, match=r"has no charter\.yaml") as caught:
            read(directory)
        assert caught.value.file == str(directory / CHARTER)  # an operator may have named another directory


def test_links_are_not_followed_and_signatures_are_no_part(bundle: Path) -> None:
    (bundle / "signatures/tenants").mkdir(parents=True)
    (bundle / "signatures/tenants/health.sig").write_text("anything")
    assert read(bundle).sources == SOURCES
    for target in (bundle / ROLES, bundle / "tenants"):
        link = bundle / "keys"
        link.symlink_to(target)
        with pytest.raises(BundleRefused, match="keys:0: links are not followed"):
            read(bundle)
        link.unlink()


def test_the_largest_file_that_is_taken_is_a_mebibyte(bundle: Path) -> None:
    text = (bundle / "tenants/health/members.yaml").read_text()
    (bundle / MEMBERS).write_text(text + "#" * ((1 << 20) - len(text)))
    read(bundle)
    append(bundle, MEMBERS, "")
    with pytest.raises(BundleRefused, match="larger than 1048576 bytes"):
        read(bundle)


@pytest.mark.parametrize(
    "path",
    [
        "notes.txt",
        "charter/members.yaml",
        "charter/00-charter.txt",
        "charter/more/00.cedar",
        "installation/notes.yaml",
        "tenants/00.cedar",
        "tenants/health/notes.yaml",
        "tenants/health/more/00.cedar",
        "keys/some.cedar",
        "keys/6F1C0000-0000-4000-8000-000000000001.cedar",
        "keys/6f1c0000-0000-4000-8000-000000000001.yaml",
        "cases/more.cedar",
        "cases/more/cases.yaml",
        "schema.cedarschema",
    ],
)
def test_a_file_that_has_no_place_is_a_mistake(path: str) -> None:
    found = refused({**SOURCES, path: b""})
    assert (found.file, found.line, found.reason) == (path, 0, "a bundle has no such file")


@pytest.mark.parametrize("path", [CHARTER, MEMBERS, ROLES, "cases/charter.yaml"])
def test_a_file_that_is_not_text_is_refused_by_name(path: str) -> None:
    found = refused({**SOURCES, path: SOURCES[path] + b"# \xff\n"})
    assert (found.file, found.line) == (path, 0)
    assert "UTF-8" in found.reason


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("members: []\nmore: []\n", 0, "a list 'members' and nothing else"),
        ("members: {}\n", 0, "a list 'members' and nothing else"),
        ("- members\n", 0, "a list 'members' and nothing else"),
        ("", 0, "a list 'members' and nothing else"),
        ("members:\n  - {id: 5, role: operator, person: p}\n", 0, "all text"),
        ("members:\n  - {id: x, role: operator}\n", 0, "id, role and person"),
        ("members:\n  - {id: x, role: operator, person: p, more: p}\n", 0, "id, role and person"),
        ("members:\n  - operator\n", 0, "id, role and person"),
        ("members: []\nmembers: []\n", 2, "'members' stands there twice"),
        ("\nmembers: [\n", 3, "not YAML"),
        ("members:\n  - 2026-02-30\n", 2, "no such value"),
        ("members:\n  - &a x\n", 2, "anchors"),
    ],
)
def test_a_members_file_that_is_none_is_refused_in_its_line(text: str, line: int, reason: str) -> None:
    found = refused({**SOURCES, MEMBERS: text.encode()})
    assert (found.file, found.line) == (MEMBERS, line)
    assert reason in found.reason


def member(identity: str, role: str = "operator") -> str:
    return f'  - {{id: "{identity}", role: "{role}", person: "p9"}}\n'


@pytest.mark.parametrize(
    ("path", "entry", "reason"),
    [
        (MEMBERS, member("mtls:a.example:/health/x", "workload"), "auditor, custodian, officer, operator"),
        (MEMBERS, member("mtls:a.example:/health/x", "platform"), "auditor, custodian, officer, operator"),
        (PLATFORM, member("mtls:a.example:/x", "operator"), "auditor, officer, platform"),
        (PLATFORM, member("mtls:a.example:/x", "custodian"), "auditor, officer, platform"),
        (MEMBERS, member("mtls:a.example:/health/*"), "no wildcard"),
        (MEMBERS, member("mtls:a.example:/health/x y"), "printable ASCII"),
        (MEMBERS, member("token:a.example:/health/x"), "kind:issuer:subject"),
        (MEMBERS, member("mtls:ab"), "kind:issuer:subject"),
        (MEMBERS, member("oidc:" + "x" * 501), "kind:issuer:subject"),
        (MEMBERS, member("mtls:a.example:/healthy/x"), "must begin with /health/"),
        (MEMBERS, member("mtls:a.example:/defence/health/x"), "must begin with /health/"),
        (MEMBERS, member("mtls:a.example:x:/health/x"), "must begin with /health/"),
        (MEMBERS, member("mtls:eu-de-1.gov.example:/health/people/officer-1"), "listed twice"),
        (PLATFORM, member("mtls:eu-de-1.gov.example:/platform/people/auditor-1", "officer"), "listed twice"),
    ],
)
def test_a_person_who_cannot_be_listed_is_refused_in_the_line_of_the_identity(
    path: str, entry: str, reason: str
) -> None:
    identity = entry.split('"')[1]
    files = with_(path, entry)
    found = refused(files)
    first = next(n for n, line in enumerate(files[path].decode().splitlines(), 1) if f'"{identity}"' in line)
    assert (found.file, found.line) == (path, first)
    assert reason in found.reason


def test_a_person_whose_identity_is_spelled_with_escapes_is_refused_without_a_line() -> None:
    found = refused(with_(MEMBERS, member("mtls:a.example:/health/\\x78", "workload")))
    assert (found.file, found.line) == (MEMBERS, 0)


def test_people_are_found_by_their_identity_with_tenant_and_role() -> None:
    entries = member("mtls:a.example:/health/x", "auditor") + member("oidc:https://idp.example/:sub-1")
    registry = taken(with_(MEMBERS, entries)).registry
    for identity, role in (("mtls:a.example:/health/x", "auditor"), ("oidc:https://idp.example/:sub-1", "operator")):
        found = registry.member(identity)
        assert found is not None
        assert (found.tenant, found.role, found.person) == ("health", role, "p9")
    platform = registry.member("mtls:eu-de-1.gov.example:/platform/people/officer-1")
    assert platform is not None
    assert (platform.tenant, platform.role) == (None, "officer")
    assert taken(with_(PLATFORM, member("oidc:" + "x" * 500, "officer"))).registry.member("oidc:" + "x" * 500)


def test_a_gateway_is_no_person(bundle: Path) -> None:
    identity = "mtls:eu-de-1.gov.example:/health/people/operator-1"
    key = "MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE="
    gateway = f'\nforwarders:\n  gate: {{identity: "{identity}", places: ["eu-de-1"], public_key: "{key}"}}\n'
    found = refused(with_(CHARTER, gateway))
    assert (found.file, found.line) == (CHARTER, 0)
    assert "gate: a listed person too" in found.reason
    elsewhere = gateway.replace("people/operator-1", "gateways/one")
    assert taken(with_(CHARTER, elsewhere)).registry.forwarder_of(identity.replace("people/operator-1", "gateways/one"))


@pytest.mark.parametrize(
    ("old", "new", "line", "reason"),
    [
        ('jurisdiction: "NO"', "jurisdiction: NO", "no-1:", "quote names"),
        ('  no-1:     {jurisdiction: "NO"', '  NO:     {jurisdiction: "NO"', "NO:", "quote names"),
        ('valid_until: "2027-09-30"', "valid_until: 2027-09-30", '"C5":', "quote dates"),
        ("  health:  {home", "  He:  {home", "tenants:", "tenant name 'He'"),
        ("version: 1", 'version: "1"', "version:", "version: Input should be a valid integer"),
        ("version: 1", "version: 1\nvision: 1", "vision:", "vision: Extra inputs"),
        ("  2: {residency_within", "  2: {residency_wit", "2:", "residency_wit"),
        ('groups: ["EEA", "ALLIED"]', "groups: [EEA, 5]", "no-1:", "places.no-1.groups.1"),
        ('legal_bases: ["eu-law",', 'legal_bases: [\n  "law",\n  5,\n  "eu-law",', "5,", "legal_bases.1"),
    ],
)
def test_what_is_wrong_in_the_charter_is_named_with_its_line_and_a_hint(
    old: str, new: str, line: str, reason: str
) -> None:
    text = SOURCES[CHARTER].decode()
    assert old in text
    files = {**SOURCES, CHARTER: text.replace(old, new, 1).encode()}
    found = refused(files)
    assert found.file == CHARTER
    assert found.line == line_of(files, CHARTER, line)
    assert reason in found.reason
    assert ("quote" in found.reason) == ("quote" in reason)


@pytest.mark.parametrize(("text", "reason"), [("[]", "must be a mapping"), ("{}", "version: Field required")])
def test_a_charter_that_is_none_is_refused(text: str, reason: str) -> None:
    found = refused({**SOURCES, CHARTER: text.encode()})
    assert (found.file, found.line) == (CHARTER, 0)
    assert reason in found.reason


# ---- as a whole ------------------------------------------------------------------------------------------------------


def test_the_digest_can_be_made_again_by_whoever_has_the_files() -> None:
    bundle = made(SOURCES)
    files = {path: hashlib.sha256(data).hexdigest() for path, data in SOURCES.items()}
    files["schema.cedarschema"] = hashlib.sha256((SHIPPED.parent / "schema.cedarschema").read_bytes()).hexdigest()
    manifest = json.dumps({"files": files, "format": 1, "version": 1}, sort_keys=True, separators=(",", ":")).encode()
    assert bundle.digest == hashlib.sha256(b"skms/policy/v1\0" + manifest).hexdigest()
    assert bundle.files == files
    assert (bundle.sources, bundle.version, bundle.development) == (SOURCES, 1, False)


def test_each_action_is_of_one_kind_and_for_the_principals_and_resources_of_the_schema() -> None:
    for name, action in schema_actions().items():
        assert sum(kind in action.groups for kind in ("use", "admin", "read", "meta")) == 1, name
        assert name in action.groups
    found = schema_actions()
    assert found["reEncrypt"].groups == {"reEncrypt", "use", "release", "move"}
    assert (found["encrypt"].principals, found["encrypt"].resources) == ({"Workload"}, {"Key"})
    assert (found["random"].principals, found["random"].resources) == ({"Workload", "Operator"}, {"Tenant"})
    assert WHOLE.groups["destroy"] == {"destroy", "admin"}


def test_a_file_that_did_not_change_is_not_read_again_and_one_that_did_is() -> None:
    first = made(SOURCES)
    files = with_(ROLES, rule())
    second = made(files, known=first)
    same = {path for path, part in second.parts.items() if part is first.parts[path]}
    assert same == set(first.parts) - {ROLES}
    assert set(second.rules) - set(first.rules) == {"x"}
    assert second.text == made(files).text


def test_a_development_bundle_is_the_shipped_one_with_authorities_people_and_agreements_of_its_own(
    bundle: Path,
) -> None:
    domains = {"eu-de-1": "de-1.dev.example", "eu-de-2": "de-2.dev.example", "eu-fr-1": "fr.dev.example"}
    people = {"health": {"operator": "mtls:de-1.dev.example:/health/o", "auditor": "oidc:https://idp.example/:a"}}
    platform = "mtls:de-1.dev.example:/platform/p"
    write_development(
        bundle, trust_domains=domains, members=people, platform_member=platform, officer_member=f"{platform}/officer"
    )
    found = read(bundle)
    registry = found.registry
    assert (found.development, found.version, found.cases) == (True, 1, ())
    assert (bundle / CHARTER).read_text().startswith("# A development charter")
    assert {place: registry.place_of_trust_domain(domain) for place, domain in domains.items()} == {
        p: p for p in domains
    }
    assert registry.place_of_trust_domain("no-1.allied.example") == "no-1"
    assert {i: (m.tenant, m.role, m.person) for i, m in registry.members.items()} == {
        "mtls:de-1.dev.example:/health/o": ("health", "operator", "health-operator"),
        "oidc:https://idp.example/:a": ("health", "auditor", "health-auditor"),
        platform: (None, "platform", "platform"),
        f"{platform}/officer": (None, "officer", "officer"),
    }
    for tenant in ("health", "defence"):
        for crossing in (("DE", "FR"), ("FR", "DE")):
            (agreement,) = [a for a in found.agreements.of(tenant, crossing) if a.id.startswith("dev-")]
            assert agreement.id == f"dev-{crossing[0]}-{crossing[1]}".lower()
            assert agreement.purposes == {"default", "billing", "inference", "research", "training"}
            assert (agreement.begins, agreement.ends) == (1_577_836_800, 4_102_444_800)  # 2020 to 2100
        assert found.agreements.of(tenant, ("DE", "NO")) == ()
    assert "development" in registry.legal_bases
    assert set(registry.suppliers) == {"development"}
    home = frozenset({"eu-de-1"})
    places = dict.fromkeys(("residency", "execution", "reach", "egress"), home)
    for tier in (1, 2, 3):
        verdict = registry.verdict(
            tenant="health",
            tier=tier,
            home="eu-de-1",
            **places,
            failover=frozenset(),
            suppliers=["development"],
            now=4_000_000_000_000_000,
        )
        assert verdict.gaps == ()
    assert set(WHOLE.rules) - set(found.rules) == {"charter.t1-attested-release"}


def test_a_development_bundle_takes_the_place_of_an_earlier_one_whole(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("left over")
    for directory in (bundle, bundle.parent / "new"):
        write_development(directory, trust_domains={}, members={}, platform_member="mtls:a:/platform/p")
        found = read(directory)
        assert set(found.sources) == set(SOURCES) - {"cases/charter.yaml"}
        assert set(found.registry.members) == {"mtls:a:/platform/p"}
        assert [a.id for a in found.agreements.of("health", ("DE", "FR"))] == ["health-de-fr"]


CASE: dict[str, Any] = {
    "title": "mine",
    "caller": {"kind": "workload", "tenant": "health", "roles": ["workload"], "places": ["eu-de-1"]},
    "action": "encrypt",
    "key": {"tenant": "health", "tier": 2, "residency": ["eu-de-1"]},
    "expect": "allow",
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"expect": "charter.proof"}, "case 'mine': expected charter.proof, got allow"),
        ({"hsm": "eu-fr-1", "via": ["eu-de-1"]}, r"expected allow, got deny by \('charter.residency',\)"),
        ({"hsm": "eu-fr-1", "via": ["eu-de-1"], "expect": "charter.proof"}, "expected charter.proof, got deny by"),
        ({"hsm": "eu-fr-1", "via": ["eu-de-1"], "expect": "DEFAULT"}, "expected DEFAULT, got deny by"),
        ({"action": "rotate"}, "expected allow, got deny by DEFAULT"),
        ({"caller": "workload"}, "case 'mine': AttributeError"),
        ({"caller": {"kind": "workload"}}, "case 'mine': KeyError 'tenant'"),
        ({"dest": ["atlantis"]}, "case 'mine': UnknownPlace"),
        ({"attest": [1, 2, 3, 4]}, "case 'mine': TypeError"),
        ({"expect": ...}, "case 'mine': KeyError 'expect'"),
        ({"title": ..., "action": ...}, r"case '\?': KeyError 'action'"),
    ],
)
def test_a_case_that_is_none_or_comes_out_otherwise_refuses_the_bundle_by_its_title(
    bundle: Path, change: dict[str, Any], reason: str
) -> None:
    case = {name: value for name, value in {**CASE, **change}.items() if value is not ...}
    (bundle / "cases/charter.yaml").write_text(json.dumps({"cases": [case]}))
    with pytest.raises(BundleRefused, match=f"cases:0: .*{reason}"):
        Policy.load(bundle, sample=0)


@pytest.mark.parametrize("case", ["encrypt", 5, None, ["encrypt"]])
def test_a_case_that_is_no_mapping_is_refused_by_its_file(case: object) -> None:
    found = refused({**SOURCES, "cases/charter.yaml": json.dumps({"cases": [CASE, case]}).encode()})
    assert (found.file, found.line, found.reason) == ("cases/charter.yaml", 0, "each case is a mapping")


@pytest.mark.parametrize("expect", ["charter.residency", "SOV-RESIDENCY"])
def test_a_case_may_expect_a_denial_by_its_rule_or_by_its_code(bundle: Path, expect: str) -> None:
    case = {**CASE, "hsm": "eu-fr-1", "via": ["eu-de-1"], "expect": expect}
    (bundle / "cases/charter.yaml").write_text(json.dumps({"cases": [CASE, case]}))
    assert len(Policy.load(bundle, sample=0).bundle.cases) == 2


def test_a_draft_follows_what_is_in_force_and_takes_over_what_did_not_change() -> None:
    sources = {path: data for path, data in SOURCES.items() if not path.startswith("cases/")}
    first = Policy.stored(sources)
    changed = {**sources, ROLES: sources[ROLES] + rule().encode()}
    with pytest.raises(BundleRefused, match="version must rise above 1") as caught:
        Policy.draft(changed, after=first)
    assert (caught.value.file, caught.value.line) == (CHARTER, 1)
    changed[CHARTER] = changed[CHARTER].replace(b"version: 1", b"version: 2")
    second = Policy.draft(changed, after=first)
    taken = {path for path, part in second.bundle.parts.items() if part is first.bundle.parts[path]}
    assert taken == set(first.bundle.parts) - {ROLES}
    with pytest.raises(BundleRefused, match="version must rise above 2"):
        Policy.draft(sources, after=second)
    elsewhere = Policy.draft(changed, known=first)  # no rise is asked of what follows nothing
    assert elsewhere.digest == second.digest


def test_a_configured_signer_makes_a_bundle_without_signatures_refused(bundle: Path) -> None:
    """Whoever can write the directory could otherwise change the policy: `policy.signatures` says what counts."""
    signers = [Signer("bundle", Ed25519PrivateKey.generate().public_key())]
    with pytest.raises(BundleRefused, match=r"signatures/bundle\.sig:0: not there, and the configuration wants it"):
        Policy.load(bundle, signers=signers, sample=0)
    assert Policy.load(bundle, sample=0).digest == WHOLE.digest


def test_what_was_in_force_once_decides_as_it_did() -> None:
    home = frozenset({"eu-de-1"})
    key = KeyFacts("k", "health", 2, home, home, home, home, frozenset(), frozenset(), ("default",), "active")
    who = Caller("mtls:a:/health/x", "workload", "health", frozenset({"workload"}), home, 4, "mtls")
    request = Request(who, "encrypt", key, 1, "eu-de-1", home, purpose="default", reason="customer-initiated")
    assert Policy.stored(SOURCES).check(request).rules == ("health.workload-use",)
    assert Policy.stored(with_(ROLES, rule())).decide(request).rules == ("x",)
