"""The oracle in service: a sample is decided again; a difference makes the node allow only what both engines allow."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import uuid
from pathlib import Path

import pytest

from cedar_engines import many
from harness import Lab, new_key, until
from policy import Caller, Decision, KeyFacts, Policy, Request
from policy.bundle import SHIPPED, read
from service.shadow import ONE_IN, Shadow

pytestmark = pytest.mark.anyio
HOME = frozenset({"eu-de-1"})
CALLER = Caller("mtls:a:/health/x", "workload", "health", frozenset({"workload"}), HOME, 4, "mtls")
KEY = KeyFacts("k", "health", 2, HOME, HOME, HOME, HOME, frozenset(), frozenset(), ("default",), "active")
ENCRYPT = Request(CALLER, "encrypt", KEY, 1, "eu-de-1", HOME, purpose="default", reason="customer-initiated")
FORBIDDEN = dataclasses.replace(ENCRYPT, hsm="eu-fr-1")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load(SHIPPED)


class Wrong(Policy):
    """A policy whose compiled half answers wrongly: the fault the oracle is there for."""

    def decide(self, request: Request) -> Decision:
        return dataclasses.replace(super().decide(request), allowed=True, code="", rule_code="")


@pytest.fixture(scope="module")
def wrong() -> Policy:
    return Wrong(read(SHIPPED))


def test_equal_decisions_are_checked_and_change_nothing(policy: Policy) -> None:
    shadow = Shadow(one_in=1)
    for request in (ENCRYPT, FORBIDDEN, dataclasses.replace(ENCRYPT, action="rotate")):
        assert shadow.decide(policy, request, str(uuid.uuid4())) == policy.decide(request)
    shadow.close()
    assert (shadow.checked, shadow.mismatches) == (3, 0)


def test_one_in_a_thousand_is_checked(policy: Policy) -> None:
    shadow = Shadow()
    for _ in range(20 * ONE_IN):
        shadow.decide(policy, ENCRYPT, str(uuid.uuid4()))
    shadow.close()
    assert 1 <= shadow.checked <= 60


def test_after_a_mismatch_only_what_both_engines_allow_is_allowed(
    wrong: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    shadow = Shadow(one_in=1)
    assert shadow.decide(wrong, FORBIDDEN, "d-1").allowed  # nobody has noticed yet
    shadow.close()
    assert shadow.mismatch
    assert [r.levelno for r in caplog.records if "disagree" in r.message] == [logging.CRITICAL]
    denied = shadow.decide(wrong, FORBIDDEN, "d-2")
    assert (denied.allowed, denied.rule_code) == (False, "POLICY-ERROR")
    assert shadow.decide(wrong, ENCRYPT, "d-3").allowed


@pytest.mark.parametrize("purpose", ["\ud800", "x" * 1025, 'Place::"eu-de-1"', "\0", "\u202e"])
def test_no_text_of_a_caller_makes_the_engines_differ(policy: Policy, purpose: str) -> None:
    shadow = Shadow(one_in=1)
    key = dataclasses.replace(KEY, purposes=("default", purpose))
    for what in (KEY, key):
        shadow.decide(policy, dataclasses.replace(ENCRYPT, purpose=purpose, resource=what), "d")
    shadow.close()
    assert (shadow.checked, shadow.mismatches) == (2, 0)


async def test_the_node_counts_and_tells(lab: Lab, wrong: Policy) -> None:
    key = await new_key(lab, "AES_256")
    platform = lab.client("platform")
    kms = lab.node.kms
    metrics = (await platform.get("/metrics")).text
    assert "skms_policy_oracle_mismatch_total 0.0" in metrics
    before, kms.shadow = kms.shadow, Shadow(one_in=1)
    try:
        kms.shadow.decide(wrong, FORBIDDEN, "d-1")
        await until(lambda: kms.shadow.mismatch, "the oracle did not notice")
        assert "skms_policy_oracle_mismatch_total 1.0" in (await platform.get("/metrics")).text
        ready = await platform.get("/readyz")
        assert ready.status_code == 200
        assert "both engines" in ready.json()["policy_oracle"]
        answer = await lab.client("health-eu-de-1").post(f"/v1/keys/{key}/encrypt", json={"plaintext": "AAAA"})
        assert answer.status_code == 200, answer.text
    finally:  # other files share this node
        kms.shadow.close()
        kms.shadow = before


async def test_the_event_loop_runs_on_while_a_bundle_is_loaded(tmp_path: Path) -> None:
    bundle = many(tmp_path / "bundle", 200)
    loading = asyncio.create_task(asyncio.to_thread(Policy.load, bundle))
    turns = 0
    while not loading.done():
        await asyncio.sleep(0.005)
        turns += 1
    await loading
    assert turns >= 5  # how long each waits is measured by `make bench-policy`: a busy machine would fail it here
