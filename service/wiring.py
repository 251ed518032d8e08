"""From configuration to a running node. The only place that chooses implementations."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from fastapi import FastAPI
from sqlalchemy import Engine

import audit.log
from audit.anchors import NodeFiles, TokenObject, WriteOnce
from audit.archive import Archiver, Retention
from audit.disk import Disk, Watermarks
from audit.forward import Forwarder, Skipped, Target, Wanted
from audit.index import Indexer, IndexKey
from audit.notary import Notary
from audit.observed import Observations
from audit.proofs import Prover
from audit.rollback import Guard, Watched
from audit.search import Search
from keystore import (
    Admin,
    Catalog,
    DataKeeper,
    Fleet,
    Hsm,
    HsmFault,
    HsmGroup,
    HsmUnavailable,
    Imports,
    Keystore,
    SelfTestFailed,
    UnsupportedByHsm,
    proof_of,
)
from keystore.pkcs11 import TokenConfig, open_token, total_calls
from policy import BundleRefused, Freezes, Policy
from policy.bundle import files_in
from policy.exceptions import Exceptions, Waiver
from policy.grants import Grant, Grants
from policy.rows import EXCEPTION, GRANT, FreezeRows, FreezeRowsDamaged, GrantUses, SignedRows
from policy.signatures import Signer
from service.app import create_app
from service.approvals import Approver, GroupRule, load_approver
from service.callers import callers
from service.ceremonies import record_ceremonies
from service.compliance import Bars
from service.config import (
    ApprovalsSection,
    Config,
    FolderAnchor,
    HsmAnchor,
    LimitsSection,
    SinkSection,
    WriteOnceAnchor,
)
from service.containment import Containment
from service.database import close_engine, migrate, open_engine, ping
from service.decisions import BundleLost, Bundles, Decisions
from service.drills import Drills
from service.exceptions import Excepting
from service.following import Followed, Following
from service.grants import Granting
from service.health import Health
from service.hsmcalls import THREADS, HsmCalls
from service.identity import Authenticator
from service.identity.api_token import ApiTokenProvider
from service.identity.hops import Ways
from service.identity.mtls import MtlsProvider
from service.identity.oidc import OidcProvider
from service.integrity import NAME
from service.jobs import Forwarding, Scheduler, archive_old, index, notarise
from service.keyfiles import KeyFileRefused, public_key
from service.keygraph import GraphWatch
from service.keyrequests import KeyRequests
from service.kms import POLICY_SETTING, Kms, facts_of
from service.limits import RateLimits
from service.mark import Mark
from service.policychanges import PolicyChanges
from service.protocols.native import Limits, Native
from service.quorum import Quorum, Rule
from service.requests import Observer
from service.rows import (
    ApiTokens,
    Applied,
    AppliedDamaged,
    AppliedRows,
    ApprovalRows,
    Idempotency,
    Lease,
    Operations,
    Settings,
)
from service.shadow import Shadow
from service.sovereignty import Sovereignty, follow
from service.timekeeping import Timekeeper
from service.timestamps import Timestamps
from service.tlsfiles import TlsFiles
from service.tracing import Tracing
from service.turns import Turns
from service.webauthn import Credential, decoded
from service.witnesses import Witnesses, checked, post_quantum_of, pusher_of, witness_of

log: Final = logging.getLogger("skms.wiring")
START_SAMPLE: Final = 25  # a start takes up a bundle that a check or a reload has tried with all 500
POLL_S: Final = 0.2  # other workers' changes are seen within this time
_PEPPER: Final = b"skms/api-token-pepper/v1"
_INDEX: Final = b"skms/audit-index/v1"
_ROWS: Final = b"skms/freezes-and-approvals/v1"


@dataclass(frozen=True, slots=True)
class Node:
    """What `serve` needs of a wired node."""

    app: FastAPI
    kms: Kms
    health: Health
    scheduler: Scheduler
    catalog: Catalog
    tls: TlsFiles

    @staticmethod
    def pkcs11_calls() -> int:
        """PKCS#11 functions called by this process so far, beside the canaries of its own health task."""
        return total_calls(but=[t.ident for t in threading.enumerate() if t.name.startswith("asyncio") and t.ident])


def now() -> int:
    """Microseconds since the epoch."""
    return time.time_ns() // 1_000


