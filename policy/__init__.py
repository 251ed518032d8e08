"""Who may do what with which key, where: facts in, a decision with its rule out. Pure."""

from policy.bundle import Bundle, BundleRefused, write_development
from policy.engine import Policy
from policy.freeze import Freeze, FreezeGone, Freezes, FreezeUnconfirmed, Frozen, InForce, Scope, Touched
from policy.lockout import LockedOut
from policy.places import DIRECT, Evidence, Hops, Member, Registry, UnknownPlace, Whereabouts, behind, whereabouts
from policy.request import (
    Attest,
    Caller,
    Decision,
    Denied,
    InstallationFacts,
    KeyFacts,
    Request,
    Resource,
    TenantFacts,
)
from policy.suppliers import NO_HSM, Gap, SupplierEntry, Verdict

__all__ = [
    "DIRECT",
    "NO_HSM",
    "Attest",
    "Bundle",
    "BundleRefused",
    "Caller",
    "Decision",
    "Denied",
    "Evidence",
    "Freeze",
    "FreezeGone",
    "FreezeUnconfirmed",
    "Freezes",
    "Frozen",
    "Gap",
    "Hops",
    "InForce",
    "InstallationFacts",
    "KeyFacts",
    "LockedOut",
    "Member",
    "Policy",
    "Registry",
    "Request",
    "Resource",
    "Scope",
    "SupplierEntry",
    "TenantFacts",
    "Touched",
    "UnknownPlace",
    "Verdict",
    "Whereabouts",
    "behind",
    "whereabouts",
    "write_development",
]
