"""Cedar itself, by cedarpy, closed by hand: the oracle that the compiled policies are compared with.

It makes its own facts of a request, so that a mistake in ours is found too. Stock Cedar skips a forbid that errs, and an
unknown entity makes one err: so the schema goes with every call, and an error is told, never passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import cedarpy

from policy.facts import PLACE_SETS, RESERVED_TENANT
from policy.request import Caller, KeyFacts, Request, Resource


class Opinion(NamedTuple):
    """What Cedar says: allowed, the @id of each deciding policy, and whether anything erred (then it denies)."""

    allowed: bool
    rules: frozenset[str]
    error: bool = False


class Oracle:
    """One set of policies in Cedar. Thread-safe; a call holds the GIL, about 1 us a policy."""

    def __init__(self, text: str, schema: cedarpy.Schema) -> None:
        self._schema = schema
        self._policies = cedarpy.PolicySet.from_str(text, release_gil=True)

    def decide(self, request: Request) -> Opinion:
        """What Cedar says to this request."""
        entities = [_principal(request.caller), _resource(request.resource)]
        uids = entities[0]["uid"], {"type": "Action", "id": request.action}, entities[1]["uid"]
        return self.ask(*uids, _context(request), json.dumps(entities))

    def ask(
        self,
        principal: Mapping[str, str],
        action: Mapping[str, str],
        resource: Mapping[str, str],
        context: Mapping[str, Any],
        entities: str | cedarpy.Entities,
    ) -> Opinion:
        """What Cedar says of facts in Cedar's own JSON form."""
        question = {"principal": principal, "action": action, "resource": resource, "context": context}
        result = cedarpy.is_authorized(question, self._policies, entities, self._schema)
        errors = result.diagnostics.errors
        if errors and all("is not valid for" in str(e) for e in errors):
            return Opinion(allowed=False, rules=frozenset())  # the action is not for this kind at all
        if errors:
            return Opinion(allowed=False, rules=frozenset(), error=True)
        return Opinion(result.allowed, frozenset(result.diagnostics.id_annotations_by_reason.values()))


class Slices:
    """The oracle of what can concern one resource: Cedar takes 1 us a policy, of which most are other tenants'.

    A bundle lets a tenant's file speak of that tenant's resources alone, and a key's file of that key. For trying a
    bundle out, beside the whole of it; in service only the whole is asked.
    """

    def __init__(self, texts: Mapping[str, str], schema: cedarpy.Schema, known: Slices | None = None) -> None:
        """`texts` by path; oracles of `known` that say the same are taken over."""
        self._schema = schema
        self._common = "\n".join(text for path, text in texts.items() if path.startswith(_EVERYWHERE))
        self._own: dict[str, str] = {}
        for path, text in texts.items():
            if not path.startswith(_EVERYWHERE):
                owner = "/".join(path.split("/")[:2])
                self._own[owner] = f"{self._own.get(owner, '')}\n{text}"
        self._made: dict[str, Oracle] = {}
        self._known = {} if known is None else known._made

    def of(self, resource: Resource) -> Oracle:
        """The oracle to ask about this resource."""
        owners = [f"tenants/{resource.tenant if isinstance(resource, KeyFacts) else resource.id}"]
        if isinstance(resource, KeyFacts):
            owners.append(f"keys/{resource.id}.cedar")
        text = "\n".join((self._common, *(self._own[o] for o in owners if o in self._own)))
        found = self._made.get(text)
        if found is None:
            found = self._made[text] = self._known.get(text) or Oracle(text, self._schema)
        return found

    def tried(self) -> Slices:
        """Itself, without what only its predecessor said."""
        self._known = {}
        return self


_EVERYWHERE: Final = ("charter/", "installation/")


def _entity(kind: str, name: str) -> dict[str, Any]:
    return {"__entity": {"type": kind, "id": name}}


def _set(kind: str, names: frozenset[str]) -> list[dict[str, Any]]:
    return [_entity(kind, n) for n in sorted(names)]


def _principal(caller: Caller) -> dict[str, Any]:
    own = RESERVED_TENANT if caller.tenant is None else caller.tenant
    home = next(iter(sorted(caller.places)), "nowhere")
    return {
        "uid": {"type": caller.kind.capitalize(), "id": caller.id},
        "attrs": {"tenant": _entity("Tenant", own), "home": _entity("Place", home), "clearance": 0, "critical": False},
        "parents": [
            {"type": "Tenant", "id": own},
            *({"type": "Role", "id": f"{own}/{role}"} for role in sorted(caller.roles)),
        ],
    }


def _resource(resource: Resource) -> dict[str, Any]:
    if not isinstance(resource, KeyFacts):
        kind = type(resource).__name__.removesuffix("Facts")
        return {"uid": {"type": kind, "id": resource.id}, "attrs": {}, "parents": []}
    attributes = {
        "tenant": _entity("Tenant", resource.tenant),
        "sharedWith": _set("Tenant", resource.shared_with),
        "tier": resource.tier,
        "purposes": sorted(resource.purposes),
        "state": resource.state,
        **{field: _set("Place", getattr(resource, field)) for field in PLACE_SETS},
    }
    return {
        "uid": {"type": "Key", "id": resource.id},
        "attrs": attributes,
        "parents": [{"type": "Tenant", "id": resource.tenant}],
    }


def _context(r: Request) -> dict[str, Any]:
    return {
        "hsm": _entity("Place", r.hsm),
        "via": _set("Place", r.via),
        "caller": _set("Place", r.caller.places),
        "callerProof": r.caller.proof,
        "dest": _set("Place", r.dest),
        "target": _set("Place", r.target),
        "failover": r.failover,
        "waivedReach": _set("Place", r.waived_reach),
        "waivedEgress": _set("Place", r.waived_egress),
        "purpose": r.purpose,
        "reason": r.reason,
        "attest": {"level": r.attest.level, "ageS": r.attest.age_s, "tcbOk": r.attest.tcb_ok},
        "approvals": r.approvals,
        "now": r.now,
    }
