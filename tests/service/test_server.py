"""The TLS server over raw sockets: resumption, framing, heads, drips (I-07, W-05 to W-08)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import uvicorn

from harness import Files, Served, tls_of
from service.server import TlsClientCertProtocol, server_of, tls_context

GET = b"GET /v1/whoami HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = b"GET /v1/whoami HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/random HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

REFUSED = {
    "two hosts": (b"400", HEAD + b"Host: y\r\n\r\n"),
    "no host": (b"400", b"GET /v1/whoami HTTP/1.1\r\n\r\n"),
    "two authorizations": (b"400", HEAD + b"Authorization: a\r\nAuthorization: b\r\n\r\n"),
    "TE and CL": (b"400", POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "two lengths": (b"400", POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}"),
    "negative length": (b"400", POST + b"Content-Length: -1\r\n\r\n"),
    "bad chunk": (b"400", POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
    "obs-fold": (b"400", HEAD + b"A: b\r\n c\r\n\r\n"),
    "underscore": (b"400", HEAD + b"X_Forwarded_For: 6.6.6.6\r\n\r\n"),
    "absolute form": (b"400", b"GET https://evil.example/v1/whoami HTTP/1.1\r\nHost: x\r\n\r\n"),
    "userinfo": (b"400", b"GET @evil HTTP/1.1\r\nHost: x\r\n\r\n"),
    "double slash": (b"400", b"GET //v1/whoami HTTP/1.1\r\nHost: x\r\n\r\n"),
    "101 headers": (b"431", HEAD + b"A: b\r\n" * 100 + b"\r\n"),
    "large head": (b"431", HEAD + b"A: " + b"a" * 40_000),
    "trailer": (b"431", POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nAuthorization: a\r\n\r\n"),
    "not HTTP": (b"400", b"\x00\x01\x02\r\n\r\n"),
}


def ask(node: Served, name: str | None, *parts: bytes, session: Any = None) -> tuple[bytes, Any, bool]:
    """(answer, TLS session, whether it resumed); close_notify is sent, or a resumed session would hide."""
    port = int(node.url.rsplit(":", 1)[1])
    answer, reused = b"", False
    with contextlib.suppress(OSError, ssl.SSLError):
        raw = socket.create_connection(("127.0.0.1", port), timeout=30)
        context = node.tls(name) if session is None else session[0]
        with context.wrap_socket(
            raw, server_hostname="127.0.0.1", session=None if session is None else session[1]
        ) as tls:
            reused = bool(tls.session_reused)
            with contextlib.suppress(OSError):  # a server that has refused a message reads no more of it
                for part in parts:
                    tls.sendall(part)
            while chunk := tls.recv(65_536):
                answer += chunk
                head, _, body = answer.partition(b"\r\n\r\n")
                length = [ln for ln in head.lower().split(b"\r\n") if ln.startswith(b"content-length:")]
                if length and len(body) >= int(length[0].split(b":")[1]):
                    break
            session = (context, tls.session)
            tls.unwrap()
    return answer, session, reused


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_W_07_W_08_ambiguous_messages_are_refused_with_a_constant(node: Served, name: str) -> None:
    status, message = REFUSED[name]
    answer, _, _ = ask(node, "health-eu-de-1", message)
    if name == "trailer":
        # The body ended before the trailer came: its answer may be under way; the trailer never reaches a request.
        assert answer[9:12] in {b"431", b"200"}
        return
    assert answer[9:12] == status, (name, answer[:200])
    assert b"evil" not in answer
    assert b'"code": "request_malformed"' in answer


def test_the_same_message_without_the_ambiguity_is_answered(node: Served) -> None:
    answer, _, _ = ask(node, "health-eu-de-1", GET)
    assert answer.startswith(b"HTTP/1.1 200")


def test_I_07_no_tls_session_can_be_resumed(node: Served) -> None:
    first, session, _ = ask(node, "health-eu-de-1", GET)
    assert first.startswith(b"HTTP/1.1 200")
    assert session[1] is None or not session[1].has_ticket
    _, _, reused = ask(node, "health-eu-de-1", GET, session=session)
    assert not reused, "a saved TLS session was resumed: it would carry an identity without a certificate"


def test_tls_1_2_is_refused(node: Served) -> None:
    context = node.tls("health-eu-de-1")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    port = int(node.url.rsplit(":", 1)[1])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as raw,
        pytest.raises(ssl.SSLError),
        context.wrap_socket(raw, server_hostname="127.0.0.1"),
    ):
        pass


def test_W_06_drips_leave_others_unharmed(node: Served) -> None:
    """Connections that send a byte now and then, beside one that works as it did without them."""
    port = int(node.url.rsplit(":", 1)[1])
    context = node.tls(None)
    slow = []

    def took(client: httpx.Client) -> float:
        begun = time.perf_counter()
        assert client.get("/v1/whoami").status_code == 200
        return time.perf_counter() - begun

    try:
        with node.client("health-eu-de-1") as client:
            alone = sorted(took(client) for _ in range(30))[15]
        for _ in range(100):
            raw = socket.create_connection(("127.0.0.1", port), timeout=30)
            tls = context.wrap_socket(raw, server_hostname="127.0.0.1")
            tls.sendall(b"G")
            slow.append(tls)
        times = []
        with node.client("health-eu-de-1") as client:
            for turn in range(60):
                slow[turn].sendall(b"E")
                times.append(took(client))
        assert sorted(times)[30] < 5 * alone + 0.1, (alone, sorted(times))
    finally:
        for tls in slow:
            tls.close()


def test_a_stranger_authority_gets_no_connection(node: Served, tmp_path: Any) -> None:
    from service.devpki import Authority

    pem, key = Authority.create("stranger").issue("x", uris=("spiffe://eu-de-1.dev.skms.example/health/x",))
    (tmp_path / "c.pem").write_bytes(pem)
    (tmp_path / "c.key").write_bytes(key)
    context = node.tls(None)
    context.load_cert_chain(tmp_path / "c.pem", tmp_path / "c.key")
    with pytest.raises(httpx.TransportError), httpx.Client(base_url=node.url, verify=context) as client:
        client.get("/v1/whoami")


class Aging(TlsClientCertProtocol):
    """Connections that grow old in no time; a client that a busy machine holds up is waited for."""

    max_age_s, drain_s = 0.2, 3.0


async def hello(_: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


@contextlib.asynccontextmanager
async def greeting(
    files: Files, protocol: type[TlsClientCertProtocol], app: Any = hello
) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    """A server that says hi, and its port; the block is left when it has ended."""
    listen = files.config.listen
    context = tls_context(str(listen.certificate), str(listen.private_key), str(listen.client_ca))
    server = server_of(app, host="127.0.0.1", port=0, context=context, protocol=protocol)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


@pytest.mark.anyio
async def test_what_comes_on_an_idle_connection_of_a_stopping_server_is_answered(dev_files: Files) -> None:
    tls = tls_of(dev_files, None)
    async with greeting(dev_files, TlsClientCertProtocol) as (server, port):
        asking, silent = [await asyncio.open_connection("127.0.0.1", port, ssl=tls) for _ in range(2)]
        request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        asking[1].write(request)
        assert b"hi" in await asking[0].read(4096)
        server.should_exit = True
        async with asyncio.timeout(60):
            while server.servers[0].is_serving():
                await asyncio.sleep(0.001)
            asking[1].write(request)  # sent before the client could know that the server stops
            answer = await asking[0].read()
            assert b"connection: close" in answer
            assert answer.endswith(b"hi")
            assert await silent[0].read() == b""
        for _, writer in (asking, silent):
            writer.close()


@pytest.mark.anyio
async def test_a_connection_whose_handshake_ends_as_the_server_stops_is_answered_once_and_ended(
    dev_files: Files,
) -> None:
    async with greeting(dev_files, TlsClientCertProtocol) as (server, port):
        raw = await asyncio.open_connection("127.0.0.1", port)
        staying = await connected(dev_files, port)  # accepted after the first one, and the server waits for it
        server.should_exit = True
        async with asyncio.timeout(60):
            while server.servers[0].is_serving():
                await asyncio.sleep(0.001)
            await raw[1].start_tls(tls_of(dev_files, None), server_hostname="127.0.0.1")
            raw[1].write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = await raw[0].read()
        assert b"connection: close" in answer
        assert answer.endswith(b"hi")
        for _, writer in (raw, staying):
            writer.close()


@pytest.mark.anyio
async def test_an_old_connection_ends_with_an_answer_and_an_idle_one_by_itself(dev_files: Files) -> None:
    async with greeting(dev_files, Aging) as (_, port):
        said, until = list[str](), asyncio.get_running_loop().time() + 60
        async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=tls_of(dev_files, None)) as client:
            # Without a pause: one is nearly always under way.
            while not 2 <= said.count("close") < len(said) and asyncio.get_running_loop().time() < until:
                answer = await client.get("/")
                assert answer.text == "hi"
                said.append(answer.headers.get("connection", ""))
            assert 2 <= said.count("close") < len(said)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls_of(dev_files, None))
        assert await asyncio.wait_for(reader.read(), 60) == b""
        writer.close()


class Strict(TlsClientCertProtocol):
    """Connections whose limits are soon reached."""

    handshake_deadline_s = head_deadline_s = body_deadline_s = 0.5
    max_connections = 3


Wire = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connected(files: Files, port: int, said: bytes = b"", *, name: str | None = None) -> Wire:
    """A connection that has said something."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls_of(files, name))
    writer.write(said)
    return reader, writer