def token_configs(config: Config) -> list[TokenConfig]:
    """The tokens a configuration names, as the PKCS#11 layer wants them."""
    return [
        TokenConfig(
            name=h.name,
            region=h.region,
            vendor=h.vendor,
            module=h.module,
            token_label=h.token_label,
            token_serial=h.token_serial,
            token_dir=h.token_dir,
            pin_file=h.pin_file,
            sessions=h.sessions,
            environment=h.environment,
            lock_dir=config.node.state_dir,
            installation=config.node.installation,
        )
        for h in config.hsm
    ]


def token_unconfigured(
    *, vendor: str, module: Path, token_label: str, pin_file: Path, token_dir: Path | None
) -> TokenConfig:
    """A token that stands in no configuration yet, to be probed: its installation is nobody's."""
    return TokenConfig(
        name="probe",
        region="none",
        vendor=vendor,
        module=module,
        token_label=token_label,
        token_dir=token_dir,
        pin_file=pin_file,
        lock_dir=Path(tempfile.gettempdir()),
        installation=uuid.uuid4(),
    )


def refuse_test_profile(token: TokenConfig, *, development: bool) -> None:
    """SelfTestFailed if a token with a test profile is to hold keys under a charter that is not for development."""
    vendor = token.profile()
    if vendor.test and not development:
        waived = ", ".join(vendor.waivers) or "none"
        raise SelfTestFailed(
            f"HSM {token.name}: its profile {vendor.name!r} is for tests (self-test rules waived: {waived}) and the policy's "
            "charter is not for development: use another HSM, or a profile that waives nothing"
        )


class AuditSigner:
    """The audit keys of one region's HSMs, as the log wants them."""

    def __init__(self, fleet: Fleet, region: str) -> None:
        self._fleet, self._region = fleet, region

    def public_key(self) -> bytes:
        """SubjectPublicKeyInfo (DER) of the HSM that would sign now."""
        return self._fleet.groups[self._region].audit_public_key()

    def known_keys(self) -> tuple[bytes, ...]:
        """Those of every HSM that is or was in any region: nodes of several regions write one log, and one of them signs."""
        return self._fleet.audit_keys()

    def sign(self, statement: bytes) -> bytes:
        """Sign a statement inside the first HSM that can."""
        return self._fleet.groups[self._region].audit_sign(statement)


class HsmShelf:
    """The data objects of a region's HSMs, as an anchor wants them."""

    _ROLE: Final = "audit-anchor"

    def __init__(self, group: HsmGroup) -> None:
        self._group = group

    def get(self) -> Sequence[tuple[str, bytes]]:
        """What each HSM that is up holds; OSError if none can be asked."""
        try:
            return [(name, data) for name, keeper in self._keepers() for data in keeper.data_objects(self._ROLE)]
        except (HsmUnavailable, HsmFault) as error:
            raise OSError(str(error)) from None

    def put(self, data: bytes) -> None:
        """Store on every HSM that is up; OSError if none keeps data objects."""
        kept, reason = 0, ""
        for _, keeper in self._keepers():
            try:
                keeper.keep_data_object(self._ROLE, data)
                kept += 1
            except (HsmUnavailable, HsmFault, UnsupportedByHsm) as error:
                reason = str(error)
        if not kept:
            raise OSError(reason)

    def _keepers(self) -> list[tuple[str, DataKeeper]]:
        found: list[tuple[str, DataKeeper]] = []
        reason = "no HSM of the region keeps data objects"
        for name in self._group.names:
            try:
                hsm = self._group.on(name)
            except HsmUnavailable as error:
                reason = str(error)
                continue
            if isinstance(hsm, DataKeeper):
                found.append((name, hsm))
        if not found:
            raise OSError(reason)
        return found


def guard_of(config: Config, engine: Engine, fleet: Fleet) -> Guard:
    """What compares the database with the anchors of a configuration; the node's own file is always one."""
    own = config.node.state_dir / "anchors"
    own.mkdir(parents=True, exist_ok=True, mode=0o700)
    watched = [Watched(NodeFiles(own, config.node.name))]
    for section in config.audit.anchor:
        match section:
            case FolderAnchor():
                watched.append(
                    Watched(NodeFiles(section.path, config.node.name), section.required, every_s=section.every_s)
                )
            case WriteOnceAnchor():
                watched.append(Watched(WriteOnce(section.path), section.required, every_s=section.every_s, leader=True))
            case HsmAnchor():
                shelf = HsmShelf(fleet.groups[config.node.region])
                watched.append(Watched(TokenObject(shelf), section.required, every_s=section.every_s, leader=True))
    signer = AuditSigner(fleet, config.node.region)
    return Guard(
        engine,
        origin=config.node.origin,
        known_keys=signer.known_keys,
        watched=watched,
        monotonic=time.monotonic,
        observed=observations_of(config),
    )


