"""Where things are: the charter's registry of places, and what evidence proves about a caller's place.

A place is a concrete region; jurisdictions and groups are names for sets of regions. What is known about a place is the
*set of possible regions*: "somewhere in DE" is usable, the empty set is refused everywhere.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType
from typing import Annotated, Final, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

from policy.request import Caller
from policy.suppliers import Bar, Gap, SupplierEntry, Verdict, judge, wrong

NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
RESERVED_TENANTS: Final = frozenset(
    {"root", "admin", "administrator", "default", "system", "platform", "installation", "skms", "internal", "none"}
)


class UnknownPlace(Exception):
    """A name that is no place, jurisdiction or group of the charter."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _instant(value: object) -> int:
    """Seconds since the epoch of an RFC 3339 time, as text or as YAML reads it; never a bare number or a local time."""
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, datetime) or found.tzinfo is None or found.microsecond:
        raise ValueError('a time in whole seconds with its offset, as in "2026-01-31T12:00:00Z"')
    return int(found.timestamp())


Instant = Annotated[StrictInt, BeforeValidator(_instant)]
# Short and plain: it stands in the rule that a record names (`policy.transfers`).
Jurisdiction = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,23}$")]
PurposeName = Annotated[StrictStr, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Text = Annotated[StrictStr, Field(min_length=1, max_length=512)]


class PlaceEntry(_Strict):
    """A region: its jurisdiction, its groups, and the authority that may vouch for it."""

    jurisdiction: Jurisdiction
    groups: tuple[StrictStr, ...] = ()
    trust_domain: StrictStr


class TierEntry(Bar):
    """What typed code uses of a tier; thresholds of rules stand in the rules."""

    residency_within: StrictStr


class TenantEntry(_Strict):
    """A tenant: its home jurisdiction, and the reason its workloads have when they give none."""

    home: StrictStr
    default_reason: Annotated[StrictStr, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")] = "unspecified"


class AgreementEntry(_Strict):
    """What lets a tenant's data cross from one jurisdiction into another, for these purposes, until it ends."""

    from_: Annotated[StrictStr, Field(alias="from")]
    to: StrictStr
    tenants: Annotated[tuple[StrictStr, ...], Field(min_length=1)]
    legal_basis: StrictStr
    legal_ref: Text  # article, treaty, contract: what an auditor looks up
    purposes: Annotated[tuple[PurposeName, ...], Field(min_length=1)]
    parties: Annotated[tuple[Text, ...], Field(min_length=2)]
    not_before: Instant
    not_after: Instant  # the first second at which it no longer counts


class ForwarderEntry(_Strict):
    """A gateway or proxy at which TLS of callers may end: who it is to TLS, where it can be, what it signs hops with."""

    identity: Annotated[StrictStr, Field(pattern=r"^mtls:[a-z0-9._-]{1,255}:(/[A-Za-z0-9._-]+)+$", max_length=512)]
    places: Annotated[tuple[StrictStr, ...], Field(min_length=1)]
    public_key: Annotated[StrictStr, Field(max_length=512)]  # SubjectPublicKeyInfo (DER), in base64

    @field_validator("public_key")
    @classmethod
    def _usable(cls, text: str) -> str:
        try:
            key = load_der_public_key(base64.b64decode(text, validate=True))
        except (ValueError, UnsupportedAlgorithm, binascii.Error):
            raise ValueError("a public key in base64: `openssl pkey -pubout -outform DER | base64 -w0`") from None
        if not isinstance(key, ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey):
            raise ValueError("an Ed25519 or P-256 key")
        if isinstance(key, ec.EllipticCurvePublicKey) and not isinstance(key.curve, ec.SECP256R1):
            raise ValueError("an Ed25519 or P-256 key")
        return text

    @property
    def domain(self) -> str:
        """The trust domain of its identity."""
        return self.identity.split(":")[1]


class CopyEntry(_Strict):
    """What else holds a region's root KEK, or holds such a copy: with it, every key of the region is usable there."""

    kind: Literal["wrap", "backup", "escrow"]
    of: StrictStr  # a region, for its root KEK, or another copy
    places: Annotated[tuple[StrictStr, ...], Field(min_length=1)]


class SystemEntry(_Strict):
    """A system that somebody runs, and the key that each of its data stores is under: by id, or `alias/<name>`."""

    tenant: StrictStr
    critical: StrictBool
    stores: Annotated[dict[StrictStr, StrictStr], Field(min_length=1)]


class Charter(_Strict):
    """charter.yaml."""

    version: Annotated[StrictInt, Field(ge=1)]
    development: StrictBool = False
    places: dict[StrictStr, PlaceEntry]
    tiers: dict[StrictInt, TierEntry]
    tenants: dict[StrictStr, TenantEntry]
    legal_bases: tuple[StrictStr, ...] = ()
    transfer_agreements: dict[StrictStr, AgreementEntry] = {}  # none: nothing may cross
    suppliers: dict[StrictStr, SupplierEntry] = {}
    forwarders: dict[StrictStr, ForwarderEntry] = {}  # none: callers' TLS ends at the service's own nodes alone
    copies: dict[StrictStr, CopyEntry] = {}  # none: root KEKs are on the HSMs and backup tokens of their regions alone
    systems: dict[StrictStr, SystemEntry] = {}  # what the figures of sovereignty count; no decision asks for it

    @field_validator("suppliers")
    @classmethod
    def _supplier_names(cls, suppliers: dict[str, SupplierEntry]) -> dict[str, SupplierEntry]:
        for name in suppliers:
            if NAME.fullmatch(name) is None:
                raise wrong(f"supplier name {name!r}: lower-case letters, digits and hyphens", name)
        return suppliers

    @field_validator("tenants")
    @classmethod
    def _tenant_names(cls, tenants: dict[str, TenantEntry]) -> dict[str, TenantEntry]:
        for name in tenants:
            if NAME.fullmatch(name) is None or name in RESERVED_TENANTS:
                raise ValueError(
                    f"tenant name {name!r}: lower-case letters, digits and hyphens, and none of "
                    + ", ".join(sorted(RESERVED_TENANTS))
                )
        return tenants

    @model_validator(mode="after")
    def _consistent(self) -> Charter:
        if set(self.tiers) != {1, 2, 3}:
            raise ValueError("tiers: 1, 2 and 3 must be there")
        names = {p.jurisdiction for p in self.places.values()} | {g for p in self.places.values() for g in p.groups}
        if clash := names & set(self.places):
            raise ValueError(f"{sorted(clash)}: a region and a group or jurisdiction share a name")
        for place in self.places:
            if NAME.fullmatch(place) is None:
                raise ValueError(f"place {place!r}: lower-case letters, digits and hyphens")
        domains = [p.trust_domain for p in self.places.values()]
        if len(set(domains)) != len(domains):
            raise ValueError("places: each trust domain vouches for one region")
        self._forwarders_consistent()
        self._copies_consistent()
        for name, system in self.systems.items():
            if NAME.fullmatch(name) is None:
                raise wrong(f"system name {name!r}: lower-case letters, digits and hyphens", "systems", name)
            if system.tenant not in self.tenants:
                raise wrong(f"{system.tenant!r} is no tenant of the charter", "systems", name, "tenant")
        homes = {p.jurisdiction for p in self.places.values()}
        for name, tenant in self.tenants.items():
            if tenant.home not in homes:
                raise ValueError(f"tenant {name}: home {tenant.home!r} is no jurisdiction of a place")
        return self

    def _copies_consistent(self) -> None:
        groups = {g for p in self.places.values() for g in p.groups} | {p.jurisdiction for p in self.places.values()}
        for name, about in self.copies.items():
            if NAME.fullmatch(name) is None or name in self.places:
                reason = f"copy name {name!r}: lower-case letters, digits and hyphens, and no region's name"
                raise wrong(reason, "copies", name)
            if about.of not in self.places and about.of not in self.copies:
                raise wrong(f"{about.of!r} is neither a region nor another copy", "copies", name, "of")
            for place in about.places:
                if place not in self.places and place not in groups | {"approved"}:
                    reason = f"{place!r} is no place, jurisdiction or group of the charter"
                    raise wrong(reason, "copies", name, "places")

    def _forwarders_consistent(self) -> None:
        for name, about in self.forwarders.items():
            if NAME.fullmatch(name) is None:
                raise wrong(f"forwarder name {name!r}: lower-case letters, digits and hyphens", "forwarders", name)
            for place in about.places:
                if place not in self.places or self.places[place].trust_domain != about.domain:
                    reason = f"{place!r} is no place that the authority of {about.domain!r} may vouch for"
                    raise wrong(reason, "forwarders", name, "places")
        for what in ("identity", "public_key"):
            found = [getattr(about, what) for about in self.forwarders.values()]
            if len(set(found)) != len(found):
                raise wrong(f"two forwarders have one {what}: each is one machine or one group of them", "forwarders")


@dataclass(frozen=True, slots=True)
class Member:
    """A listed person: tenant (None for the installation's own), role, and one opaque name per human."""

    tenant: str | None
    role: str
    person: str


class Registry:
    """The charter's words, looked up. Immutable; a new bundle brings a new one."""

    def __init__(self, charter: Charter, members: Mapping[str, Member]) -> None:
        self._charter, self._members = charter, dict(members)
        leaves: dict[str, set[str]] = {"approved": set(charter.places)}
        for place, about in charter.places.items():
            for name in (place, about.jurisdiction, *about.groups):
                leaves.setdefault(name, set()).add(place)
        self._leaves = {name: frozenset(found) for name, found in leaves.items()}
        self._domains = {about.trust_domain: place for place, about in charter.places.items()}
        self._forwarders = {about.identity: name for name, about in charter.forwarders.items()}

    def says_the_same(self, other: Registry) -> bool:
        """Whether another bundle's charter and members differ from these by the version alone."""
        mine, theirs = (r._charter.model_copy(update={"version": 0}) for r in (self, other))
        return mine == theirs and self._members == other._members

    def expand(self, names: Iterable[str]) -> frozenset[str]:
        """The regions that these names stand for; UnknownPlace for a name the charter does not have."""
        found: frozenset[str] = frozenset()
        for name in names:
            if name not in self._leaves:
                raise UnknownPlace("not a place, jurisdiction or group of the charter")
            found |= self._leaves[name]
        return found

    def around(self, places: Iterable[str]) -> frozenset[str]:
        """Every name that stands for one of these regions: its own, its jurisdiction, its groups."""
        wanted = frozenset(places)
        return wanted | {name for name, leaves in self._leaves.items() if not leaves.isdisjoint(wanted)}

    def place_of_trust_domain(self, domain: str) -> str | None:
        """The region that this SPIFFE trust domain's authority may vouch for."""
        return self._domains.get(domain)

    @property
    def copies(self) -> Mapping[str, CopyEntry]:
        """Every registered copy of a root KEK, by name."""
        return self._charter.copies

    @property
    def has_forwarders(self) -> bool:
        """Whether any forwarder is registered."""
        return bool(self._forwarders)

    def forwarder(self, name: str) -> ForwarderEntry | None:
        """A registered forwarder, by its exact name."""
        return self._charter.forwarders.get(name)

    def forwarder_of(self, identity: str) -> str | None:
        """The name of the forwarder with this canonical identity, byte for byte."""
        return self._forwarders.get(identity)

    def tenant(self, name: str) -> TenantEntry | None:
        """A registered tenant, by its exact name."""
        return self._charter.tenants.get(name)

    def tenant_names(self) -> tuple[str, ...]:
        """Every registered tenant."""
        return tuple(self._charter.tenants)

    def member(self, identity: str) -> Member | None:
        """The listed person behind a canonical identity, byte for byte."""
        return self._members.get(identity)

    @property
    def members(self) -> Mapping[str, Member]:
        """Every listed person, by canonical identity."""
        return MappingProxyType(self._members)

    def within_tier(self, tier: int, tenant: str) -> frozenset[str]:
        """Where material of a registered tenant's keys of a tier may exist at most."""
        bound = self._charter.tiers[tier].residency_within
        name = self._charter.tenants[tenant].home if bound == "home-jurisdiction" else bound
        return self._leaves.get(name, frozenset())

    def check_key(
        self,
        *,
        tenant: str,
        tier: int,
        home: str,
        residency: frozenset[str],
        execution: frozenset[str],
        reach: frozenset[str],
        egress: frozenset[str],
        failover: frozenset[str],
    ) -> tuple[str, ...]:
        """What a key lacks to meet its tier; empty if it meets it. Tiers are minimum bars, met at all times."""
        missing = []
        if tenant not in self._charter.tenants:
            return ("tenant is not registered",)
        bound, within = self._charter.tiers[tier].residency_within, self.within_tier(tier, tenant)
        if not residency or not residency <= within:
            missing.append(f"residency lies within {bound}")
        if home not in residency:
            missing.append("home is part of residency")
        if not failover <= residency:
            missing.append("failover is part of residency")
        known = self._leaves["approved"]
        for name, places in (("execution", execution), ("reach", reach), ("egress", egress)):
            if not places or not places <= known:
                missing.append(f"{name} names approved places")
        return tuple(missing)

    def verdict(
        self,
        *,
        tenant: str,
        tier: int,
        home: str,
        residency: frozenset[str],
        execution: frozenset[str],
        reach: frozenset[str],
        egress: frozenset[str],
        failover: frozenset[str],
        suppliers: Iterable[str | None],
        now: int,
    ) -> Verdict:
        """What a key lacks to meet its tier at `now` (us), its places and the suppliers of its region's HSMs together."""
        if tier not in self._charter.tiers:  # of a row that somebody changed
            return Verdict((Gap("the tier is 1, 2 or 3"),))
        places = self.check_key(
            tenant=tenant,
            tier=tier,
            home=home,
            residency=residency,
            execution=execution,
            reach=reach,
            egress=egress,
            failover=failover,
        )
        labels = judge(self.bar(tier), self._charter.suppliers, suppliers, now)
        return Verdict((*(Gap(what) for what in places), *labels.gaps), labels.since, labels.until)

    def bar(self, tier: int) -> Mapping[str, int]:
        """The least level of each label that a tier demands of the suppliers who hold its keys."""
        return self._charter.tiers[tier].labels

    @property
    def suppliers(self) -> Mapping[str, SupplierEntry]:
        """Every registered supplier, by name."""
        return self._charter.suppliers

    @property
    def systems(self) -> Mapping[str, SystemEntry]:
        """The systems whose keys are here, by name."""
        return self._charter.systems

    @property
    def legal_bases(self) -> tuple[str, ...]:
        """What an agreement or an exception can rest on."""
        return self._charter.legal_bases

    def describe_places(self) -> list[dict[str, object]]:
        """Every place as operators see it."""
        return [
            {"name": n, "jurisdiction": p.jurisdiction, "groups": list(p.groups), "trust_domain": p.trust_domain}
            for n, p in sorted(self._charter.places.items())
        ]

    def describe_tenants(self) -> list[dict[str, object]]:
        """Every tenant as operators see it."""
        return [{"name": n, "home": t.home} for n, t in sorted(self._charter.tenants.items())]


@dataclass(frozen=True, slots=True)
class Evidence:
    """One piece of evidence about where a caller can be.

    `places` is what it says, `vouches` what its authority may say at all; both as regions.
    """

    kind: Literal["header", "listener", "svid", "document", "tee"]
    places: frozenset[str] = frozenset()
    vouches: frozenset[str] | None = None  # None: nobody restricted it
    bound: bool = True  # to the TLS key or a nonce; a bearer document is none
    stale: bool = False


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a caller can be, how well that is proven (0 to 5), and whether evidence contradicts itself."""

    places: frozenset[str] = field(default_factory=frozenset)
    proof: int = 0
    conflict: bool = False


NOWHERE: Final = Whereabouts()
_CONFLICT: Final = Whereabouts(conflict=True)


def whereabouts(evidence: Iterable[Evidence]) -> Whereabouts:
    """Combine evidence: identity-grade evidence narrows, weak evidence can only contradict; contradiction is nowhere.

    Headers, bodies and GeoIP are ignored. A listener on a region's network proves 2 alone and never narrows. A
    certificate of the region's own authority proves 3, with a bound instance document 4, with a TEE quote beside both 5;
    a TEE says what runs, not where, so alone it proves nothing.
    """
    given = [e for e in evidence if e.kind != "header" and not e.stale]
    if any(e.vouches is not None and not e.places <= e.vouches for e in given):
        return _CONFLICT
    svids = [e for e in given if e.kind == "svid"]
    documents = [e for e in given if e.kind == "document" and e.bound]
    listeners = [e for e in given if e.kind == "listener"]
    tee = any(e.kind == "tee" and e.bound for e in given)
    if not svids:
        if documents or not listeners:
            return NOWHERE
        places = frozenset.intersection(*(e.places for e in listeners))
        return Whereabouts(places, 2) if places else _CONFLICT
    places = frozenset.intersection(*(e.places for e in (*svids, *documents)))
    if not places or any(not (places & e.places) for e in listeners):
        return _CONFLICT
    proof = 4 if documents else 3
    if tee:
        proof = 5 if documents else 4
    return Whereabouts(places, proof)


@dataclass(frozen=True, slots=True)
class Hops:
    """The forwarders that a request came through, the first one first, each proven by its signature.

    `places` is where they can be, `origin` where the caller of the first one can be, as that one's TLS proved it.
    """

    names: tuple[str, ...] = ()
    places: frozenset[str] = frozenset()
    origin: frozenset[str] = frozenset()


DIRECT: Final = Hops()


def behind(caller: Caller, origin: frozenset[str]) -> Caller:
    """The caller, who may also be where the first hop's own caller can be. Who is nowhere gains no place by that."""
    return replace(caller, places=caller.places | origin) if caller.places and origin else caller


EMPTY: Final[Mapping[str, Member]] = MappingProxyType({})
