"""Every operation of the service, without HTTP. Start reading here.

Each operation takes the same way: who and where the caller is stands in the `Ask`; `_permitted` finds the key in the
caller's tenant, checks its state and asks the policy; the keystore acts in the HSM of the key's own region; `_recorded`
commits the audit record, looks once more whether the key still may be used, and only then lets the answer out.
Changes of keys and rules (`_control`) write a durable intent before they act; their outcome commits in one transaction
with the change itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol, TypeVar

from sqlalchemy import Connection

import policy
import policy.lockout
from audit import event
from audit.chain import Receipt
from audit.log import Change, ChangeFailed, Log
from audit.proofs import Bundle, Prover
from audit.search import Search
from audit.witness import Answer, Witness
from keystore import (
    Admin,
    Envelope,
    Fleet,
    Import,
    Imports,
    InvalidCiphertext,
    Key,
    KeyNotFound,
    KeySpec,
    KeyState,
    Keystore,
    ListFilter,
    MemberStatus,
    NewKey,
    Parameters,
    Plan,
    Purpose,
    RowDamaged,
    Sealed,
    Wrapping,
    check_use,
)
from keystore.envelope import MAX_PAIRS
from policy import (
    DIRECT,
    Caller,
    Decision,
    Freezes,
    FreezeUnconfirmed,
    Frozen,
    Hops,
    InForce,
    InstallationFacts,
    KeyFacts,
    Policy,
    Resource,
    TenantFacts,
    Touched,
)
from policy import exceptions as waivers
from policy.exceptions import Exceptions, Waiver
from policy.explain import Explanation
from policy.freeze import PASSING
from policy.grants import RULE as GRANT
from policy.grants import Grant, Grants
from policy.graph import root
from policy.rows import FreezeRowsDamaged, GrantSpent, GrantUses
from policy.signed import RowsDamaged
from policy.transfers import CODE, RULE, Agreement, crosses
from policy.written import Digests
from service.admission import Admission, Refusals
from service.compliance import Bars, Compliance, Report
from service.decisions import BundleLost, Decisions, Replay
from service.ids import uuid4
from service.keysathand import KeysAtHand
from service.limits import RateLimits
from service.outcome import (
    DENIED,
    ERROR,
    FAILED,
    ApprovalClosed,
    Draining,
    EtagMismatch,
    IncorrectKey,
    NotFound,
    PolicyByQuorum,
    RequestInvalid,
    TierNotMet,
    outcome_of,
)
from service.rows import ApiToken, ApiTokens, AppliedDamaged, AppliedRows, NewToken, Settings
from service.shadow import Shadow
from service.tracing import Traced, stage
from service.transfers import Transfers, report
from service.work import (
    Checked,
    Ciphertext,
    DataKey,
    Decrypt,
    Encrypt,
    Mac,
    MakeDataKey,
    Open,
    Plaintext,
    Rewrap,
    Rewrapped,
    Sign,
    Signature,
    Unwrap,
    Use,
    Verify,
    VerifyMac,
    Work,
)

alarm: Final = logging.getLogger("skms.alarm")
T = TypeVar("T")
W = TypeVar("W", bound=Work)
Direction = Literal["protect", "process"]

# What an action does with key material: K12 and the keystore's own check.
_DIRECTION: Final[Mapping[str, Direction]] = {
    "encrypt": "protect",
    "generateDataKey": "protect",
    "sign": "protect",
    "mac": "protect",
    "decrypt": "process",
    "unwrap": "process",
    "verify": "process",
    "verifyMac": "process",
    "rewrap": "process",
    "reEncrypt": "process",
}
_BRINGING: Final = frozenset({"importKey"})  # material into an HSM: as a creation, only where the tier is met
POLICY_SETTING: Final = "policy-digest"
_LIVE: Final = ("pending_import", "enabled", "disabled", "deactivated", "compromised", "pending_deletion")
_BY_QUORUM: Final = (
    "the bundle in force was applied by a quorum, and a directory does not take its place: apply the new one"
)
NO_USE: Final = Use()
NO_FACTS: Final[Mapping[str, Any]] = MappingProxyType({})
APPROVAL_REQUIRED: Final = "approval_required"  # the code of a denial that more approvals may turn
MOST_APPROVALS: Final = 16  # as many as a configuration may ask for
# What a witness answers, for the record: (`out`, `why`) by status of C2SP tlog-witness.
_WITNESS_REFUSALS: Final = {
    400: (FAILED, "request_malformed"),
    403: (DENIED, "signature_untrusted"),
    404: (DENIED, "not_found"),
    409: (FAILED, "size_conflict"),
    422: (FAILED, "proof_invalid"),
    503: (ERROR, "witness_busy"),
}
# Requests of unknown callers recorded one by one, a second and source; of all sources, four times that.
UNKNOWN: Final = 50
_TOO_MANY: Final = frozenset({"rate_limited", "overloaded"})  # refusals that cost less than what they refuse
# Signatures that take SoftHSM 0.9 to 6 ms; P-256 takes 0.1.
_HEAVY: Final = frozenset({KeySpec.EC_P384, KeySpec.RSA_3072, KeySpec.RSA_4096})
_RELEASES: Final = frozenset({"decrypt", "unwrap", "reEncrypt"})


class WouldAllow(Exception):
    """A dry run came to its end: the operation would be allowed; nothing was done."""

    def __init__(self, decision: Decision) -> None:
        super().__init__("dry run")
        self.decision = decision


class Sealer(Protocol):
    """What seals and opens envelopes: the keystore, or one batch of it that shares a derivation per key and salt."""

    def seal(
        self, key: Key, plaintext: bytes, context: Mapping[str, str], *, purpose: Purpose, version: int | None
    ) -> Sealed: ...

    def open(self, key: Key, envelope: Envelope, context: Mapping[str, str], *, purpose: Purpose) -> bytes: ...


class Hsms(Protocol):
    """How `Kms` runs a call that may reach an HSM (`service.hsmcalls`)."""

    async def run(
        self, region: str, call: Callable[[], T], *, who: str = "", slow: bool = False, heavy: bool = False
    ) -> T: ...


@dataclass(slots=True)
class Ask:
    """One request as its protocol understood it, and what `Kms` tells back about it beside the answer."""

    caller: Caller
    request_id: str
    arrived: int  # microseconds
    client_request_id: str | None = None
    trace: str | None = None  # its id (W3C Trace Context)
    traced: Traced | None = None  # its span, if there is one
    dry_run: bool = False
    reason: str | None = None  # of a control-plane request
    if_match: int | None = None
    remember: Callable[[Connection, Any], None] | None = None  # stores an idempotent answer with the change
    receipt: Receipt | None = None
    executed: bool = False  # a change is committed, whatever comes after it
    counted: bool = False  # refused, and counted instead of recorded: see `Refusals`
    decision_id: str | None = None
    decision: Decision | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # of the last record, for the request log and metrics
    hops: Hops = DIRECT  # the forwarders it came through


class _Entry:
    """The record of one operation in the making."""

    __slots__ = (
        "ask",
        "beside",
        "context",
        "decision",
        "facts",
        "grants",
        "id",
        "key",
        "memo",
        "op",
        "refused",
        "touched",
        "use",
        "version",
        "waivers",
        "wanted",
    )

    def __init__(self, ask: Ask, op: str, *, use: Use = NO_USE, **facts: object) -> None:
        self.ask, self.op, self.use, self.id = ask, op, use, uuid4()
        self.facts: dict[str, Any] = {k: v for k, v in facts.items() if v is not None}
        self.context: Mapping[str, str] | None = None
        self.decision: Decision | None = None
        self.memo: _Memo | None = None
        self.refused: tuple[str, str] | None = None  # (out, why) of a request refused before it reached `Kms`
        self.key: Key | None = None
        self.beside: Key | None = None  # another one that the result is made under
        self.version: int | None = None
        self.wanted: Direction | None = None
        self.touched: tuple[Touched, ...] = ()  # what a freeze may stop
        self.grants: tuple[Grant, ...] = ()  # those that allowed it
        self.waivers: tuple[Waiver, ...] = ()  # the exceptions it needed

    @classmethod
    def of(cls, ask: Ask, work: Work, **facts: object) -> _Entry:
        entry = cls(ask, work.op, use=work.use, in_len=work.size, **facts)
        entry.context = work.context
        return entry

    def uses(self) -> Iterator[tuple[Key, int | None, Direction]]:
        """The keys that the result comes of: which version (the latest), and in which direction."""
        if self.key is not None and self.wanted is not None:
            yield self.key, self.version, self.wanted
        if self.beside is not None:
            yield self.beside, None, "protect"

    def used(self, version: int, *, alg: str | None = None, out_len: int | None = None) -> None:
        """Note what the HSM did."""
        self.version = version
        self.facts["kver"] = version
        if alg is not None:
            self.facts["alg"] = alg
        if out_len is not None:
            self.facts["out_len"] = out_len


@dataclass(frozen=True, slots=True)
class _Permit:
    """What let an item of a batch be done with a key, for the next one that asks the same about the same row.

    Another row, freeze or policy since then, and it is asked anew. What comes later withholds the answer, as with each.
    """

    key: Key
    freezes: InForce
    policy: Policy
    decision: Decision
    wanted: Direction | None
    version: int | None
    touched: tuple[Touched, ...]
    facts: Mapping[str, Any]


@dataclass(slots=True)
class _Memo:
    """What was decided within one batch."""

    decisions: dict[policy.Request, Decision] = field(default_factory=dict)
    permits: dict[tuple[str, int, int | None, Use], _Permit] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unusable:
    """A batch item that its protocol refused: the code for its record, the error for its answer."""

    why: str
    error: Exception


@dataclass(frozen=True, slots=True)
class ItemResult:
    """What came of one item: a value or the error that stopped it, and its own receipt."""

    value: Any
    error: Exception | None
    receipt: Receipt
    decision_id: str
    decision: Decision | None


def request_hash(op: str, parameters: Mapping[str, object]) -> str:
    """SHA-256 of the canonical control-plane request: what an intent or an approval refers to."""
    text = json.dumps({"op": op, "parameters": parameters}, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Kms:
    """The key service of one node and worker. All methods are safe to call from one event loop."""

    def __init__(
        self,
        *,
        node: str,
        region: str,
        keystore: Keystore,
        imports: Imports,
        policy_now: Policy,
        load_policy: Callable[[Policy | None], Policy],  # the argument is the policy it must succeed
        log: Log,
        prover: Prover,
        search: Search,
        tokens: ApiTokens,
        hsms: Hsms,
        fleet: Fleet,
        clock: Callable[[], int],
        shadow: Shadow,
        freezes: Freezes,
        decisions: Decisions,
        bars: Bars,
        applied: AppliedRows,
        exceptions: Exceptions,
        grants: Grants,
        grant_uses: GrantUses,
        rates: RateLimits,
        witness: Witness | None = None,
    ) -> None:
        self.node, self.region, self._here = node, region, frozenset({region})
        self.keystore, self.imports, self.log, self.search = keystore, imports, log, search
        self.tokens, self.fleet, self.prover = tokens, fleet, prover
        self.policy, self.shadow, self.freezes = policy_now, shadow, freezes
        self._load_policy, self._hsms, self._clock = load_policy, hsms, clock
        self._witness, self._strangers, self._refusals = witness, Admission(), Refusals(clock=clock)
        self._unknown = Refusals(clock=clock, rate=UNKNOWN, burst=4 * UNKNOWN, together=4.0 * UNKNOWN)
        self.decisions, self.applied, self.bars = decisions, applied, bars
        self.exceptions, self.grants, self._grant_uses = exceptions, grants, grant_uses
        self.rates = rates
        self.compliance = Compliance(keystore, bars, clock=clock)
        self._in_step: str | None = None  # the applied bundle that this worker has, by the digest it was applied with
        self._told_active = policy_now.digest
        self._digests = Digests()
        self.at_hand = KeysAtHand(keystore)
        self.draining = False
        self.damaged_rows = 0  # uses of rows that somebody changed behind the service's back
        self.hsm_changes_allowed: Callable[[str], None] = lambda _: None  # raises while a drill has the HSM
        self._not_found: str | None = None
        self._secrets: dict[str, tuple[int, bytes]] = {}

    # ---- data plane -------------------------------------------------------------------------------------------

    async def encrypt(self, ask: Ask, work: Encrypt) -> Ciphertext:
        """Encrypt at most 65,536 bytes under a key, bound to the context."""
        return await self._do(ask, work, self._encrypt)

    async def decrypt(self, ask: Ask, work: Decrypt) -> Plaintext:
        """Open an envelope; every way in which it can be wrong is one InvalidCiphertext."""
        return await self._do(ask, work, self._open)

    async def unwrap_data_key(self, ask: Ask, work: Unwrap) -> Plaintext:
        """Open a wrapped data key. Decrypt refuses these, and this refuses ordinary ciphertexts."""
        return await self._do(ask, work, self._open)

    async def rewrap(self, ask: Ask, work: Rewrap) -> Rewrapped:
        """Move a ciphertext to the newest version, another key or another context; the plaintext stays inside."""
        return await self._do(ask, work, self._rewrap)

    async def data_key(self, ask: Ask, work: MakeDataKey) -> DataKey:
        """Make a data key of 16 to 64 bytes, wrapped, and in clear only if asked for."""
        return await self._do(ask, work, self._data_key)

    async def sign(self, ask: Ask, work: Sign) -> Signature:
        """Sign a message or a digest of exactly the algorithm's length."""
        return await self._do(ask, work, self._sign)

    async def verify(self, ask: Ask, work: Verify) -> Checked:
        """Tell whether a signature is right; a wrong one is an answer, not an error."""
        return await self._do(ask, work, self._verify)

    async def mac(self, ask: Ask, work: Mac) -> Signature:
        """HMAC of a message of at most 65,536 bytes."""
        return await self._do(ask, work, self._mac)

    async def verify_mac(self, ask: Ask, work: VerifyMac) -> Checked:
        """Tell whether an HMAC is right, in time that does not depend on where it differs."""
        return await self._do(ask, work, self._verify_mac)

    async def batch(self, ask: Ask, op: str, items: Sequence[Work | Unusable]) -> tuple[str, list[ItemResult]]:
        """Do up to 500 items: each is decided, done and recorded by itself; a bad one harms no other.

        An item that its protocol could not use is recorded and answered like the rest.
        """
        self._accepting(op)
        acts: dict[type[Work], Callable[[_Entry, Sealer, Any], Awaitable[Any]]] = {
            Encrypt: self._encrypt,
            Decrypt: self._open,
            Unwrap: self._open,
            Rewrap: self._rewrap,
            MakeDataKey: self._data_key,
            Sign: self._sign,
            Verify: self._verify,
            Mac: self._mac,
            VerifyMac: self._verify_mac,
        }
        batch_id = uuid4()
        memo = _Memo()
        done: list[tuple[_Entry, Any, Exception | None]] = []
        with self.keystore.batch() as sealer:
            for index, item in enumerate(items):
                value: Any = None
                error: Exception | None = None
                if isinstance(item, Unusable):
                    entry, error = _Entry(ask, op, batch=batch_id, bi=index), item.error
                    entry.refused = (FAILED, item.why)
                else:
                    entry = _Entry.of(ask, item, batch=batch_id, bi=index)
                    entry.memo = memo
                    try:
                        value = await acts[type(item)](entry, sealer, item)
                        if ask.dry_run and entry.decision is not None:
                            error = WouldAllow(entry.decision)
                    except Exception as caught:  # it belongs to this item alone and stands in its record
                        error = caught
                done.append((entry, value, error))
        given = [(self._record(entry, error), None if error else self._counting(entry)) for entry, _, error in done]
        results = []
        with stage("audit"):
            recorded = await self.log.append_each(given)
        failed = [
            _cause(told) if isinstance(told, ChangeFailed) else error
            for (_, _, error), told in zip(done, recorded, strict=True)
        ]
        good = [place for place, error in enumerate(failed) if error is None]
        withheld = dict(zip(good, await self._withheld([done[place][0] for place in good]), strict=True))
        for place, ((entry, value, _), told) in enumerate(zip(done, recorded, strict=True)):
            late = failed[place] or withheld[place]
            ask.receipt = receipt = told.receipt if isinstance(told, ChangeFailed) else told
            results.append(ItemResult(None if late is not None else value, late, receipt, entry.id, entry.decision))
        return batch_id, results

    async def random(self, ask: Ask, length: int) -> bytes:
        """Random bytes from the HSM of this node's region."""
        async with self._recorded(_Entry(ask, "random", out_len=length)) as entry:
            self._allowed(entry, "random", self._tenant_of(ask))
            self._go(entry)
            data: bytes = await self._at(
                self.region, lambda: self.keystore.random(self.region, length), who=ask.caller.tenant
            )
            return data

    async def public_key(self, ask: Ask, key: str, *, version: int | None = None) -> tuple[Key, int, bytes]:
        """The public half of a signing key as SubjectPublicKeyInfo (DER)."""
        async with self._recorded(_Entry(ask, "get_public_key")) as entry:
            found = await self._permitted(entry, "publicKey", key)
            number = version or found.latest.number
            spki = await self._inside(found, lambda: self.keystore.public_key(found, number))
            entry.used(number)
            return found, number, spki

    # ---- the work itself, the same for single calls and batches -------------------------------------------------

    async def _do(self, ask: Ask, work: W, act: Callable[[_Entry, Sealer, W], Awaitable[T]]) -> T:
        async with self._recorded(_Entry.of(ask, work)) as entry:
            return await act(entry, self.keystore, work)

    async def _encrypt(self, entry: _Entry, sealer: Sealer, work: Encrypt) -> Ciphertext:
        found = await self._permitted(entry, "encrypt", work.key, version=work.version)
        self._go(entry)
        return await self._sealed(entry, sealer, found, work.plaintext, work.context, Purpose.ENCRYPT, work.version)

    async def _open(self, entry: _Entry, sealer: Sealer, work: Open) -> Plaintext:
        envelope, found = await self._named_by(entry, work.envelope, work.expect_key)
        action, purpose = ("decrypt", Purpose.ENCRYPT) if isinstance(work, Decrypt) else ("unwrap", Purpose.DATAKEY)
        self._permit(entry, action, found, version=envelope.version)
        self._go(entry)
        data = await self._inside(found, lambda: sealer.open(found, envelope, work.context, purpose=purpose))
        entry.used(envelope.version, alg=f"0x{envelope.suite:04x}", out_len=len(data))
        return Plaintext(found, envelope.version, data)

    async def _rewrap(self, entry: _Entry, sealer: Sealer, work: Rewrap) -> Rewrapped:
        envelope, source = await self._named_by(entry, work.envelope, None)
        target = source
        if work.to_key is not None:
            target = await self.at_hand.find(self._tenant(entry.ask), work.to_key)
            source = self.keystore.by_id_at_hand(source.id) or source  # it may have changed meanwhile
        if target.id == source.id:
            contexts = (work.context, work.context if work.to_context is None else work.to_context)
            self._permit(entry, "rewrap", source, version=envelope.version, contexts=contexts)
            check_use(target, target.latest_number, "protect", now=self._clock())
        else:
            # Whoever may use the other key can read this: two keys, two decisions, both must allow. From a key below its
            # bar there is this way out, to one that meets a bar as high.
            leaving = target.tier <= source.tier
            copies = target.residency | target.reach | self.bars.graph(self.policy.registry).usable(root(target.home))
            made_under = work.context if work.to_context is None else work.to_context
            self._permit(entry, "encrypt", target, contexts=(made_under,))
            self._permit(entry, "reEncrypt", source, version=envelope.version, target=copies, leaving=leaving)
            entry.beside = target
        self._go(entry)
        purpose = envelope.purpose
        if purpose not in {Purpose.ENCRYPT, Purpose.DATAKEY}:
            raise InvalidCiphertext  # what else an envelope may hold is opened by its own operation only
        data = await self._inside(source, lambda: sealer.open(source, envelope, work.context, purpose=purpose))
        context = work.context if work.to_context is None else work.to_context
        made = await self._sealed(entry, sealer, target, data, context, purpose, None)
        entry.facts["kver"] = envelope.version
        return Rewrapped(source, envelope.version, made)

    async def _data_key(self, entry: _Entry, sealer: Sealer, work: MakeDataKey) -> DataKey:
        found = await self._permitted(entry, "generateDataKey", work.key)
        self._go(entry)
        data: bytes = await self._inside(found, lambda: self.keystore.random(found.home, work.length))
        made = await self._sealed(entry, sealer, found, data, work.context, Purpose.DATAKEY, None)
        return DataKey(found, made.version, made.envelope, data if work.with_plaintext else None)

    async def _sealed(
        self,
        entry: _Entry,
        sealer: Sealer,
        key: Key,
        data: bytes,
        context: Mapping[str, str],
        purpose: Purpose,
        version: int | None,
    ) -> Ciphertext:
        await self.at_hand.countable(key, version)
        made = await self._inside(key, lambda: sealer.seal(key, data, context, purpose=purpose, version=version))
        entry.used(made.version, alg=f"0x{made.suite:04x}", out_len=len(made.ciphertext))
        return Ciphertext(key, made.version, made.suite, made.ciphertext)

    async def _sign(self, entry: _Entry, _: Sealer, work: Sign) -> Signature:
        found = await self._permitted(entry, "sign", work.key)
        self._go(entry)
        await self.at_hand.countable(found)
        value, number = await self._signing(
            found,
            lambda: self.keystore.sign(found, work.algorithm, message=work.message, digest=work.digest, form=work.form),
        )
        entry.used(number, alg=work.algorithm, out_len=len(value))
        return Signature(found, number, value)

    async def _verify(self, entry: _Entry, _: Sealer, work: Verify) -> Checked:
        found = await self._permitted(entry, "verify", work.key, version=work.version)
        self._go(entry)
        number = work.version or found.latest_number
        valid = await self._signing(
            found,
            lambda: self.keystore.verify(
                found,
                work.signature,
                work.algorithm,
                message=work.message,
                digest=work.digest,
                form=work.form,
                version=number,
            ),
        )
        entry.used(number, alg=work.algorithm)
        return Checked(found, number, valid)

    async def _mac(self, entry: _Entry, _: Sealer, work: Mac) -> Signature:
        found = await self._permitted(entry, "mac", work.key)
        self._go(entry)
        await self.at_hand.countable(found)
        value, number = await self._inside(found, lambda: self.keystore.mac(found, work.message, work.algorithm))
        entry.used(number, alg=work.algorithm, out_len=len(value))
        return Signature(found, number, value)

    async def _verify_mac(self, entry: _Entry, _: Sealer, work: VerifyMac) -> Checked:
        found = await self._permitted(entry, "verifyMac", work.key, version=work.version)
        self._go(entry)
        number = work.version or found.latest_number
        valid = await self._inside(
            found,
            lambda: self.keystore.verify_mac(found, work.message, work.mac, work.algorithm, version=number),
        )
        entry.used(number, alg=work.algorithm)
        return Checked(found, number, valid)

    async def _named_by(self, entry: _Entry, ciphertext: bytes, expect_key: str | None) -> tuple[Envelope, Key]:
        """The envelope's own key, if it is the caller's; a foreign or unknown key is an invalid ciphertext."""
        envelope = Envelope.parse(ciphertext)
        try:
            found = await self.at_hand.by_id(envelope.key_id)
        except KeyNotFound:
            raise InvalidCiphertext from None
        if found.tenant != entry.ask.caller.tenant or envelope.version > found.latest_number:
            raise InvalidCiphertext
        if expect_key is not None and (await self.at_hand.find(found.tenant, expect_key)).id != found.id:
            raise IncorrectKey
        return envelope, self.keystore.by_id_at_hand(found.id) or found  # it may have changed meanwhile

    # ---- keys: reading -----------------------------------------------------------------------------------------

    async def get_key(self, ask: Ask, key: str) -> Key:
        """A key's metadata and versions; never material."""
        async with self._recorded(_Entry(ask, "get_key")) as entry:
            return await self._permitted(entry, "describe", key)

    async def list_keys(self, ask: Ask, wanted: ListFilter, *, after: uuid.UUID | None, limit: int) -> list[Key]:
        """The tenant's keys in the order of their ids."""
        async with self._recorded(_Entry(ask, "list_keys")) as entry:
            self._allowed(entry, "listKeys", self._tenant_of(ask))
            return self.keystore.list(self._tenant(ask), filters=wanted, after=after, limit=limit)

    async def list_aliases(self, ask: Ask, *, after: str | None, limit: int) -> Sequence[tuple[str, uuid.UUID]]:
        """The tenant's aliases and the keys they point to."""
        async with self._recorded(_Entry(ask, "list_aliases")) as entry:
            self._allowed(entry, "listKeys", self._tenant_of(ask))
            return self.keystore.aliases(self._tenant(ask), after=after, limit=limit)

    # ---- keys: changing ----------------------------------------------------------------------------------------

    async def create_key(self, ask: Ask, new: NewKey, *, alias: str | None) -> Key:
        """Make a key in the HSM of its home region, if it meets its tier and the token can hold it."""

        def decide(entry: _Entry) -> NewKey:
            self._allowed(entry, "createKey", self._tenant_of(ask), new=new)
            self._meets(new)
            self.keystore.supports(new)
            return new

        parameters = {"alias": alias, **new.parameters()}
        plan = await self._control(
            ask,
            "create_key",
            parameters,
            decide,
            lambda wanted: self.keystore.plan_create(wanted, alias=alias),
            region=new.home,
            slow=True,
        )
        return _planned(plan)

    async def rotate_key(self, ask: Ask, key: str) -> Key:
        """Make a new version; older ones go on opening what they protected."""
        return await self._change_key(ask, "rotate_key", "rotate", key, self.keystore.plan_rotate, slow=True)

    async def import_parameters(self, ask: Ask, key: str, wrapping: Wrapping, rsa_spec: str | None) -> Parameters:
        """Make a wrapping key and a token for one import of a key's material; earlier tokens of the key are spent."""
        made: list[Parameters] = []

        def plan(found: Key) -> Plan:
            parameters, change = self.imports.plan_parameters(found, wrapping, rsa_spec)
            made.append(parameters)
            return change

        await self._change_key(
            ask,
            "import_parameters",
            "importKey",
            key,
            plan,
            {"wrapping": str(wrapping), "wrapping_key_spec": rsa_spec},
            alg=str(wrapping),
            slow=True,
        )
        return made[0]

    async def import_key(self, ask: Ask, key: str, wanted: Import) -> Key:
        """Add imported material as the key's next version; a key that waited for it is enabled then."""
        parameters = {
            "wrapped_key": hashlib.sha256(wanted.wrapped).hexdigest(),
            "key_check_value": wanted.check_value,
            "expires_at": wanted.expires_at,
        }
        return await self._change_key(
            ask,
            "import_key",
            "importKey",
            key,
            lambda k: self.imports.plan_import(k, wanted),
            parameters,
            slow=True,
        )

    async def enable_key(self, ask: Ask, key: str) -> Key:
        """Put a disabled key back into use."""
        return await self._change_key(
            ask, "enable_key", "enable", key, lambda k: self.keystore.plan_transition(k, KeyState.ACTIVE)
        )

    async def disable_key(self, ask: Ask, key: str) -> Key:
        """Stop every use of a key at once; its handles leave the HSM cache."""
        return await self._change_key(
            ask, "disable_key", "suspend", key, lambda k: self.keystore.plan_transition(k, KeyState.SUSPENDED)
        )

    async def mark_compromised(self, ask: Ask, key: str) -> Key:
        """Mark a key compromised, for ever."""
        return await self._change_key(
            ask,
            "compromise_key",
            "revoke",
            key,
            lambda k: self.keystore.plan_transition(k, KeyState.COMPROMISED),
        )

    async def schedule_deletion(self, ask: Ask, key: str, wait_s: int) -> Key:
        """Stop a key now and destroy it after 7 to 90 days, unless that is cancelled."""
        return await self._change_key(
            ask,
            "schedule_deletion",
            "scheduleDeletion",
            key,
            lambda k: self.keystore.plan_schedule_deletion(k, wait_s=wait_s),
            {"wait_s": wait_s},
        )

    async def cancel_deletion(self, ask: Ask, key: str) -> Key:
        """Take a scheduled deletion back; the key is disabled then (or compromised again)."""
        return await self._change_key(ask, "cancel_deletion", "cancelDeletion", key, self.keystore.plan_cancel_deletion)

    async def complete_deletion(self, ask: Ask, key: str) -> Key:
        """Destroy every copy of a key whose waiting time is over. The scheduler's alone."""
        return await self._change_key(ask, "complete_deletion", "completeDeletion", key, self.keystore.plan_destroy)

    async def update_key(self, ask: Ask, key: str, changes: Mapping[str, object], apply: Callable[[Key], Plan]) -> Key:
        """Change description, tags, rotation or fences."""
        return await self._change_key(ask, "update_key", "updateKey", key, apply, changes)

    async def revoke_version(self, ask: Ask, key: str, version: int) -> Key:
        """Take one version out of use; opening what it protected is refused from now on."""
        return await self._change_key(
            ask,
            "revoke_version",
            "revokeVersion",
            key,
            lambda k: self.keystore.plan_revoke_version(k, version),
            {"version": version},
        )

    async def put_alias(self, ask: Ask, alias: str, key: str) -> Key:
        """Point an alias to a key, at once for every worker; also if it pointed elsewhere before."""
        return await self._change_key(
            ask,
            "put_alias",
            "setAlias",
            key,
            lambda k: self.keystore.plan_put_alias(k.tenant, alias, k),
            {"alias": alias},
        )

    async def delete_alias(self, ask: Ask, alias: str) -> None:
        """Remove an alias; the key stays."""
        await self._change_key(
            ask,
            "delete_alias",
            "setAlias",
            f"alias/{alias}",
            lambda k: self.keystore.plan_delete_alias(k.tenant, alias),
            {"alias": alias},
        )

    async def _change_key(
        self,
        ask: Ask,
        op: str,
        action: str,
        key: str,
        plan: Callable[[Key], Plan],
        parameters: Mapping[str, object] | None = None,
        *,
        alg: str | None = None,
        slow: bool = False,
    ) -> Key:
        def decide(entry: _Entry) -> Key:
            found = self.keystore.find(self._tenant(ask), key)
            self._permit(entry, action, found)
            if alg is not None:
                entry.facts["alg"] = alg
            if ask.if_match is not None and ask.if_match != found.kv:
                raise EtagMismatch(f"key {found.id} is at {found.kv}")
            return found

        made = await self._control(ask, op, {"key": key, **(parameters or {})}, decide, plan, slow=slow)
        return _planned(made)

    # ---- tenants, regions, HSMs, policy, tokens, audit ------------------------------------------------------------

    async def list_tenants(self, ask: Ask) -> list[dict[str, object]]:
        """The tenants of the charter: all for the platform role, its own for everyone else."""
        async with self._recorded(_Entry(ask, "list_tenants")) as entry:
            self._allowed(entry, "listTenants", InstallationFacts())
            own = ask.caller.tenant
            return [t for t in self.policy.registry.describe_tenants() if own is None or t["name"] == own]

    async def list_regions(self, ask: Ask) -> list[dict[str, object]]:
        """The places of the charter, and which of them have an HSM here."""
        async with self._recorded(_Entry(ask, "list_regions")) as entry:
            self._allowed(entry, "listRegions", InstallationFacts())
            here = self.keystore.regions
            return [{**p, "hsm": p["name"] in here} for p in self.policy.registry.describe_places()]

    async def list_hsms(self, ask: Ask) -> Sequence[MemberStatus]:
        """The state of every HSM of this node."""
        return await self.read_installation(ask, "list_hsms", "hsmStatus", self.fleet.members)

    async def drain_hsm(self, ask: Ask, name: str) -> MemberStatus:
        """Give an HSM no more calls, on every worker; GroupWouldBeEmpty if nobody could serve then."""
        return await self._set_hsm(ask, "drain_hsm", "hsmDrain", name, Admin.DRAINED)

    async def undrain_hsm(self, ask: Ask, name: str) -> MemberStatus:
        """Let a drained or fallback HSM serve again."""
        return await self._set_hsm(ask, "undrain_hsm", "hsmUndrain", name, Admin.ACTIVE)

    async def _set_hsm(self, ask: Ask, op: str, action: str, name: str, admin: Admin) -> MemberStatus:
        def plan() -> Plan:
            self.hsm_changes_allowed(name)
            write, applied = self.fleet.plan({name: admin})
            return Plan(key=None, write=write, applied=applied)

        await self.change_installation(ask, op, action, {"hsm": name}, plan)
        self.bars.refresh()
        return self.fleet.group_of(name).member(name)

    async def read_installation(self, ask: Ask, op: str, action: str, read: Callable[[], T]) -> T:
        """Read something of the installation, if the caller may, and record that. `read` may call the database."""
        async with self._recorded(_Entry(ask, op)) as entry:
            self._allowed(entry, action, InstallationFacts())
            return await asyncio.to_thread(read)

    async def change_installation(
        self, ask: Ask, op: str, action: str, parameters: Mapping[str, object], plan: Callable[[], Plan]
    ) -> Plan:
        """Change something of the installation, if the caller may: intent, plan, outcome and change in one commit."""

        def decide(entry: _Entry) -> None:
            self._allowed(entry, action, InstallationFacts())

        return await self._control(ask, op, parameters, decide, lambda _: plan())

    async def read_own(self, ask: Ask, op: str, action: str, read: Callable[[], T]) -> T:
        """Read something of the caller's tenant, or of the installation for its own people. `read` may call the database."""
        async with self._recorded(_Entry(ask, op)) as entry:
            self._allowed(entry, action, self._tenant_of(ask))
            return await asyncio.to_thread(read)

    async def change_own(
        self,
        ask: Ask,
        op: str,
        action: str,
        parameters: Mapping[str, object],
        decide: Callable[[str], T],
        plan: Callable[[T], Plan],
        *,
        facts: Mapping[str, Any] = NO_FACTS,
        region: str | None = None,
    ) -> Plan:
        """Change something of the caller's tenant, or of the installation for its own people.

        `decide` gets the decision's id. `plan` reaches the HSM of `region`, or none. `facts` stand in the records, those
        that `decide` and `plan` add to them too.
        """

        def permitted(entry: _Entry) -> T:
            self._allowed(entry, action, self._tenant_of(ask))
            return decide(entry.id)

        beside = region is None
        return await self._control(ask, op, parameters, permitted, plan, facts=facts, region=region, beside=beside)

    async def ask_of_key(
        self,
        ask: Ask,
        op: str,
        action: str,
        key: str,
        parameters: Mapping[str, object],
        decide: Callable[[str, Key, int], T],
        plan: Callable[[T], Plan],
        *,
        facts: Mapping[str, Any] = NO_FACTS,
        withdrawing: bool = False,
    ) -> Plan:
        """Store something about a change of a key that the policy allows the caller once enough others approve it.

        `decide` gets the decision's id, the key and how many approvals the rules ask for; it and `plan` reach no HSM.
        `withdrawing` such a request stays possible while the key is frozen or was changed.
        """

        def permitted(entry: _Entry) -> T:
            found = self.keystore.find(self._tenant(ask), key)
            needed = self._approvable(entry, action, found, passing=withdrawing)
            if ask.if_match is not None and ask.if_match != found.kv:
                raise EtagMismatch(f"key {found.id} is at {found.kv}")
            made = decide(entry.id, found, needed)
            if ask.dry_run and not withdrawing and entry.decision is not None and not entry.decision.allowed:
                raise policy.Denied(entry.decision)  # what the caller would be told: it takes approvals
            return made

        return await self._control(ask, op, {"key": key, **parameters}, permitted, plan, facts=facts, beside=True)

    async def read_of_key(self, ask: Ask, op: str, action: str, key: str, read: Callable[[Key], T]) -> T:
        """Read something about a key of the caller's tenant, if the caller may. `read` may call the database."""
        async with self._recorded(_Entry(ask, op)) as entry:
            found = await self._permitted(entry, action, key)
            return await asyncio.to_thread(read, found)

    async def change_of_key(
        self,
        ask: Ask,
        op: str,
        action: str,
        key: str,
        parameters: Mapping[str, object],
        decide: Callable[[str, Key], T],
        plan: Callable[[T], Plan],
        *,
        facts: Mapping[str, Any] = NO_FACTS,
        passing: bool = False,
    ) -> Plan:
        """Change something about a key that is not in its row, if the caller may. No freeze stops what is `passing`.

        `decide` gets the decision's id and the key; it and `plan` reach no HSM.
        """

        def permitted(entry: _Entry) -> T:
            found = self.keystore.find(self._tenant(ask), key)
            self._decide(entry, self._asked(entry, action, found, passing=passing))
            return decide(entry.id, found)

        return await self._control(ask, op, {"key": key, **parameters}, permitted, plan, facts=facts, beside=True)

    def approvals_needed(self, caller: str, action: str, key: Key) -> int:
        """How few approvals the rules would ask for if this member asked now; 0 if no number of them would do."""
        request = self._approved_request(caller, action, key, "unspecified")
        found = None if request is None else self._least(request)
        return 0 if found is None or not self.policy.decide(found).allowed else found.approvals

    def approved(self, caller: str, action: str, key: Key, *, approvals: int, reason: str) -> bool:
        """Whether a member may do this to a key, now and with so many approvals; False while the rules want more of them.

        Denied if they do not help: the member left, or has another role. Frozen, FreezeUnconfirmed if it may, but not yet.
        """
        request = self._approved_request(caller, action, key, reason)
        if request is None:
            raise ApprovalClosed("who asked is no member any more, so nobody asks for this: ask again")
        # Rare, and not to be taken back: both engines must allow it.
        decision = self.policy.decide_twice(dataclasses.replace(request, approvals=approvals))
        if decision.code == APPROVAL_REQUIRED:
            return False
        if not decision.allowed:
            raise policy.Denied(decision)
        self._thawed(self._touching(request.caller, action, key, request.caller.places))
        return True

    def _approved_request(self, caller: str, action: str, key: Key, reason: str) -> policy.Request | None:
        """What the policy is asked for somebody who is not the one that calls; None if that is no member any more."""
        found = self.decisions.caller(self.policy.registry, caller, key.tenant)
        if found is None:
            return None
        return policy.Request(
            caller=found,
            action=action,
            resource=facts_of(key, key.latest_number),
            now=self._clock() // 1_000_000,
            hsm=key.home,
            via=frozenset({self.region}),
            purpose=self._purpose(NO_USE, key),
            reason=reason,
        )

    def _approvable(self, entry: _Entry, action: str, key: Key, *, passing: bool) -> int:
        """How few approvals the rules ask for; raises Denied where none help. The record tells why it takes approvals."""
        request = self._asked(entry, action, key, passing=passing)
        least = self._least(request)
        if passing or not self.policy.decide(least).allowed:
            self._decide(entry, least)
        else:
            self._judge(entry, request)
        return least.approvals

    def _least(self, request: policy.Request) -> policy.Request:
        """The request with the fewest approvals that the rules do not call too few."""
        for count in range(MOST_APPROVALS):
            tried = dataclasses.replace(request, approvals=count)
            if self.policy.decide(tried).code != APPROVAL_REQUIRED:
                return tried
        return dataclasses.replace(request, approvals=MOST_APPROVALS)

    def agreements_end_s(self) -> float:
        """Seconds until the first agreement in force ends; infinite if none is."""
        now = self._clock() / 1_000_000
        return self.policy.agreements.first_end(int(now)) - now

    async def get_compliance(self, ask: Ask, *, after: str | None, limit: int) -> Report:
        """The keys that do not meet their tier and what is missing: of the caller's tenant, or of all for the installation."""
        now = self.policy

        def read() -> Report:
            since = self.decisions.bundles.since(now)
            return self.compliance.report(now, since=since, tenant=ask.caller.tenant, after=after, limit=limit)

        return await self.read_own(ask, "get_compliance", "readCompliance", read)

    async def get_policy(self, ask: Ask) -> tuple[Policy, str | None]:
        """The policy in force, and the request by which a quorum applied it; None: a directory's."""
        async with self._recorded(_Entry(ask, "get_policy")) as entry:
            self._allowed(entry, "readPolicy", InstallationFacts())
            found = await asyncio.to_thread(self.applied.get) if self._in_step is not None else None
            return self.policy, None if found is None or found.digest != self._in_step else found.approval

    async def reload_policy(self, ask: Ask) -> Policy:
        """Load the bundle from its directory; the old one stays in force if anything is wrong with the new."""

        def decide(entry: _Entry) -> Policy:
            self._allowed(entry, "reloadPolicy", InstallationFacts())
            return self.policy

        def plan(old: Policy) -> Plan:
            if self.applied.get() is not None:
                raise PolicyByQuorum(_BY_QUORUM)
            new = self._load_policy(old)
            self.check_lock_out(new)

            def write(connection: Connection) -> None:
                if self.applied.stands(connection):
                    raise PolicyByQuorum(_BY_QUORUM)
                Settings.put(connection, POLICY_SETTING, new.digest)
                self.decisions.bundles.keep(connection, new, at=self._clock(), before=old)

            def applied() -> None:
                self.policy, self._told_active = new, new.digest

            return Plan(key=None, write=write, applied=applied)

        await self._control(ask, "reload_policy", {}, decide, plan, beside=True)
        await self.tell_active()
        return self.policy

    def check_lock_out(self, draft: Policy) -> None:
        """LockedOut if nobody would be left who administers a tenant or the installation. Reads the database."""
        policy.lockout.check(self.policy, draft, now=self._clock() // 1_000_000, given_up=self.without_keys)

    def without_keys(self, tenant: str) -> bool:
        """Whether a tenant has no key that is not destroyed: then nothing is lost with it."""
        filters = (ListFilter(state=state) for state in _LIVE)
        return not any(self.keystore.list(tenant, filters=f, after=None, limit=1) for f in filters)

    def in_force(self, new: Policy, digest: str | None) -> None:
        """Decide by a bundle from now on; `digest` is the name that it was applied under, None: a directory's."""
        self.policy, self._in_step = new, digest

    async def follow_policy(self, digest: str | None) -> bool:
        """Take over the bundle that another worker put in force; whether this worker has a new one to tell of.

        A directory that does not hold it (yet) changes nothing, nor does an applied bundle that cannot be believed.
        """
        if digest is not None and digest not in {self.policy.digest, self._in_step, self._not_found}:
            before = self.policy
            found = await asyncio.to_thread(self._followed, digest)
            if found is None:
                self._not_found = digest  # said once; a reload, another bundle or a restart brings this worker in step
            elif self.policy is before:  # else a later one came into force here while this one was read
                self.in_force(*found)
        if self._told_active == self.policy.digest:
            return False
        self._told_active = self.policy.digest
        await self.tell_active()
        return True

    def _followed(self, digest: str) -> tuple[Policy, str | None] | None:
        """The bundle of this name, as applied or from the directory; None if it is not to be had."""
        try:
            applied = self.applied.get()
            if applied is None:
                if self._in_step is not None:
                    raise AppliedDamaged("the setting policy-applied went missing")
                # that its version rises was decided by the worker that loaded it first
                new = self._load_policy(None)
                return (new, None) if new.digest == digest else None
            if applied.digest == self._in_step:
                return None  # the name is older than what was applied here meanwhile, or nothing that was applied
            new = self.decisions.bundles.in_force(applied)
            if new.version <= self.policy.version:
                raise AppliedDamaged(f"version {new.version} would follow version {self.policy.version}")
        except policy.BundleRefused:
            return None
        except (AppliedDamaged, BundleLost, FreezeRowsDamaged) as error:
            told = {"bundle": digest[:12], "why": str(error), "in_force": self.policy.digest[:12]}
            alarm.critical("the applied bundle is not taken over", extra={"facts": told})
            return None
        return new, applied.digest

    async def tell_active(self) -> None:
        """Record the bundle in force; of an applied one also what it replaced, and the request and its signers."""
        await self.load_tenant_secrets()
        applied = await asyncio.to_thread(self.applied.get) if self._in_step is not None else None
        if applied is None or applied.digest != self._in_step:
            await self.note("bundle_active")
            return
        await asyncio.to_thread(self.applied.remember, applied)
        await self.log.append(
            self.admin_record(
                "bundle_active",
                why=f"replaces:{applied.replaces[:32]}",
                intent=applied.approval,
                rh=applied.request,
                appr=applied.signers,
            )
        )

    async def note(self, op: str, *, hsm: str | None = None) -> None:
        """Record an event of the node itself: start, stop, a new bundle, an HSM that is lost or back."""
        await self.log.append(self.admin_record(op, hsm=hsm))

    def admin_record(self, op: str, **facts: Any) -> event.Admin:
        """A record of something that no caller asked for."""
        return event.Admin(id=uuid4(), ts=self._clock(), node=self.node, op=op, pol=self.policy.digest[:32], **facts)

    async def create_token(self, ask: Ask, new: NewToken) -> tuple[ApiToken, str]:
        """Make an API token of the caller's own tenant and role; its secret is shown this once."""
        secret: list[str] = []

        def decide(entry: _Entry) -> NewToken:
            self._allowed(entry, "createToken", self._tenant_of(ask))
            return new

        made: list[ApiToken] = []

        def plan(wanted: NewToken) -> Plan:
            token, text, write = self.tokens.plan_create(wanted)
            made.append(token)
            secret.append(text)
            return Plan(key=None, write=write, applied=lambda: None)

        await self._control(ask, "create_token", {"scopes": sorted(new.scopes)}, decide, plan)
        return made[0], secret[0]

    async def list_tokens(self, ask: Ask) -> list[ApiToken]:
        """The tenant's tokens without their secrets."""
        async with self._recorded(_Entry(ask, "list_tokens")) as entry:
            self._allowed(entry, "createToken", self._tenant_of(ask))
            return self.tokens.list(self._tenant(ask))

    async def revoke_token(self, ask: Ask, token_id: str) -> None:
        """Revoke a token; every worker refuses it within a second."""

        def decide(entry: _Entry) -> str:
            self._allowed(entry, "createToken", self._tenant_of(ask))
            return token_id

        def plan(wanted: str) -> Plan:
            write = self.tokens.plan_revoke(self._tenant(ask), wanted)
            return Plan(key=None, write=write, applied=lambda: self.tokens.forget(wanted))

        await self._control(ask, "revoke_token", {"token": token_id}, decide, plan)

    async def explain_decision(self, ask: Ask, decision: str) -> tuple[dict[str, Any], Explanation]:
        """A recorded decision and why it came out so, a tenant's own or any for an auditor of the installation.

        NotFound for an unknown id and a foreign one alike; BundleLost, FactsLost if it cannot be made again.
        """
        async with self._recorded(_Entry(ask, "get_decision")) as entry:
            self._allowed(entry, "explainDecision", self._tenant_of(ask))

            try:
                wanted = str(uuid.UUID(decision))
            except ValueError:
                raise NotFound("a decision's id is a UUID") from None

            def read() -> tuple[dict[str, Any], Explanation]:
                found = self.decisions.record(wanted, tenant=ask.caller.tenant)
                if found is None:
                    raise NotFound("no such decision, or none of the caller's")
                return found, self.decisions.explained(found)

            return await asyncio.to_thread(read)

    async def simulate_policy(self, ask: Ask, files: Mapping[str, bytes], *, since: int, until: int) -> Replay:
        """What a draft bundle would have decided of a recorded period (us), a tenant's own or all for an auditor.

        BundleRefused if the draft cannot be used; nothing of it stays.
        """
        async with self._recorded(_Entry(ask, "simulate_policy")) as entry:
            self._allowed(entry, "explainDecision", self._tenant_of(ask))
            self._go(entry)

            def replay() -> Replay:
                draft = Policy.draft(files, known=self.policy)
                return self.decisions.replay(tenant=ask.caller.tenant, since=since, until=until, draft=draft)

            return await asyncio.to_thread(replay)

    async def transfers(self, ask: Ask, *, tenant: str | None, since: int, until: int) -> Transfers:
        """What crossed a border in a period (us): a tenant's own, or that of one or all for an auditor of the installation.

        NotFound if the tenant is not the caller's.
        """
        async with self._recorded(_Entry(ask, "list_transfers")) as entry:
            self._allowed(entry, "readTransfers", self._tenant_of(ask))
            whose = tenant if ask.caller.tenant is None else ask.caller.tenant
            if tenant not in {None, whose}:
                raise NotFound("no such tenant, or not the caller's")
            return await asyncio.to_thread(report, self.search, tenant=whose, since=since, until=until)

    async def transfer_agreements(self, ask: Ask) -> list[Agreement]:
        """The registered agreements, in force or not: those of the caller's tenant, or all."""
        async with self._recorded(_Entry(ask, "list_transfer_agreements")) as entry:
            self._allowed(entry, "readTransfers", self._tenant_of(ask))
            return [a for a in self.policy.agreements.all if ask.caller.tenant in {None, *a.tenants}]

    async def search_records(self, ask: Ask, **wanted: Any) -> list[Any]:
        """Audit records, newest first: a tenant's own, or all for an auditor of the installation."""
        async with self._recorded(_Entry(ask, "search_records")) as entry:
            self._may_audit(entry)
            return await asyncio.to_thread(self.search.records, tenant=ask.caller.tenant, **wanted)

    async def audit_status(self, ask: Ask) -> dict[str, object]:
        """State of this worker's chain, of all chains and of the newest checkpoint."""
        async with self._recorded(_Entry(ask, "audit_status")) as entry:
            self._may_audit(entry)
            return {
                "log": self.log.name,
                "state": self.log.state,
                "reason": self.log.reason or None,
                "disk_used_percent": round(self.log.disk_used * 100),
                "epoch": self.log.epoch,
                "next_seq": self.log.next_seq,
                "waiting": self.log.waiting,
                "public_key": self.log.public_key().hex(),
                "exposed_s": self.log.exposed_s,
                "checkpoint": None
                if self.log.checkpoint is None
                else {
                    "size": self.log.checkpoint[0],
                    "root": self.log.checkpoint[1],
                    "age_s": self.log.checkpoint_age_s,
                },
                "chains": await asyncio.to_thread(self.prover.chains),
            }

    async def audit_checkpoint(self, ask: Ask, size: int | None = None) -> bytes:
        """The newest signed checkpoint of the root log, or that of a size; NotCovered before the first one."""
        return await self._proved(ask, "audit_checkpoint", lambda: self.prover.checkpoint(size))

    async def audit_consistency(self, ask: Ask, old: int, size: int | None) -> bytes:
        """That one checkpoint extends another; NotFound unless both were signed."""
        return await self._proved(ask, "audit_consistency", lambda: self.prover.growth(old, size))

    async def audit_proof(self, ask: Ask, chain: str, seq: int) -> bytes:
        """The proof of a record, a tenant's own or any for an auditor of the installation; NotCovered if it is new."""
        tenant = ask.caller.tenant
        return await self._proved(ask, "audit_proof", lambda: self.prover.record(chain, seq, tenant=tenant))

    async def root_tile(self, ask: Ask, level: int | None, index: int, width: int) -> bytes:
        """A tile of the root log, or (level None) a bundle of its entries: they name no tenant."""
        return await self._proved(ask, "audit_tile", lambda: self._tile(None, level, index, width))

    async def chain_tile(self, ask: Ask, chain: str, level: int | None, index: int, width: int) -> bytes:
        """As `root_tile`, of a chain: every tenant's records stand in it, so only the installation's auditor may."""
        return await self._proved(ask, "audit_tile", lambda: self._tile(chain, level, index, width), everyone=True)

    def _tile(self, chain: str | None, level: int | None, index: int, width: int) -> bytes | None:
        if level is None:
            return self.prover.entries(chain, index, width)
        return self.prover.tile(chain, level, index, width)

    async def tenant_bundle(self, ask: Ask, tenant: str, *, since: int) -> Bundle:
        """All records of the caller's own tenant, or of any for an auditor of the installation, and their proof."""

        def bundle() -> Bundle | None:
            return self.prover.bundle(tenant, since=since) if ask.caller.tenant in {None, tenant} else None

        return await self._proved(ask, "tenant_bundle", bundle)

    async def _proved(self, ask: Ask, op: str, prove: Callable[[], T | None], *, everyone: bool = False) -> T:
        async with self._recorded(_Entry(ask, op)) as entry:
            if everyone:
                self._allowed(entry, "readAllAudit", InstallationFacts())
            else:
                self._may_audit(entry)
            found = await asyncio.to_thread(prove)
            if found is None:
                raise NotFound("nothing of that name, or nothing of the caller's")
            return found

    def _may_audit(self, entry: _Entry) -> None:
        """A tenant's auditor reads its tenant's records, one of the installation all of them."""
        if entry.ask.caller.tenant is None:
            self._allowed(entry, "readAllAudit", InstallationFacts())
        else:
            self._allowed(entry, "readAudit", self._tenant_of(entry.ask))

    # ---- a witness of other logs -------------------------------------------------------------------------------

    async def witness_checkpoint(self, ask: Ask, body: bytes) -> Answer:
        """Cosign a checkpoint of another log, C2SP tlog-witness; the record is durable before the cosignature leaves.

        Anybody may ask: what counts is the log's own signature. Of a flood of refusals most are only counted. NotFound if
        this node is no witness; RateLimited.
        """
        asked = _Entry(ask, "witness_checkpoint", in_len=len(body), rh=hashlib.sha256(body).hexdigest())
        async with self._recorded(asked) as entry:
            if self._witness is None:
                raise NotFound("this node is no witness")
            with self._strangers.admitted(ask.caller.source):
                answer = await asyncio.to_thread(self._witness.add, body)
            entry.refused = _WITNESS_REFUSALS.get(answer.status)
            return answer

    async def witnessed_checkpoint(self, source: str, origin_hash: str) -> Answer:
        """The newest checkpoint of another log that was cosigned here; public as the log itself, so no record."""
        if self._witness is None:
            raise NotFound("this node is no witness")
        with self._strangers.admitted(source):
            return await asyncio.to_thread(self._witness.latest, origin_hash)

    async def whoami(self, ask: Ask) -> Caller:
        """What the service makes of the caller's credential."""
        async with self._recorded(_Entry(ask, "whoami")):
            return ask.caller

    async def metrics_allowed(self, ask: Ask) -> None:
        """Whether the caller may read metrics."""
        async with self._recorded(_Entry(ask, "metrics")) as entry:
            self._allowed(entry, "metrics", InstallationFacts())

    async def refused(self, ask: Ask, op: str, out: str, why: str, *, rule: str | None = None) -> None:
        """Record a request that was refused before its operation began: malformed, invalid, too large, of no proven way."""
        entry = _Entry(ask, op, rule=None if rule is None else (rule,))
        entry.refused, ask.decision_id = (out, why), entry.id
        await self._append(entry, None)

    async def unidentified(
        self, *, source: str, request_id: str, arrived: int, why: str, stranger: bool
    ) -> Receipt | None:
        """Record a request whose caller or route is unknown; None if it is one of a flood of strangers, and only counted."""
        if stranger and self.log.state == "RUNNING" and self._unknown.only_counted(source, why):
            return None
        record = event.Auth(
            id=uuid4(),
            ts=arrived,
            node=self.node,
            src=source or None,
            req=request_id,
            why=why,
            pol=self.policy.digest[:32],
        )
        return await self.log.append(record)

    # ---- decide, act, record -----------------------------------------------------------------------------------

    def _tenant(self, ask: Ask) -> str:
        if ask.caller.tenant is None:
            raise KeyNotFound("the installation's own roles have no keys")
        return ask.caller.tenant

    def _tenant_of(self, ask: Ask) -> Resource:
        return TenantFacts(ask.caller.tenant) if ask.caller.tenant is not None else InstallationFacts()

    async def _permitted(self, entry: _Entry, action: str, name: str, *, version: int | None = None) -> Key:
        """The caller's key of this name, if policy and state allow `action` with it; raises otherwise."""
        found = await self.at_hand.find(self._tenant(entry.ask), name)
        self._permit(entry, action, found, version=version)
        return found

    def _permit(
        self,
        entry: _Entry,
        action: str,
        key: Key,
        *,
        version: int | None = None,
        target: frozenset[str] = frozenset(),
        leaving: bool = False,
        contexts: Sequence[Mapping[str, str]] | None = None,
    ) -> None:
        memo = entry.memo
        alone = (
            entry.key is None and not target and contexts is None
        )  # a second key of one item is asked about by itself
        if memo is not None and (not alone or self.grants.held(str(key.id), entry.ask.caller.id)):
            memo = None  # what a grant allows depends on each item's context
        question = (action, id(key), version, entry.use)
        known = None if memo is None else memo.permits.get(question)
        if known is not None and known.key is key and known.freezes is self.freezes.now and known.policy is self.policy:
            entry.key, entry.wanted, entry.version, entry.touched = key, known.wanted, known.version, known.touched
            entry.decision = entry.ask.decision = known.decision
            entry.facts |= known.facts
            self._metered(entry)
            return
        own = frozenset(entry.facts)
        request = self._asked(entry, action, key, version=version, target=target, leaving=leaving)
        if "use" in self.policy.actions.get(action, ()):
            request = self._waived(entry, request)
            grant = self._grant_for(entry, request, contexts)
            request = request if grant is None else dataclasses.replace(request, grant=grant.id)
        else:
            grant = None
        self._decide(entry, request)
        if grant is not None and entry.decision is not None and f"{GRANT}/{grant.id}" in entry.decision.rules:
            entry.grants = (*entry.grants, grant)
        if memo is not None and entry.decision is not None and not entry.waivers:
            facts = {name: fact for name, fact in entry.facts.items() if name not in own}
            memo.permits[question] = _Permit(
                key, self.freezes.now, self.policy, entry.decision, entry.wanted, entry.version, entry.touched, facts
            )
        self._metered(entry)

    def _metered(self, entry: _Entry) -> None:
        """RateLimited if the key that was permitted now is used too often.

        After the decision: who may not use a key neither uses up what others may, nor learns from this that it exists.
        """
        if entry.wanted is not None and entry.key is not None and self.rates.keyed:
            self.rates.use(str(entry.key.id))

    def _waived(self, entry: _Entry, request: policy.Request) -> policy.Request:
        """The request with what live exceptions waive for it: only where it needs any, and its record names them."""
        entry.facts.pop("exc", None)  # of an earlier decision for the same record
        needed = self.exceptions.needed(request)
        if not needed:
            return request
        entry.facts["exc"] = waivers.told(needed)
        entry.waivers = (*entry.waivers, *needed)
        return dataclasses.replace(
            request, waived_reach=waivers.waived(needed, "reach"), waived_egress=waivers.waived(needed, "egress")
        )

    def _grant_for(
        self, entry: _Entry, request: policy.Request, contexts: Sequence[Mapping[str, str]] | None
    ) -> Grant | None:
        """The grant that covers a use, for its record too: whether it was needed, the decision tells."""
        entry.facts.pop("grant", None)  # of an earlier decision for the same record
        key, caller = request.resource, request.caller
        if not isinstance(key, KeyFacts) or caller.tenant is None:
            return None
        found = self.grants.covering(
            tenant=caller.tenant,
            key=key.id,
            caller=caller.id,
            action=request.action,
            purpose=request.purpose,
            contexts=(entry.context or {},) if contexts is None else contexts,
        )
        if found is not None:
            entry.facts["grant"] = found.id
        return found

    def _counting(self, entry: _Entry) -> Change | None:
        """What counts the uses of grants together with the record; Denied there if one has no more of them."""
        counted = [g for g in entry.grants if g.max_uses is not None]
        if not counted:
            return None
        made: dict[str, int] = {}

        def write(connection: Connection) -> None:
            for grant in counted:
                try:
                    made[grant.id] = self._grant_uses.count(connection, grant, known=self.grants.uses(grant.id))
                except GrantSpent:
                    self.grants.used(grant.id, grant.max_uses or 0)  # by another worker, or before this one began
                    raise self._ungranted() from None
                except RowsDamaged as damaged:
                    alarm.critical(
                        "uses of a grant were changed outside the service", extra={"facts": {"why": str(damaged)}}
                    )
                    raise self._ungranted() from None

        def applied() -> None:
            for grant_id, count in made.items():
                self.grants.used(grant_id, count)

        return Change(write, applied)

    def _ungranted(self) -> policy.Denied:
        """What a caller is told whose grant does not count any more: that nothing permits this."""
        return policy.Denied(Decision(False, "policy_denied", (), "DEFAULT", self.policy.digest))

    def _asked(
        self,
        entry: _Entry,
        action: str,
        key: Key,
        *,
        version: int | None = None,
        target: frozenset[str] = frozenset(),
        passing: bool = False,
        leaving: bool = False,
    ) -> policy.Request:
        """What the policy is to be asked about a key; raises if freeze, state or tier forbid it.

        `passing`: no freeze does. `leaving`: no bar of its tier does.
        """
        number = version or key.latest_number
        entry.key = key
        entry.facts |= {"key": str(key.id), "kv": key.kv, "tier": key.tier, "region": key.home}
        destination = self._destination(entry)
        if action not in PASSING and not passing:
            self._unfrozen(entry, self._touching(entry.ask.caller, action, key, destination | entry.ask.hops.places))
        entry.wanted = _DIRECTION.get(action)
        if entry.wanted is not None:
            entry.version = number
            check_use(key, number, entry.wanted, now=self._clock())
        if (entry.wanted is not None or action in _BRINGING) and not leaving:
            self._meets(key)
        if entry.use.purpose is not None:
            entry.facts["purpose"] = entry.use.purpose
        if declared := destination - entry.ask.caller.places:
            entry.facts["dest"] = tuple(sorted(declared))
        return policy.Request(
            caller=entry.ask.caller,
            action=action,
            resource=facts_of(key, number),
            now=entry.ask.arrived // 1_000_000,  # the record's own time: a recompute has it too
            hsm=key.home,
            via=self._via(entry.ask),
            dest=destination if action in _RELEASES else frozenset(),
            target=target,
            purpose=self._purpose(entry.use, key),
            reason=self._reason(entry),
        )

    def _still_agreed(self, decision: Decision) -> None:
        """Denied if an agreement that let data cross has ended meanwhile, or is registered no more."""
        if self._clock() >= self.policy.agreements.ends(decision.rules) * 1_000_000:
            raise policy.Denied(Decision(False, CODE, (), RULE, decision.digest))

    def _via(self, ask: Ask) -> frozenset[str]:
        """Where plaintext of a request passes: at this node, and at each forwarder it came through."""
        return self._here | ask.hops.places

    def _touching(self, caller: Caller, action: str, key: Key, destination: frozenset[str]) -> Touched:
        return Touched(
            key.tenant,
            caller.id,
            key.home,
            destination | {self.region},
            self.policy.actions.get(action, frozenset()),
            key=str(key.id),
            tags=key.tags,
            tier=key.tier,
        )

    def _unfrozen(self, entry: _Entry, touched: Touched) -> None:
        """Frozen or FreezeUnconfirmed unless nothing stops what is touched, which is looked at again before the answer."""
        entry.touched = (*entry.touched, touched)
        if self.freezes.now.epoch:
            entry.facts["frz"] = self.freezes.now.epoch
        try:
            self._thawed(touched)
        except (Frozen, FreezeUnconfirmed):
            entry.facts["rule"] = ("FREEZE",)
            raise

    def _thawed(self, touched: Touched) -> None:
        self.freezes.check(touched, around=self.policy.registry.around)

    def _allowed(self, entry: _Entry, action: str, resource: Resource, *, new: NewKey | None = None) -> None:
        """Ask the policy about something that is not a key, or not yet one."""
        ask = entry.ask
        if action not in PASSING:
            places, groups = ask.caller.places | self._via(ask), self.policy.actions.get(action, frozenset())
            touched = Touched(ask.caller.tenant, ask.caller.id, self.region, places, groups)
            if new is not None:
                touched = touched._replace(region=new.home, tags=new.tags, tier=new.tier)
            self._unfrozen(entry, touched)
        self._decide(
            entry,
            policy.Request(
                caller=entry.ask.caller,
                action=action,
                resource=resource,
                now=entry.ask.arrived // 1_000_000,
                hsm=self.region,
                via=self._via(ask),
                reason=self._reason(entry),
            ),
        )

    def _decide(self, entry: _Entry, request: policy.Request) -> None:
        decision = self._judge(entry, request)
        if not decision.allowed:
            raise policy.Denied(decision)

    def _judge(self, entry: _Entry, request: policy.Request) -> Decision:
        """What the policy says, for the record too."""
        entry.facts["facts"] = self._digests.of(request)
        # Within one batch the same question has the same answer.
        decision = entry.memo.decisions.get(request) if entry.memo is not None else None
        if decision is None:
            decision = self.shadow.decide(self.policy, request, entry.id)
            if entry.memo is not None:
                entry.memo.decisions[request] = decision
        entry.decision = entry.ask.decision = decision
        entry.facts["pol"] = decision.digest[:32]
        if decision.rules:
            entry.facts["rule"] = decision.rules[:8]
        else:
            entry.facts.pop("rule", None)  # of an earlier decision for the same record
        if crosses(decision) and request.purpose:
            # Also where the key has no other: a crossing is told for what it was.
            entry.facts["purpose"] = request.purpose
        return decision

    def _purpose(self, use: Use, key: Key) -> str:
        if use.purpose is not None:
            return use.purpose
        return key.purposes[0] if len(key.purposes) == 1 else ""

    def _reason(self, entry: _Entry) -> str:
        given = entry.use.reason or entry.ask.reason
        if given is not None:
            return given
        caller = entry.ask.caller
        tenant = self.policy.registry.tenant(caller.tenant) if caller.tenant is not None else None
        return tenant.default_reason if tenant is not None else "unspecified"

    def _destination(self, entry: _Entry) -> frozenset[str]:
        # What the request declares can only widen where the plaintext may go, never narrow it.
        return entry.ask.caller.places | self.places("/destination", entry.use.destination)

    async def _inside(self, key: Key, call: Callable[[], T]) -> T:
        with stage("hsm"):
            return await self._hsms.run(key.home, call, who=key.tenant)

    async def _signing(self, key: Key, call: Callable[[], T]) -> T:
        with stage("hsm"):
            return await self._hsms.run(key.home, call, who=key.tenant, heavy=key.spec in _HEAVY)

    async def _at(self, region: str, call: Callable[[], T], *, who: str | None = None, slow: bool = False) -> T:
        with stage("hsm"):
            return await self._hsms.run(region, call, who=who or "", slow=slow)

    def _accepting(self, op: str) -> None:
        """Draining, or audit.log.Unavailable: what could not be recorded is not begun."""
        if self.draining:
            raise Draining("this node is shutting down")
        self.log.accepting(op)

    def _go(self, entry: _Entry) -> None:
        """The end of a dry run: everything was decided, nothing was done."""
        if entry.ask.dry_run and entry.decision is not None:
            raise WouldAllow(entry.decision)

    @asynccontextmanager
    async def _recorded(self, entry: _Entry) -> AsyncIterator[_Entry]:
        """Commit one record of what the block did, whatever came of it; only then does its result get out."""
        ask = entry.ask
        ask.decision_id = entry.id
        try:
            self._accepting(entry.op)
            yield entry
            self._go(entry)
        except Exception as error:
            await self._append(entry, error)
            raise
        try:
            await self._append(entry, None)
        except ChangeFailed as failed:
            ask.receipt = failed.receipt
            raise _cause(failed) from failed
        (late,) = await self._withheld([entry])
        if late is not None:
            raise late

    async def _append(self, entry: _Entry, error: Exception | None) -> None:
        """Make the record of an operation durable; of a flood of refused strangers, or of requests too many, count it."""
        ask, record = entry.ask, self._record(entry, error)
        flood = ask.caller.authn == "none" or record.why in _TOO_MANY
        if flood and record.why is not None and self.log.state == "RUNNING":
            ask.counted = self._refusals.only_counted(ask.caller.source, record.why)
        if not ask.counted:
            change = self._counting(entry) if error is None else None
            with stage("audit"):
                ask.receipt = await self.log.append(record, change=change)

    async def tell_refusals(self) -> None:
        """Record how many refusals were only counted since the last time; those that cannot be are kept for the next."""
        for refusals in (self._refusals, self._unknown):
            counted = refusals.taken()
            try:
                while counted:
                    c = counted[-1]
                    record = event.Suppressed(
                        id=uuid4(),
                        ts=self._clock(),
                        node=self.node,
                        src=c.source or None,
                        why=c.why,
                        count=c.count,
                        from_=c.since,
                        to=c.until,
                    )
                    await self.log.append(record)
                    counted.pop()
            finally:
                refusals.give_back(counted)

    async def _withheld(self, entries: Sequence[_Entry]) -> list[Exception | None]:
        """The reason not to release each recorded result: it was stopped while its record became durable.

        A row that changed is read again, and what is stopped is recorded; then all the others are looked at once more. Nothing
        waits between the last look and the return: no result leaves after a stop that this worker has acknowledged.
        """
        late: list[Exception | None] = [None] * len(entries)
        rows: dict[uuid.UUID, Key] = {}  # as they are now, of keys that changed
        while True:
            going = [place for place, reason in enumerate(late) if reason is None]
            found = [(place, self._stopped(entries[place], rows)) for place in going]
            if all(reason is None for _, reason in found):
                return late
            for place, reason in found:
                if isinstance(reason, uuid.UUID):
                    late[place] = await self._read_again(entries[place], reason, rows)
                elif reason is not None:
                    late[place] = await self._note_withheld(entries[place], reason)

    async def _read_again(self, entry: _Entry, key_id: uuid.UUID, rows: dict[uuid.UUID, Key]) -> Exception | None:
        try:
            rows[key_id] = await self.at_hand.by_id(key_id)
        except Exception as error:  # unknown now, or nobody can say
            return await self._note_withheld(entry, error)
        return None

    def _stopped(self, entry: _Entry, rows: Mapping[uuid.UUID, Key]) -> Exception | uuid.UUID | None:
        """Why a result must not leave: frozen, disabled, destroyed, fenced, ungranted; or a key whose row is to be read first."""
        fresh: list[tuple[Key, int | None, Direction]] = []
        for key, version, wanted in entry.uses():
            row = rows.get(key.id, key)
            if not self.keystore.current(row):
                return key.id
            if row is not key:
                fresh.append((row, version, wanted))
        crossed = entry.decision is not None and crosses(entry.decision)
        if not fresh and not crossed and not entry.touched:
            return None
        try:
            held = all(map(self.grants.still, entry.grants)) and all(map(self.exceptions.still, entry.waivers))
            if not held:
                raise self._ungranted()
            if crossed and entry.decision is not None:
                self._still_agreed(entry.decision)
            for touched in entry.touched:
                self._thawed(touched)
            for row, version, wanted in fresh:
                check_use(row, version or row.latest_number, wanted, now=self._clock())
        except Exception as error:
            return error
        return None

    async def _note_withheld(self, entry: _Entry, reason: Exception) -> Exception:
        await self.log.append(
            event.Withheld(
                id=uuid4(),
                ts=self._clock(),
                node=self.node,
                tenant=entry.ask.caller.tenant,
                intent=entry.id,
                why=outcome_of(reason)[1],
            )
        )
        return reason

    async def _control(
        self,
        ask: Ask,
        op: str,
        parameters: Mapping[str, object],
        decide: Callable[[_Entry], T],
        plan: Callable[[T], Plan],
        *,
        facts: Mapping[str, Any] = NO_FACTS,
        region: str | None = None,
        slow: bool = False,
        beside: bool = False,
    ) -> Plan:
        """Decide; make the intent durable; act; commit outcome and change in one transaction.

        `slow` acts make or take in keys, which may take seconds: they never run on the event loop. Stopping a key is not
        slow: it must not wait for its turn beside a loop that is busy with the uses it stops. `beside` acts reach no HSM
        and compute for long: they run on a thread of their own. `facts` may grow on the way: each record has those of
        its time.
        """
        entry = _Entry(ask, op, rh=request_hash(op, parameters))
        ask.decision_id = entry.id
        try:
            entry.facts |= facts
            self._accepting(op)
            subject = decide(entry)
            entry.facts |= facts
            if ask.dry_run and entry.decision is not None:
                raise WouldAllow(entry.decision)
        except Exception as error:
            ask.receipt = await self.log.append(self._record(entry, error))
            raise
        with stage("audit"):
            await self.log.append(self._record(entry, None, kind=event.Intent))
        done = _Entry(ask, op, **{**entry.facts, "intent": entry.id})
        done.key, done.decision, done.touched = entry.key, entry.decision, entry.touched
        home = region or (entry.key.home if entry.key is not None else self.region)
        try:
            if beside:
                made = await asyncio.to_thread(plan, subject)
            else:
                made = await self._at(home, lambda: plan(subject), who=ask.caller.tenant, slow=slow)
        except Exception as error:
            done.facts |= facts
            ask.receipt = await self.log.append(self._record(done, error, kind=event.Outcome))
            raise
        done.facts |= facts
        await self._commit(ask, done, made)
        return made

    async def _commit(self, ask: Ask, done: _Entry, made: Plan) -> None:
        def write(connection: Connection) -> None:
            for touched in done.touched:  # a change that was decided before a freeze does not come after it
                self._thawed(touched)
            made.write(connection)
            if ask.remember is not None:
                ask.remember(connection, made.key)

        if made.key is not None:
            done.facts |= {
                "key": str(made.key.id),
                "kv": made.key.kv,
                "tier": made.key.tier,
                "region": made.key.home,
            }
        try:
            with stage("audit"):
                ask.receipt = await self.log.append(
                    self._record(done, None, kind=event.Outcome), change=Change(write, made.applied)
                )
        except ChangeFailed as failed:
            ask.receipt = failed.receipt
            raise _cause(failed) from failed
        ask.executed = True

    def _record(self, entry: _Entry, error: Exception | None, *, kind: type[Any] = event.Op) -> Any:
        ask, caller, now = entry.ask, entry.ask.caller, self._clock()
        out, why = ("ok", None) if error is None or isinstance(error, WouldAllow) else outcome_of(error)
        if isinstance(error, RowDamaged):
            self.damaged_rows += 1
            told = {"op": entry.op, "tenant": caller.tenant, "request_id": ask.request_id, "reason": str(error)}
            alarm.critical("a stored key row was changed outside the service", extra={"facts": told})
        if entry.refused is not None:
            out, why = entry.refused
        facts = dict(entry.facts)
        if (
            entry.context
            and len(entry.context) <= MAX_PAIRS
            and caller.tenant is not None
            and caller.tenant in self._secrets
        ):
            generation, secret = self._secrets[caller.tenant]
            facts["ctx"] = event.hash_context(secret, generation, entry.context)
        facts.setdefault("pol", self.policy.digest[:32])
        if why is not None:
            facts |= {"why": why}
        if entry.decision is not None and out == DENIED and not entry.decision.rules:
            facts["rule"] = ("DEFAULT",)
        if len(caller.places) == 1:
            facts["creg"] = next(iter(caller.places))
        if ask.hops.names:
            facts |= {"hops": ask.hops.names, "via": tuple(sorted(ask.hops.places))}
            if ask.hops.origin:
                facts["orig"] = tuple(sorted(ask.hops.origin))
        ask.facts = {
            "op": entry.op,
            "out": out,
            "why": why,
            "key": facts.get("key"),
            "rule": facts.get("rule"),
        }
        return kind(
            id=entry.id,
            ts=ask.arrived,
            node=self.node,
            tenant=caller.tenant,
            actor=event.actor_field(caller.id),
            authn=caller.authn,
            src=caller.source or None,
            req=ask.request_id,
            creq=ask.client_request_id,
            trace=ask.trace,
            op=entry.op,
            out=out,
            dry=True if ask.dry_run else None,
            reason=entry.use.reason or ask.reason,
            ev=caller.evidence.hex() or None,
            us=max(0, now - ask.arrived),
            **facts,
        )

    def places(self, pointer: str, names: Sequence[str]) -> frozenset[str]:
        """The regions that names of places, jurisdictions or groups stand for; RequestInvalid names the field."""
        try:
            return self.policy.registry.expand(names)
        except policy.UnknownPlace:
            raise RequestInvalid((pointer, "unknown_place", "name places of the charter: GET /v1/regions")) from None

    def tier_missing(self, key: Key | NewKey) -> list[str]:
        """What a key lacks to meet its tier now; empty if it meets it."""
        return [gap.what for gap in self.bars.verdict(self.policy.registry, key, self._clock()).gaps]

    def _meets(self, key: Key | NewKey) -> None:
        """TierNotMet unless a key meets its tier now."""
        if missing := self.tier_missing(key):
            raise TierNotMet(missing)

    async def load_tenant_secrets(self) -> None:
        """Have every tenant's audit key at hand, before the first request and with a new bundle: recording calls no HSM."""
        for name in self.policy.registry.tenant_names():
            if name in self._secrets:
                continue
            known = self.keystore.has_tenant_secret(name)
            self._secrets[name] = await self._at(self.region, partial(self.keystore.tenant_secret, name))
            if not known:
                await self.note("tenant_audit_key")


def _cause(failed: ChangeFailed) -> Exception:
    """Why a change was undone."""
    return failed.__cause__ if isinstance(failed.__cause__, Exception) else failed


def _planned(plan: Plan) -> Key:
    if plan.key is None:
        raise RuntimeError("this plan concerns no key")
    return plan.key


def facts_of(key: Key, version: int) -> KeyFacts:
    """A key as the policy sees it: the stricter of the states of key and version counts."""
    state = key.state
    if state is KeyState.ACTIVE and 1 <= version <= len(key.versions):
        state = key.version(version).state
    if key.delete_at is not None and state is not KeyState.COMPROMISED:
        state = KeyState.SUSPENDED
    return KeyFacts(
        id=str(key.id),
        tenant=key.tenant,
        tier=key.tier,
        residency=key.residency,
        execution=key.execution,
        reach=key.reach,
        egress=key.egress,
        failover=key.failover,
        shared_with=key.shared_with,
        purposes=key.purposes,
        state=str(state),
    )
