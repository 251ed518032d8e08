"""Having checkpoints cosigned by the configured witnesses: a job of its own, so that no witness delays a signature."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import ssl
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from sqlalchemy import Connection, Engine

from audit.anchors import AnchorUnusable
from audit.checkpoint import ECDSA, ED25519, BadNote, NoteKey, format_vkey, key_of, parse_vkey
from audit.log import Log, RolledBack
from audit.observed import Observation, Observations
from audit.postquantum import PostQuantumKey, UnusableKey, load
from audit.rootlog import split_origin
from audit.tlogpolicy import BadPolicy, WitnessPolicy, parse_policy
from audit.witness import Ahead, Cosigner, Endpoint, Forked, HttpEndpoint, Pusher, Witness, Witnessing
from service.config import Config, ConfigInvalid, WitnessedLog, WitnessesSection, WitnessSection
from service.rows import Lease

log: Final = logging.getLogger("skms.witnesses")
LEASE: Final = "witnesses"
LEASE_S: Final = 10
ALARM_S: Final = 60.0
_NOT_A_LOGS: Final = "a witness's key is no log's key: make one with `skms witness init`"


def pusher_of(section: WitnessesSection, *, clock: Callable[[], int]) -> Pusher:
    """The witnesses of a policy file; ConfigInvalid if it is none, or a witness of it cannot be reached by HTTPS."""
    name = str(section.policy)
    try:
        policy = parse_policy(section.policy.read_text())
        context = ssl.create_default_context(cafile=section.ca)
    except (OSError, BadPolicy) as error:
        raise ConfigInvalid(name, 0, f"[audit.witnesses]: {error}") from None
    endpoints: dict[str, Endpoint] = {}
    for witness in policy.witnesses:
        url = policy.urls.get(witness, "")
        if not url.startswith("https://"):
            raise ConfigInvalid(name, 0, f"witness {witness} has no https:// URL to send checkpoints to")
        endpoints[witness] = HttpEndpoint(url, context)
    return Pusher(policy, endpoints, clock=clock)


# ---- being a witness of other logs ---------------------------------------------------------------------------------


def new_cosigner(name: str, key_file: Path) -> str:
    """Make a witness's key in a new file that only its owner reads; its verifier key. FileExistsError, BadNote."""
    private = Ed25519PrivateKey.generate()
    vkey = format_vkey(Cosigner(name, private).key)
    parse_vkey(vkey)  # the name may name a key
    descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        file.flush()
        os.fsync(file.fileno())
    return vkey


def checked(config: Config) -> None:
    """ConfigInvalid if what `[witness]`, `[audit.witnesses]` or `[audit] post_quantum_key` name cannot be used.

    Reads their files, reaches nobody.
    """
    post_quantum_of(config)
    own = None if config.witness is None else _cosigner_of(config.witness, config.node.origin)[0].key
    if config.audit.witnesses is None:
        return
    for name, key in pusher_of(config.audit.witnesses, clock=lambda: 0).policy.witnesses.items():
        if own is not None and key.material == own.material:
            policy = str(config.audit.witnesses.policy)
            raise ConfigInvalid(policy, 0, f"witness {name} is this service itself: a quorum is of others")


def known_of(config: Config) -> WitnessPolicy:
    """Whose cosignatures a node checks in its own database: of its witnesses, and of its post-quantum key.

    None of them is demanded: the newest checkpoint of a moment may not have them yet. ConfigInvalid.
    """
    section = config.audit.witnesses
    keys = [] if section is None else list(pusher_of(section, clock=lambda: 0).policy.witnesses.values())
    if (second := post_quantum_of(config)) is not None:
        keys.append(second.key)
    return WitnessPolicy({format_vkey(key): key for key in keys})


def post_quantum_of(config: Config) -> PostQuantumKey | None:
    """The key that signs checkpoints beside the audit key; ConfigInvalid if its file cannot be used."""
    path = config.audit.post_quantum_key
    if path is None:
        return None
    try:
        return load(path, cosigner_name(config.node.origin))
    except UnusableKey as unusable:
        raise ConfigInvalid(str(path), 0, f"[audit] post_quantum_key: {unusable}") from None


def cosigner_name(origin: str) -> str:
    """What a post-quantum key is called: as the first generation of its log, since it outlives a recovery."""
    return split_origin(origin)[0]


def witness_of(
    section: WitnessSection | None,
    engine: Engine,
    *,
    origin: str,
    audit_keys: Sequence[bytes],
    clock: Callable[[], int],
) -> Witness | None:
    """What cosigns the logs of a configuration; ConfigInvalid if its key or one of the logs cannot be used."""
    if section is None:
        return None
    cosigner, logs = _cosigner_of(section, origin)
    if cosigner.key.spki in audit_keys:
        raise _unusable(section, _NOT_A_LOGS)
    return Witness(engine, cosigner, logs, clock=clock)