def observations_of(config: Config) -> Observations:
    """Where the workers of this node keep what a witness saw that the database does not hold."""
    return Observations(config.node.state_dir / "witness-observations")


def serving_tokens(config: Config) -> list[TokenConfig]:
    """The tokens that a node serves from: all but those that are stored away as backups."""
    away = stored_away(config)
    return [token for token in token_configs(config) if token.name not in away]


def stored_away(config: Config) -> dict[str, str]:
    """The tokens that hold a root KEK as a backup, by name, and its region."""
    return {h.name: h.region for h in config.hsm if h.backup}


def groups_of(config: Config, catalog: Catalog) -> dict[str, HsmGroup]:
    """The HSM groups of a configuration, not open yet."""
    tokens, locks = serving_tokens(config), {h.module: threading.Lock() for h in config.hsm}
    minimum = {g.region: g.minimum for g in config.hsm_group}

    def opener(token: TokenConfig) -> Callable[[], Hsm]:
        def open_it() -> Hsm:
            with locks[token.module]:  # modules start at the same time, the tokens of one after each other
                return open_token(token)

        return open_it

    return {
        region: HsmGroup(
            region,
            {t.name: opener(t) for t in tokens if t.region == region},
            minimum=minimum.get(region, 1),
            proven=proof_of(catalog, region),
        )
        for region in dict.fromkeys(t.region for t in tokens)
    }


async def open_fleet(config: Config, catalog: Catalog, *, clock: Callable[[], int]) -> Fleet:
    """Every HSM that can be opened, those of different modules at the same time.

    HsmUnavailable or SelfTestFailed, for the first reason, if a region would have none; the others are tried again by
    the health task.
    """
    groups = groups_of(config, catalog)
    try:
        await asyncio.gather(*(asyncio.to_thread(group.open) for group in groups.values()))
        fleet = Fleet(catalog, groups, clock=clock)
        await asyncio.to_thread(fleet.follow)
        await asyncio.to_thread(fleet.remember_audit_keys)
    except BaseException:
        for group in groups.values():
            group.close()
        raise
    return fleet


async def audit_keys(config: Config, engine: Engine) -> tuple[bytes, ...]:
    """Every audit key that HSMs of the configured regions have or had: what the log is verified with."""
    fleet = await open_fleet(config, Catalog(engine), clock=now)
    try:
        return fleet.audit_keys()
    finally:
        for group in fleet:
            group.close()


def signers_of(config: Config) -> list[Signer]:
    """Who signs the bundle's directory; BundleRefused if a key cannot be read."""
    try:
        return [Signer(one.part, public_key(one.public_key, one.algorithm)) for one in config.policy.signer]
    except KeyFileRefused as error:
        raise BundleRefused("signatures", 0, f"[[policy.signer]]: {error}") from None


def bundle_at_start(config: Config, engine: Engine) -> tuple[Policy, Applied | None]:
    """The bundle that a quorum applied, whatever the directory holds, or the directory's if none was; BundleRefused.

    Who wrote down that it was applied is not known before an HSM is at hand: until then nothing is decided by it.
    """
    try:
        applied = AppliedRows.named(engine)
        if applied is None:
            return Policy.load(config.policy.bundle, signers=signers_of(config), sample=START_SAMPLE), None
        found = Bundles(engine).in_force(applied)
    except (AppliedDamaged, BundleLost) as error:
        raise BundleRefused("applied bundle", 0, f"{error}; restore the database from a backup that holds it") from None
    if not _holds(config.policy.bundle, found):
        told = {"applied": found.digest[:12], "version": found.version, "directory": str(config.policy.bundle)}
        log.warning("the applied bundle is in force, and the directory holds another one", extra={"facts": told})
    return found, applied


