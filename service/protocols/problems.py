"""The native API's errors: RFC 9457 problems, one row per code of the error table.

`code` is the contract; `title` may be reworded. Nothing of a request ever stands in an answer: fields are named by JSON
pointer, values never. `executed` tells whether the operation took place; it is false wherever nothing was done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import keystore
import policy
from audit.chain import Bad
from audit.log import Unavailable
from audit.proofs import NotCovered
from audit.tree import Pruned
from service.approvals import ApprovalRefused
from service.decisions import BundleLost, FactsLost
from service.identity import Unidentified
from service.identity.hops import HopRefused
from service.limits import RateLimited
from service.outcome import (
    DENIED,
    FAILED,
    ApprovalClosed,
    HsmStateInvalid,
    PolicyByQuorum,
    PolicyStale,
    RequestInvalid,
    TierNotMet,
    Withheld,
    outcome_of,
)
from service.protocols.strict_json import Invalid, Malformed
from service.protocols.wire import moment
from service.rows import AppliedMoved
from service.turns import Overloaded


class PayloadTooLarge(Exception):
    """The body is larger than its route allows."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"more than {limit} bytes")
        self.limit = limit


class MethodNotAllowed(Exception):
    """The path exists, but not with this method."""

    def __init__(self, allowed: tuple[str, ...]) -> None:
        super().__init__("allowed: " + ", ".join(allowed))
        self.allowed = allowed


class DeletionIsScheduled(Exception):
    """DELETE of a key: there is no such thing; deletion is scheduled and can be cancelled."""


class UnsupportedMediaType(Exception):
    """The body is not JSON in UTF-8."""


class Disconnected(Exception):
    """The client left before its body was complete."""


class IdempotencyKeyMissing(Exception):
    """This operation needs an Idempotency-Key."""


class IdempotencyKeyReused(Exception):
    """The Idempotency-Key stands for another request."""


class IdempotencyInProgress(Exception):
    """The first request with this Idempotency-Key has not ended."""


# What only this protocol can find wrong; everything else has its code in `service.outcome`.
OWN: Final[dict[type[Exception], tuple[str, str]]] = {
    Malformed: (FAILED, "request_malformed"),
    Invalid: (FAILED, "validation_failed"),
    PayloadTooLarge: (FAILED, "payload_too_large"),
    MethodNotAllowed: (FAILED, "method_not_allowed"),
    DeletionIsScheduled: (FAILED, "deletion_is_scheduled"),
    UnsupportedMediaType: (FAILED, "unsupported_media_type"),
    Disconnected: (FAILED, "request_malformed"),
    IdempotencyKeyMissing: (FAILED, "idempotency_key_missing"),
    IdempotencyKeyReused: (FAILED, "idempotency_key_reused"),
    IdempotencyInProgress: (FAILED, "idempotency_in_progress"),
    Unidentified: (DENIED, "unauthenticated"),
    HopRefused: (DENIED, "region_conflict"),
}


def meaning(error: BaseException) -> tuple[str, str]:
    """(`out`, `code`) of an exception for the record and the answer."""
    return OWN.get(type(error)) or outcome_of(error)  # type: ignore[arg-type]  # `outcome_of` takes whatever was raised and knows an Exception


@dataclass(frozen=True, slots=True)
class Row:
    """How a code looks on the wire."""

    status: int
    title: str
    retryable: bool = False
    retry_after: int | None = None  # seconds


