"""Identity by API token: for bootstrap and automation without certificates. A token proves no place.

Form: `skms_api_<8-character id>_<43 base62 digits, 256 bits><6 base62 digits, CRC32 of all before>`; scanners find it
by the regex below. Without a proven place the charter lets it near no key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import replace
from typing import Final

from starlette.types import Scope

from policy import Caller
from service.identity import Unidentified, bearer, source
from service.rows import NEVER_FOR_TOKENS, ApiToken, ApiTokens, checksum

SCANNER: Final = re.compile(r"skms_[a-z]{2,8}_[0-9A-Za-z]{8}_[0-9A-Za-z]{49}")
_TOKEN: Final = re.compile(r"skms_api_([0-9A-Za-z]{8})_[0-9A-Za-z]{43}([0-9A-Za-z]{6})")


class ApiTokenProvider:
    """Callers by API token."""

    def __init__(self, tokens: ApiTokens) -> None:
        self._tokens = tokens

    async def identify(self, scope: Scope) -> Caller | None:
        """The token's caller; None if there is no bearer token of this kind."""
        text = bearer(scope)
        if text is None or not text.startswith("skms_"):
            return None
        match = _TOKEN.fullmatch(text)
        if match is None or not hmac.compare_digest(checksum(text[:-6]), match[2]):
            raise Unidentified("token_malformed")
        found = self._tokens.find(match[1])
        given = self._tokens.digest(text)  # in any case: known and unknown ids take the same time
        if found is None or not hmac.compare_digest(found[1], given):
            raise Unidentified("token_unknown")
        caller = caller_of_token(found[0], f"token:{self._tokens.installation}:{found[0].id}")
        return replace(caller, source=source(scope), evidence=hashlib.sha256(given).digest())


def caller_of_token(token: ApiToken, identity: str) -> Caller:
    """Who holds a token, as the policy sees it."""
    return Caller(
        id=identity,
        kind="operator",
        tenant=token.tenant,
        roles=frozenset({token.role}),
        places=frozenset(),
        proof=0,
        authn="token",
        scopes=token.scopes - NEVER_FOR_TOKENS,
    )
