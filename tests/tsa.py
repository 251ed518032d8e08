"""A time-stamping authority: `openssl ts` behind a small HTTP server."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_CONFIG = """
[req]
distinguished_name = name
prompt = no
[name]
CN = Test TSA
[root]
basicConstraints = critical, CA:true
[stamps]
extendedKeyUsage = critical, timeStamping
[tsa]
default_tsa = test
[test]
serial = {directory}/serial
default_policy = 1.2.3.4.1
digests = sha256
signer_digest = sha256
ess_cert_id_alg = sha256
"""


@dataclass
class Tsa:
    """Where it answers, its certificates, and a way to make it answer wrongly."""

    directory: Path
    url: str = ""
    answer: bytes | None = None  # instead of its own
    asked: list[bytes] = field(default_factory=list)

    @property
    def authority(self) -> Path:
        return self.directory / "authority.pem"

    def reply(self, query: bytes) -> bytes:
        (self.directory / "query").write_bytes(query)
        self._openssl("ts", "-reply", "-queryfile", "query", "-signer", "tsa.pem", "-inkey", "tsa.key", "-out", "reply")
        return (self.directory / "reply").read_bytes()

    def make(self) -> None:
        (self.directory / "openssl.cnf").write_text(_CONFIG.format(directory=self.directory))
        (self.directory / "serial").write_text("01\n")
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-batch")
        self._openssl("req", "-x509", *key, "-keyout", "root.key", "-out", "root.pem", "-extensions", "root")
        subject = ("-subj", "/CN=Stamps")
        self._openssl("req", "-new", *key, "-keyout", "tsa.key", "-out", "tsa.csr", *subject)
        issuer = ("-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial")
        extensions = ("-extfile", "openssl.cnf", "-extensions", "stamps")
        self._openssl("x509", "-req", "-in", "tsa.csr", *issuer, "-out", "tsa.pem", *extensions, config=False)
        self.authority.write_text((self.directory / "tsa.pem").read_text() + (self.directory / "root.pem").read_text())

    def _openssl(self, *arguments: str, config: bool = True) -> None:
        given = [arguments[0], *(("-config", "openssl.cnf") if config else ()), *arguments[1:]]
        subprocess.run(["openssl", *given], cwd=self.directory, check=True, capture_output=True)


@contextlib.contextmanager
def tsa(directory: Path) -> Iterator[Tsa]:
    """A running authority."""
    directory.mkdir()
    made = Tsa(directory)
    made.make()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = self.rfile.read(int(self.headers["content-length"]))
            assert self.headers["content-type"] == "application/timestamp-query"
            made.asked.append(query)
            answer = made.reply(query) if made.answer is None else made.answer
            self.send_response(200)
            self.send_header("content-type", "application/timestamp-reply")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
