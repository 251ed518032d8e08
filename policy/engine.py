"""Decisions: `Policy.check` raises `Denied`, `Policy.decide` tells. Cedar decides; this closes what it leaves open.

Stock Cedar skips a forbid that errs, and an unknown entity makes one err: so the schema goes with every call, and a
decision counts as allowed only if Cedar allowed it without a single error. Anything unexpected is a denial.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import cedarpy

from policy import bundle as bundles
from policy.bundle import Bundle, BundleRefused, Rule
from policy.places import Registry
from policy.request import (
    Attest,
    Caller,
    Decision,
    Denied,
    InstallationFacts,
    KeyFacts,
    Request,
    TenantFacts,
)

log: Final = logging.getLogger("skms.policy")

_RESERVED_TENANT: Final = "installation"  # the tenant of those who belong to none; no tenant may have this name
_CODES: Final[Mapping[str, str]] = {
    "SOV-RESIDENCY": "region_not_allowed",
    "SOV-EXECUTION": "region_not_allowed",
    "SOV-CALLER-PLACE": "region_not_allowed",
    "SOV-DESTINATION": "region_not_allowed",
    "SOV-MOVE": "region_not_allowed",
    "SOV-FAILOVER": "region_not_allowed",
    "SOV-QUORUM": "approval_required",
    "SOV-ATTEST": "attestation_failed",
    "KEY-STATE": "key_state_invalid",
    "SOV-TENANT": "not_found",
}


class Policy:
    """A loaded bundle, ready to decide. Immutable and thread-safe; a reload makes a new one."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._schema = cedarpy.Schema.from_str(bundles.SCHEMA.read_text())
        self._policies = cedarpy.PolicySet.from_str(bundle.text)

    @classmethod
    def load(cls, directory: Path, *, after: Policy | None = None) -> Policy:
        """Read, validate and try out a bundle; BundleRefused leaves whatever was in force in force.

        `after` is the policy in force: its successor needs a higher version, unless it is byte for byte the same.
        """
        bundle = bundles.read(directory)
        if after is not None and bundle.digest != after.digest and bundle.version <= after.version:
            raise BundleRefused(
                "charter.yaml", 1, f"version must rise above {after.version}; a rollback is old content under a new one"
            )
        made = cls(bundle)
        for case in bundle.cases:
            made._try(case)
        return made

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the bundle."""
        return self._bundle.digest

    @property
    def version(self) -> int:
        """The bundle's own number."""
        return self._bundle.version

    @property
    def development(self) -> bool:
        """Whether this is a development charter."""
        return self._bundle.development

    @property
    def registry(self) -> Registry:
        """Places, tenants, members."""
        return self._bundle.registry

    @property
    def files(self) -> Mapping[str, str]:
        """Every file of the bundle and its SHA-256."""
        return self._bundle.files

    @property
    def actions(self) -> Mapping[str, frozenset[str]]:
        """Every action and its groups."""
        return self._bundle.groups

    def check(self, request: Request) -> Decision:
        """The decision, if it is allowed; Denied otherwise."""
        decision = self.decide(request)
        if not decision.allowed:
            raise Denied(decision)
        return decision

    def decide(self, request: Request) -> Decision:
        """Decide one request. Never raises: what cannot be decided is denied as POLICY-ERROR."""
        try:
            return self._decide(request)
        except Exception as error:  # fail closed, whatever it is; its text may hold facts of the request
            log.error("decision failed", extra={"facts": {"error": type(error).__name__, "action": request.action}})
            return self._denied("policy_denied", (), "POLICY-ERROR")

    # ---- inside ------------------------------------------------------------------------------------------------

    def _decide(self, request: Request) -> Decision:
        _check_types(request)
        caller = request.caller
        if request.action not in self._bundle.groups:
            raise ValueError("unknown action")
        if caller.scopes is not None and request.action not in caller.scopes:
            return self._denied("policy_denied", (), "TOKEN-SCOPE")
        own = caller.tenant or _RESERVED_TENANT
        if caller.tenant is not None and self.registry.tenant(caller.tenant) is None:
            return self._denied("policy_denied", (), "DEFAULT")
        entities = [_principal(caller, own), *_resource(request.resource)]
        result = cedarpy.is_authorized(
            {
                "principal": {"type": caller.kind.capitalize(), "id": caller.id},
                "action": {"type": "Action", "id": request.action},
                "resource": _uid(request.resource),
                "context": _context(request),
            },
            self._policies,
            json.dumps(entities),
            self._schema,
        )
        if result.diagnostics.errors:
            if _not_for_this_principal(self._bundle, result.diagnostics.errors):
                return self._denied("policy_denied", (), "DEFAULT")
            raise ValueError("Cedar reported an error")
        names = sorted(result.diagnostics.id_annotations_by_reason.values())
        rules = [self._bundle.rules[n] for n in names]
        if not result.allowed:
            return self._refusal(request, rules)
        obligations = frozenset().union(*(r.obligations for r in rules))
        if obligations:
            return self._denied("policy_denied", tuple(names[:8]), "OBLIGATION-UNMET")
        return Decision(True, "", tuple(names[:8]), "", self.digest)

    def _refusal(self, request: Request, rules: list[Rule]) -> Decision:
        forbids = sorted((r for r in rules if r.effect == "forbid"), key=lambda r: (r.layer, r.id))
        if not forbids:
            return self._denied("policy_denied", (), "DEFAULT")
        told = next((r for r in forbids if r.code == "SOV-TENANT"), forbids[0])
        code = _CODES.get(told.code, "policy_denied")
        if told.code == "SOV-REASON" and request.reason == "unspecified":
            code = "reason_required"
        ids = (told.id, *(r.id for r in forbids if r.id != told.id))[:8]
        return self._denied(code, ids, told.code if told.disclosed else "DENIED")

    def _denied(self, code: str, rules: tuple[str, ...], rule_code: str) -> Decision:
        return Decision(False, code, rules, rule_code, self.digest)

    def _try(self, case: Mapping[str, Any]) -> None:
        """One case of the bundle: what it expects must be what is decided."""
        title = str(case.get("title", "?"))
        try:
            request = _case(case, self.registry)
            expect = case["expect"]
        except (KeyError, TypeError, ValueError) as error:
            raise BundleRefused("cases", 0, f"case {title!r}: {type(error).__name__} {error}") from None
        decision = self.decide(request)
        if expect == "allow":
            good = decision.allowed
        else:
            good = not decision.allowed and (expect in decision.rules or expect == decision.rule_code)
        if not good:
            got = "allow" if decision.allowed else f"deny by {decision.rules or decision.rule_code}"
            raise BundleRefused("cases", 0, f"case {title!r}: expected {expect}, got {got}")


