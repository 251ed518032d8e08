"""Who a recorded caller was, put together again: from the record, the bundle's members, issuers and tokens.

What comes out is a proposal: only the digest of the facts in the record says whether it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from policy import Caller, Registry
from service.identity import Unidentified, oidc
from service.identity.api_token import caller_of_token
from service.identity.mtls import caller_of_svid
from service.jobs import scheduler_of
from service.rows import ApiTokens


def callers(tokens: ApiTokens, issuers: Sequence[oidc.Issuer]) -> Callable[[Registry, Mapping[str, Any]], list[Caller]]:
    """How records become callers here."""

    def found(registry: Registry, record: Mapping[str, Any]) -> list[Caller]:
        return list(_possible(registry, record, tokens, issuers))

    return found


def _possible(
    registry: Registry, record: Mapping[str, Any], tokens: ApiTokens, issuers: Sequence[oidc.Issuer]
) -> Iterator[Caller]:
    kind, _, rest = str(record.get("actor", "")).partition(":")
    if kind == "mtls":
        domain, _, path = rest.partition(":")
        try:
            yield caller_of_svid(registry, domain, path)
        except Unidentified:
            return
    elif kind == "oidc":
        for issuer in issuers:
            if rest.startswith(f"{issuer.issuer}:"):
                yield oidc.caller_of(issuer, rest.removeprefix(f"{issuer.issuer}:"))
    elif kind == "token":
        token = tokens.known(rest.rpartition(":")[2])
        if token is not None:
            yield caller_of_token(token, str(record["actor"]))
    elif kind == "internal" and record.get("tenant") is not None:
        node = rest.rpartition(":")[0]
        for place in sorted(registry.expand(["approved"])):
            yield scheduler_of(str(record["tenant"]), place, node)
