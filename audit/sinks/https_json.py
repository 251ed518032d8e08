"""JSON over HTTPS: one POST a group, one line a record (NDJSON), with all that a receiver needs to verify it again."""

from __future__ import annotations

import json

from audit.forward import Group, Item, Target
from audit.sinks.posting import Poster


class HttpsJson:
    """Any 2xx means that the receiver has the group: it should answer after it stored it."""

    def __init__(self, target: Target) -> None:
        self._poster = Poster(target)

    def deliver(self, group: Group) -> None:
        """See `Sink`."""
        body = b"".join(line(group.log, item) for item in group.items)
        # The first number alone would not do: after a crash the same first record may begin a longer group.
        self._poster.post(body, {"content-type": "application/x-ndjson", "idempotency-key": f'"{group.key}"'})

    def close(self) -> None:
        """See `Sink`."""
        self._poster.close()


def line(log: str, item: Item) -> bytes:
    """`{"entry":{...},"leaf":"<hex>","log":"...","n":1}`: the entry's own bytes are copied, not made again.

    They are canonical JSON (RFC 8785), so a receiver that parsed them can still make the bytes the leaf is the hash of.
    """
    return b'{"entry":%b,"leaf":"%b","log":%b,"n":%d}\n' % (
        item.entry,
        item.leaf.hex().encode(),
        json.dumps(log).encode(),
        item.n,
    )