def believe(kms: Kms, bundle: Policy, applied: Applied | None) -> None:
    """Decide by what the setting named before an HSM was at hand, now that one tells who wrote it; BundleRefused."""
    try:
        if kms.applied.get() != applied:
            raise AppliedDamaged("another one was applied while this node started: start it again")
    except (AppliedDamaged, FreezeRowsDamaged) as error:
        raise BundleRefused("applied bundle", 0, str(error)) from None
    if applied is not None:
        kms.in_force(bundle, applied.digest)


def _holds(directory: Path, bundle: Policy) -> bool:
    """Whether a directory has exactly the files of a bundle."""
    try:
        return files_in(directory) == dict(bundle.bundle.sources)
    except (OSError, BundleRefused):
        return False


def applied_of(config: Config, engine: Engine, fleet: Fleet) -> AppliedRows:
    """The bundles that a quorum has applied."""
    mark = config.node.state_dir / "policy-version"
    return AppliedRows(engine, key=row_keys(fleet), region=config.node.region, mark=mark)


def bars_of(config: Config, fleet: Fleet) -> Bars:
    """What each tier asks of the HSMs, suppliers and backups that this node has."""
    return Bars(
        {h.name: h.supplier or None for h in config.hsm},
        regions=fleet.groups,
        serving=functools.partial(serving, fleet),
        backups=stored_away(config),
    )


async def kms_of(
    stack: contextlib.AsyncExitStack,
    config: Config,
    engine: Engine,
    bundle: Policy,
    catalog: Catalog,
    fleet: Fleet,
    index_key: IndexKey,
    *,
    clock: Callable[[], int],
    workers: int = 1,
) -> Kms:
    """The operations of a node, with its chain open; leaving the stack closes that."""
    # Salts and IVs come from the kernel: 0.6 us a call, and the token's own generator guards its keys.
    keystore = Keystore(catalog, fleet.groups, installation=config.node.installation, clock=clock)
    log = log_of(config, engine, fleet)
    await log.start()
    stack.push_async_callback(log.close)
    tokens = ApiTokens(
        engine,
        pepper=fleet.groups[config.node.region].row_mac(_PEPPER),
        installation=str(config.node.installation),
        clock=clock,
    )
    members = max(len(group.names) for group in fleet)
    calls = HsmCalls(fleet.groups, deadline_s=config.limits.hsm_deadline_s, threads=THREADS * members)
    stack.callback(calls.close)
    shadow = Shadow()
    stack.callback(shadow.close)
    kms = Kms(
        node=config.node.name,
        region=config.node.region,
        keystore=keystore,
        imports=Imports(keystore, catalog),
        policy_now=bundle,
        applied=applied_of(config, engine, fleet),
        load_policy=lambda old: Policy.load(
            config.policy.bundle, after=old, known=kms.policy, signers=signers_of(config)
        ),
        log=log,
        search=(search := Search(engine, index_key)),
        prover=Prover(engine, origin=config.node.origin),
        tokens=tokens,
        hsms=calls,
        fleet=fleet,
        clock=clock,
        shadow=shadow,
        exceptions=Exceptions(boot_clock, time_of := Timekeeper(clock, boot_clock, recorded=lambda: log.newest)),
        grants=Grants(boot_clock, time_of),
        grant_uses=GrantUses(engine, key=row_keys(fleet), region=config.node.region),
        rates=rates_of(config.limits, workers),
        freezes=Freezes(serving=functools.partial(serving, fleet), monotonic=boot_clock),
        decisions=Decisions(
            search,
            Bundles(engine).starting(bundle, at=clock()),
            callers=callers(tokens, config.oidc),
            key_facts=lambda key_id: facts_of(found := keystore.by_id(key_id), found.latest_number),
        ),
        bars=bars_of(config, fleet),
        witness=witness_of(
            config.witness,
            engine,
            origin=config.node.origin,
            audit_keys=fleet.audit_keys(),
            clock=now,
        ),
    )
    stack.callback(kms.at_hand.close)
    return kms


def tracing_of(config: Config, stack: contextlib.AsyncExitStack) -> Tracing | None:
    """The tracer, where a collector is configured; it ends with the stack. TracingUnavailable without its packages."""
    if not config.tracing.url:
        return None
    made = Tracing(config.tracing, node=config.node.name, region=config.node.region)
    stack.push_async_callback(made.close)
    return made


def observer_of(config: Config, kms: Kms, operations: Operations, figures: Sovereignty, tls: TlsFiles) -> Observer:
    """What counts and tells of requests, and of what the node is asked about by metrics."""
    observer = Observer(kms, operations, node=config.node.name, version=version())
    observer.watch_sovereignty(figures)
    observer.watch_certificates(tls.ends, lambda: tls.refused)
    return observer