async def rest(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server ends the connection; a reset is an end, too."""
    got = b""
    with contextlib.suppress(OSError, ssl.SSLError):
        while part := await asyncio.wait_for(reader.read(65_536), 60):
            got += part
    return got


async def greet_whole(scope: Any, receive: Any, send: Any) -> None:
    """Say hi after the whole body, or how crowded it is at once."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        if not message.get("more_body"):
            break
    text = b"crowded" if scope["extensions"].get("crowded") else b"hi"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
    await send({"type": "http.response.body", "body": text})


async def refuse(_: Any, __: Any, send: Any) -> None:
    """Answer without a look at the body."""
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"no"})


UPLOAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"


@pytest.mark.anyio
async def test_W_06_slow_handshakes_heads_and_bodies_are_ended(dev_files: Files) -> None:
    async with greeting(dev_files, Strict, greet_whole) as (_, port):
        handshake = await asyncio.open_connection("127.0.0.1", port)
        head = await connected(dev_files, port, b"GET / HT")
        body = await connected(dev_files, port, UPLOAD + b"\r\nx")
        assert await rest(handshake[0]) == b""
        assert await rest(head[0]) == b""
        told = await rest(body[0])
        assert told.startswith(b"HTTP/1.1 408 ")
        assert b'"code": "request_malformed"' in told
        whole = await connected(dev_files, port, UPLOAD.replace(b"1000000", b"3") + b"\r\nabc")
        assert (await asyncio.wait_for(whole[0].readuntil(b"hi"), 60)).startswith(b"HTTP/1.1 200 ")
        for _, writer in (handshake, head, body, whole):
            writer.close()


