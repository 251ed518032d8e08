"""The files of TLS: certificate and key of the server, authorities and revocation lists of clients, read anew when they change.

New connections get what is new; the others end within five minutes (`service.server`). Files that cannot be used change
nothing: the ones before go on, and log and metrics say so.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from cryptography import x509

from service.config import ListenSection
from service.server import tls_context

log: Final = logging.getLogger("skms.tls")
POLL_S: Final = 1.0


class TlsFilesRefused(Exception):
    """Files that cannot be used: which, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class TlsFiles:
    """The context of the server, over the newest files that can be used. TlsFilesRefused if there are none at first.

    `also` are other files that change with these, and `takers` whoever reads them: each reads all it needs, or raises, and
    gives back what puts it in force.
    """

    def __init__(
        self,
        listen: ListenSection,
        *,
        also: Sequence[Path] = (),
        takers: Sequence[Callable[[], Callable[[], None]]] = (),
    ) -> None:
        self._listen, self._takers = listen, takers
        named = (listen.certificate, listen.private_key, listen.client_ca, listen.client_crl)
        self._files = [*(path for path in named if path is not None), *also]
        self._seen = self._tried = self._signature()
        self._current, self._ends = self._load()
        self.refused = False
        # OpenSSL asks this about every connection, with a server name or without: the listener keeps its first context.
        self.context = _context(listen)
        self.context.sni_callback = self._choose

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._current

    def ends(self) -> dict[str, float]:
        """Seconds until the first of each kind of file ends."""
        return {kind: end - time.time() for kind, end in self._ends.items()}

    async def follow(self) -> None:
        """Look each second, for ever."""
        while True:
            await asyncio.sleep(POLL_S)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        """Take over files that changed, once they have stopped changing: certificate and key are two."""
        seen, before = self._signature(), self._seen
        self._seen = seen
        if seen == self._tried or seen != before:
            return
        self._tried = seen
        try:
            current, ends = self._load()
            ready = [take() for take in self._takers]
        except (TlsFilesRefused, OSError, ValueError) as error:
            self.refused = True
            log.error("changed TLS files are not taken over", extra={"facts": {"reason": str(error)}})
            return
        self._current, self._ends, self.refused = current, ends, False
        for enforce in ready:
            enforce()
        log.info("changed TLS files are taken over", extra={"facts": {"days": int(self.ends()["server"] // 86_400)}})

    def _signature(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_signature(path) for path in self._files)

    def _load(self) -> tuple[ssl.SSLContext, dict[str, float]]:
        listen = self._listen
        ends = {"server": _first_end(listen.certificate), "client_ca": _first_end(listen.client_ca)}
        if ends["server"] < time.time():
            raise TlsFilesRefused(listen.certificate, "has expired: renew it")
        if listen.client_crl is not None:
            ends["client_crl"] = first_update(listen.client_crl)
        return _context(listen), ends


def _context(listen: ListenSection) -> ssl.SSLContext:
    crl = None if listen.client_crl is None else str(listen.client_crl)
    try:
        return tls_context(str(listen.certificate), str(listen.private_key), str(listen.client_ca), crl)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise TlsFilesRefused(listen.certificate, f"cannot be used with its key and the authorities: {error}") from None


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _first_end(path: Path) -> float:
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TlsFilesRefused(path, f"no certificates in PEM: {error}") from None
    return min(certificate.not_valid_after_utc.timestamp() for certificate in found)


def first_update(path: Path) -> float:
    """When the first of the revocation lists in a file ends: from then on its authority's clients are refused."""
    begin = b"-----BEGIN X509 CRL-----"
    try:
        lists = [x509.load_pem_x509_crl(begin + part) for part in path.read_bytes().split(begin)[1:]]
    except (OSError, ValueError) as error:
        raise TlsFilesRefused(path, f"no revocation lists in PEM: {error}") from None
    updates = [found.next_update_utc for found in lists]
    if not updates or None in updates:
        raise TlsFilesRefused(path, "no revocation list, or one that names no next update")
    return min(update.timestamp() for update in updates if update is not None)
