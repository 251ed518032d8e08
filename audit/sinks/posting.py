"""POST over TLS, for receivers that answer: what each status means to a log that may not lose a record."""

from __future__ import annotations

import email.utils
import ssl
import time
from typing import Final

import httpx

from audit.forward import Refused, Target, Undelivered

MAX_ANSWER: Final = 65_536
# The receiver looked at the body and will not have it: too large, malformed, of another type, unprocessable.
_REFUSED: Final = frozenset({400, 413, 415, 422})


def tls_context(target: Target) -> ssl.SSLContext:
    """Who the receiver must be, and what this client shows. OSError or ssl.SSLError if a file cannot be used."""
    context = ssl.create_default_context(cafile=None if target.ca is None else str(target.ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if target.certificate is not None:
        context.load_cert_chain(target.certificate, target.key)
    return context


class Poster:
    """Posts to one URL. Files are read when they are needed, so that a renewed token or certificate is taken up."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._client: httpx.Client | None = None

    def post(self, body: bytes, headers: dict[str, str]) -> bytes:
        """The body of the answer, if it is a success; Refused or Undelivered."""
        deadline = time.monotonic() + 2 * self._target.timeout_s
        try:
            client = self._connected()
            headers = headers | self._authorization()
            with client.stream("POST", self._target.url, content=body, headers=headers) as answer:
                found = b""
                for piece in answer.iter_bytes():
                    found += piece
                    if len(found) > MAX_ANSWER or time.monotonic() > deadline:
                        raise Undelivered("the answer is too long or too slow")
        except (httpx.ConnectError, OSError) as error:
            raise Undelivered(f"{type(error).__name__}: {error}") from None
        except (httpx.HTTPError, ValueError) as error:  # their text may repeat a header, and so the token
            raise Undelivered(type(error).__name__) from None
        if answer.is_success:
            return found
        if answer.status_code in _REFUSED:
            raise Refused(f"HTTP {answer.status_code}")
        wait = retry_after_s(answer.headers.get("retry-after", ""), time.time())
        raise Undelivered(f"HTTP {answer.status_code}", retry_after_s=wait)

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _connected(self) -> httpx.Client:
        if self._client is None:
            # No proxy and no certificate from the environment: a sink is what its configuration says, nothing else.
            self._client = httpx.Client(
                verify=tls_context(self._target),
                trust_env=False,
                timeout=self._target.timeout_s,
                follow_redirects=False,
            )
        return self._client

    def _authorization(self) -> dict[str, str]:
        if self._target.token_file is None:
            return {}
        token = self._target.token_file.read_text().strip()
        return {"authorization": f"{self._target.token_scheme} {token}"}


def retry_after_s(value: str, now: float) -> float:
    """Seconds that `Retry-After` asks for (RFC 9110, 10.2.3: seconds or a date); 0 if it says nothing readable."""
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError):
        return 0.0
