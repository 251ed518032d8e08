"""From configuration to a running node. The only place that chooses implementations."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from fastapi import FastAPI

import audit.log
from keystore import Catalog, Hsm, Keystore
from keystore.pkcs11 import TokenConfig, open_token, total_calls
from policy import Policy
from service.app import create_app
from service.config import Config
from service.database import migrate, open_engine, ping
from service.health import Health
from service.identity import Authenticator
from service.identity.api_token import ApiTokenProvider
from service.identity.mtls import MtlsProvider
from service.identity.oidc import OidcProvider
from service.jobs import Scheduler
from service.kms import POLICY_SETTING, Kms
from service.protocols.native import Limits, Native
from service.requests import Observer
from service.rows import ApiTokens, Idempotency, Lease, Settings

POLL_S: Final = 0.2  # other workers' changes are seen within this time
_PEPPER: Final = b"skms/api-token-pepper/v1"


@dataclass(frozen=True, slots=True)
class Node:
    """What `serve` needs of a wired node."""

    app: FastAPI
    kms: Kms
    health: Health
    scheduler: Scheduler

    @staticmethod
    def pkcs11_calls() -> int:
        """PKCS#11 functions called by this process so far."""
        return total_calls()


class Executors:
    """Which HSM calls leave the event loop: those of a token slower than 200 us a call."""

    def __init__(self, hsms: Mapping[str, Hsm]) -> None:
        self._pools: dict[str, ThreadPoolExecutor | None] = {
            region: None if hsm.fast else ThreadPoolExecutor(8, thread_name_prefix=f"hsm-{region}")
            for region, hsm in hsms.items()
        }

    def executor(self, region: str) -> Executor | None:
        """The pool of a region's HSM; None to call it inline."""
        return self._pools.get(region)

    def close(self) -> None:
        """Let running calls end; take no new ones."""
        for pool in self._pools.values():
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)


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
            pin_file=h.pin_file,
            sessions=h.sessions,
            environment=h.environment,
            lock_dir=config.node.state_dir,
            installation=config.node.installation,
        )
        for h in config.hsm
    ]


class AuditSigner:
    """The audit key of one HSM, as the log wants it."""

    def __init__(self, hsm: Hsm) -> None:
        self._hsm = hsm

    def public_key(self) -> bytes:
        """SubjectPublicKeyInfo (DER)."""
        return self._hsm.audit_public_key()

    def sign(self, statement: bytes) -> bytes:
        """Sign a statement inside the HSM."""
        return self._hsm.audit_sign(statement)


@contextlib.asynccontextmanager
async def wire(config: Config, *, clock: Callable[[], int] = now) -> AsyncIterator[Node]:
    """A node that is ready to serve; leaving the block drains it and closes its chain. `clock` gives microseconds."""
    async with contextlib.AsyncExitStack() as stack:
        engine = open_engine(config.database.url)
        stack.callback(engine.dispose)
        migrate(engine, lock_dir=config.node.state_dir)
        bundle = Policy.load(config.policy.bundle)
        hsms: dict[str, Hsm] = {}
        for token in token_configs(config):
            hsms[token.region] = hsm = open_token(token)
            stack.callback(hsm.close)
        local = hsms[config.node.region]
        # Salts and IVs come from the kernel: 0.6 us a call, and the token's own generator guards its keys.
        keystore = Keystore(Catalog(engine), hsms, installation=config.node.installation, clock=clock)
        log = audit.log.Log(
            engine,
            origin=config.node.origin,
            node=config.node.name,
            slots=config.audit.slots,
            lock_dir=config.node.state_dir,
            signer=AuditSigner(local),
            open_facts=_open_facts(config),
            clock=now,  # the chain's time is the machine's
            monotonic=time.monotonic,
            deadline_s=config.audit.deadline_s,
        )
        await log.start()
        stack.push_async_callback(log.close)
        tokens = ApiTokens(
            engine, pepper=local.row_mac(_PEPPER), installation=str(config.node.installation), clock=clock
        )
        executors = Executors(hsms)
        stack.callback(executors.close)
        kms = Kms(
            node=config.node.name,
            region=config.node.region,
            keystore=keystore,
            policy_now=bundle,
            load_policy=lambda old: Policy.load(config.policy.bundle, after=old),
            log=log,
            tokens=tokens,
            hsms=executors,
            clock=clock,
        )
        await kms.load_tenant_secrets()
        await kms.note("start")

        def seconds() -> float:
            return clock() / 1e6

        identity = Authenticator(
            ApiTokenProvider(tokens),
            OidcProvider(config.oidc, clock=seconds),
            MtlsProvider(lambda: kms.policy.registry, config.trust, clock=seconds),
        )
        health = Health(kms, hsms, ping=lambda: ping(engine))
        await health.check_hsms()
        native = Native(
            kms,
            identity,
            idempotency=Idempotency(engine, clock=clock),
            health=health,
            observer=Observer(kms, node=config.node.name, version=version()),
            limits=Limits(config.limits.body, config.limits.batch_body),
            clock=clock,
        )
        owner = f"{config.node.name}/{uuid.uuid4()}"
        scheduler = Scheduler(kms, Lease(engine, clock=clock), owner=owner, clock=clock)
        for job in (scheduler.run(), health.watch(), poll(kms, Settings(engine))):
            task = asyncio.create_task(job)
            stack.callback(task.cancel)
        yield Node(create_app({"": native}), kms, health, scheduler)
        kms.draining = True
        await kms.note("stop")


async def poll(kms: Kms, settings: Settings) -> None:
    """Pick up what other workers changed, five times a second, for ever."""
    while True:
        await asyncio.sleep(POLL_S)
        with contextlib.suppress(Exception):  # the next round tries again; readiness tells about the database
            kms.keystore.poll()
            kms.tokens.poll()
            await kms.follow_policy(settings.get(POLICY_SETTING))


def version() -> str:
    """The version of the installed distribution."""
    return importlib.metadata.version("sovereign-kms")


def _open_facts(config: Config) -> audit.log.OpenFacts:
    described = hashlib.sha256(repr(config).encode()).hexdigest()
    return audit.log.OpenFacts(cfg=described, dist=distribution_digest(), ver=version())


def distribution_digest() -> str:
    """SHA-256 over the hashes of the installed distribution's RECORD: which code wrote these records."""
    files = importlib.metadata.distribution("sovereign-kms").files or []
    lines = sorted(f"{f} {f.hash.value if f.hash else ''}" for f in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
