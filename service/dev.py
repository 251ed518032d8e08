"""The development node: everything a node needs, in one directory, made by one command.

Tests, benches and demos use exactly this. Its charter has two thresholds lowered that no laptop can meet, and says so.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import softhsm
import softhsm.nss
from keystore.pkcs11 import TokenConfig, Transcript, initialise, join
from policy import write_development
from policy.bundle import DEVELOPMENT, SHIPPED, read
from service.config import Config, load
from service.devpki import Authority, write_private

TENANTS: Final = ("health", "defence")
CALLER_REGIONS: Final = ("eu-de-1", "eu-fr-1", "us-mkt-1")
ROLES: Final = ("operator", "officer", "custodian", "auditor")
DEFAULT_REGION: Final = "eu-de-1"
DEFAULT_PORT: Final = 8443


class DevFailed(Exception):
    """The development node cannot be made, started or stopped; the message says why."""


@dataclass(frozen=True, slots=True)
class Who:
    """One identity of the development node."""

    name: str
    role: str
    tenant: str | None
    region: str
    path: str  # of its SPIFFE id

    def spiffe(self) -> str:
        return f"spiffe://{domain(self.region)}{self.path}"

    def identity(self) -> str:
        return f"mtls:{domain(self.region)}:{self.path}"


def domain(region: str) -> str:
    """The development trust domain of a region."""
    return f"{region}.dev.skms.example"


def everyone(home: str) -> list[Who]:
    """Workloads of each tenant in each caller region, people of each tenant at home, the platform engineer."""
    found = [Who(f"{t}-{r}", "workload", t, r, f"/{t}/workload/{t}-{r}") for t in TENANTS for r in CALLER_REGIONS]
    found += [Who(f"{t}-{role}", role, t, home, f"/{t}/{role}/{t}-{role}") for t in TENANTS for role in ROLES]
    own = ("platform", "platform"), ("installation-officer", "officer")
    return [*found, *(Who(name, role, None, home, f"/platform/{role}") for name, role in own)]


@dataclass(frozen=True, slots=True)
class Shape:
    """How many HSMs stand where: `hsms` SoftHSM2 tokens in each region, and an NSS token in the first region if asked."""

    regions: tuple[str, ...] = (DEFAULT_REGION,)
    hsms: int = 1
    nss: bool = False

    def labels(self, region: str) -> list[str]:
        """Labels of a region's SoftHSM2 tokens; the first one's root KEK is the region's."""
        return [f"skms-{region}" if n == 1 else f"skms-{region}-{n}" for n in range(1, self.hsms + 1)]


def prepare(
    directory: Path,
    *,
    regions: Sequence[str] = (DEFAULT_REGION,),
    hsms: int = 1,
    nss: bool = False,
    port: int = DEFAULT_PORT,
    database: str | None = None,
) -> Config:
    """Make the node's files, tokens, certificates and policy, as far as they are not there. Idempotent."""
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory.chmod(0o700)
    known = set(read(SHIPPED).registry.expand(["approved"]))
    if unknown := set(regions) - known:
        raise DevFailed(f"unknown region {sorted(unknown)[0]!r}: one of {', '.join(sorted(known))}")
    try:
        shape = Shape(tuple(regions), hsms, nss)
        tokens = softhsm.bring_up(directory / "softhsm", [label for r in regions for label in shape.labels(r)])
        second = softhsm.nss.bring_up(directory / "nss") if nss else None
    except softhsm.SoftHsmUnavailable as error:
        raise DevFailed(str(error)) from None
    config_file = directory / "skms.toml"
    installation = _installation(config_file)
    people = everyone(regions[0])
    identities = _certificates(directory / "pki", people, regions[0])
    places = sorted({*CALLER_REGIONS, *regions})
    members = {t: {w.role: w.identity() for w in people if w.tenant == t and w.role != "workload"} for t in TENANTS}
    bundle = directory / "policy"
    if not bundle.exists():
        write_development(
            bundle,
            trust_domains={p: domain(p) for p in places},
            members=members,
            platform_member=people[-2].identity(),
            officer_member=people[-1].identity(),
        )
    port = port or free_port()
    write_private(
        config_file,
        _toml(directory, tokens, second, shape, places, port, database, installation).encode(),
    )
    config = load(config_file)
    from service.wiring import token_configs

    audit_keys = _ceremony(token_configs(config), tokens)
    environment = {
        "base_url": f"https://127.0.0.1:{port}",
        "ca_file": str(directory / "pki" / "server-ca.pem"),
        "database_url": config.database.url,
        "audit_export_dir": str(directory / "export"),
        "trust_file": str(directory / "trust.txt"),
        "config_file": str(config_file),
        "fronts": {},
        "identities": identities,
    }
    write_private(directory / "env.json", json.dumps(environment, indent=2).encode())
    # What an auditor would take home from the ceremony: origin and audit keys.
    lines = [f"origin {config.node.origin}", *(f"key {base64.b64encode(key).decode()}" for key in audit_keys)]
    write_private(directory / "trust.txt", ("\n".join(lines) + "\n").encode())
    return config


