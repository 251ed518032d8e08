"""Files of TLS that change under a running server: what new connections get, and what is refused (I-09, I-11)."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from harness import Served, served, until
from service.config import ListenSection
from service.devpki import Authority, write_private
from service.server import server_of
from service.tlsfiles import TlsFiles, TlsFilesRefused

URI = ("spiffe://eu-de-1.dev.skms.example/health/x",)


async def hello(_: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


def put(path: Path, data: bytes) -> None:
    """As docs/operations.md says: a new file in the old one's place."""
    write_private(path.with_suffix(".new"), data)
    path.with_suffix(".new").rename(path)


def pem(authority: Authority) -> bytes:
    return authority.certificate.public_bytes(Encoding.PEM)


def crl(authority: Authority, *revoked: bytes, hours: float = 24) -> bytes:
    now = dt.datetime.now(dt.UTC)
    made = x509.CertificateRevocationListBuilder().issuer_name(authority.certificate.subject)
    made = made.last_update(now - dt.timedelta(days=2)).next_update(now + dt.timedelta(hours=hours))
    for certificate in revoked:
        serial = x509.load_pem_x509_certificate(certificate).serial_number
        gone = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - dt.timedelta(hours=1))
        made = made.add_revoked_certificate(gone.build())
    return made.sign(authority.key, hashes.SHA256()).public_bytes(Encoding.PEM)


