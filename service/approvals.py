"""Approvals: signatures of officers over the digest of one exact request, by keys that are on no node.

Each officer holds a key, in a file or on a card; the configuration names the public halves. What is approved is a digest, so
an approval counts for that request alone; how long it counts is said by the request. A request that the service itself
executes is an `Asked`; that of `skms audit recover` is made and executed by a command, and approved in the same way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from policy.signing import ED25519, PersonKey, identity, verifies
from service.keyfiles import KeyFileRefused, Sign, by_file, public_key
from service.webauthn import AssertionRefused, Credential, verify

_FIELDS: Final = {"approver", "digest", "kind", "signature"}
_ASKED: Final = b"skms/approval/v1\0"


class ApprovalRefused(Exception):
    """An approval, a key or the number of approvals does not do; the message says which and why."""


class AuthenticatorCloned(ApprovalRefused):
    """An authenticator's counter did not rise: there may be two of it, and who holds the other one is not known."""


@dataclass(frozen=True, slots=True)
class Approver:
    """An officer who may approve."""

    name: str
    key: PersonKey
    identities: tuple[str, ...] = ()  # as which the service knows the same person: whoever asks does not approve
    tenants: tuple[str, ...] = ()  # whose requests; empty: everybody's
    groups: tuple[str, ...] = ()  # such as nation:DE: which places of a rule the officer can fill
    credential: Credential | None = None  # approves by WebAuthn, and in no other way

    def same_as(self, other: Approver) -> bool:
        """Whether the enrolments themselves say that both are one person: by name, key, credential or identity."""
        one, another = self.credential, other.credential
        return (
            self.name == other.name
            or identity(self.key) == identity(other.key)
            or (one is not None and another is not None and one.id == another.id)
            or not set(self.identities).isdisjoint(other.identities)
        )


@dataclass(frozen=True, slots=True)
class GroupRule:
    """Places that approvers fill, beside the number that it takes: each names a group, and takes another person.

    Without `kinds` it is about requests of every kind, without `tenants` about everybody's and the installation's.
    """

    places: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    tenants: tuple[str, ...] = ()

    def concerns(self, kind: str, tenant: str | None) -> bool:
        """Whether it is about such a request."""
        return (not self.kinds or kind in self.kinds) and (not self.tenants or tenant in self.tenants)

    def unfilled(self, officers: Sequence[Approver]) -> tuple[str, ...]:
        """The places that these officers, all different persons, leave open however they are seated."""
        seats: dict[int, int] = {}  # officer -> place

        def seated(place: int, tried: set[int]) -> bool:
            for number, officer in enumerate(officers):
                if self.places[place] in officer.groups and number not in tried:
                    tried.add(number)
                    if number not in seats or seated(seats[number], tried):
                        seats[number] = place
                        return True
            return False

        return tuple(name for place, name in enumerate(self.places) if not seated(place, set()))


@dataclass(frozen=True, slots=True)
class Asked:
    """Exactly what the service shall execute once, and until when (us). `tenant` None: it concerns the installation."""

    id: str
    installation: str
    kind: str
    tenant: str | None
    parameters: Mapping[str, object]
    requester: str
    created: int
    expires: int

    def to_json(self) -> str:
        """Its canonical text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def of(cls, text: str) -> Asked:
        """The request that a text spells; ApprovalRefused if it is none."""
        try:
            asked = cls(**json.loads(text))
            numbers = type(asked.created) is type(asked.expires) is int
            texts = all(type(t) is str for t in (asked.id, asked.installation, asked.kind, asked.requester))
            if not (numbers and texts and type(asked.parameters) is dict and type(asked.tenant) in {str, type(None)}):
                raise ValueError
        except (ValueError, TypeError, RecursionError):
            raise ApprovalRefused("not a request that can be approved") from None
        return asked

    def digest(self) -> str:
        """What approvers sign: hex SHA-256 over all of it."""
        return hashlib.sha256(_ASKED + self.to_json().encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Approval:
    """An officer's signature over the digest (hex) of a request of some kind."""

    approver: str
    kind: str
    digest: str
    signature: bytes

    def to_json(self) -> str:
        """As it is handed over."""
        plain = {"approver": self.approver, "digest": self.digest, "kind": self.kind, "signature": self.signature.hex()}
        return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def revocation(kind: str) -> str:
    """The kind of what an officer signs who takes an approval of a request of some kind back."""
    return f"revoke-{kind}"


