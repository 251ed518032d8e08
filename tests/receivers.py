"""Receivers of the audit log for tests: real servers that parse strictly, and one fake that keeps the same contract.

Each holds what it took as (chain, number, leaf, entry), and can be told to be away, to hang or to refuse records.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from audit.forward import Group, Refused, Target, Undelivered
from service.dev import free_port
from service.devpki import Authority

Taken = tuple[str, int, str, bytes]


@dataclass
class Held:
    """What a receiver took, and how it behaves."""

    taken: list[Taken] = field(default_factory=list)
    away: bool = False
    hanging: bool = False
    retry_after: str = ""
    status: int = 503  # what `away` answers
    refuses: Callable[[Taken], bool] = lambda _: False
    answers: bytes | None = None  # instead of the usual body
    headers: list[dict[str, str]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def take(self, found: list[Taken]) -> bool:
        """Whether all were taken."""
        if any(self.refuses(t) for t in found):
            return False
        self.taken += found
        return True

    def numbers(self, log: str) -> list[int]:
        return [n for chain, n, _, _ in self.taken if chain == log]


class MemorySink:
    """The fake: a list in memory. Held to the same contract as the real ones."""

    def __init__(self, held: Held) -> None:
        self.held = held

    def deliver(self, group: Group) -> None:
        if self.held.hanging:
            self.held.released.wait(0.3)
            raise Undelivered("hanging")
        if self.held.away:
            raise Undelivered("away", retry_after_s=float(self.held.retry_after or 0))
        if not self.held.take([(group.log, i.n, i.leaf.hex(), i.entry) for i in group.items]):
            raise Refused("refused")

    def close(self) -> None:
        pass


# ---- TLS -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pki:
    """An authority with a server of 127.0.0.1 and a client, as files."""

    ca: Path
    certificate: Path
    key: Path
    client_certificate: Path
    client_key: Path

    @classmethod
    def make(cls, directory: Path) -> Pki:
        directory.mkdir(parents=True, exist_ok=True)
        authority = Authority.create("siem.example")
        made = cls(*(directory / n for n in ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")))
        authority.write(made.ca, directory / "ca.key")
        for names, server in (
            ((made.certificate, made.key), True),
            ((made.client_certificate, made.client_key), False),
        ):
            issued = authority.issue("siem", hosts=("127.0.0.1",) if server else (), server=server)
            for path, data in zip(names, issued, strict=True):
                path.write_bytes(data)
        return made

    def server(self, *, mutual: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        if mutual:
            context.load_verify_locations(self.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


# ---- HTTPS -----------------------------------------------------------------------------------------------------------

_LINE = re.compile(rb'\{"entry":(\{.*\}),"leaf":"([0-9a-f]{64})","log":"([^"]*)","n":([0-9]+)\}')


def parse_ndjson(body: bytes, headers: dict[str, str]) -> list[Taken]:
    """Strictly what `https-json` promises; ValueError otherwise."""
    if headers["content-type"] != "application/x-ndjson" or not body.endswith(b"\n"):
        raise ValueError("not NDJSON")
    found = []
    for line in body.splitlines():
        match = _LINE.fullmatch(line)
        whole = json.loads(line)
        if match is None or set(whole) != {"entry", "leaf", "log", "n"}:
            raise ValueError("another line")
        # What a receiver does that only has the parsed object: make the canonical bytes, and compare the leaf.
        entry = json.dumps(whole["entry"], sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        if entry != match[1] or hashlib.sha256(b"\0" + entry).hexdigest() != whole["leaf"]:
            raise ValueError("the leaf is not that of the entry")
        found.append((whole["log"], whole["n"], whole["leaf"], entry))
    key = f'"{found[0][0]}/{found[0][1]}-{found[-1][1]}"'
    if headers["idempotency-key"] != key:
        raise ValueError("idempotency key")
    return found


_ANY = {"stringValue": str, "intValue": str}


def parse_otlp(body: bytes, headers: dict[str, str]) -> list[Taken]:
    """ExportLogsServiceRequest, by the names and types of its protobuf JSON form; ValueError otherwise."""
    if headers["content-type"] != "application/json":
        raise ValueError("content type")
    found = []
    (resource_logs,) = _message(json.loads(body), {"resourceLogs": list})["resourceLogs"]
    _message(resource_logs, {"resource": dict, "scopeLogs": list})
    _attributes(_message(resource_logs["resource"], {"attributes": list})["attributes"])
    (scope_logs,) = resource_logs["scopeLogs"]
    _message(_message(scope_logs, {"scope": dict, "logRecords": list})["scope"], {"name": str, "version": str})
    fields = {"timeUnixNano": str, "observedTimeUnixNano": str, "severityNumber": int, "severityText": str}
    for record in scope_logs["logRecords"]:
        _message(record, fields | {"body": dict, "attributes": list}, optional={"traceId": str})
        if not (record["timeUnixNano"].isdigit() and 1 <= record["severityNumber"] <= 24):
            raise ValueError("time or severity")
        if not re.fullmatch("[0-9a-f]{32}", record.get("traceId", "a" * 32)):
            raise ValueError("traceId: hex, not base64")
        facts = _attributes(record["attributes"])
        entry = _message(record["body"], {"stringValue": str})["stringValue"].encode()
        found.append((facts["skms.log"], int(facts["skms.seq"]), facts["skms.leaf"], entry))
    return found


def _message(value: Any, fields: dict[str, type], optional: dict[str, type] | None = None) -> Any:
    known = fields | (optional or {})
    if not isinstance(value, dict) or not set(fields) <= set(value) <= set(known):
        raise ValueError(f"fields {sorted(value)}")
    for name, kind in known.items():
        if name in value and type(value[name]) is not kind:
            raise ValueError(f"{name} is no {kind.__name__}")
    return value


def _attributes(found: list[Any]) -> dict[str, str]:
    pairs = {}
    for one in found:
        _message(one, {"key": str, "value": dict})
        ((kind, value),) = one["value"].items()
        if type(value) is not _ANY[kind] or one["key"] in pairs:
            raise ValueError(f"attribute {one['key']}")
        pairs[one["key"]] = value
    return pairs


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    held: ClassVar[Held]
    parse: ClassVar[Callable[[bytes, dict[str, str]], list[Taken]]]
    partial: ClassVar[bool]

    def do_POST(self) -> None:
        held = self.held
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {k.lower(): v for k, v in self.headers.items()}
        held.headers.append(headers)
        if held.hanging:
            held.released.wait(30)
            return self.answer(503, b"")
        if held.away:
            return self.answer(held.status, b"")
        try:
            found = type(self).parse(body, headers)
        except (ValueError, KeyError, TypeError) as error:
            return self.answer(400, str(error).encode())
        if held.take(found):
            return self.answer(200, held.answers if held.answers is not None else b"{}" if self.partial else b"")
        if self.partial:
            text = b'{"partialSuccess":{"rejectedLogRecords":"1","errorMessage":"no"}}'
            return self.answer(200, text)
        return self.answer(400, b"")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        if self.held.retry_after:
            self.send_header("Retry-After", self.held.retry_after)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:  # a client that gave up is no error of a test
        pass


@contextlib.contextmanager
def http_receiver(
    pki: Pki, *, otlp: bool = False, mutual: bool = False, timeout_s: float = 30.0
) -> Iterator[tuple[Held, Target]]:
    """An HTTPS server that takes NDJSON, or OTLP."""
    held = Held()
    parse = staticmethod(parse_otlp if otlp else parse_ndjson)
    handler = type("Handler", (_Handler,), {"held": held, "parse": parse, "partial": otlp})
    server = _Server(("127.0.0.1", 0), handler)
    server.socket = pki.server(mutual=mutual).wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    path = "/v1/logs" if otlp else "/skms"
    try:
        yield held, Target(f"https://127.0.0.1:{server.server_address[1]}{path}", ca=pki.ca, timeout_s=timeout_s)
    finally:
        held.released.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


# ---- syslog ----------------------------------------------------------------------------------------------------------

_PRINT = r"[\x21-\x7e]"
_NAME = r'[^ =\]"\x00-\x20\x7f-\xff]{1,32}'  # SD-NAME
_VALUE = r'(?:[^"\\\]]|\\["\\\]])*'  # PARAM-VALUE
_MESSAGE = re.compile(
    rf"<(?P<pri>0|[1-9][0-9]{{0,2}})>1 "
    rf"(?P<time>[0-9]{{4}}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]\.[0-9]{{1,6}}Z) "
    rf"(?P<host>{_PRINT}{{1,255}}) (?P<app>{_PRINT}{{1,48}}) (?P<proc>{_PRINT}{{1,128}}) (?P<msgid>{_PRINT}{{1,32}}) "
    rf'\[(?P<id>{_NAME}@[0-9]+)(?P<params>(?: {_NAME}="{_VALUE}")*)\] (?P<msg>.*)',
    re.DOTALL,
)


def parse_syslog(message: bytes) -> Taken:
    """One message by the ABNF of RFC 5424; ValueError otherwise."""
    match = _MESSAGE.fullmatch(message.decode())
    if match is None or int(match["pri"]) > 191:
        raise ValueError(f"not RFC 5424: {message[:200]!r}")
    return of_structured_data(match["params"], match["msg"].encode())


def of_structured_data(text: str, entry: bytes) -> Taken:
    pairs = re.findall(rf'({_NAME})="({_VALUE})"', text)
    facts = {name: re.sub(r'\\(["\\\]])', r"\1", value) for name, value in pairs}
    return facts["log"], int(facts["seq"]), facts["leaf"], entry


@contextlib.contextmanager
def syslog_receiver(pki: Pki | None, *, timeout_s: float = 30.0) -> Iterator[tuple[Held, Target]]:
    """A server of octet-counted syslog over TLS, or TCP without a PKI. `away` closes connections; `hanging` reads none."""
    held, listening, open_now = Held(), socket.create_server(("127.0.0.1", 0)), set[socket.socket]()
    context = None if pki is None else pki.server()

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    def talk(plain: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), plain:
            if held.away:
                return
            plain.settimeout(60)
            connection = plain if context is None else context.wrap_socket(plain, server_side=True)
            with connection, connection.makefile("rb") as stream:
                open_now.add(connection)
                if held.hanging:
                    held.released.wait(30)
                    return
                while (length := b"".join(iter(lambda: stream.read(1).strip(), b""))) and not held.away:
                    data = stream.read(int(length))
                    held.take([parse_syslog(data)])

    threading.Thread(target=serve, daemon=True).start()
    scheme = "tcp" if pki is None else "tls"
    ca = None if pki is None else pki.ca
    try:
        yield held, Target(f"{scheme}://127.0.0.1:{listening.getsockname()[1]}", ca=ca, timeout_s=timeout_s)
    finally:
        held.released.set()
        listening.close()
        for connection in open_now:
            with contextlib.suppress(OSError):
                connection.close()


RSYSLOGD = Path("/usr/sbin/rsyslogd")


@contextlib.contextmanager
def rsyslog(directory: Path, pki: Pki) -> Iterator[tuple[Path, Target]]:
    """A real rsyslogd with TLS; the file has what it parsed, one message a line."""
    port = free_port()
    out, config = directory / "messages", directory / "rsyslog.conf"
    config.write_text(
        f"""global(maxMessageSize="128k" workDirectory="{directory}" defaultNetstreamDriver="gtls"
  defaultNetstreamDriverCAFile="{pki.ca}" defaultNetstreamDriverCertFile="{pki.certificate}"
  defaultNetstreamDriverKeyFile="{pki.key}" parser.escapeControlCharactersOnReceive="off")
module(load="imtcp" streamDriver.name="gtls" streamDriver.mode="1" streamDriver.authMode="anon")
input(type="imtcp" port="{port}" address="127.0.0.1")
template(name="parsed" type="string" string="%pri%\\t%hostname%\\t%app-name%\\t%msgid%\\t%structured-data%\\t%msg%\\n")
action(type="omfile" file="{out}" template="parsed")
"""
    )
    command = [str(RSYSLOGD), "-n", "-f", str(config), "-i", str(directory / "pid")]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 10):
                break
            assert process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield out, Target(f"tls://127.0.0.1:{port}", ca=pki.ca, timeout_s=30)
    finally:
        process.terminate()
        process.wait(60)