ERRORS: Final[dict[str, Row]] = {
    "request_malformed": Row(400, "The request is not well-formed"),
    "idempotency_key_missing": Row(400, "Idempotency-Key is required"),
    "page_token_invalid": Row(400, "The page token is not valid for this list"),
    "incorrect_key": Row(400, "The ciphertext belongs to another key"),
    "invalid_ciphertext": Row(400, "The ciphertext cannot be opened"),
    "unauthenticated": Row(401, "No valid credential"),
    "policy_denied": Row(403, "The policy does not allow this"),
    "region_not_allowed": Row(403, "The place of the caller, the node or the destination is not allowed for this key"),
    "region_conflict": Row(403, "Evidence about the caller's place disagrees"),
    "transfer_not_authorised": Row(403, "No agreement covers this transfer"),
    "reason_required": Row(403, "This key needs a reason"),
    "attestation_failed": Row(403, "The caller's attestation does not suffice"),
    "version_fenced": Row(403, "This key version is fenced or revoked"),
    "approval_required": Row(403, "Approvals are missing"),
    "not_found": Row(404, "Not found"),
    "key_destroyed": Row(410, "The key was destroyed"),
    "deletion_is_scheduled": Row(405, "Keys are deleted by schedule-deletion"),
    "method_not_allowed": Row(405, "Method not allowed"),
    "unsupported_media_type": Row(415, "Send application/json in UTF-8"),
    "key_state_invalid": Row(409, "The key's state does not allow this"),
    "hsm_state_invalid": Row(409, "The state of the HSMs does not allow this"),
    "alias_in_use": Row(409, "The alias is in use"),
    "policy_would_lock_out": Row(409, "The policy would lock everyone out"),
    "policy_stale": Row(409, "The draft is not for the bundle in force"),
    "policy_by_quorum": Row(409, "The policy is changed by a quorum"),
    "bundle_lost": Row(409, "The bundle that the record names is not at hand"),
    "facts_lost": Row(409, "The decision cannot be made again"),
    "tier_not_met": Row(409, "The key does not meet its tier"),
    "idempotency_in_progress": Row(409, "The first request with this key is still running", True, 1),
    "etag_mismatch": Row(412, "The key changed; read it again"),
    "if_match_required": Row(428, "If-Match is required"),
    "payload_too_large": Row(413, "The body is too large"),
    "validation_failed": Row(422, "A field is not valid"),
    "key_usage_invalid": Row(422, "The key is not for this use"),
    "algorithm_not_supported_by_hsm": Row(422, "The HSM of this region cannot hold or use such a key"),
    "idempotency_key_reused": Row(422, "This Idempotency-Key belongs to another request"),
    "frozen": Row(423, "Frozen"),
    "freeze_lifted": Row(409, "The freeze is not in force"),
    "approval_refused": Row(403, "The approval does not count"),
    "authenticator_cloned": Row(403, "The authenticator's counter did not rise, so the approval does not count"),
    "approval_closed": Row(409, "The request for approval is closed"),
    "rate_limited": Row(429, "Too many requests", True, 1),
    "quota_exceeded": Row(429, "The quota is used up", True, 60),
    "internal": Row(500, "Internal error"),
    "hsm_error": Row(502, "The HSM answered with an error", True, 1),
    "hsm_timeout": Row(504, "The HSM did not answer in time", True, 1),
    "hsm_unavailable": Row(503, "The HSM is not available", True, 1),
    "audit_unavailable": Row(503, "The audit log cannot be written", True, 2),
    "database_unavailable": Row(503, "The database cannot be asked", True, 1),
    "audit_damaged": Row(500, "The stored audit log does not verify: call the operator"),
    "record_archived": Row(410, "These records are in the archive alone"),
    "checkpoint_pending": Row(503, "No checkpoint covers this yet", True, 1),
    "freeze_unconfirmed": Row(503, "The freeze state is not confirmed", True, 1),
    "overloaded": Row(503, "Too many requests at once; nothing was done", True, 1),
    "draining": Row(503, "This node is shutting down", True, 1),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """An answer that is an error: status, body, and what stands in its headers."""

    status: int
    body: dict[str, Any]
    headers: tuple[tuple[str, str], ...] = ()


def problem(
    code: str,
    *,
    request_id: str,
    decision_id: str | None = None,
    executed: bool = False,
    again: bool = True,
    retry_after: int | None = None,
    headers: tuple[tuple[str, str], ...] = (),
    **extra: object,
) -> Problem:
    """The problem of a code; `retry_after` (seconds) where the error knows better than its row.

    Unless `again`, it is not to be retried, whatever its row says.
    """
    row = ERRORS[code]
    retryable = row.retryable and again
    body: dict[str, Any] = {
        "type": f"urn:skms:problem:{code}",
        "title": row.title,
        "status": row.status,
        "code": code,
        "retryable": retryable,
        "executed": executed,
        "request_id": request_id,
    }
    if decision_id is not None:
        body["decision_id"] = decision_id
    body |= {k: v for k, v in extra.items() if v is not None}
    told = list(headers)
    wait = row.retry_after if retry_after is None else retry_after
    if retryable and wait is not None:
        told.append(("retry-after", str(wait)))
    if code == "unauthenticated":
        told.append(("www-authenticate", 'Bearer realm="skms"'))
    return Problem(row.status, body, tuple(told))


def problem_of(
    error: BaseException, *, request_id: str, decision_id: str | None = None, executed: bool = False
) -> Problem:
    """The problem of an exception; one that nobody expected says nothing but `internal`.

    `executed` says that the operation took place before it: then nobody is told to ask again.
    """
    _, code = meaning(error)
    extra: dict[str, object] = {}
    done, wait = executed, None
    told: tuple[tuple[str, str], ...] = ()
    match error:
        case policy.Denied():
            extra = _decided(error.decision)
            if code == "not_found":
                extra = {}  # the same answer as for a key that does not exist
        case keystore.WrongState() | Withheld():
            extra = {"state": error.state}
        case TierNotMet():
            extra = {"missing": error.missing}
        case RequestInvalid():
            extra = {"errors": [{"pointer": p, "code": c, "detail": d} for p, c, d in error.errors]}
        case Invalid():
            extra = {"errors": error.errors}
        case PayloadTooLarge():
            extra = {"limit": error.limit}
        case keystore.InputRefused():
            extra = {"errors": [{"pointer": error.pointer, "code": error.code, "detail": error.detail}]}
        case policy.BundleRefused():
            extra = {
                "errors": [{"pointer": "", "code": "bundle_refused", "detail": error.reason}],
                "file": error.file,
                "line": error.line,
            }
        case policy.LockedOut():
            extra = {"detail": str(error), "names": error.names}
        case PolicyStale() | AppliedMoved() | PolicyByQuorum():
            extra = {"detail": str(error)}
        case policy.Frozen():
            extra = {"freeze_id": error.freeze.id, "since": moment(error.freeze.at)}
        case policy.FreezeUnconfirmed() | policy.FreezeGone() | ApprovalRefused() | ApprovalClosed():
            extra = {"detail": str(error)}
        case HopRefused():
            extra = {"detail": str(error)}
        case BundleLost() | FactsLost() | NotCovered() | Pruned():
            extra = {"detail": str(error)}
        case Bad():
            extra = {"detail": f"{error.code} {error.where}"}
        case keystore.UnsupportedByHsm() | keystore.GroupWouldBeEmpty() | HsmStateInvalid():
            extra = {"detail": str(error)}
        case keystore.HsmFault():
            extra = {"ckr": error.ckr}
        case keystore.HsmUnavailable():
            extra, executed, wait = {"ckr": error.ckr or None}, done or error.executed, error.retry_after
        case RateLimited() | Overloaded():
            wait, told = error.retry_after, error.told
        case Unavailable():
            executed = done or error.executed
        case _:
            pass
    return problem(
        code,
        request_id=request_id,
        decision_id=decision_id,
        executed=executed,
        again=not done,
        retry_after=wait,
        headers=told,
        **extra,
    )


def _decided(decision: policy.Decision) -> dict[str, object]:
    return {"rule": decision.rule_code or "DEFAULT", "policy": decision.digest[:12]}
