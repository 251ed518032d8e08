"""The TLS server: uvicorn with client certificates shown to the application, and hard limits on every message.

uvicorn gives the application no certificate (Kludex/uvicorn #1119); this subclass fills the keys of the ASGI TLS
extension, so that its removal later is a deletion. TLS 1.3 only, no tickets, and a connection that resumed a session is
dropped: a client with the saved session alone was accepted with its old identity (CVE-2025-23419).
"""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, Final

import uvicorn
from cryptography import x509
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.ids import uuid7

MAX_HEAD: Final = 32_768
MAX_HEADERS: Final = 100
MAX_MESSAGE: Final = 5 * 2**20
HEAD_DEADLINE_S: Final = 10.0
HANDSHAKE_DEADLINE_S: Final = 10.0
BODY_DEADLINE_S: Final = 30.0  # a body of the most bytes, by a slow line
UNREAD_S: Final = 1.0  # for the rest of a body that was refused unread
MAX_CONNECTIONS: Final = 1_000
YIELDS_AFTER_S: Final = 5.0  # idle for so long, a connection gives way: its next request is hardly under way
SPARE: Final = 100  # connections beyond that: for what stops something, and to say to others that there are too many
MAX_AGE_S: Final = 300.0
DRAIN_S: Final = 20
LINGER_S: Final = 1.0  # how long a stopping worker still answers what comes on an idle connection
GOODBYE_S: Final = 0.5  # for the TLS close_notify of an idle connection
_ONCE: Final = (b"authorization", b"content-length", b"content-type", b"transfer-encoding", b"host")