def start_jobs(stack: contextlib.AsyncExitStack, *jobs: Coroutine[Any, Any, None]) -> None:
    """Run them beside each other until the stack ends."""
    for job in jobs:
        stack.callback(asyncio.create_task(job).cancel)


async def begin(kms: Kms, bundle: Policy, applied: Applied | None) -> None:
    """Record that this worker starts, and under which bundle."""
    await asyncio.to_thread(believe, kms, bundle, applied)
    await kms.load_tenant_secrets()
    await kms.note("start")
    if applied is not None:
        await kms.tell_active()


async def end(kms: Kms) -> None:
    """Take no new work, and record that this worker stops."""
    kms.draining = True
    with contextlib.suppress(audit.log.Unavailable):  # a log that cannot be written keeps no process alive
        await kms.tell_refusals()
        await kms.note("stop")


@contextlib.asynccontextmanager
async def wire(config: Config, *, clock: Callable[[], int] = now, workers: int = 1) -> AsyncIterator[Node]:
    """A node that is ready to serve; leaving the block drains it and closes its chain. `clock` gives microseconds.

    It is one of `workers`, and has its share of what the configuration gives to all of them.
    """
    async with contextlib.AsyncExitStack() as stack:
        checked(config)
        tracing = tracing_of(config, stack)
        engine = open_engine(config.database.url)
        stack.push_async_callback(close_engine, engine)
        migrate(engine, lock_dir=config.node.state_dir)
        bundle, applied = bundle_at_start(config, engine)
        for token in serving_tokens(config):
            refuse_test_profile(token, development=bundle.development)
        catalog = Catalog(engine)
        fleet = await open_fleet(config, catalog, clock=clock)
        for group in fleet:
            stack.callback(group.close)
        guard = guard_of(config, engine, fleet)
        await asyncio.to_thread(guard.start)  # before this process writes its first record
        index_key = IndexKey(fleet.groups[config.node.region].row_mac(_INDEX))
        kms = await kms_of(stack, config, engine, bundle, catalog, fleet, index_key, clock=clock, workers=workers)
        await begin(kms, bundle, applied)
        await record_ceremonies(kms, Settings(engine), config.node.state_dir)
        mtls, tls = peers_of(config, kms, clock)
        identity = identity_of(config, kms, mtls, clock)
        health = Health(kms, fleet, ping=lambda: ping(engine))
        await health.check_hsms(everyone=True)
        owner = f"{config.node.name}/{uuid.uuid4()}"
        lease, operations = Lease(engine, clock=clock), Operations(engine, clock=clock)
        containment = await stack.enter_async_context(obeying(config, kms, engine, owner=owner, clock=clock))
        granting, excepting = await stack.enter_async_context(allowing(config, kms, engine, containment.quorum))
        changes = PolicyChanges(kms, Settings(engine), quorum=containment.quorum, clock=clock)
        drills = Drills(kms, operations, lease, owner=owner, clock=clock)
        idempotency = Idempotency(engine, clock=clock)
        freezes = FreezeRows(engine, key=row_keys(fleet), region=config.node.region, clock=now)
        figures = Sovereignty(kms, operations, freezes, clock=clock)
        observer = observer_of(config, kms, operations, figures, tls)
        native = Native(
            kms,
            identity,
            ways=ways_of(config, kms, mtls, idempotency, clock),
            drills=drills,
            containment=containment,
            requests=KeyRequests(kms, containment.quorum),
            granting=granting,
            excepting=excepting,
            policy_changes=changes,
            sovereignty=figures,
            idempotency=idempotency,
            health=health,
            observer=observer,
            limits=Limits(config.limits.body, config.limits.batch_body),
            turns=turns_of(config.limits, observer),
            clock=clock,
            tracing=tracing,
        )
        graph = GraphWatch(kms, Settings(engine), containment, clock=clock)
        scheduler = Scheduler(kms, lease, owner=owner, clock=clock, nightly=graph.due)
        start_sinks(config, engine, kms, observer, stack)
        start_jobs(
            stack,
            *(scheduler.run(), drills.run(), tls.follow(), observer.follow(), follow(figures)),
            *(health.watch(), poll(kms, Settings(engine)), containment.run(), tell_refusals(kms)),
            *audit_jobs(config, engine, fleet, kms.log, guard, index_key, owner=owner),
            *watch_witnesses(config, engine, kms.log, observer, owner=owner),
        )
        yield Node(create_app({"": native}), kms, health, scheduler, catalog, tls)
        await end(kms)