def _ceremony(configs: Sequence[TokenConfig], tokens: softhsm.SoftHsm) -> list[bytes]:
    """Make each region's keys on its first token and bring them to the others; the audit key of every token."""
    first: dict[str, TokenConfig] = {}
    keys = []
    for token in configs:
        source = first.setdefault(token.region, token)
        if source is token:
            keys.append(bytes.fromhex(initialise(token).audit_public_key))
            continue
        transcript = Transcript("join", {"region": token.region}, lambda: time.time_ns() // 1_000)
        officer = tokens.directory / f"{source.token_label}.so-pin"
        keys.append(bytes.fromhex(join(source, token, so_pin_file=officer, transcript=transcript).audit_public_key))
    return keys


def _installation(config_file: Path) -> uuid.UUID:
    return load(config_file, environment={}).node.installation if config_file.exists() else uuid.uuid4()


def _certificates(pki: Path, people: Sequence[Who], home: str) -> list[dict[str, Any]]:
    pki.mkdir(exist_ok=True, mode=0o700)
    authorities = {}
    for region in sorted({w.region for w in people} | set(CALLER_REGIONS)):
        authorities[region] = _authority(pki, region, domain(region))
    server = _authority(pki, "server", "server")
    bundle = b"".join((pki / f"{r}-ca.pem").read_bytes() for r in sorted(authorities))
    write_private(pki / "clients-ca.pem", bundle)
    if not (pki / "server.pem").exists():
        certificate, key = server.issue("127.0.0.1", hosts=("127.0.0.1", "localhost"), server=True)
        write_private(pki / "server.pem", certificate)
        write_private(pki / "server.key", key)
    found = []
    for who in people:
        files = pki / f"{who.name}.pem", pki / f"{who.name}.key"
        if not all(f.exists() for f in files):
            certificate, key = authorities[who.region].issue(who.name, uris=(who.spiffe(),))
            write_private(files[0], certificate)
            write_private(files[1], key)
        shown = {"name": who.name, "role": who.role, "tenant": who.tenant, "region": who.region}
        found.append({**shown, "cert_file": str(files[0]), "key_file": str(files[1])})
    return found


def _authority(pki: Path, name: str, title: str) -> Authority:
    files = pki / f"{name}-ca.pem", pki / f"{name}-ca.key"
    if all(f.exists() for f in files):
        return Authority.load(title, *files)
    made = Authority.create(title)
    made.write(*files)
    return made


def free_port() -> int:
    """A port nobody listens on, below those the kernel hands out by itself: nobody gets it by chance before it is bound."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(100):
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", first - 1 - secrets.randbelow(12_000))) as found,
        ):
            return int(found.getsockname()[1])
    raise OSError(f"no free port below {first}: give one with --port")


def _toml(
    directory: Path,
    tokens: softhsm.SoftHsm,
    second: softhsm.nss.Nss | None,
    shape: Shape,
    places: Sequence[str],
    port: int,
    database: str | None,
    installation: uuid.UUID,
) -> str:
    regions = shape.regions
    pki, sqlite = directory / "pki", f"sqlite:///{directory / 'skms.db'}"
    lines = [
        "# Made by `skms dev up`. For development only.",
        "[node]",
        'name = "n0"',
        f'region = "{regions[0]}"',
        'origin = "dev.skms.example/audit"',
        f'state_dir = "{directory}/state"',
        f'installation = "{installation}"',
        "[listen]",
        'host = "127.0.0.1"',
        f"port = {port}",
        f'certificate = "{pki}/server.pem"',
        f'private_key = "{pki}/server.key"',
        f'client_ca = "{pki}/clients-ca.pem"',
        "[database]",
        f'url = "{database or sqlite}"',
        "[policy]",
        f'bundle = "{directory}/policy"',
    ]
    for region, label in ((r, label) for r in regions for label in shape.labels(r)):
        lines += [
            "[[hsm]]",
            f'name = "softhsm-{label.removeprefix("skms-")}"',
            f'region = "{region}"',
            'vendor = "softhsm2"',
            f'supplier = "{DEVELOPMENT}"',
            f'module = "{tokens.module}"',
            f'token_label = "{label}"',
            f'pin_file = "{tokens.pin_file(label)}"',
            f'environment = {{SOFTHSM2_CONF = "{tokens.directory}/softhsm2.conf"}}',
        ]
    if second is not None:
        lines += [
            "[[hsm]]",
            f'name = "nss-{regions[0]}"',
            f'region = "{regions[0]}"',
            'vendor = "nss-test"',
            f'supplier = "{DEVELOPMENT}"',
            f'module = "{second.module}"',
            f'token_label = "{second.label}"',
            f'token_dir = "{second.directory}"',
            f'pin_file = "{second.pin_file}"',
            'environment = {NSS_MAX_MP_PBE_ITERATION_COUNT = "1"}',
        ]
    for place in places:
        if (pki / f"{place}-ca.pem").exists():
            lines += ["[[trust]]", f'domain = "{domain(place)}"', f'authority = "{pki}/{place}-ca.pem"']
    return "\n".join(lines) + "\n"


# ---- running -------------------------------------------------------------------------------------------------------


def up(
    directory: Path,
    shape: Shape,
    *,
    port: int,
    database: str | None,
    workers: int,
) -> int:
    """Prepare the node and serve it in the foreground until SIGTERM or SIGINT."""
    config = prepare(directory, regions=shape.regions, hsms=shape.hsms, nss=shape.nss, port=port, database=database)
    sys.stderr.write(
        f"Sovereign KMS development node on https://127.0.0.1:{config.listen.port}, files in {directory}\n"
        "DEVELOPMENT CHARTER: K6 asks proof 3 of every tier, K7 is left out, transfers need no real agreement. "
        "Never use this node for real keys.\n"
    )
    from service.supervisor import supervise

    pid = directory / "dev.pid"
    write_private(pid, f"{os.getpid()} {_started(os.getpid())}\n".encode())
    try:
        return supervise(directory / "skms.toml", config, workers=workers)
    finally:
        pid.unlink(missing_ok=True)


def _started(pid: int) -> str:
    """When a process started, in clock ticks since boot: a pid alone may be another process by now."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]


def environment(directory: Path) -> Mapping[str, Any] | None:
    """What a client needs; None while the node is not ready."""
    import ssl
    import urllib.error
    import urllib.request

    try:
        found: dict[str, Any] = json.loads((directory / "env.json").read_text())
    except (OSError, ValueError):
        return None
    try:
        trust = ssl.create_default_context(cafile=found["ca_file"])
        url = found["base_url"] + "/readyz"
        with urllib.request.urlopen(url, context=trust, timeout=2) as answer:  # noqa: S310 - our own https URL
            return found if answer.status == 200 else None
    except (OSError, urllib.error.URLError, ValueError):
        return None


def down(directory: Path, *, wait_s: float = 30.0) -> None:
    """Stop the node of a directory; DevFailed if none runs there or it does not stop."""
    try:
        pid_text, started = (directory / "dev.pid").read_text().split()
        pid = int(pid_text)
        ours = _started(pid) == started
    except (OSError, ValueError):
        raise DevFailed(f"no development node runs in {directory}") from None
    if not ours:
        raise DevFailed(f"no development node runs in {directory}")
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if not (directory / "dev.pid").exists():
            return
        time.sleep(0.05)
    raise DevFailed(f"process {pid} did not stop within {wait_s:.0f} s")
