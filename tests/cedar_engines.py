"""Both engines on plain Cedar facts: the compiled policies and Cedar itself, asked the same."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import cedarpy
import yaml

from policy.bundle import SHIPPED, schema, schema_actions
from policy.compiler import Action, Compiler, Entity, Index, Record, RuleFailed, uid
from policy.oracle import Opinion, Oracle
from policy.places import Charter, Registry

CONTEXT_ENTITIES = ["hsm", "via", "caller", "dest", "target", "waivedReach", "waivedEgress"]
KEY_ENTITIES = ["residency", "execution", "reach", "egress", "failover", "tenant", "sharedWith"]
ENTITY_FIELDS = frozenset([*CONTEXT_ENTITIES, *KEY_ENTITIES, "home"])
REGISTRY = Registry(Charter.model_validate(yaml.safe_load((SHIPPED / "charter.yaml").read_text())), {})
Asked = tuple[Entity, str, Entity, dict[str, Any]]


class Engines:
    """A policy text in both engines. Strict validation first, as at load."""

    def __init__(
        self, text: str, *, by: cedarpy.Schema | None = None, actions: Mapping[str, Action] | None = None
    ) -> None:
        by = by or schema()
        result = cedarpy.validate_policies(text, by)
        if not result.validation_passed:
            raise ValueError(str(result.errors[0].error))
        policies = json.loads(cedarpy.policies_to_json_str(text))["staticPolicies"].values()
        compiler = Compiler()
        self.ids = [p["annotations"]["id"] for p in policies]
        self.effects = {p["annotations"]["id"]: p["effect"] for p in policies}
        self._index = Index([compiler.compile(p) for p in policies], actions or schema_actions())
        self._oracle, self._schema = Oracle(text, by), by
        self._known: cedarpy.Entities | None = None

    def know(self, entities: Iterable[Entity]) -> None:
        """Hand Cedar all entities that will be asked about, once; otherwise those of a question go with it."""
        self._known = cedarpy.Entities.from_json_str(json.dumps([_entity(e) for e in entities]), self._schema)

    def ours(self, principal: Entity, action: str, resource: Entity, context: dict[str, Any]) -> Opinion:
        try:
            allowed, hits = self._index.evaluate(principal, action, resource, context)
        except RuleFailed:
            return Opinion(allowed=False, rules=frozenset(), error=True)
        return Opinion(allowed, frozenset(self.ids[n] for n in hits))

    def cedar(self, principal: Entity, action: str, resource: Entity, context: dict[str, Any]) -> Opinion:
        entities = self._known or json.dumps([_entity(principal), _entity(resource)])
        uids = reference(principal.uid), {"type": "Action", "id": action}, reference(resource.uid)
        return self._oracle.ask(*uids, as_json(context), entities)

    def differ(self, asked: Asked) -> str | None:
        """What is different, if anything: the answer, the deciding rules, or an error that does not deny."""
        ours, cedar = self.ours(*asked), self.cedar(*asked)
        denied = not ours.allowed and (ours.error or bool(ours.rules))  # by the error, or by a forbid
        good = denied if cedar.error else ours == cedar
        return None if good else f"{asked[1]}: {ours} but Cedar says {cedar}"


def _entity(e: Entity) -> dict[str, Any]:
    parents = [reference(a) for a in sorted(e.ancestors - {e.uid})]
    return {"uid": reference(e.uid), "attrs": as_json(e.attrs), "parents": parents}


@functools.cache
def reference(entity: str) -> dict[str, str]:
    kind, _, name = entity.partition('::"')
    return {"type": kind, "id": json.loads('"' + name)}


def as_json(value: Any, name: str = "") -> Any:
    """By the field's type in the schema, never by the looks of a string: callers choose some strings."""
    if isinstance(value, dict):
        return {k: as_json(v, k) for k, v in value.items()}
    if isinstance(value, frozenset):
        return [as_json(v, name) for v in sorted(value)]
    return {"__entity": reference(value)} if name in ENTITY_FIELDS and isinstance(value, str) else value


def places(names: Iterable[str]) -> frozenset[str]:
    return frozenset(map(_place, REGISTRY.expand(names)))


@functools.cache
def _place(leaf: str) -> str:
    return uid("Place", leaf)


def principal(
    kind: str,
    name: str,
    tenant: str,
    home: str,
    roles: Iterable[str] = (),
    clearance: int = 0,
    critical: bool = False,
) -> Entity:
    attrs = {"tenant": uid("Tenant", tenant), "home": uid("Place", home), "clearance": clearance, "critical": critical}
    return Entity(kind, name, attrs, [uid("Tenant", tenant), *(uid("Role", r) for r in roles)])


def key(
    name: str,
    tenant: str,
    tier: int,
    residency: Iterable[str],
    *,
    purposes: Iterable[str],
    reach: Iterable[str] | None = None,
    egress: Iterable[str] | None = None,
    failover: Iterable[str] = (),
    shared: Iterable[str] = (),
    state: str = "active",
) -> Entity:
    home = list(residency)
    attrs = {
        "tenant": uid("Tenant", tenant),
        "sharedWith": frozenset(uid("Tenant", t) for t in shared),
        "tier": tier,
        "residency": places(home),
        "execution": places(home),
        "reach": places(home if reach is None else reach),
        "egress": places(home if egress is None else egress),
        "failover": places(failover),
        "purposes": frozenset(purposes),
        "state": state,
    }
    return Entity("Key", name, attrs, [uid("Tenant", tenant)])


def facts(
    *,
    hsm: str = "eu-de-1",
    via: Iterable[str] | None = None,
    caller: Iterable[str] = ("eu-de-1",),
    proof: int = 4,
    dest: Iterable[str] = (),
    target: Iterable[str] = (),
    failover: bool = False,
    waived: Iterable[str] = (),
    purpose: str = "inference",
    reason: str = "customer-initiated",
    attest: tuple[int, int, bool] = (2, 10, True),
    approvals: int = 0,
    now: int = 2_000_500_000,
) -> dict[str, Any]:
    """The context of one request; by default all is in eu-de-1."""
    return {
        "hsm": uid("Place", hsm),
        "via": places([hsm] if via is None else via),
        "caller": places(caller),
        "callerProof": proof,
        "dest": places(dest),
        "target": places(target),
        "failover": failover,
        "waivedReach": places(waived),
        "waivedEgress": places(waived),
        "purpose": purpose,
        "reason": reason,
        "attest": Record(level=attest[0], ageS=attest[1], tcbOk=attest[2]),
        "approvals": approvals,
        "now": now,
    }


def many(directory: Path, count: int, *, tenants: int = 20) -> Path:
    """The shipped bundle with about `count` policies: further tenants, each with roles of its own."""
    shutil.copytree(SHIPPED, directory)
    about = yaml.safe_load((directory / "charter.yaml").read_text())
    for number in range(tenants):
        name = f"t{number}"
        about["tenants"][name] = {"home": "DE"}
        folder = directory / "tenants" / name
        folder.mkdir()
        rules = "".join(_rule(name, n) for n in range(max(0, count - 44) // tenants))
        (folder / "00-roles.cedar").write_text(rules)
    (directory / "charter.yaml").write_text(yaml.safe_dump(about))
    return directory


def _rule(tenant: str, number: int) -> str:
    return (
        f'@id("{tenant}.r{number}") @layer("tenant") permit (principal in Role::"{tenant}/role-{number % 97}", '
        f'action in [Action::"use", Action::"describe"], resource in Tenant::"{tenant}") '
        f'when {{ principal.tenant == Tenant::"{tenant}" && context.purpose == "purpose-{number}" && context.now < {number} }};\n'
    )