def rates_of(section: LimitsSection, workers: int) -> RateLimits:
    """The rate limits of one worker."""
    return RateLimits(
        tenant=section.tenant_rate,
        tenants=section.tenant_rates,
        key=section.key_rate,
        burst_s=section.burst_s,
        workers=workers,
    )


def turns_of(section: LimitsSection, observer: Observer) -> Turns:
    """The places for requests of one worker, shown in its metrics."""
    turns = Turns(places=section.in_flight, queue=section.queue, wait_s=section.queue_wait_s)
    observer.watch_turns(turns)
    return turns


def serving(fleet: Fleet, region: str) -> frozenset[str]:
    """The HSMs of a region that may be called: all that are not drained."""
    group = fleet.groups.get(region)
    return frozenset[str]() if group is None else frozenset(m.name for m in group.members() if m.admin != Admin.DRAINED)


def approvers_of(section: ApprovalsSection) -> tuple[Approver, ...]:
    """The approvers of a configuration; ApprovalRefused if a key cannot be read."""
    return tuple(
        load_approver(
            a.name,
            a.public_key,
            algorithm=a.algorithm,
            identities=a.identities,
            tenants=a.tenants,
            groups=a.groups,
            credential=None
            if a.webauthn is None
            else Credential(decoded(a.webauthn.credential), a.webauthn.rp, a.webauthn.origins),
        )
        for a in section.approver
    )


def rules_of(section: ApprovalsSection) -> tuple[GroupRule, ...]:
    """Which groups approve, by a configuration."""
    return tuple(GroupRule(rule.places, rule.kinds, rule.tenants) for rule in section.rule)


def quorum_of(
    config: Config, kms: Kms, engine: Engine, key: Callable[[str], bytes], *, clock: Callable[[], int]
) -> Quorum:
    """The requests that approvers of a configuration decide about."""
    section = config.approvals
    rule = Rule(
        approvers_of(section), section.needed, section.lifetime_s, str(config.node.installation), rules_of(section)
    )
    return Quorum(kms, ApprovalRows(engine, key=key, region=config.node.region), rule, clock=clock)


@contextlib.asynccontextmanager
async def obeying(
    config: Config, kms: Kms, engine: Engine, *, owner: str, clock: Callable[[], int]
) -> AsyncIterator[Containment]:
    """This worker obeys the stored freezes, on the machine's time, until the block is left."""
    key = row_keys(kms.fleet)
    rows = FreezeRows(engine, key=key, region=config.node.region, clock=now)
    quorum = quorum_of(config, kms, engine, key, clock=clock)
    mark = Mark(config.node.state_dir / "freeze-epoch")
    containment = Containment(kms, rows, quorum=quorum, worker=owner, clock=now, monotonic=boot_clock, mark=mark)
    await containment.begin()
    try:
        yield containment
    finally:
        containment.end()


@contextlib.asynccontextmanager
async def allowing(
    config: Config, kms: Kms, engine: Engine, quorum: Quorum
) -> AsyncIterator[tuple[Granting, Excepting]]:
    """This worker knows the stored grants and exceptions until the block is left."""
    key, node = row_keys(kms.fleet), config.node
    grants, exceptions = [
        SignedRows(engine, kind, key=key, region=node.region, mark=Mark(node.state_dir / f"{kind}-epoch"))
        for kind in (GRANT, EXCEPTION)
    ]
    followed = [Followed(grants, Grant.of, kms.grants), Followed(exceptions, Waiver.of, kms.exceptions)]
    following = Following(followed, monotonic=boot_clock)
    await following.begin()
    granting = Granting(kms, grants, GrantUses(engine, key=key, region=node.region), following)
    try:
        yield granting, Excepting(kms, exceptions, quorum, following)
    finally:
        following.end()


def row_keys(fleet: Fleet) -> Callable[[str], bytes]:
    """The MAC key of freezes and approvals by the region that wrote them; each is derived once, inside an HSM there."""

    @functools.cache
    def key(region: str) -> bytes:
        group = fleet.groups.get(region)
        if group is None:
            raise FreezeRowsDamaged(f"a row of region {region}: no HSM of that region is configured here")
        return group.row_mac(_ROWS)

    return key