def _check_types(request: Request) -> None:
    """Facts are of their types: a bool is an int in Python and would become true or 1 in Cedar."""
    for value in (request.now, request.approvals, request.caller.proof, request.attest.level, request.attest.age_s):
        if type(value) is not int or not -(2**53) < value < 2**53:
            raise TypeError("a number is not an integer")
    for flag in (request.failover, request.attest.tcb_ok):
        if type(flag) is not bool:
            raise TypeError("a flag is not a boolean")
    texts = (request.action, request.hsm, request.purpose, request.reason, request.caller.id)
    if not all(type(t) is str for t in texts) or request.caller.kind not in {"workload", "operator"}:
        raise TypeError("a text is not a string")


def _entity(kind: str, name: str) -> dict[str, Any]:
    return {"__entity": {"type": kind, "id": name}}


def _set(kind: str, names: frozenset[str]) -> list[dict[str, Any]]:
    return [_entity(kind, n) for n in sorted(names)]


def _principal(caller: Caller, own: str) -> dict[str, Any]:
    home = next(iter(sorted(caller.places)), "nowhere")
    return {
        "uid": {"type": caller.kind.capitalize(), "id": caller.id},
        "attrs": {"tenant": _entity("Tenant", own), "home": _entity("Place", home), "clearance": 0, "critical": False},
        "parents": [
            {"type": "Tenant", "id": own},
            *({"type": "Role", "id": f"{own}/{role}"} for role in sorted(caller.roles)),
        ],
    }


def _uid(resource: KeyFacts | TenantFacts | InstallationFacts) -> dict[str, str]:
    match resource:
        case KeyFacts():
            return {"type": "Key", "id": resource.id}
        case TenantFacts():
            return {"type": "Tenant", "id": resource.id}
    return {"type": "Installation", "id": resource.id}


def _resource(resource: KeyFacts | TenantFacts | InstallationFacts) -> list[dict[str, Any]]:
    if not isinstance(resource, KeyFacts):
        return [{"uid": _uid(resource), "attrs": {}, "parents": []}]
    places = {n: _set("Place", getattr(resource, n)) for n in ("residency", "execution", "reach", "egress", "failover")}
    attributes = {
        "tenant": _entity("Tenant", resource.tenant),
        "sharedWith": _set("Tenant", resource.shared_with),
        "tier": resource.tier,
        "purposes": sorted(resource.purposes),
        "state": resource.state,
        **places,
    }
    return [{"uid": _uid(resource), "attrs": attributes, "parents": [{"type": "Tenant", "id": resource.tenant}]}]


def _context(r: Request) -> dict[str, Any]:
    return {
        "hsm": _entity("Place", r.hsm),
        "via": _set("Place", r.via),
        "caller": _set("Place", r.caller.places),
        "callerProof": r.caller.proof,
        "dest": _set("Place", r.dest),
        "target": _set("Place", r.target),
        "failover": r.failover,
        "waivedReach": [],
        "waivedEgress": [],
        "purpose": r.purpose,
        "reason": r.reason,
        "attest": {"level": r.attest.level, "ageS": r.attest.age_s, "tcbOk": r.attest.tcb_ok},
        "approvals": r.approvals,
        "now": r.now,
    }


def _not_for_this_principal(bundle: Bundle, errors: list[Any]) -> bool:
    """Whether the request was refused because the action is not for this kind of principal or resource at all."""
    return bool(errors) and all("is not valid for" in str(e) for e in errors)


def _case(case: Mapping[str, Any], registry: Registry) -> Request:
    def places(name: str, default: tuple[str, ...] = ()) -> frozenset[str]:
        return registry.expand(case.get(name, default))

    who, key = case["caller"], case["key"]
    residency = registry.expand(key["residency"])
    facts = KeyFacts(
        id=key.get("id", "case"),
        tenant=key["tenant"],
        tier=key["tier"],
        residency=residency,
        execution=registry.expand(key.get("execution", key["residency"])),
        reach=registry.expand(key.get("reach", key["residency"])),
        egress=registry.expand(key.get("egress", key["residency"])),
        failover=registry.expand(key.get("failover", ())),
        shared_with=frozenset(key.get("shared_with", ())),
        purposes=tuple(key.get("purposes", ("default",))),
        state=key.get("state", "active"),
    )
    attest = case.get("attest", (0, 0, False))
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
        action=case["action"],
        resource=facts,
        now=case.get("now", 1_800_000_000),
        hsm=case.get("hsm", "eu-de-1"),
        via=places("via", (case.get("hsm", "eu-de-1"),)),
        dest=places("dest"),
        target=places("target"),
        failover=case.get("failover", False),
        purpose=case.get("purpose", "default"),
        reason=case.get("reason", "customer-initiated"),
        approvals=case.get("approvals", 0),
        attest=Attest(*attest),
    )