class TlsClientCertProtocol(HttpToolsProtocol):
    """One per connection."""

    max_age_s, drain_s = MAX_AGE_S, float(DRAIN_S)
    handshake_deadline_s, head_deadline_s, body_deadline_s = HANDSHAKE_DEADLINE_S, HEAD_DEADLINE_S, BODY_DEADLINE_S
    max_connections, yields_after_s = MAX_CONNECTIONS, YIELDS_AFTER_S
    stopping: Callable[[], bool] = staticmethod(lambda: False)  # whether the server ends
    _old = False
    _refusal: tuple[int, str] = (400, "bad request")
    _tls: dict[str, Any] | None = None
    _not_after = float("inf")
    _size, _in_head = 0, True  # bytes of this message so far
    _deadline: asyncio.TimerHandle | None = None
    _age: asyncio.TimerHandle | None = None
    _crowded = False
    _since = 0.0  # when it became idle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows it too: what it gets is a Transport
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        if tls is None or tls.session_reused:
            transport.abort()
            return
        self._tls = self._extension(tls)
        self._since = self.loop.time()
        if len(self.connections) > self.max_connections:
            self._crowd(transport)
        self._deadline = self.loop.call_later(self.head_deadline_s, transport.abort)
        self._age = self.loop.call_later(self.max_age_s, self._grow_old)
        if self.stopping():  # since its handshake began: nobody else would tell it
            self.shutdown()

    def _crowd(self, transport: asyncio.Transport) -> None:
        """A connection too many: an idle one gives way, of those without a certificate first; else urgent requests alone."""
        live = [c for c in self.connections if isinstance(c, TlsClientCertProtocol) and not c.transport.is_closing()]
        before = self.loop.time() - self.yields_after_s
        idle = [c for c in live if c is not self and c.idle and c._since <= before]
        if len(live) > self.max_connections + SPARE or len(self.connections) > 2 * self.max_connections:
            transport.abort()
        elif len(live) > self.max_connections and not idle:
            self._crowded = True
        elif len(live) > self.max_connections:
            min(idle, key=lambda c: (c.certified, c._since)).give_way()

    def give_way(self) -> None:
        """End an idle connection."""
        if self._age is not None:
            self._age.cancel()
        self._end()

    @property
    def certified(self) -> bool:
        """Whether the client showed a certificate."""
        return self._tls is not None and bool(self._tls["client_cert_chain"])

    @property
    def idle(self) -> bool:
        """Whether no request is under way, nor was the connection told to end."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and self._size == 0 and not self.transport.is_closing()

    def _extension(self, tls: ssl.SSLObject) -> dict[str, Any]:
        der = tls.getpeercert(binary_form=True)
        extension: dict[str, Any] = {"tls_version": 0x0304, "cipher_suite": None, "server_cert": None}
        extension |= {"client_cert_chain": [], "client_cert_name": None, "client_cert_error": None}
        if der:  # before Python 3.13 only the leaf is reachable
            certificate = x509.load_der_x509_certificate(der)
            self._not_after = certificate.not_valid_after_utc.timestamp()
            extension["client_cert_chain"] = [ssl.DER_cert_to_PEM_cert(der)]
            extension["client_cert_name"] = certificate.subject.rfc4514_string()
        return extension

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in filter(None, (self._deadline, self._age)):
            timer.cancel()
        super().connection_lost(exc)

    def _grow_old(self) -> None:
        """Certificates and revocations are looked at anew: the client connects again.

        It is told so in the answer to its next request. Closed at once, a connection could have that request under way,
        and its sender could not tell whether it was executed. A drip does not outlive this.
        """
        self._old = True
        self._age = self.loop.call_later(self.drain_s, self._end)

    def _end(self) -> None:
        """End the connection after the answer that is under way; a peer that does not say goodbye is not waited for."""
        super().shutdown()
        idle = self.cycle is None or self.cycle.response_complete
        self._age = self.loop.call_later(GOODBYE_S if idle else self.drain_s, self.transport.abort)

    def shutdown(self) -> None:
        """The worker stops. An idle connection may have a request under way too, so it ends as one that grew old does."""
        if self._age is not None:  # None: it was refused or is gone already
            self._age.cancel()
            self._old = True
            if self.cycle is not None:
                self.cycle.keep_alive = False
            self._age = self.loop.call_later(LINGER_S, self._end)

    def data_received(self, data: bytes) -> None:
        """Feed in slices: httptools itself buffers a header or trailer of any size."""
        while data and not self.transport.is_closing():
            room = (MAX_HEAD if self._in_head else MAX_MESSAGE) - self._size
            if room <= 0:
                self._refusal = (431, "head too large") if self._in_head else (413, "message too large")
                self.send_400_response("")
                return
            if self._size == 0 and self._deadline is None:
                self._deadline = self.loop.call_later(self.head_deadline_s, self.transport.abort)
            part, data = data[:room], data[room:]
            self._size += len(part)
            super().data_received(part)
        if not self._in_head and self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self.body_deadline_s, self._too_slow)

    def _too_slow(self) -> None:
        """The body has not come in time: say so if its answer has not begun, and end the connection."""
        if self.cycle is None or self.cycle.response_started:
            self.transport.abort()
            return
        self._refusal = (408, "body too slow")
        self.send_400_response("")

    def on_response_complete(self) -> None:
        """An answer has left. Whatever is to come of its body is not waited for."""
        unread = not self._in_head and not self.pipeline
        self._since = self.loop.time()
        super().on_response_complete()
        if unread and not self.transport.is_closing():
            if self._deadline is not None:
                self._deadline.cancel()
            self._deadline = self.loop.call_later(UNREAD_S, self.transport.abort)

    def _refuse(self, status: int, reason: str) -> None:
        self._refusal = (status, reason)
        raise ValueError(reason)  # httptools wraps it, and uvicorn then calls send_400_response

    def send_400_response(self, msg: str) -> None:
        """A constant answer: never the parser's text, never the input."""
        status, reason = self._refusal
        body = json.dumps(
            {
                "type": "urn:skms:problem:request_malformed",
                "title": reason,
                "status": status,
                "code": "request_malformed",
                "retryable": False,
                "executed": False,
                "request_id": uuid7(time.time_ns() // 1_000),
            }
        ).encode()
        head = b"content-type: application/problem+json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        scope: Any = self.scope
        scope.setdefault("extensions", {})["tls"] = self._tls
        if self._crowded:
            self._crowded = len(self.connections) > self.max_connections
            scope["extensions"]["crowded"] = self._crowded

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS or not self._in_head:  # uvicorn appends trailers to the headers
            self._refuse(431, "too many headers or a trailer")

    def on_headers_complete(self) -> None:
        names = [name for name, _ in self.headers]
        doubled = any(names.count(name) > 1 for name in _ONCE) or b"host" not in names
        both = {b"transfer-encoding", b"content-length"} <= set(names)
        if doubled or both or any(b"_" in name for name in names):
            self._refuse(400, "ambiguous headers")
        if not self.url.startswith(b"/") or self.url.startswith(b"//"):
            self._refuse(400, "target must be a path")
        if time.time() >= self._not_after:
            self._refuse(401, "client certificate expired")
        self._in_head = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        super().on_headers_complete()
        if self._old and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._in_head, self._size = True, 0


def protocol_of(connections: int) -> type[TlsClientCertProtocol]:
    """The protocol of a worker that takes so many connections."""
    return type("Connection", (TlsClientCertProtocol,), {"max_connections": connections})


def tls_context(certificate: str, key: str, authorities: str, crls: str | None = None) -> ssl.SSLContext:
    """TLS 1.3, client certificates of the authorities in a file, no session tickets.

    With `crls`, a client's certificate needs a valid revocation list of its authority in that file, and must not be on it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    context.verify_mode = ssl.CERT_OPTIONAL  # no certificate is an anonymous caller: health, tokens
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(authorities)
    if crls is not None:
        context.load_verify_locations(crls)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


class Server(uvicorn.Server):
    """uvicorn's, with a limit for the TLS handshake: it has none of its own, and the event loop's is a minute."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on the sockets, or on the configured address."""
        config, loop = self.config, asyncio.get_running_loop()
        protocol: Any = config.http_protocol_class

        def connection() -> TlsClientCertProtocol:
            made: TlsClientCertProtocol = protocol(config, self.server_state, self.lifespan.state)
            made.stopping = lambda: self.should_exit
            return made

        listen = functools.partial(
            loop.create_server,
            connection,
            ssl=config.ssl,
            backlog=config.backlog,
            ssl_handshake_timeout=protocol.handshake_deadline_s,
        )
        if sockets is None:
            self.servers = [await listen(host=config.host, port=config.port)]
        else:
            self.servers = [await listen(sock=one) for one in sockets]
        self.started = True


def server_of(
    app: ASGIApp,
    *,
    host: str,
    port: int,
    context: ssl.SSLContext,
    protocol: type[TlsClientCertProtocol] = TlsClientCertProtocol,
) -> uvicorn.Server:
    """A server that is not running yet."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=DRAIN_S,
        backlog=2_048,
        ssl_context_factory=lambda *_: context,
    )
    return Server(config)
