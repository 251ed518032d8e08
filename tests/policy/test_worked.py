"""Six worked examples in 27 cases, each decided by both engines: the shipped charter with rules of three tenants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cedar_engines import Engines, facts, key, principal
from policy.bundle import SHIPPED
from policy.compiler import Entity

CHARTER = (SHIPPED / "charter/00-charter.cedar").read_text()
TEXT = CHARTER + "\n".join(p.read_text() for p in sorted((Path(__file__).parent / "worked").glob("*.cedar")))

SPIFFE = "spiffe://{}.gov.example/{}".format
SERVE = principal(
    "Workload", SPIFFE("eu-de-1", "health/ns/ml/sa/serve"), "health", "eu-de-1", ["health/ml-serve"], clearance=2
)
TRAIN = principal(
    "Workload", SPIFFE("eu-de-2", "health/ns/ml/sa/train"), "health", "eu-de-2", ["health/ml-train"], clearance=2
)
ISSUER = principal(
    "Workload",
    SPIFFE("eu-de-1", "interior/ns/pki/sa/issuer"),
    "interior",
    "eu-de-1",
    ["interior/id-issuer"],
    clearance=3,
    critical=True,
)
JOINT = principal("Workload", SPIFFE("eu-fr-1", "institute/ns/onco/sa/joint-study"), "institute", "eu-fr-1")
INTRUDER = principal("Workload", SPIFFE("eu-de-1", "institute/x"), "institute", "eu-de-1", ["health/ml-serve"])
OFFICER = principal("Operator", "anna@health", "health", "eu-de-1", ["health/key-officer"])
FOREIGN = principal("Operator", "luc@institute", "institute", "eu-de-1", ["health/key-officer"])
PATIENTS = key("patients", "health", 1, ["DE"], failover=["eu-de-2"], purposes=["inference", "training"])
NATID = key("natid-root", "interior", 1, ["eu-de-1"], purposes=["sign"])
ONCO = key(
    "onco-study",
    "health",
    2,
    ["DE", "FR"],
    reach=["DE"],
    egress=["DE"],
    purposes=["research", "training"],
    shared=["institute"],
)
DE1, FRANCE = {"dest": ["eu-de-1"]}, {"caller": ["eu-fr-1"], "dest": ["eu-fr-1"]}
FR = {**FRANCE, "hsm": "eu-fr-1", "purpose": "research"}
WAIVED, SIGN, LATE = {"waived": ["eu-fr-1"]}, {"purpose": "sign"}, {"now": 2_010_000_000}
TRAINING = {"caller": ["eu-de-2"], "dest": ["eu-de-2"], "purpose": "training"}
MOVE, ABROAD = {"dest": ["eu-de-2"], "target": ["eu-de-2"]}, {"dest": ["eu-fr-1"], "target": ["eu-fr-1"]}
DEFAULT = ""  # no rule decides, so it is denied
HOME = {"dest": ["eu-de-1"], "target": ["eu-de-1"]}
CASES: list[tuple[str, Entity, str, Entity, dict[str, Any], str]] = [
    ("1a in Germany, attested", SERVE, "decrypt", PATIENTS, DE1, "health.serve"),
    ("1b TLS ended on a French hop", SERVE, "decrypt", PATIENTS, {**DE1, "via": ["DE", "FR"]}, "charter.execution"),
    ("1c caller somewhere in the EU", SERVE, "decrypt", PATIENTS, {**DE1, "caller": ["EU"]}, "charter.caller"),
    ("1d caller somewhere in DE", SERVE, "decrypt", PATIENTS, {"caller": ["DE"], "dest": ["DE"]}, "health.serve"),
    ("1e empty hop set", SERVE, "encrypt", PATIENTS, {"via": []}, "charter.execution"),
    ("1f unknown caller place", SERVE, "encrypt", PATIENTS, {"caller": []}, "charter.caller"),
    ("1g region from a header only", SERVE, "encrypt", PATIENTS, {"proof": 1}, "charter.proof"),
    (
        "2a stale attestation",
        SERVE,
        "decrypt",
        PATIENTS,
        {**DE1, "attest": (2, 4000, True)},
        "charter.t1-attested-release",
    ),
    ("2b training inside its window", TRAIN, "decrypt", PATIENTS, TRAINING, "health.train"),
    ("2c training after its window", TRAIN, "decrypt", PATIENTS, {**TRAINING, **LATE}, "health.train-window"),
    ("2d server asks for training", SERVE, "decrypt", PATIENTS, {**DE1, "purpose": "training"}, DEFAULT),
    ("3a issuer signs, two approvals", ISSUER, "sign", NATID, {**SIGN, "approvals": 2}, "key.natid-root.sign"),
    ("3b issuer signs, one approval", ISSUER, "sign", NATID, {**SIGN, "approvals": 1}, DEFAULT),
    ("3c mac with a signing key", ISSUER, "mac", NATID, {**SIGN, "approvals": 2}, "key.natid-root.only-sign"),
    ("4a France, no exception", JOINT, "decrypt", ONCO, FR, "charter.caller"),
    ("4b France, live exception, grant", JOINT, "decrypt", ONCO, {**FR, **WAIVED}, "grant.g-2031"),
    ("4c exception live, grant over", JOINT, "decrypt", ONCO, {**FR, **WAIVED, **LATE}, DEFAULT),
    ("4d no exception helps tier 1", SERVE, "decrypt", PATIENTS, {**FRANCE, **WAIVED}, "charter.caller"),
    ("5a failover HSM, not declared", SERVE, "decrypt", PATIENTS, {**DE1, "hsm": "eu-de-2"}, "charter.failover"),
    ("5b failover declared", SERVE, "decrypt", PATIENTS, {**DE1, "hsm": "eu-de-2", "failover": True}, "health.serve"),
    ("5c replicate tier 1 to France", OFFICER, "replicate", PATIENTS, {**ABROAD, "approvals": 3}, "charter.move"),
    ("5d replicate in Germany, three", OFFICER, "replicate", PATIENTS, {**MOVE, "approvals": 3}, "health.admin"),
    ("5e the same with two", OFFICER, "replicate", PATIENTS, {**MOVE, "approvals": 2}, "charter.quorum"),
    ("6a vendor-initiated", SERVE, "decrypt", PATIENTS, {**DE1, "reason": "vendor-initiated"}, "charter.reason"),
    ("6b usable in the UK", TRAIN, "reEncrypt", ONCO, {**TRAINING, "target": ["DE", "uk-1"]}, "charter.move"),
    ("6c foreign tenant, our role name", INTRUDER, "decrypt", PATIENTS, DE1, "charter.tenant"),
    (
        "6d export of tier 1, five approvals",
        OFFICER,
        "export",
        PATIENTS,
        {**HOME, "approvals": 5},
        "charter.t1-no-export",
    ),
]


def wrong(engines: Engines) -> list[str]:
    """The cases that come out otherwise."""
    found = []
    for title, who, action, what, given, rule in CASES:
        ours = engines.ours(who, action, what, facts(**given))
        allow = engines.effects.get(rule) == "permit"
        if ours.error or ours.allowed != allow or (rule not in ours.rules if rule else ours.rules):
            found.append(title)
    return found


@pytest.fixture(scope="module")
def engines() -> Engines:
    return Engines(TEXT)


@pytest.mark.parametrize("case", CASES, ids=[c[0] for c in CASES])
def test_worked_case(engines: Engines, case: tuple[Any, ...]) -> None:
    title, who, action, what, given, _ = case
    assert engines.differ((who, action, what, facts(**given))) is None
    assert title not in wrong(engines)


def test_a_share_gives_no_administration(engines: Engines) -> None:
    assert engines.ours(FOREIGN, "rotate", ONCO, facts()).rules == {"charter.tenant-admin"}


def without(rule: str) -> str:
    """The text without one policy."""
    begin = TEXT.index(f'@id("{rule}")')
    return TEXT[:begin] + TEXT[TEXT.index(";", begin) + 1 :]


# Each is a wall that no other stands behind; `caller` and `residency` have others behind them in some cases only.
SABOTAGE = {
    "no execution rule": without("charter.execution"),
    "no caller rule": without("charter.caller"),
    "no proof rule": without("charter.proof"),
    "no attestation rule": without("charter.t1-attested-release"),
    "no failover rule": without("charter.failover"),
    "no move rule": without("charter.move"),
    "no quorum rule": without("charter.quorum"),
    "no export rule": without("charter.t1-no-export"),
    "no tenant rule": without("charter.tenant"),
    "no reason rule": without("charter.reason"),
    "no window": without("health.train-window"),
    "K2 by containsAny": TEXT.replace("execution.containsAll(context.via)", "execution.containsAny(context.via)"),
    "K2 without isEmpty": TEXT.replace("!context.via.isEmpty() && ", ""),
    "K3 by containsAny": TEXT.replace("reach.containsAll(context.caller)", "reach.containsAny(context.caller)"),
    "K3 without isEmpty": TEXT.replace("!context.caller.isEmpty() &&", "true &&"),
    "K3 waived for tier 1": TEXT.replace(
        "resource.tier > 1 && context.waivedReach", "resource.tier >= 1 && context.waivedReach"
    ),
    "K5 by containsAny": TEXT.replace("residency.containsAll(context.target)", "residency.containsAny(context.target)"),
}


@pytest.mark.parametrize("name", sorted(SABOTAGE))
def test_a_sabotaged_rule_is_caught_by_a_case(name: str) -> None:
    assert SABOTAGE[name] != TEXT
    assert wrong(Engines(SABOTAGE[name]))
