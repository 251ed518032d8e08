"""Syslog (RFC 5424) over TLS (RFC 5425) or TCP (RFC 6587, 3.4.1 octet counting). Never UDP, which loses messages unseen.

Syslog has no answer. What can be known is that the receiver's kernel acknowledged every byte and the connection still
stood then: a group counts as delivered after that. A receiver that dies with bytes in its kernel loses them; who cannot
bear that uses `https-json`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import re
import select
import socket
import ssl
import struct
import termios
import time
from typing import Final
from urllib.parse import urlsplit

from audit.forward import Group, Item, Target, Undelivered
from audit.sinks.posting import tls_context

FACILITY: Final = 13  # log audit
_SEVERITY: Final = {"ok": 6, "failed": 5, "denied": 4, "error": 3}
_PARAMETERS: Final = ("kind", "op", "out", "why", "tenant", "id")
_PORTS: Final = {"tls": 6514, "tcp": 601}


class Syslog:
    """One connection, kept open."""

    def __init__(self, target: Target) -> None:
        self._target = target
        parts = urlsplit(target.url)
        self._tls = parts.scheme == "tls"
        self._address = (parts.hostname or "", parts.port or _PORTS[parts.scheme])
        self._socket: socket.socket | None = None

    def deliver(self, group: Group) -> None:
        """See `Sink`."""
        data = b"".join(frame(message(group.log, item, self._target.enterprise)) for item in group.items)
        deadline = time.monotonic() + 2 * self._target.timeout_s
        try:
            connection = self._connected()
            _still_open(connection)  # a receiver that went away in between: TCP would take the first write
            rest = memoryview(data)
            while rest:  # not `sendall`: over TLS the timeout would bound each 16 KiB and not the whole
                rest = rest[connection.send(rest[:65_536]) :]
                if time.monotonic() > deadline:
                    raise Undelivered("the receiver reads too slowly")
            while _unacknowledged(connection):
                if time.monotonic() > deadline:
                    raise Undelivered("the receiver acknowledges nothing")
                time.sleep(0.002)
            _still_open(connection)
        except (OSError, ValueError) as error:
            self.close()
            raise Undelivered(f"{type(error).__name__}: {error}") from None

    def close(self) -> None:
        """See `Sink`."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None

    def _connected(self) -> socket.socket:
        if self._socket is None:
            plain = socket.create_connection(self._address, timeout=self._target.timeout_s)
            try:
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                self._socket = (
                    tls_context(self._target).wrap_socket(plain, server_hostname=self._address[0])
                    if self._tls
                    else plain
                )
            except BaseException:
                plain.close()
                raise
        return self._socket


def _still_open(connection: socket.socket) -> None:
    """OSError if the receiver closed or broke the connection. A syslog receiver sends nothing (RFC 6587, 3.1)."""
    pending = isinstance(connection, ssl.SSLSocket) and connection.pending()
    if not pending and not select.select([connection], [], [], 0)[0]:
        return
    timeout = connection.gettimeout()
    connection.setblocking(False)
    try:
        if connection.recv(4_096) == b"":
            raise ConnectionResetError("closed by the receiver")
    except (ssl.SSLWantReadError, BlockingIOError):
        return  # session tickets of TLS 1.3
    finally:
        connection.settimeout(timeout)


def _unacknowledged(connection: socket.socket) -> int:
    """Bytes in the send queue that the peer's TCP has not acknowledged (SIOCOUTQ, whose number is TIOCOUTQ's)."""
    answer = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, struct.pack("i", 0))
    return int(struct.unpack("i", answer)[0])


# ---- the message -----------------------------------------------------------------------------------------------------


def frame(message: bytes) -> bytes:
    """MSG-LEN SP SYSLOG-MSG (RFC 5425, 4.3; RFC 6587, 3.4.1)."""
    return b"%d %b" % (len(message), message)


def message(log: str, item: Item, enterprise: int) -> bytes:
    """One record as RFC 5424: the entry's exact bytes are MSG, chain, number and leaf are structured data."""
    record = item.record
    priority = FACILITY * 8 + _SEVERITY.get(str(record.get("out")), 6)
    moment = dt.datetime.fromtimestamp(0, dt.UTC) + dt.timedelta(microseconds=item.t)
    host = _token(str(record.get("node", "-")), 255)
    kind = _token(str(record.get("kind", "-")), 32)
    facts = {"log": log, "seq": str(item.n), "leaf": item.leaf.hex()}
    facts |= {name: str(record[name]) for name in _PARAMETERS if name in record}
    data = " ".join(f'{name}="{_escaped(value)}"' for name, value in facts.items())
    header = f"<{priority}>1 {moment:%Y-%m-%dT%H:%M:%S.%f}Z {host} skms - {kind} [skms@{enterprise} {data}] "
    bom = b"" if item.entry.isascii() else b"\xef\xbb\xbf"  # MSG-UTF8 begins with a BOM
    return header.encode() + bom + item.entry


def _token(text: str, length: int) -> str:
    """PRINTUSASCII of at most so many characters; `-` (NILVALUE) if nothing is left."""
    return re.sub(r"[^\x21-\x7e]", "_", text)[:length] or "-"


def _escaped(value: str) -> str:
    """PARAM-VALUE (6.3.3): these three are escaped and nothing else is."""
    return re.sub(r'(["\\\]])', r"\\\1", value)