def audit_jobs(
    config: Config,
    engine: Engine,
    fleet: Fleet,
    log: audit.log.Log,
    guard: Guard,
    index_key: IndexKey,
    *,
    owner: str,
) -> list[Coroutine[Any, Any, None]]:
    """What is done with the log beside writing it: signed, time-stamped, indexed, archived. Leased, on the machine's time."""
    lease = Lease(engine, clock=now)
    notary = notary_of(config, engine, fleet, clock=now)
    jobs = [
        notarise(notary, lease, log, engine, guard, owner=owner, clock=now),
        Timestamps(engine, lease, config.audit.timestamp, owner=owner, clock=now).run(),
        index(Indexer(engine, index_key), lease, owner=owner),
    ]
    archiver = archiver_of(config, engine, fleet)
    if archiver is not None:
        jobs.append(archive_old(archiver, lease, log, owner=owner, node=config.node.name))
    return jobs


def notary_of(config: Config, engine: Engine, fleet: Fleet, *, clock: Callable[[], int]) -> Notary:
    """What signs the checkpoints of the configured log."""
    signer = AuditSigner(fleet, config.node.region)
    return Notary(engine, origin=config.node.origin, signer=signer, clock=clock, post_quantum=post_quantum_of(config))


def watch_witnesses(
    config: Config, engine: Engine, log: audit.log.Log, observer: Observer, *, owner: str
) -> list[Coroutine[None, None, None]]:
    """The job that has checkpoints cosigned, if witnesses are configured."""
    if config.audit.witnesses is None:
        return []
    pusher = pusher_of(config.audit.witnesses, clock=now)
    lease = Lease(engine, clock=now)
    witnesses = Witnesses(engine, lease, log, pusher, owner=owner, observations=observations_of(config), clock=now)
    observer.watch_witnesses(witnesses.witnessing)
    return [witnesses.run()]


def log_of(config: Config, engine: Engine, fleet: Fleet) -> audit.log.Log:
    """The writer of this process, not started yet."""
    return audit.log.Log(
        engine,
        origin=config.node.origin,
        node=config.node.name,
        slots=config.audit.slots,
        lock_dir=config.node.state_dir,
        signer=AuditSigner(fleet, config.node.region),
        open_facts=_open_facts(config),
        clock=now,  # the chain's time is the machine's
        monotonic=boot_clock,
        deadline_s=config.audit.deadline_s,
        disk=audit_disk(config),
    )


def peers_of(config: Config, kms: Kms, clock: Callable[[], int]) -> tuple[MtlsProvider, TlsFiles]:
    """Who a connection's certificate is, and the files that say which connections there are; both follow their files."""
    mtls = MtlsProvider(lambda: kms.policy.registry, config.trust, clock=lambda: clock() / 1e6)
    return mtls, TlsFiles(config.listen, also=[t.authority for t in config.trust], takers=[mtls.reread])


def identity_of(config: Config, kms: Kms, mtls: MtlsProvider, clock: Callable[[], int]) -> Authenticator:
    """Who may be recognised, and by which proof."""
    return Authenticator(ApiTokenProvider(kms.tokens), OidcProvider(config.oidc, clock=lambda: clock() / 1e6), mtls)


def ways_of(config: Config, kms: Kms, mtls: MtlsProvider, idempotency: Idempotency, clock: Callable[[], int]) -> Ways:
    """What proves through which forwarders a request came."""
    return Ways(
        lambda: kms.policy.registry,
        mtls.peer,
        once=lambda names, keep_us: idempotency.once(names, keep_us=keep_us),
        audience=str(config.node.installation),
        clock=lambda: clock() / 1e6,
    )


def start_sinks(config: Config, engine: Engine, kms: Kms, observer: Observer, stack: contextlib.AsyncExitStack) -> None:
    """Forward the log to every configured receiver until the stack is left."""
    skipped = skip_recorder(kms, asyncio.get_running_loop())
    forwarders = [forwarder_of(sink, engine, skipped) for sink in config.audit.sink]
    observer.watch_sinks(engine, forwarders, now)
    for forwarder in forwarders:
        # The chain's name, not `owner`: a worker that comes back after a kill need not wait for its own lease to end.
        forwarding = Forwarding(forwarder, Lease(engine, clock=now), owner=kms.log.name)
        stack.callback(forwarding.stop)
        forwarding.start()


