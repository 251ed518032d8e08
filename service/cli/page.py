"""A page on this machine's own loopback address where a person signs with a WebAuthn credential: what is shown is made here.

The page comes from the signer's own machine and not from a node: a node that lies about a request shows another digest there,
and its signature counts for nothing else. A file would not do: browsers give pages of `file:` no origin, and no credentials.
One page, one answer: under a path that nobody else knows, to this machine's browser only, nothing from elsewhere in it.
"""

from __future__ import annotations

import html
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

RP: Final = "localhost"
PORT: Final = 8910
WAIT_S: Final = 300
_LARGEST: Final = 65_536  # bytes of an answer

HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_STYLE: Final = """body{font:1rem/1.5 sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem}
dt{font-weight:bold;margin-top:.7rem}dd{margin:0;overflow-wrap:anywhere;white-space:pre-wrap}
button{font:inherit;padding:.6rem 1.2rem;margin:1.5rem 0}
"""

_SCRIPT: Final = """"use strict";
const main = document.querySelector("main"), said = document.getElementById("said");
const options = JSON.parse(main.dataset.options);
const bytes = (text) => Uint8Array.from(atob(text.replace(/-/g, "+").replace(/_/g, "/")), (c) => c.charCodeAt(0));
const text = (buffer) => btoa(String.fromCharCode(...new Uint8Array(buffer)))
  .replace(/[+]/g, "-").replace(/[/]/g, "_").replace(/=+$/, "");
const asked = { ...options.publicKey, challenge: bytes(options.publicKey.challenge) };
if (asked.user) asked.user = { ...asked.user, id: bytes(asked.user.id) };
if (asked.allowCredentials)
  asked.allowCredentials = asked.allowCredentials.map((one) => ({ ...one, id: bytes(one.id) }));
document.getElementById("go").addEventListener("click", async () => {
  said.textContent = "Waiting for the authenticator.";
  try {
    const made = await navigator.credentials[options.act]({ publicKey: asked });
    const part = made.response;
    const answer = options.act === "get"
      ? { rawId: text(made.rawId), clientDataJSON: text(part.clientDataJSON),
          authenticatorData: text(part.authenticatorData), signature: text(part.signature) }
      : { rawId: text(made.rawId), clientDataJSON: text(part.clientDataJSON),
          attestationObject: text(part.attestationObject) };
    const reply = await fetch("answer", { method: "POST", headers: { "Content-Type": "application/json" },
      body: JSON.stringify(answer) });
    said.textContent = reply.ok ? "Done. Look at the command line, and close this page." : "Not taken.";
    document.getElementById("go").disabled = reply.ok;
  } catch (error) {
    said.textContent = "Nothing was signed: " + error.name;
  }
});
"""


class PageUnanswered(Exception):
    """Nobody answered on the page, or it could not be served; the message says why."""


@dataclass(frozen=True, slots=True)
class Page:
    """What a page shows, and what it asks the authenticator for (`navigator.credentials.get` or `create`)."""

    title: str
    facts: Sequence[tuple[str, str]]
    button: str
    act: str
    public_key: Mapping[str, Any] = field(repr=False)

    def html(self) -> bytes:
        """The page; whatever is shown is escaped."""
        options = json.dumps({"act": self.act, "publicKey": self.public_key})
        facts = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>\n" for name, value in self.facts)
        title = html.escape(self.title)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<title>{title}</title><link rel="stylesheet" href="page.css"><script src="page.js" defer></script></head>\n'
            f'<body><main data-options="{html.escape(options)}"><h1>{title}</h1>\n<dl>\n{facts}</dl>\n'
            f'<button id="go">{html.escape(self.button)}</button>\n<p id="said" role="status"></p></main></body></html>\n'
        ).encode()


def origin(port: int) -> str:
    """Of a page on a port: what an approver's entry allows."""
    return f"http://{RP}:{port}"


def answered(page: Page, port: int, told: Callable[[str], None], *, wait_s: float = WAIT_S) -> dict[str, str]:
    """Serve the page, tell where it is, and give what the browser answered; PageUnanswered."""
    here, found = f"/{secrets.token_urlsafe(24)}/", []
    content = {
        here: ("text/html; charset=utf-8", page.html()),
        f"{here}page.js": ("text/javascript; charset=utf-8", _SCRIPT.encode()),
        f"{here}page.css": ("text/css; charset=utf-8", _STYLE.encode()),
    }

    class Handler(BaseHTTPRequestHandler):
        timeout = 5

        def do_GET(self) -> None:
            # The name of the host: another site's name that leads here is not this page (DNS rebinding).
            if self.headers.get("Host") == f"{RP}:{port}" and self.path in content:
                self._reply(200, *content[self.path])
            else:
                self._reply(404)

        def do_POST(self) -> None:
            size, kind = self.headers.get("Content-Length", ""), self.headers.get("Content-Type")
            if self.path != f"{here}answer" or self.headers.get("Host") != f"{RP}:{port}":
                self._reply(404)
            elif self.headers.get("Origin") != origin(port) or kind != "application/json":
                self._reply(403)
            elif not (size.isascii() and size.isdigit() and int(size) <= _LARGEST):
                self._reply(413)
            else:
                try:
                    made = json.loads(self.rfile.read(int(size)))
                    if type(made) is not dict or not all(type(v) is str for v in made.values()):
                        raise ValueError
                except (ValueError, RecursionError):
                    self._reply(400)
                else:
                    self._reply(204)
                    found.append(made)

        def _reply(self, status: int, kind: str = "text/plain", body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nothing: the path is known to the browser alone."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """Nothing: a browser that goes away in between is none."""

    try:
        server = Server(("127.0.0.1", port), Handler)
    except OSError as error:
        raise PageUnanswered(f"port {port} of this machine: {error.strerror}") from None
    with server:
        told(f"{origin(port)}{here}")
        until, server.timeout = time.monotonic() + wait_s, 0.2
        while not found and time.monotonic() < until:
            server.handle_request()
    if not found:
        raise PageUnanswered(f"nobody signed on the page within {wait_s:.0f} s: start again")
    return dict(found[0])