@pytest.mark.anyio
async def test_W_06_a_drip_of_a_body_does_not_win_time(dev_files: Files) -> None:
    async with greeting(dev_files, Strict, greet_whole) as (_, port):
        reader, writer = await connected(dev_files, port, UPLOAD + b"\r\n")
        answer = asyncio.create_task(rest(reader))
        for _ in range(600):
            if answer.done():
                break
            writer.write(b"x")
            await asyncio.sleep(0.05)
        assert (await answer)[:13] in {b"HTTP/1.1 408 ", b""}  # a reset may take the answer with it
        writer.close()


@pytest.mark.anyio
async def test_W_15_a_body_refused_unread_is_not_waited_for_and_never_asked_for(dev_files: Files) -> None:
    async with greeting(dev_files, TlsClientCertProtocol, refuse) as (_, port):
        polite = await connected(dev_files, port, UPLOAD + b"Expect: 100-continue\r\n\r\n")
        told = await rest(polite[0])
        assert told.startswith(b"HTTP/1.1 401 ")
        assert b"100 Continue" not in told
        slow = await connected(dev_files, port, UPLOAD + b"\r\n" + b"x" * 1_000)
        assert (await rest(slow[0])).startswith(b"HTTP/1.1 401 ")
        quick = await connected(dev_files, port, UPLOAD + b"\r\n" + b"x" * 1_000_000)  # as curl does: all at once
        assert (await asyncio.wait_for(quick[0].readuntil(b"no"), 60)).startswith(b"HTTP/1.1 401 ")
        quick[1].write(UPLOAD.replace(b"1000000", b"1") + b"\r\nx")
        assert (await asyncio.wait_for(quick[0].readuntil(b"no"), 60)).startswith(b"HTTP/1.1 401 ")  # kept
        for _, writer in (polite, slow, quick):
            writer.close()


@pytest.mark.anyio
async def test_idle_connections_give_way_to_new_ones_and_strangers_first(dev_files: Files) -> None:
    class Few(TlsClientCertProtocol):
        max_connections, yields_after_s = 3, 0.0

    async with greeting(dev_files, Few) as (server, port):
        known = await connected(dev_files, port, name="health-eu-de-1")
        strangers = [await connected(dev_files, port) for _ in range(2)]
        while len(server.server_state.connections) < 3:
            await asyncio.sleep(0.01)
        newer = []
        for gone, _ in strangers:
            newer.append(await connected(dev_files, port, GET, name="health-eu-de-1"))
            assert await rest(gone) == b""
            assert b"hi" in await asyncio.wait_for(newer[-1][0].readuntil(b"hi"), 60)
        known[1].write(GET)
        assert b"hi" in await asyncio.wait_for(known[0].readuntil(b"hi"), 60)
        for _, writer in (known, *strangers, *newer):
            writer.close()


@pytest.mark.anyio
async def test_when_none_is_idle_requests_of_a_new_connection_are_told_so_until_there_is_room(dev_files: Files) -> None:
    class Few(TlsClientCertProtocol):
        max_connections = 3

    async with greeting(dev_files, Few, greet_whole) as (server, port):
        busy = [await connected(dev_files, port, UPLOAD + b"\r\n") for _ in range(3)]
        while len(server.server_state.tasks) < 3:
            await asyncio.sleep(0.01)
        new = await connected(dev_files, port, GET)
        assert await asyncio.wait_for(new[0].readuntil(b"crowded"), 60)
        for _, writer in busy:
            writer.close()
        while len(server.server_state.connections) > 1:
            await asyncio.sleep(0.01)
        new[1].write(GET)
        assert await asyncio.wait_for(new[0].readuntil(b"hi"), 60)
        new[1].close()
