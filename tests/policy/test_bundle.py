"""Loading: what is refused, with file, line and reason; what the digest covers; what a failed reload leaves in force."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from policy import BundleRefused, Policy
from policy.bundle import SHIPPED

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