def statement(kind: str, digest: str) -> bytes:
    """What an officer signs."""
    return f"skms-approval/v1\n{kind}\n{digest}\n".encode()


def challenge(kind: str, digest: str) -> bytes:
    """What an officer's WebAuthn credential signs: a request's digest itself; SHA-256 of the statement of a revocation."""
    if kind.startswith(revocation("")):
        return hashlib.sha256(statement(kind, digest)).digest()
    return bytes.fromhex(digest)


def approve(kind: str, digest: str, *, name: str, key_file: Path, password: bytes | None = None) -> Approval:
    """Sign with an officer's private key (PEM); ApprovalRefused if the file holds no Ed25519 key."""
    return approve_by(by_file(key_file, password), kind, digest, name=name)


def approve_by(sign: Sign, kind: str, digest: str, *, name: str) -> Approval:
    """Sign with whatever an officer signs with; ApprovalRefused if that does not sign."""
    try:
        return Approval(name, kind, digest, sign(statement(kind, digest)))
    except KeyFileRefused as error:
        raise ApprovalRefused(str(error)) from None


def load_approval(path: Path) -> Approval:
    """The approval in a file; ApprovalRefused if it holds none."""
    try:
        plain = json.loads(path.read_text())
        if not isinstance(plain, dict) or set(plain) != _FIELDS or not all(type(v) is str for v in plain.values()):
            raise ValueError
        signature = bytes.fromhex(plain["signature"])
    except OSError as error:
        raise ApprovalRefused(f"approval {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ApprovalRefused(f"approval {path}: not an approval of `skms audit approve`") from None
    return Approval(plain["approver"], plain["kind"], plain["digest"], signature)


def load_approver(
    name: str,
    path: Path,
    *,
    algorithm: str = ED25519,
    identities: tuple[str, ...] = (),
    tenants: tuple[str, ...] = (),
    groups: tuple[str, ...] = (),
    credential: Credential | None = None,
) -> Approver:
    """An officer by the public key (PEM) that the configuration names; ApprovalRefused if it is of another algorithm."""
    try:
        return Approver(name, public_key(path, algorithm), identities, tenants, groups, credential)
    except KeyFileRefused as error:
        raise ApprovalRefused(f"approver {name}, {error}") from None


def check(approval: Approval, approvers: Sequence[Approver], *, kind: str, digest: str) -> Approver:
    """Who gave an approval of this request; ApprovalRefused if nobody who may, or not of this request."""
    known = next((a for a in approvers if a.name == approval.approver), None)
    if known is None:
        raise ApprovalRefused(f"{approval.approver!r} is no approver of this installation: see [[approvals.approver]]")
    if (approval.kind, approval.digest) != (kind, digest):
        raise ApprovalRefused(f"the approval of {approval.approver} is of another request ({approval.digest[:16]}…)")
    if known.credential is not None:
        try:
            verify(approval.signature, known.credential, known.key, challenge(kind, digest))
        except AssertionRefused as error:
            raise ApprovalRefused(f"the assertion of {approval.approver}: {error}") from None
    elif not verifies(known.key, approval.signature, statement(kind, digest)):
        raise ApprovalRefused(f"the signature of {approval.approver} is false")
    return known


def quorum(
    given: Sequence[Approval],
    approvers: Sequence[Approver],
    *,
    kind: str,
    digest: str,
    needed: int,
    rules: Sequence[GroupRule] = (),
) -> tuple[Approval, ...]:
    """The approvals, if each is right and enough different officers gave them; ApprovalRefused otherwise.

    One key or identity under two names is one officer. The request is the installation's.
    """
    officers: list[Approver] = []
    for approval in given:
        officer = check(approval, approvers, kind=kind, digest=digest)
        if same := next((other for other in officers if officer.same_as(other)), None):
            raise ApprovalRefused(f"{same.name} and {approval.approver} are one officer: each counts once")
        officers.append(officer)
    if len(officers) < needed:
        raise ApprovalRefused(f"{len(officers)} of {needed} approvals: different officers must approve this request")
    if lacking := [name for r in rules if r.concerns(kind, None) for name in r.unfilled(officers)]:
        raise ApprovalRefused(f"an officer of {lacking[0]} must approve this request: see [[approvals.rule]]")
    return tuple(given)
