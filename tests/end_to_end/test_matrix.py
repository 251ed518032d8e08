"""Tenant x region x tier x state x role x operation: decided as the table below says, and not by the service's code.

Denied cells make no PKCS#11 call, counted at the binding.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
from collections import Counter
from typing import Any

import httpx
import pytest

from harness import Lab, shows

REGIONS = ("eu-de-1", "eu-fr-1", "us-mkt-1")
TIERS: dict[int, dict[str, Any]] = {
    1: {"tier": 1, "home": "eu-de-1"},
    2: {"tier": 2, "home": "eu-de-1", "reach": ["eu-de-1", "eu-fr-1"], "egress": ["eu-de-1", "eu-fr-1"]},
    3: {
        "tier": 3,
        "home": "eu-de-1",
        "reach": ["eu-de-1", "eu-fr-1", "us-mkt-1"],
        "egress": ["eu-de-1", "eu-fr-1", "us-mkt-1"],
    },
}
STATES = ("enabled", "disabled", "pending_deletion", "compromised", "destroyed")
SPECS = {"encrypt": "AES_256", "sign": "EC_P256", "mac": "HMAC_256"}
B64 = base64.b64encode(b"matrix").decode()

# operation -> (usage of the key it needs, who may: a role, or "workload"; whether the key must be enabled)
OPERATIONS: dict[str, tuple[str, frozenset[str], bool]] = {
    "encrypt": ("encrypt", frozenset({"workload"}), True),
    "decrypt": ("encrypt", frozenset({"workload"}), True),
    "data-keys": ("encrypt", frozenset({"workload"}), True),
    "unwrap": ("encrypt", frozenset({"workload"}), True),
    "rewrap": ("encrypt", frozenset({"workload"}), True),
    "sign": ("sign", frozenset({"workload"}), True),
    "verify": ("sign", frozenset({"workload"}), True),
    "mac": ("mac", frozenset({"workload"}), True),
    "verify-mac": ("mac", frozenset({"workload"}), True),
    "describe": ("encrypt", frozenset({"workload", "operator", "officer", "custodian", "auditor"}), False),
    "destroy": ("encrypt", frozenset({"operator"}), False),
    "policy": ("encrypt", frozenset({"officer"}), False),
}
ASKED = {"destroy", "policy"}  # by one, for others to approve: and this node has no approvers
OPERATOR_ROLES = ("operator", "officer", "custodian", "auditor")


def expected(*, same_tenant: bool, region: str, tier: int, state: str, role: str, operation: str) -> set[str]:
    """The codes that this cell may answer with; {"ok"} for an allowed one."""
    _, who, needs_enabled = OPERATIONS[operation]
    if not same_tenant or role == "platform":
        # A foreign key is no key; its envelope is no envelope.
        return {"invalid_ciphertext"} if operation in {"decrypt", "unwrap", "rewrap"} else {"not_found"}
    faults: set[str] = set()
    if needs_enabled and state == "destroyed":
        faults.add("key_destroyed")
    elif needs_enabled and state != "enabled":
        faults.add("key_state_invalid")
    if role not in who:
        faults.add("policy_denied")
    if region not in TIERS[tier].get("reach", ["eu-de-1"]):
        faults.add("region_not_allowed")
    if not faults and operation in ASKED:
        return {"key_destroyed" if state == "destroyed" else "approval_refused"}
    return faults or {"ok"}


class Keys:
    """One key per usage, tier and state, with something each of them made."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.ids: dict[tuple[str, int, str], str] = {}
        self.made: dict[tuple[int, str], dict[str, str]] = {}

    async def make(self) -> None:
        operator, workload = self.lab.client("health-operator"), self.lab.client("health-eu-de-1")
        for (usage, spec), tier, state in itertools.product(SPECS.items(), TIERS, STATES):
            body = {"spec": spec, **TIERS[tier]}
            headers = {"Idempotency-Key": f"{usage}-{tier}-{state}"}
            key = (await operator.post("/v1/keys", json=body, headers=headers)).raise_for_status().json()
            self.ids[usage, tier, state] = key["id"]
            path = f"/v1/keys/{key['id']}"
            if usage == "encrypt":
                made = (await workload.post(f"{path}/encrypt", json={"plaintext": B64})).raise_for_status().json()
                data = (await workload.post(f"{path}/data-keys", json={})).raise_for_status().json()
                self.made[tier, state] = {"ciphertext": made["ciphertext"], "wrapped_key": data["wrapped_key"]}
            await self._bring_to(path, state, key["id"])

    async def _bring_to(self, path: str, state: str, key_id: str) -> None:
        operator, officer = self.lab.client("health-operator"), self.lab.client("health-officer")
        etag = (await operator.get(path)).headers["etag"]
        match = {"If-Match": etag, "Idempotency-Key": f"del-{key_id}"}
        if state == "disabled":
            (await operator.post(f"{path}/disable")).raise_for_status()
        elif state == "compromised":
            answer = await operator.post(f"{path}/mark-compromised")
            if answer.status_code == 403:
                answer = await officer.post(f"{path}/mark-compromised")
            answer.raise_for_status()
        elif state in {"pending_deletion", "destroyed"}:
            body = {"wait": "P7D" if state == "destroyed" else "P90D"}
            (await operator.post(f"{path}/schedule-deletion", json=body, headers=match)).raise_for_status()

    async def destroy_due(self) -> None:
        """Let the waiting time of the keys that shall be destroyed pass, until the scheduler has destroyed them."""
        operator, clock = self.lab.client("health-operator"), self.lab.clock
        clock.ahead += 8 * 86_400 * 1_000_000
        try:
            for usage, tier in itertools.product(SPECS, TIERS):
                await shows(operator, self.ids[usage, tier, "destroyed"], seconds=180, state="destroyed")
        finally:
            clock.ahead = 0

    async def read_all(self) -> None:
        """Have every row checked: a worker asks its HSM about a row that it reads for the first time."""
        operator = self.lab.client("health-operator")
        for (_, _, state), key_id in self.ids.items():
            assert await self._state(operator, key_id) == state

    @staticmethod
    async def _state(operator: httpx.AsyncClient, key_id: str) -> str:
        return str((await operator.get(f"/v1/keys/{key_id}")).raise_for_status().json()["state"])