@dataclass
class Place:
    """A server of its own files, and its authorities."""

    directory: Path
    listen: ListenSection
    servers: Authority
    clients: Authority
    files: TlsFiles
    port: int = 0

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=pem(self.servers).decode())

    async def serial(self, host: str = "127.0.0.1") -> int:
        """Of the certificate that a new connection is shown."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.trust(), server_hostname=host)
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return x509.load_der_x509_certificate(der).serial_number

    async def taken(self, who: tuple[bytes, bytes]) -> bool:
        """Whether a client with this certificate gets an answer over a new connection."""
        context = self.trust()
        write_private(self.directory / "who.pem", b"".join(who))
        context.load_cert_chain(self.directory / "who.pem")
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(12), 60)
            writer.close()
        except (ssl.SSLError, ConnectionError):
            return False
        return answer == b"HTTP/1.1 200"

    def changed(self) -> None:
        """What the task that follows does, without its pauses: files that changed are taken when they stand still."""
        self.files.look()
        self.files.look()


@contextlib.asynccontextmanager
async def place(directory: Path, *, revocation: bool = False) -> AsyncIterator[Place]:
    servers, clients = Authority.create("servers"), Authority.create("clients")
    certificate, key = servers.issue("server", hosts=("127.0.0.1", "localhost"), server=True)
    names = {"certificate": "server.pem", "private_key": "server.key", "client_ca": "clients.pem"}
    listen = ListenSection(
        **{k: directory / v for k, v in names.items()}, client_crl=directory / "clients.crl" if revocation else None
    )
    put(listen.certificate, certificate)
    put(listen.private_key, key)
    put(listen.client_ca, pem(clients))
    put(directory / "clients.crl", crl(clients))
    made = Place(directory, listen, servers, clients, TlsFiles(listen))
    server = server_of(hello, host="127.0.0.1", port=0, context=made.files.context)
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started, "the server does not start")
    made.port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.should_exit = True
        await serving


@pytest.mark.anyio
async def test_new_connections_get_a_changed_certificate_with_and_without_a_server_name(tmp_path: Path) -> None:
    async with place(tmp_path) as here:
        first = await here.serial()
        certificate, key = here.servers.issue("server", hosts=("127.0.0.1", "localhost"), server=True, seconds=86_400)
        put(here.listen.certificate, certificate)
        here.changed()  # its key is not there yet
        assert here.files.refused
        assert await here.serial() == first
        put(here.listen.private_key, key)
        here.files.look()
        assert await here.serial() == first, "a file was read that may still be written"
        here.files.look()
        assert not here.files.refused
        wanted = x509.load_pem_x509_certificate(certificate).serial_number
        assert await here.serial() == await here.serial("localhost") == wanted != first
        assert 86_000 < here.files.ends()["server"] <= 86_400


@pytest.mark.anyio
@pytest.mark.parametrize("broken", ["empty", "text", "expired", "gone"])
async def test_files_that_cannot_be_used_change_nothing_and_are_named(
    tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with place(tmp_path) as here:
        first = await here.serial()
        if broken == "gone":
            here.listen.certificate.unlink()
        else:
            expired, key = here.servers.issue("server", hosts=("127.0.0.1",), server=True, seconds=-60)
            put(here.listen.certificate, {"empty": b"", "text": b"not PEM", "expired": expired}[broken])
            if broken == "expired":
                put(here.listen.private_key, key)
        here.changed()
        here.changed()
        assert here.files.refused
        assert await here.serial() == first
        told = [r for r in caplog.records if r.name == "skms.tls" and r.levelno == logging.ERROR]
        assert len(told) == 1, "once for each change"
        assert str(here.listen.certificate) in told[0].facts["reason"]  # type: ignore[attr-defined]
        with pytest.raises(TlsFilesRefused, match=r"server\.pem"):  # a start has nothing to go on with
            TlsFiles(here.listen)


@pytest.mark.anyio
async def test_I_09_a_changed_authority_rules_new_connections(tmp_path: Path) -> None:
    async with place(tmp_path) as here:
        other = Authority.create("others")
        old, new = here.clients.issue("x", uris=URI), other.issue("x", uris=URI)
        assert (await here.taken(old), await here.taken(new)) == (True, False)
        put(here.listen.client_ca, pem(here.clients) + pem(other))
        here.changed()
        assert (await here.taken(old), await here.taken(new)) == (True, True)
        put(here.listen.client_ca, pem(other))
        here.changed()
        assert (await here.taken(old), await here.taken(new)) == (False, True)


@pytest.mark.anyio
async def test_a_revoked_client_is_refused_once_the_list_is_there_and_all_when_it_ends(tmp_path: Path) -> None:
    async with place(tmp_path, revocation=True) as here:
        good, bad = here.clients.issue("good", uris=URI), here.clients.issue("bad", uris=URI)
        assert (await here.taken(good), await here.taken(bad)) == (True, True)
        put(tmp_path / "clients.crl", crl(here.clients, bad[0]))
        here.changed()
        assert (await here.taken(good), await here.taken(bad)) == (True, False)
        put(tmp_path / "clients.crl", b"broken")
        here.changed()
        assert here.files.refused
        assert (await here.taken(good), await here.taken(bad)) == (True, False)
        other = Authority.create("others")  # has no list
        put(here.listen.client_ca, pem(here.clients) + pem(other))
        put(tmp_path / "clients.crl", crl(here.clients, bad[0]))
        here.changed()
        assert (await here.taken(good), await here.taken(other.issue("x", uris=URI))) == (True, False)
        put(tmp_path / "clients.crl", crl(here.clients, hours=-1))
        here.changed()
        assert here.files.ends()["client_crl"] < 0
        assert not await here.taken(good)
        assert await here.serial()  # who shows no certificate is anonymous, as before


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Served]:
    """A node whose files a test may change."""
    with served(tmp_path / "node") as node:
        yield node


def metric(node: Served, name: str) -> float:
    with node.client("platform") as client:
        text = client.get("/metrics").raise_for_status().text
    return float(next(line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(name + " ")))


def test_a_node_takes_over_its_files_as_they_change(alone: Served) -> None:
    pki, deadline = alone.directory / "pki", time.monotonic() + 60
    ends = 'skms_certificate_expires_seconds{certificate="server"}'
    assert metric(alone, ends) > 80 * 86_400
    authority = Authority.load("server", pki / "server-ca.pem", pki / "server-ca.key")
    certificate, key = authority.issue("127.0.0.1", hosts=("127.0.0.1",), server=True, seconds=5 * 86_400)
    put(pki / "server.pem", certificate)
    put(pki / "server.key", key)
    while metric(alone, ends) > 6 * 86_400:
        assert time.monotonic() < deadline, "the changed certificate is not taken over"
        time.sleep(0.1)
    assert metric(alone, "skms_tls_files_refused") == 0
    # The authority of a trust domain changes: whom it vouched for is nobody any more.
    with alone.client("health-eu-de-1") as workload:
        assert workload.get("/v1/whoami").status_code == 200
        put(pki / "eu-de-1-ca.pem", pem(Authority.create("another")))
        while workload.get("/v1/whoami").status_code != 401:
            assert time.monotonic() < deadline, "the changed authority is not taken over"
            time.sleep(0.1)
    assert b"changed TLS files are taken over" in alone.directory.with_suffix(".log").read_bytes()
