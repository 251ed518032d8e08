"""Who and where a caller is, proven: by the TLS peer or a verified token, never by a header, path or body."""

from __future__ import annotations

from typing import Protocol

from starlette.types import Scope

from policy import Caller


class Unidentified(Exception):
    """The credential proves nothing. `reason` is a short constant for the record; the caller learns nothing of it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class IdentityProvider(Protocol):
    """One kind of credential."""

    async def identify(self, scope: Scope) -> Caller | None:
        """The caller; None if this kind of credential is not there; Unidentified if it is there and bad."""


class Authenticator:
    """Asks the providers in order. A bad credential is never passed over in favour of another one."""

    def __init__(self, *providers: IdentityProvider) -> None:
        self._providers = providers

    async def identify(self, scope: Scope) -> Caller:
        """The caller of a request; Unidentified if no credential proves one."""
        for provider in self._providers:
            caller = await provider.identify(scope)
            if caller is not None:
                return caller
        raise Unidentified("no_credential")


def bearer(scope: Scope) -> str | None:
    """The bearer token of a request; Unidentified if there are several or it is not one."""
    values = [v for k, v in scope["headers"] if k.lower() == b"authorization"]
    if not values:
        return None
    if len(values) > 1:
        raise Unidentified("two_credentials")
    scheme, _, token = values[0].partition(b" ")
    if scheme.lower() != b"bearer" or not token or len(token) > 16_384:
        raise Unidentified("credential_malformed")
    try:
        return str(token.decode("ascii"))
    except UnicodeDecodeError:
        raise Unidentified("credential_malformed") from None


def source(scope: Scope) -> str:
    """The peer's address: for records, never for decisions."""
    return str((scope.get("client") or ("",))[0])