def request(keys: Keys, tier: int, state: str, operation: str) -> tuple[str, str, dict[str, Any]]:
    usage = OPERATIONS[operation][0]
    key = keys.ids[usage, tier, state]
    made = keys.made[tier, state]
    path = f"/v1/keys/{key}"
    match operation:
        case "decrypt":
            return "POST", "/v1/decrypt", {"ciphertext": made["ciphertext"]}
        case "rewrap":
            return "POST", "/v1/rewrap", {"ciphertext": made["ciphertext"]}
        case "unwrap":
            return "POST", "/v1/data-keys/unwrap", {"wrapped_key": made["wrapped_key"]}
        case "encrypt":
            return "POST", f"{path}/encrypt", {"plaintext": B64}
        case "data-keys":
            return "POST", f"{path}/data-keys", {}
        case "sign":
            return "POST", f"{path}/sign", {"message": B64, "algorithm": "ECDSA_SHA_256"}
        case "verify":
            body = {"message": B64, "algorithm": "ECDSA_SHA_256", "signature": B64}
            return "POST", f"{path}/verify", body
        case "mac":
            return "POST", f"{path}/mac", {"message": B64, "algorithm": "HMAC_SHA_256"}
        case "verify-mac":
            return "POST", f"{path}/verify-mac", {"message": B64, "algorithm": "HMAC_SHA_256", "mac": B64}
        case "destroy":
            return "POST", f"{path}/destroy", {}
        case "policy":
            return "POST", f"{path}/policy", {"purposes": ["other"]}
    return "GET", path, {}


@pytest.mark.anyio
async def test_every_cell_is_decided_as_the_table_says(lab: Lab, pkcs11_calls: Any) -> None:
    keys = Keys(lab)
    await keys.make()
    await keys.destroy_due()
    await keys.read_all()
    people: list[tuple[str, str, str, str]] = []  # identity, tenant, region, role
    for tenant in ("health", "defence"):
        people += [(f"{tenant}-{region}", tenant, region, "workload") for region in REGIONS]
        people += [(f"{tenant}-{role}", tenant, "eu-de-1", role) for role in OPERATOR_ROLES]
    people.append(("platform", "", "eu-de-1", "platform"))
    seen: Counter[str] = Counter()
    wrong: list[str] = []

    async def cell(person: tuple[str, str, str, str], tier: int, state: str, operation: str) -> bool:
        name, tenant, region, role = person
        wanted = expected(
            same_tenant=tenant == "health", region=region, tier=tier, state=state, role=role, operation=operation
        )
        method, path, body = request(keys, tier, state, operation)
        asking = {"If-Match": "*", "Idempotency-Key": f"{name}-{tier}-{state}-{operation}"}
        answer = await lab.client(name).request(
            method,
            path,
            json=body or None if method == "GET" else body,
            headers=asking if operation in ASKED else None,
        )
        code = "ok" if answer.status_code < 300 else answer.json()["code"]
        seen[code] += 1
        if code not in wanted:
            wrong.append(f"{person} tier {tier} {state} {operation}: {code}, expected {sorted(wanted)}")
        if "audit-receipt" not in answer.headers:
            wrong.append(f"{person} {operation}: no receipt")
        return wanted == {"ok"}

    cells = list(itertools.product(people, TIERS, STATES, OPERATIONS))
    denied = [
        c
        for c in cells
        if expected(
            same_tenant=c[0][1] == "health", region=c[0][2], tier=c[1], state=c[2], role=c[0][3], operation=c[3]
        )
        != {"ok"}
    ]
    before = pkcs11_calls()
    for start in range(0, len(denied), 64):
        await asyncio.gather(*(cell(*c) for c in denied[start : start + 64]))
    assert pkcs11_calls() == before, "a denied request reached the HSM"
    allowed = [c for c in cells if c not in denied]
    for start in range(0, len(allowed), 64):
        await asyncio.gather(*(cell(*c) for c in allowed[start : start + 64]))
    assert not wrong, "\n".join(wrong[:20])
    assert seen["ok"] == len(allowed)
    assert pkcs11_calls() > before
