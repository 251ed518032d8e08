"""The plain facts a decision is made of: who, what, on which key, from where, now.

Places in these facts are sets of *possible* leaf places; an empty set means unknown, and unknown is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

PrincipalKind = Literal["workload", "operator"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as identity proved it. Nothing in here comes from a header, a path or a body."""

    id: str  # canonical, byte-exact: "kind:issuer:subject", e.g. "mtls:eu-de-1.gov.example:/health/ns/ml/sa/serve"
    kind: PrincipalKind
    tenant: str | None  # None only for the installation's own roles (platform, internal jobs)
    roles: frozenset[str]  # e.g. {"operator"}; workloads may have roles of their own
    places: frozenset[str]  # possible leaf places; empty = unknown
    proof: int  # 0..5, see `policy.places.whereabouts`
    authn: str  # mtls, oidc, token, internal, none
    source: str = ""  # peer IP address
    scopes: frozenset[str] | None = None  # an API token's operations; None = not limited by the credential
    evidence: bytes = b""  # SHA-256 of the credential that proved it


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """A key as the policy sees it. All place sets are leaf places."""

    id: str
    tenant: str
    tier: int
    residency: frozenset[str]
    execution: frozenset[str]
    reach: frozenset[str]
    egress: frozenset[str]
    failover: frozenset[str]
    shared_with: frozenset[str]
    purposes: tuple[str, ...]
    state: str  # an SP 800-57 state: the stricter of key and version; "suspended" while deletion is pending


@dataclass(frozen=True, slots=True)
class TenantFacts:
    """A tenant as resource: createKey, list, readAudit, random."""

    id: str


@dataclass(frozen=True, slots=True)
class InstallationFacts:
    """The installation as resource: HSMs, nodes, regions, policy, the whole log."""

    id: str = "installation"


Resource = KeyFacts | TenantFacts | InstallationFacts


@dataclass(frozen=True, slots=True)
class Attest:
    """Attestation of the caller's machine: 0 none, 1 measured boot, 2 TEE, 3 TEE and GPU TEE."""

    level: int = 0
    age_s: int = 0
    tcb_ok: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One question to the policy. `action` is a Cedar action name (see policy/schema.cedarschema)."""

    caller: Caller
    action: str
    resource: Resource
    now: int  # seconds since the epoch
    hsm: str = ""  # the place of the HSM that would act
    via: frozenset[str] = frozenset()  # places where TLS ends or plaintext passes, this node included
    dest: frozenset[str] = frozenset()  # where plaintext would go: the caller's places and what was declared
    target: frozenset[str] = frozenset()  # where a new copy would become usable
    failover: bool = False
    waived_reach: frozenset[str] = frozenset()  # by exceptions that are live and signed
    waived_egress: frozenset[str] = frozenset()
    purpose: str = ""  # "" = the key's only purpose
    reason: str = "unspecified"
    approvals: int = 0
    attest: Attest = Attest()
    grant: str = (
        ""  # id of a live grant that covers exactly this; it counts only where no rule forbids and none permits
    )


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided and by which rules; `rules` are the deciding ones, at most eight."""

    allowed: bool
    code: str  # "" when allowed, else the stable code of the API (e.g. "region_not_allowed")
    rules: tuple[str, ...]  # @id of the deciding policies; empty = default deny
    rule_code: str  # the disclosed @code (e.g. "SOV-CALLER-PLACE"), "DENIED" if not disclosed, "" when allowed
    digest: str  # hex SHA-256 of the bundle
    obligations: frozenset[str] = field(default_factory=frozenset)
    missing: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


class Denied(Exception):
    """The policy said no. `decision` carries the code, the deciding rules and the bundle digest."""

    def __init__(self, decision: Decision) -> None:
        super().__init__(f"{decision.code} by {decision.rule_code or 'DEFAULT'}")
        self.decision = decision
