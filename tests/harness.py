"""A whole node for tests: the development node's own files, tokens and policy, served in process or as a process.

In process, requests take the whole way except the socket: the harness puts the client certificate where the TLS layer
puts it. `served` runs the same node as users do, by `skms dev up`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from msgspec import structs

from databases import address
from service.config import Config, load
from service.wiring import Node, now, wire

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Identity:
    """One certificate of the development node."""

    name: str
    role: str
    tenant: str | None
    region: str
    cert_file: Path
    key_file: Path


@dataclass
class Files:
    """A prepared development node that is not running."""

    directory: Path
    config: Config
    config_file: Path
    environment: dict[str, Any]
    identities: dict[str, Identity]

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.config.listen.port}"


def identities(environment: dict[str, Any]) -> dict[str, Identity]:
    return {
        i["name"]: Identity(
            i["name"], i["role"], i.get("tenant"), i["region"], Path(i["cert_file"]), Path(i["key_file"])
        )
        for i in environment["identities"]
    }


class Certified(httpx.AsyncBaseTransport):
    """ASGI transport that adds what the TLS layer knows of the client."""

    def __init__(self, app: Any, certificate: str | None, source: str = "127.0.0.1") -> None:
        self._certificate = certificate

        async def with_tls(scope: Any, receive: Any, send: Any) -> None:
            chain = [] if self._certificate is None else [self._certificate]
            scope["extensions"] = {"tls": {"client_cert_chain": chain, "tls_version": 0x0304}}
            await app(scope, receive, send)

        self._inner = httpx.ASGITransport(with_tls, client=(source, 40_000), raise_app_exceptions=True)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._inner.handle_async_request(request)


@dataclass
class Shifted:
    """The real clock, and how far a test has moved it (microseconds)."""

    ahead: int = 0

    def __call__(self) -> int:
        return now() + self.ahead


@dataclass
class Lab:
    """A wired node in this process."""

    node: Node
    files: Files
    clock: Shifted
    _clients: dict[str, httpx.AsyncClient] = field(default_factory=dict)

    def client(self, name: str | None, **headers: str) -> httpx.AsyncClient:
        """A client with the certificate of this identity; None for a caller without one."""
        if name in self._clients and not headers:
            return self._clients[name]
        pem = None if name is None else self.files.identities[name].cert_file.read_text()
        made = httpx.AsyncClient(
            transport=Certified(self.node.app, pem), base_url="https://127.0.0.1", headers=headers, timeout=30
        )
        if name is not None and not headers:
            self._clients[name] = made
        return made


PATIENT_S = 60.0  # for a commit: the answer in two seconds is what tests of a log that hangs are about, and ask for


@contextlib.asynccontextmanager
async def lab_of(files: Files, *, deadline_s: float = PATIENT_S) -> AsyncIterator[Lab]:
    """Wire the node in this process for the block; `deadline_s` is how long a record may take to become durable."""
    clock = Shifted()
    audit = structs.replace(files.config.audit, deadline_s=deadline_s)
    async with wire(structs.replace(files.config, audit=audit), clock=clock) as node:
        yield Lab(node, files, clock)


async def until(true: Callable[[], object], said: str, *, seconds: float = 60) -> None:
    """Wait until something is so; the limit is for what never comes, not for a busy machine."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, said
        await asyncio.sleep(0.02)


async def shows(client: httpx.AsyncClient, key: str, seconds: float = 60, **wanted: object) -> dict[str, Any]:
    """The key once it shows these fields: what the scheduler is to do takes a round of its own, or of the node's."""
    until = time.monotonic() + seconds
    while True:
        found: dict[str, Any] = (await client.get(f"/v1/keys/{key}")).raise_for_status().json()
        if found | wanted == found:
            return found
        assert time.monotonic() < until, f"wanted {wanted}, last {found}"
        await asyncio.sleep(0.05)


@dataclass
class Served:
    """A running `skms dev up`."""

    directory: Path
    process: subprocess.Popen[bytes]
    environment: dict[str, Any]

    @property
    def identities(self) -> dict[str, Identity]:
        return identities(self.environment)

    @property
    def url(self) -> str:
        return str(self.environment["base_url"])

    def tls(self, name: str | None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.environment["ca_file"])
        if name is not None:
            who = self.identities[name]
            context.load_cert_chain(who.cert_file, who.key_file)
        return context

    def client(self, name: str | None, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.tls(name), timeout=30, **options)

    def async_client(self, name: str | None, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, verify=self.tls(name), timeout=30, **options)