def _cosigner_of(section: WitnessSection, origin: str) -> tuple[Cosigner, dict[str, list[NoteKey]]]:
    """The key and the logs of a witness; ConfigInvalid if they are none."""
    cosigner, logs = Cosigner(section.name, _private_key(section.key_file)), logs_of(section, origin)
    if cosigner.key.spki in {key.spki for keys in logs.values() for key in keys}:
        raise _unusable(section, _NOT_A_LOGS)
    try:
        parse_vkey(format_vkey(cosigner.key))
    except BadNote as bad:
        raise _unusable(section, f"name: {bad}") from None
    return cosigner, logs


def logs_of(section: WitnessSection, origin: str) -> dict[str, list[NoteKey]]:
    """The configured logs and their keys; ConfigInvalid names the one that is wrong. `origin` is our own log's."""
    found: dict[str, list[NoteKey]] = {}
    for log in section.log:
        if _base(log.origin) == _base(origin):
            raise _unusable(section, f"[[witness.log]] {log.origin}: nobody is a witness of their own log")
        found.setdefault(log.origin, []).append(_key_of(section, log))
    return found


def _key_of(section: WitnessSection, log: WitnessedLog) -> NoteKey:
    try:
        if "+" in log.key and log.key.startswith(f"{log.origin}+"):
            key = parse_vkey(log.key)
        else:
            key = key_of(log.origin, base64.b64decode(log.key, validate=True))
    except ValueError as error:
        raise _unusable(section, f"[[witness.log]] {log.origin}: key: {error}") from None
    if key.type not in {ED25519, ECDSA}:
        raise _unusable(section, f"[[witness.log]] {log.origin}: key: this is a cosigner's, not a log's")
    return key


def _base(origin: str) -> str:
    """The log without its generation; logs of other services have none."""
    try:
        return split_origin(origin)[0]
    except ValueError:
        return origin


def _private_key(path: Path) -> Ed25519PrivateKey:
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigInvalid(str(path), 0, "others than its owner may read a witness's key: chmod 600")
        private = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise ConfigInvalid(str(path), 0, f"[witness] key_file: {error.strerror}") from None
    except (ValueError, TypeError):
        raise ConfigInvalid(str(path), 0, "[witness] key_file: not a private key in PEM without a password") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigInvalid(str(path), 0, "[witness] key_file: not an Ed25519 key")
    return private


def _unusable(section: WitnessSection, why: str) -> ConfigInvalid:
    return ConfigInvalid(str(section.key_file), 0, f"[witness] {section.name}: {why}")


# ---- being witnessed -----------------------------------------------------------------------------------------------


class Witnesses:
    """Pushes the newest checkpoint each second on the worker that holds the lease, and raises the alarms."""

    def __init__(
        self,
        engine: Engine,
        lease: Lease,
        audit_log: Log,
        pusher: Pusher,
        *,
        owner: str,
        observations: Observations,
        clock: Callable[[], int],
    ) -> None:
        self._observations, self._clock = observations, clock
        self.witnessing, self._lease, self._log, self._owner = Witnessing(engine, pusher), lease, audit_log, owner
        self._cosigned = time.monotonic()

    async def run(self, *, period_s: float = 1.0) -> None:
        """For ever, until a witness shows that the database is not the log that it knows: then the log stops.

        What it saw is kept for the node's other workers and for the next start; until that is done it is asked again.
        """
        while True:
            await asyncio.sleep(period_s)
            try:
                await asyncio.to_thread(self.once)
            except (Ahead, Forked) as found:
                seen = self._observation(found)
                log.critical("a witness contradicts the database", extra={"facts": {"reason": str(seen)}})
                self._log.stop(
                    RolledBack(f"ROLLED_BACK: {seen}. See docs/audit-recovery.md before you change anything")
                )
                try:
                    await asyncio.to_thread(self._observations.keep, seen)
                except AnchorUnusable as unusable:
                    log.critical("a restart would forget it", extra={"facts": {"error": str(unusable)}})
                else:
                    return
            except Exception as error:  # the database may be away, or the log spoilt: the next round tries again
                log.warning("witness round failed", extra={"facts": {"error": type(error).__name__}})
            if self.late_s > ALARM_S:
                problems = {name: s.problem for name, s in self.witnessing.pusher.seen.items() if s.problem}
                facts = {"seconds": round(self.late_s), "problems": problems}
                log.error("no quorum of witnesses cosigned the newest checkpoint", extra={"facts": facts})

    def _observation(self, found: Ahead | Forked) -> Observation:
        return Observation(
            at=self._clock(),
            forked=isinstance(found, Forked),
            note=self.witnessing.shown.decode(),
            size=found.size,
            who=found.who,
        )

    @property
    def late_s(self) -> float:
        """How long this worker has been without a quorum (s)."""
        return time.monotonic() - self._cosigned

    def once(self) -> None:
        """One round, if this worker holds the lease; as `Witnessing.round`."""
        epoch = self._lease.acquire(LEASE, self._owner, LEASE_S)
        if epoch is None:
            self._cosigned = time.monotonic()  # another worker watches
            return

        def fence(connection: Connection) -> None:
            Lease.fence(connection, LEASE, epoch)

        size = self.witnessing.round(fence)
        if size is None or self.witnessing.witnessed >= size:
            self._cosigned = time.monotonic()