def skip_recorder(kms: Kms, loop: asyncio.AbstractEventLoop) -> Callable[[Skipped], None]:
    """Records in this worker's chain, from a sink's thread, which record its receiver will never have."""

    def record(skipped: Skipped) -> None:
        made = kms.admin_record(
            "skip_record", why="sink_refused", reason=skipped.sink, intent=str(skipped.item.record["id"])
        )
        asyncio.run_coroutine_threadsafe(kms.log.append(made), loop).result(timeout=10)

    return record


def forwarder_of(section: SinkSection, engine: Engine, skipped: Callable[[Skipped], None]) -> Forwarder:
    """What forwards to one configured sink."""
    from audit.sinks import KINDS  # an HTTP client, which a node without sinks need not load

    target = Target(
        url=section.url,
        ca=section.ca,
        certificate=section.certificate,
        key=section.private_key,
        token_file=section.token_file,
        token_scheme=section.token_scheme,
        enterprise=section.enterprise,
        timeout_s=section.timeout_s,
    )
    return Forwarder(
        section.name,
        KINDS[section.kind](target),
        engine,
        clock=now,
        skipped=skipped,
        wanted=Wanted(frozenset(section.tenants), frozenset(section.kinds)),
        on_reject=section.on_reject,
    )


def archiver_of(config: Config, engine: Engine, fleet: Fleet, *, to: Path | None = None) -> Archiver | None:
    """What archives old records to a directory, or to the configured one; None if none is named or all stay for ever."""
    directory = to or config.audit.archive_dir
    if directory is None or not config.audit.retention_days:
        return None
    return Archiver(
        engine,
        origin=config.node.origin,
        signer=AuditSigner(fleet, config.node.region),
        directory=directory,
        retention=Retention(
            config.audit.retention_days, config.audit.tenant_retention_days, frozenset(config.audit.legal_hold)
        ),
        clock=now,
        sinks=tuple(sink.name for sink in config.audit.sink),
    )


async def poll(kms: Kms, settings: Settings) -> None:
    """Pick up what other workers changed, five times a second, for ever."""
    while True:
        await asyncio.sleep(POLL_S)
        with contextlib.suppress(Exception):  # the next round tries again; readiness tells about the database
            # In threads: a database that hangs must not hang the event loop, which still has to say so.
            await asyncio.to_thread(kms.keystore.poll)
            await asyncio.to_thread(kms.fleet.follow)
            kms.bars.refresh()
            await asyncio.to_thread(kms.tokens.poll)
            await kms.follow_policy(await asyncio.to_thread(settings.get, POLICY_SETTING))


async def tell_refusals(kms: Kms) -> None:
    """Record each second what was only counted, for ever."""
    while True:
        await asyncio.sleep(1)
        with contextlib.suppress(audit.log.Unavailable):  # they are part of the next count
            await kms.tell_refusals()


def boot_clock() -> float:
    """Seconds since the machine started, sleep included: a machine that woke up has not stepped its clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def audit_disk(config: Config) -> Disk:
    """The disk the log is written to: SQLite's own; of a PostgreSQL server we cannot know, so that of `state_dir`."""
    section, url = config.audit, sa.make_url(config.database.url)
    marks = Watermarks(
        warn=section.disk_warn_percent,
        refuse=section.disk_refuse_percent,
        stop=section.disk_stop_percent,
        reserve=section.disk_reserve_mb << 20,
    )
    if url.get_backend_name() != "sqlite" or not url.database:
        return Disk(config.node.state_dir, marks, reserve=None)
    folder = Path(url.database).parent
    return Disk(folder, marks, reserve=folder / "audit-reserve")


def version() -> str:
    """The version of the installed distribution."""
    return importlib.metadata.version(NAME)


def _open_facts(config: Config) -> audit.log.OpenFacts:
    described = hashlib.sha256(repr(config).encode()).hexdigest()
    return audit.log.OpenFacts(cfg=described, dist=distribution_digest(), ver=version())


def distribution_digest() -> str:
    """SHA-256 over the hashes of the installed distribution's RECORD: which code wrote these records."""
    files = importlib.metadata.distribution(NAME).files or []
    lines = sorted(f"{f} {f.hash.value if f.hash else ''}" for f in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