def skms(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the command line as a user does."""
    return subprocess.run([sys.executable, "-m", "service.cli.main", *arguments], capture_output=True, **options)


def start(directory: Path, *arguments: str, timeout: float = 180.0, log: Path | None = None) -> Served:
    """Start `skms dev up` and wait until it is ready."""
    written = log or directory.with_suffix(".log")
    command = [sys.executable, "-m", "service.cli.main", "dev", "up", "--dir", str(directory), "--port", "0"]
    with written.open("ab") as sink:
        process = subprocess.Popen(
            [*command, "--database", address(directory), *arguments],
            stdout=sink,
            stderr=sink,
            cwd=ROOT,
            start_new_session=True,
        )
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        asked = skms("dev", "env", "--dir", str(directory), "--json")
        if asked.returncode == 0:
            return Served(directory, process, json.loads(asked.stdout))
        if process.poll() is not None:
            break
        time.sleep(0.2)
    stop(process)
    raise RuntimeError("the node did not become ready:\n" + written.read_text()[-4_000:])


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a node and everything it started."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


@contextlib.contextmanager
def served(directory: Path, *arguments: str) -> Iterator[Served]:
    """A running development node for the block."""
    node = start(directory, *arguments)
    try:
        yield node
    finally:
        stop(node.process)


def prepare_apart(directory: Path, *, hsms: int = 1) -> Files:
    """Make a development node's files in a process of its own: SoftHSM2 reads its configuration once a process."""
    code = (
        "import sys; from pathlib import Path; from service.dev import prepare; "
        "prepare(Path(sys.argv[1]), hsms=int(sys.argv[2]), port=0, database=sys.argv[3])"
    )
    command = [sys.executable, "-c", code, str(directory), str(hsms), address(directory)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return prepared(directory)


def launch(files: Files, log: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], float]:
    """Start `skms serve` with these files; seconds until it was ready."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "service.cli.main", "serve", "--config", str(files.config_file), *arguments]
    with log.open("ab") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, cwd=ROOT, start_new_session=True)
    with httpx.Client(base_url=files.url, verify=tls_of(files, None), timeout=2) as probe:
        while time.monotonic() - begun < 60 and process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if probe.get("/readyz").status_code == 200:
                    return process, time.monotonic() - begun
            time.sleep(0.02)
    stop(process)
    raise AssertionError("not ready:\n" + log.read_text()[-3_000:])


@contextlib.contextmanager
def serving(files: Files, log: Path, *arguments: str) -> Iterator[Served]:
    """`skms serve` with these files for the block."""
    process, _ = launch(files, log, *arguments)
    try:
        yield Served(files.directory, process, {**files.environment, "base_url": files.url})
    finally:
        stop(process)


def prepared(directory: Path) -> Files:
    """The configuration and identities that `skms dev up` made in a directory."""
    environment = json.loads((directory / "env.json").read_text())
    config_file = directory / "skms.toml"
    return Files(directory, load(config_file), config_file, environment, identities(environment))


def tls_of(files: Files, name: str | None) -> ssl.SSLContext:
    """Trust of the development authority and the certificate of an identity."""
    context = ssl.create_default_context(cafile=files.environment["ca_file"])
    if name is not None:
        context.load_cert_chain(files.identities[name].cert_file, files.identities[name].key_file)
    return context


async def new_key(lab: Lab, spec: str, *, tenant: str = "health", **body: Any) -> str:
    """The id of a fresh key of tier 2 in eu-de-1."""
    wanted = {"spec": spec, "tier": 2, "home": "eu-de-1", **body}
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    answer = await lab.client(f"{tenant}-operator").post("/v1/keys", json=wanted, headers=headers)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def with_database(files: Files, directory: Path, **changed: Any) -> Files:
    """The node's files with a database, a state directory and a bundle directory of their own."""
    directory.mkdir(exist_ok=True)
    if not (directory / "policy").exists():
        shutil.copytree(files.config.policy.bundle, directory / "policy")
    config = structs.replace(
        files.config,
        database=structs.replace(files.config.database, url=address(directory)),
        node=structs.replace(files.config.node, state_dir=directory),
        policy=structs.replace(files.config.policy, bundle=directory / "policy"),
        **changed,
    )
    return dataclasses.replace(files, config=config)


def officer(directory: Path, name: str) -> tuple[Path, Path]:
    """The key of someone who approves: (private key file, public key file)."""
    key = Ed25519PrivateKey.generate()
    private, public = directory / f"{name}.key", directory / f"{name}.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public
