"""Rows wrapped under an old root KEK, wrapped anew one by one while the service goes on.

Each row is its own change: its MAC is checked, its blob goes through the HSM, and the new row commits with its record or
not at all. What was done is seen in the rows themselves, so a run that was killed is simply started again.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from keystore.catalog import Catalog, SecretRow
from keystore.hsm import Hsm, StoredKey, Wrapped
from keystore.key import Key
from keystore.store import Keystore, Plan, secret_binding, stored_secret

PAGE: Final = 100
Rewrap = Callable[[StoredKey], Wrapped]


@dataclasses.dataclass(frozen=True, slots=True)
class RewrapRow:
    """One row under the old root KEK: a key with its versions, or a tenant's audit key."""

    tenant: str
    key: Key | None
    plan: Callable[[], Plan]


class Rewrapping:
    """The rows of one region that are under an old root KEK."""

    def __init__(self, store: Keystore, catalog: Catalog, hsm: Hsm, *, old: uuid.UUID, rewrap: Rewrap) -> None:
        self._store, self._catalog, self._hsm, self._old, self._rewrap = store, catalog, hsm, old, rewrap

    def left(self) -> dict[str, int]:
        """What is still under the old root KEK, by kind."""
        return self._catalog.count_under(self._old)

    def rows(self) -> Iterator[RewrapRow]:
        """Each key, then each tenant's audit key, that is under the old root KEK: read a page at a time."""
        after: uuid.UUID | None = None
        while page := self._catalog.keys_under(self._old, after=after, limit=PAGE):
            for key in page:
                yield RewrapRow(key.tenant, key, partial(self._store.plan_rewrap, key, self._old, self._rewrap))
            after = page[-1].id
        for row in self._catalog.secrets_under(self._old):
            yield RewrapRow(row.tenant, None, partial(self._secret, row))

    def _secret(self, row: SecretRow) -> Plan:
        self._hsm.check_row(secret_binding(row), row.mac)
        made = self._rewrap(stored_secret(row))
        new = dataclasses.replace(row, mechanism=made.mechanism, kek=made.kek, blob=made.blob)
        new = dataclasses.replace(new, mac=self._hsm.row_mac(secret_binding(new)))
        return Plan(None, lambda c: self._catalog.put_secret(c, new, was=self._old), lambda: None)
