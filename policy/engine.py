"""Decisions: `Policy.check` raises `Denied`, `Policy.decide` tells. Compiled policies decide; Cedar itself is the oracle.

Whatever cannot be decided is denied: a fact of the wrong type, an unknown action, a rule that errs. The oracle decides
the same requests again (at load all cases and random ones, in service a sample), and must come to the same decision.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from policy import bundle as bundles
from policy import selftest, signatures
from policy.bundle import Bundle, BundleRefused, Rule
from policy.compiler import Index, RuleFailed
from policy.facts import Facts
from policy.grants import RULE as GRANT
from policy.oracle import Oracle, Slices
from policy.places import Registry, UnknownPlace
from policy.request import Decision, Denied, KeyFacts, Request
from policy.transfers import CODE, MOST, RULE, Agreements

log: Final = logging.getLogger("skms.policy")

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
_KEPT: Final = 4096
_YIELD_S: Final = 20e-6  # the GIL is let go between two questions of a self-test: cedarpy never does


class Policy:
    """A loaded bundle, ready to decide. Thread-safe and never changed; a reload makes a new one."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._rules = sorted(bundle.rules.values(), key=lambda r: (r.layer, r.id))  # in the order they are told in
        self._numbers = {rule.id: n for n, rule in enumerate(self._rules)}
        self._index = Index([rule.compiled for rule in self._rules], bundle.actions)
        self._facts = Facts()
        self._agreements = bundle.agreements
        self._oracle = Oracle(bundle.text, bundles.schema())
        self._slices: Slices | None = None  # of a bundle that was tried out
        self._answers: dict[tuple[bool, tuple[int, ...], bool], Decision] = {}

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        after: Policy | None = None,
        known: Policy | None = None,
        signers: Sequence[signatures.Signer] = (),
        sample: int = selftest.REQUESTS,
    ) -> Policy:
        """Read, validate, compile and try out a bundle; BundleRefused leaves whatever was in force in force.

        `after` is the policy in force: its successor needs a higher version, unless it is byte for byte the same.
        Files that `known` has with the same content are not parsed, validated and compiled again. `sample` is how many
        random requests the self-test asks both engines at most, beside all cases: about tenants whose rules were not
        tried out with `known` as they are. Each part that has `signers` bears a signature.
        """
        known = known or after
        bundle = bundles.read(directory, known=None if known is None else known._bundle)
        signatures.check(directory, bundle, signers)
        return cls._tried(bundle, after, known, sample)

    @classmethod
    def draft(cls, files: Mapping[str, bytes], *, after: Policy | None = None, known: Policy | None = None) -> Policy:
        """As `load`, of files at hand: path -> content."""
        known = known or after
        bundle = bundles.made(files, known=None if known is None else known._bundle)
        return cls._tried(bundle, after, known, selftest.REQUESTS)

    @classmethod
    def _tried(cls, bundle: Bundle, after: Policy | None, known: Policy | None, sample: int) -> Policy:
        if after is not None and bundle.digest != after.digest and bundle.version <= after.version:
            raise BundleRefused(
                "charter.yaml", 1, f"version must rise above {after.version}; a rollback is old content under a new one"
            )
        made = cls(bundle)
        texts = {path: part.text for path, part in bundle.parts.items()}
        slices = Slices(texts, bundles.schema(), None if known is None else known._slices)
        for case in bundle.cases:
            made._try(case, slices)
            time.sleep(_YIELD_S)
        among = None  # everybody
        if known is not None and known._slices is not None:
            among = selftest.changed(bundle, known._bundle)
        if among is not None:
            sample = min(sample, selftest.REQUESTS_A_TENANT * len(among))
        for number, request in enumerate(selftest.requests(bundle, sample, among=among)):
            oracle = made._oracle if number % selftest.WHOLE_EVERY == 0 else slices.of(request.resource)
            if not made._agrees(request, made.decide(request), oracle):
                raise BundleRefused("bundle", 0, f"self-test: {request.action} is decided otherwise by Cedar itself")
            time.sleep(_YIELD_S)
        made._slices = slices.tried()
        return made

    @classmethod
    def stored(cls, files: Mapping[str, bytes]) -> Policy:
        """A bundle that was in force once, as it decided then: it was tried out when it was loaded."""
        return cls(bundles.made(files))

    @property
    def bundle(self) -> Bundle:
        """What it decides by."""
        return self._bundle

    @property
    def told(self) -> tuple[Rule, ...]:
        """Its rules, in the order in which deciding ones are told."""
        return tuple(self._rules)

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
    def agreements(self) -> Agreements:
        """What lets data cross from one jurisdiction into another."""
        return self._agreements

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
            barred = self._barred(request)
            if barred is not None:
                return barred
            facts = self._facts
            allowed, hits = self._index.evaluate(
                facts.principal(request.caller),
                request.action,
                facts.resource(request.resource),
                facts.context(request),
            )
            return self._agreed(request, self._granted(request, self._answer(request, allowed, hits)))
        except Exception as error:  # fail closed, whatever it is; its text may hold facts of the request
            rule = self._rules[error.rule].id if isinstance(error, RuleFailed) and error.rule >= 0 else ""
            kind = type(error.__cause__ or error).__name__
            log.error("decision failed", extra={"facts": {"error": kind, "rule": rule, "action": str(request.action)}})
            return self._denied("policy_denied", (), "POLICY-ERROR")

    def agrees(self, request: Request, decision: Decision) -> bool:
        """Whether Cedar itself, asked anew, comes to this decision. About 1 us a policy; holds the GIL."""
        return self._agrees(request, decision, self._oracle)

    def _agrees(self, request: Request, decision: Decision, oracle: Oracle) -> bool:
        try:
            if self._barred(request) is not None:
                return not decision.allowed
            self._facts.principal(request.caller)
            self._facts.resource(request.resource)
            self._facts.context(request)
        except (TypeError, ValueError):  # facts that Cedar is never asked about
            return not decision.allowed
        opinion = oracle.decide(request)
        if opinion.error:
            return not decision.allowed
        hits = tuple(sorted(self._numbers[name] for name in opinion.rules))
        granted = self._granted(request, self._answer(request, opinion.allowed, hits))
        return decision == self._agreed(request, granted)

    def decide_twice(self, request: Request) -> Decision:
        """Allow only what both engines allow: for a node whose engines once came to different decisions."""
        decision = self.decide(request)
        try:
            if not decision.allowed or self.agrees(request, decision):
                return decision
        except Exception as error:  # an oracle that fails has not allowed
            log.error("oracle failed", extra={"facts": {"error": type(error).__name__, "action": request.action}})
        return self._denied("policy_denied", (), "POLICY-ERROR")

    # ---- inside ------------------------------------------------------------------------------------------------

    def _barred(self, request: Request) -> Decision | None:
        """What typed code refuses before any policy is asked. Raises for an unknown action."""
        caller = request.caller
        if type(request.action) is not str or request.action not in self._bundle.groups:
            raise ValueError("unknown action")
        if caller.scopes is not None and request.action not in caller.scopes:
            return self._denied("policy_denied", (), "TOKEN-SCOPE")
        if caller.tenant is not None and self.registry.tenant(caller.tenant) is None:
            return self._denied("policy_denied", (), "DEFAULT")
        return None

    def _granted(self, request: Request, decision: Decision) -> Decision:
        """What no rule forbids and none permits, if a grant covers it: use of a key of the grantee's own tenant, no more."""
        if not request.grant or decision.allowed or (decision.rules, decision.rule_code) != ((), "DEFAULT"):
            return decision
        if type(request.grant) is not str:
            raise TypeError("a grant is not named by text")
        key, caller, action = request.resource, request.caller, self._bundle.actions[request.action]
        able = "use" in action.groups and caller.kind.capitalize() in action.principals
        if not able or type(key) is not KeyFacts or caller.tenant != key.tenant:
            return decision
        return Decision(True, "", (f"{GRANT}/{request.grant}",), "", self.digest)

    def _agreed(self, request: Request, decision: Decision) -> Decision:
        """What no policy forbids, if an agreement in force covers every border that data crosses; told as last rules."""
        if not decision.allowed or type(request.resource) is not KeyFacts:
            return decision
        crossed = self._agreements.crossings(request)
        if not crossed:
            return decision
        found = self._agreements.found(request, request.resource.tenant, crossed)
        many = len(found) > MOST  # what a record could not tell is not allowed
        lacking = tuple(f"{RULE}/{here}/{there}" for (here, there), agreement in found if many or agreement is None)
        if lacking:
            return self._denied(CODE, lacking[:8], RULE)
        told = tuple(f"{RULE}/{here}/{there}/{agreement.id}" for (here, there), agreement in found if agreement)
        return Decision(True, "", (*decision.rules[: 8 - len(told)], *told), "", self.digest, decision.obligations)

    def _answer(self, request: Request, allowed: bool, hits: tuple[int, ...]) -> Decision:
        """The decision that these rules make. A decision says nothing of its request, so equal ones are one object."""
        named = allowed, hits, request.reason == "unspecified"
        found = self._answers.get(named)
        if found is None:
            rules = [self._rules[n] for n in hits]
            found = self._allowed(rules) if allowed else self._refusal(rules, unspecified=named[2])
            if len(self._answers) < _KEPT:
                self._answers[named] = found
        return found

    def _allowed(self, rules: list[Rule]) -> Decision:
        names = tuple(r.id for r in rules[:8])
        obligations = frozenset[str]().union(*(r.obligations for r in rules))
        if obligations:  # nothing here meets one yet, and one that is not met denies
            return Decision(False, "policy_denied", names, "OBLIGATION-UNMET", self.digest, obligations)
        return Decision(True, "", names, "", self.digest)

    def _refusal(self, forbids: list[Rule], *, unspecified: bool) -> Decision:
        if not forbids:
            return self._denied("policy_denied", (), "DEFAULT")
        told = next((r for r in forbids if r.code == "SOV-TENANT"), forbids[0])
        code = _CODES.get(told.code, "policy_denied")
        if told.code == "SOV-REASON" and unspecified:
            code = "reason_required"
        ids = (told.id, *(r.id for r in forbids if r.id != told.id))[:8]
        return self._denied(code, ids, told.code if told.disclosed else "DENIED")

    def _denied(self, code: str, rules: tuple[str, ...], rule_code: str) -> Decision:
        return Decision(False, code, rules, rule_code, self.digest)

    def _try(self, case: Mapping[str, Any], slices: Slices) -> None:
        """One case of the bundle: what it expects must be what is decided, by both engines."""
        title = str(case.get("title", "?"))
        try:
            request = selftest.case(case, self.registry)
            expect = case["expect"]
        except (AttributeError, KeyError, TypeError, ValueError, UnknownPlace) as error:
            raise BundleRefused("cases", 0, f"case {title!r}: {type(error).__name__} {error}") from None
        decision = self.decide(request)
        if expect == "allow":
            good = decision.allowed
        else:
            good = not decision.allowed and (expect in decision.rules or expect == decision.rule_code)
        if not good:
            got = "allow" if decision.allowed else f"deny by {decision.rules or decision.rule_code}"
            raise BundleRefused("cases", 0, f"case {title!r}: expected {expect}, got {got}")
        if not self._agrees(request, decision, slices.of(request.resource)):
            raise BundleRefused("cases", 0, f"case {title!r}: Cedar itself decides otherwise")
