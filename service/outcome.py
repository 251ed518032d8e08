"""What an exception means for the caller: one code per exception, in the words of the API's error table.

The code stands in the audit record (`why`) and in the answer of every protocol; each protocol adds its own wire shape.
An exception without a row is `internal`: it says nothing to the caller and everything to the log.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy.exc

import audit.chain
import audit.log
import audit.proofs
import audit.tree
import keystore
import policy
from policy.signed import RowsDamaged
from service.approvals import ApprovalRefused, AuthenticatorCloned
from service.database import DatabaseUnavailable
from service.decisions import BundleLost, FactsLost
from service.limits import RateLimited
from service.rows import AppliedDamaged, AppliedMoved, ApprovalDamaged, NoSuchToken
from service.turns import Overloaded


class NotFound(Exception):
    """No such thing for this caller; a foreign one gives the same answer as none."""


class RequestInvalid(Exception):
    """A field of a well-formed request cannot be accepted. `errors` are (JSON pointer, code, detail), never values."""

    def __init__(self, *errors: tuple[str, str, str]) -> None:
        super().__init__(", ".join(f"{pointer}: {code}" for pointer, code, _ in errors))
        self.errors = errors


class IncorrectKey(Exception):
    """The ciphertext belongs to another key than `expect_key` names."""


class EtagMismatch(Exception):
    """The key changed since the caller read it."""


class EtagMissing(Exception):
    """A change of a key needs `If-Match`."""


class HsmStateInvalid(Exception):
    """The state of the HSMs, or of a drill with them, does not allow this; the message says which and what to do."""


class TierNotMet(Exception):
    """The key does not meet its tier, or would not; `missing` names each unmet condition."""

    def __init__(self, missing: list[str]) -> None:
        super().__init__("tier not met: " + ", ".join(missing))
        self.missing = missing


class Draining(Exception):
    """The node is shutting down and takes no new work."""


class Withheld(Exception):
    """The key or a rule changed while the operation ran: the result was wiped and is not released."""

    def __init__(self, state: str) -> None:
        super().__init__(state)
        self.state = state


class ApprovalClosed(Exception):
    """The request was executed or cancelled, or its time is over."""


class PolicyStale(Exception):
    """The draft was made for another bundle than the one in force, or another one was applied first."""


class PolicyByQuorum(Exception):
    """The bundle in force was applied by a quorum: no directory takes its place."""


class PageTokenInvalid(Exception):
    """The page token is not one of ours, or belongs to another tenant or filter."""


DENIED: Final = "denied"  # identity, policy or state said no
FAILED: Final = "failed"  # the caller's input is wrong
ERROR: Final = "error"  # our side could not do it

OUTCOMES: Final[dict[type[BaseException], tuple[str, str]]] = {
    keystore.KeyNotFound: (DENIED, "not_found"),
    NotFound: (DENIED, "not_found"),
    NoSuchToken: (DENIED, "not_found"),
    keystore.KeyDestroyed: (DENIED, "key_destroyed"),
    keystore.WrongState: (DENIED, "key_state_invalid"),
    Withheld: (DENIED, "key_state_invalid"),
    keystore.VersionFenced: (DENIED, "version_fenced"),
    keystore.StaleKey: (FAILED, "etag_mismatch"),
    EtagMismatch: (FAILED, "etag_mismatch"),
    EtagMissing: (FAILED, "if_match_required"),
    keystore.AliasInUse: (FAILED, "alias_in_use"),
    keystore.InvalidCiphertext: (FAILED, "invalid_ciphertext"),
    IncorrectKey: (FAILED, "incorrect_key"),
    keystore.ContextRefused: (FAILED, "validation_failed"),
    keystore.InputRefused: (FAILED, "validation_failed"),
    RequestInvalid: (FAILED, "validation_failed"),
    keystore.UsageMismatch: (FAILED, "key_usage_invalid"),
    keystore.NoSuchHsm: (DENIED, "not_found"),
    keystore.GroupWouldBeEmpty: (DENIED, "hsm_state_invalid"),
    HsmStateInvalid: (DENIED, "hsm_state_invalid"),
    keystore.UnsupportedByHsm: (FAILED, "algorithm_not_supported_by_hsm"),
    PageTokenInvalid: (FAILED, "page_token_invalid"),
    TierNotMet: (DENIED, "tier_not_met"),
    policy.BundleRefused: (FAILED, "validation_failed"),
    policy.LockedOut: (FAILED, "policy_would_lock_out"),
    PolicyStale: (FAILED, "policy_stale"),
    AppliedMoved: (FAILED, "policy_stale"),
    AppliedDamaged: (ERROR, "internal"),
    RowsDamaged: (ERROR, "internal"),
    PolicyByQuorum: (FAILED, "policy_by_quorum"),
    policy.Frozen: (DENIED, "frozen"),
    policy.FreezeUnconfirmed: (ERROR, "freeze_unconfirmed"),
    policy.FreezeGone: (FAILED, "freeze_lifted"),
    ApprovalRefused: (DENIED, "approval_refused"),
    AuthenticatorCloned: (DENIED, "authenticator_cloned"),
    ApprovalClosed: (FAILED, "approval_closed"),
    ApprovalDamaged: (ERROR, "internal"),
    policy.UnknownPlace: (FAILED, "validation_failed"),
    keystore.HsmTimeout: (ERROR, "hsm_timeout"),
    keystore.HsmUnavailable: (ERROR, "hsm_unavailable"),
    keystore.HsmEmpty: (ERROR, "hsm_unavailable"),
    keystore.HsmFault: (ERROR, "hsm_error"),
    keystore.RowDamaged: (ERROR, "internal"),
    keystore.SelfTestFailed: (ERROR, "hsm_unavailable"),
    keystore.KeyLimitReached: (DENIED, "quota_exceeded"),
    RateLimited: (DENIED, "rate_limited"),
    Overloaded: (ERROR, "overloaded"),
    Draining: (ERROR, "draining"),
    BundleLost: (FAILED, "bundle_lost"),
    FactsLost: (FAILED, "facts_lost"),
    audit.proofs.NotCovered: (ERROR, "checkpoint_pending"),
    audit.tree.Pruned: (FAILED, "record_archived"),
    audit.chain.Bad: (ERROR, "audit_damaged"),
    DatabaseUnavailable: (ERROR, "database_unavailable"),
    sqlalchemy.exc.OperationalError: (ERROR, "database_unavailable"),
    sqlalchemy.exc.TimeoutError: (ERROR, "database_unavailable"),  # all its connections are in use
    audit.log.Unavailable: (ERROR, "audit_unavailable"),
    audit.log.Fenced: (ERROR, "audit_unavailable"),
}


def outcome_of(error: BaseException) -> tuple[str, str]:
    """(`out`, `code`) of an exception, by its nearest class; ("error", "internal") for one nobody expected."""
    if isinstance(error, policy.Denied):
        return DENIED, error.decision.code
    if isinstance(error, audit.log.ChangeFailed) and error.__cause__ is not None:
        return outcome_of(error.__cause__)
    if isinstance(error, sqlalchemy.exc.DBAPIError) and error.connection_invalidated:
        return OUTCOMES[DatabaseUnavailable]
    for kind in type(error).__mro__:
        if kind in OUTCOMES:
            return OUTCOMES[kind]
    return ERROR, "internal"
