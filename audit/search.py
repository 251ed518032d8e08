"""Searching the log: what an operator, an auditor or a tenant asks for. Reads only, and takes no write lock.

Every answer is read from the entries. The index only tells which of them need not be looked at; what it does not cover,
the newest records above all, is read entry by entry, so a search misses no durable record whatever the index holds.
"""

from __future__ import annotations

import heapq
import itertools
import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from audit.chain import leaf_hash, unpack
from audit.event import encode_plain
from audit.index import SPAN, IndexKey, Segment, bundle_with, bundles_between, extent, matching, segments, stored_facts
from audit.tables import batch_table, shard_table

CACHE: Final = 33_554_432  # bytes of facts kept in memory: of some three million records


@dataclass(frozen=True, slots=True)
class Found:
    """A record found by a search."""

    log: str
    seq: int
    leaf: bytes
    t: int
    record: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Query:
    """What is searched for: `wanted` in records, `needles` as entries spell it, `coded` as the index, times in us."""

    wanted: Mapping[str, str]
    needles: tuple[bytes, ...]
    coded: Mapping[str, bytes]
    since: int
    until: int


class _Checked:
    """Facts of segments that were checked, the last used ones: they never change, and hashing them is most of a search."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size, self._lock = limit, 0, threading.Lock()
        self._facts: OrderedDict[bytes, bytes] = OrderedDict()  # by MAC, which names chain, place and content

    def get(self, segment: Segment, read: Callable[[], bytes | None]) -> bytes | None:
        """The facts of an authenticated segment; None if `read` finds others."""
        with self._lock:
            found = self._facts.get(segment.mac)
            if found is not None:
                self._facts.move_to_end(segment.mac)
                return found
        found = read()
        if found is not None:
            with self._lock:
                if segment.mac not in self._facts:
                    self._facts[segment.mac] = found
                    self._size += len(found)
                while self._size > self._limit:
                    self._size -= len(self._facts.popitem(last=False)[1])
        return found


class Search:
    """Reads of the stored log, beside whatever its writers do."""

    def __init__(self, engine: Engine, index_key: IndexKey, *, cache: int = CACHE) -> None:
        self._reading, self._key = engine.execution_options(reading=True), index_key
        self._checked = _Checked(cache)

    def records(
        self,
        *,
        tenant: str | None = None,
        key: str | None = None,
        actor: str | None = None,
        op: str | None = None,
        out: str | None = None,
        since: int | None = None,
        until: int | None = None,
        after: tuple[str, int] | None = None,
        limit: int = 50,
    ) -> list[Found]:
        """Up to `limit` records that match, newest first; `after` is the last one of the page before."""
        filters = {"tenant": tenant, "key": key, "actor": actor, "op": op, "out": out}
        wanted = {k: v for k, v in filters.items() if v is not None}
        if not all(v.isprintable() and v for v in wanted.values()):
            return []  # no record holds such a value, and a lone surrogate could not even be compared
        query = _Query(
            wanted,
            tuple(encode_plain(v) for v in wanted.values()),
            {name: self._key.value(name, v) for name, v in wanted.items()},
            0 if since is None else since,
            2**53 if until is None else until,
        )
        with self._reading.connect() as connection:
            shards = {int(r.shard): str(r.log_id) for r in connection.execute(sa.select(shard_table))}
            below: tuple[int, int, int] | None = None
            if after is not None:
                below = _place(connection, after, shards)
                if below is None:
                    return []
            found = heapq.merge(
                *(
                    _Backwards(connection, self._key, self._checked, s, log, query, below).records()
                    for s, log in shards.items()
                ),
                key=lambda item: item[0],
                reverse=True,
            )
            return [record for _, record in itertools.islice(found, limit)]

    def decision(self, decision: str, *, tenant: str | None = None) -> dict[str, Any] | None:
        """The record of this id, a tenant's own or (None) any. Ids are not indexed: every stored batch is looked at."""
        wanted = {"id": decision, **({} if tenant is None else {"tenant": tenant})}
        query = _Query(wanted, tuple(encode_plain(v) for v in wanted.values()), {}, 0, 2**53)
        with self._reading.connect() as connection:
            rows = sa.select(shard_table.c.shard, shard_table.c.log_id)
            for shard, log in connection.execute(rows).all():
                low, high = extent(connection, shard)
                for first, bundle in bundles_between(connection, shard, low, high):
                    if all(needle in bundle for needle in query.needles):
                        for seq, entry in enumerate(unpack(bundle), first):
                            found = _found(str(log), seq, entry, query)
                            if found is not None:
                                return found.record
        return None

    def stored_since(self) -> int | None:
        """When the first record that every chain still has was written (us); None if none was ever pruned."""
        times = []
        with self._reading.connect() as connection:
            for shard in connection.execute(sa.select(shard_table.c.shard)).scalars():
                low, high = extent(connection, shard)
                if 0 < low < high:
                    times.append(int(json.loads(bundle_with(connection, shard, low)[1][0])["c"]["t"]))
        return max(times, default=None)

    def scan(self, *, since: int, until: int, telling: bytes = b"") -> Iterator[Found]:
        """Every record between two times (us), chain by chain and in order: what a figure is computed from.

        `telling`: only those in whose bytes this stands; most of the others need not be parsed then.
        """
        with self._reading.connect() as connection:
            names = {r.shard: r.log_id for r in connection.execute(sa.select(shard_table))}
            chosen = (
                sa.select(batch_table.c.shard, batch_table.c.first_seq, batch_table.c.entries)
                .where(
                    batch_table.c.t >= since, batch_table.c.t <= until + 60_000_000
                )  # a group is committed within seconds
                .order_by(batch_table.c.shard, batch_table.c.first_seq)
            )
            everything = _Query({}, (telling,), {}, since, until)
            # Whoever stops halfway must not leave a cursor on the server.
            with connection.execution_options(stream_results=True).execute(chosen) as rows:
                for row in rows:
                    if telling not in row.entries:
                        continue
                    for seq, entry in enumerate(unpack(row.entries), row.first_seq):
                        found = _found(names[row.shard], seq, entry, everything)
                        if found is not None:
                            yield found


def _place(connection: Connection, after: tuple[str, int], shards: Mapping[int, str]) -> tuple[int, int, int] | None:
    """Where a record stands in the order of answers; None if it is not there."""
    log, seq = after
    shard = next((s for s, name in shards.items() if name == log), None)
    if shard is None or seq >= 2**53:
        return None
    first, entries = bundle_with(connection, shard, seq)
    if not first <= seq < first + len(entries):
        return None
    return int(json.loads(entries[seq - first])["c"]["t"]), shard, seq


class _Backwards:
    """The matching records of one chain, newest first. Within a chain times never fall, so this is the order wanted."""

    def __init__(
        self,
        connection: Connection,
        key: IndexKey,
        checked: _Checked,
        shard: int,
        log: str,
        query: _Query,
        below: tuple[int, int, int] | None,
    ) -> None:
        self._connection, self._key, self._shard, self._log, self._query = connection, key, shard, log, query
        self._below, self._checked = below, checked
        self._latest = query.until if below is None else min(query.until, below[0])
        self._batch: tuple[int, list[bytes]] = (0, [])  # the last one read
        self._ended = False  # what was read last shows that every earlier record is too old

    def records(self) -> Iterator[tuple[tuple[int, int, int], Found]]:
        """(place in the order of answers, record)."""
        low, high = extent(self._connection, self._shard)
        if self._below is not None and self._below[1] == self._shard:
            high = min(high, self._below[2])
        there = segments(self._connection, self._key, self._shard)
        for first in range((high - 1) // SPAN * SPAN, low - SPAN, -SPAN):
            segment = there.get(first)
            places: Iterator[int] | None = None
            if segment is not None and self._key.made(self._log, segment):
                if segment.t_min > self._latest:
                    continue
                if segment.t_max < self._query.since:
                    return
                places = self._indexed(segment)
            if places is None:
                places = self._all(max(low, first), min(high, first + SPAN))
            for seq in places:
                entry = self._entry(seq) if low <= seq < high else None
                found = None if entry is None else _found(self._log, seq, entry, self._query)
                if found is not None:
                    place = (found.t, self._shard, seq)
                    if self._below is None or place < self._below:
                        yield place, found
            if self._ended:
                return

    def _indexed(self, segment: Segment) -> Iterator[int] | None:
        facts = self._checked.get(segment, lambda: stored_facts(self._connection, self._key, self._shard, segment))
        if facts is None:
            return None
        places = matching(facts, self._query.coded)
        if segment.t_max > self._latest:  # times never fall: what is too new stands at the end
            places = places[: bisect_right(places, self._latest, key=lambda i: self._time(segment.first + i))]
        return (segment.first + i for i in reversed(places))

    def _time(self, seq: int) -> int:
        entry = self._entry(seq)
        return 0 if entry is None else int(json.loads(entry)["c"]["t"])

    def _all(self, low: int, high: int) -> Iterator[int]:
        bundles = list(bundles_between(self._connection, self._shard, low, high))  # it reads them backwards
        for first, bundle in reversed(bundles):
            if any(needle not in bundle for needle in self._query.needles):
                continue
            entries = unpack(bundle)
            self._batch = (first, entries)
            yield from reversed(range(max(low, first), min(high, first + len(entries))))
        if bundles and self._query.since:
            size = int.from_bytes(bundles[0][1][:2], "big")
            self._ended = bool(json.loads(bundles[0][1][2 : 2 + size])["c"]["t"] < self._query.since)

    def _entry(self, seq: int) -> bytes | None:
        first, entries = self._batch
        if not first <= seq < first + len(entries):
            first, entries = self._batch = bundle_with(self._connection, self._shard, seq)
        return entries[seq - first] if first <= seq < first + len(entries) else None


def _found(log: str, seq: int, entry: bytes, query: _Query) -> Found | None:
    # A cheap look before the parser: most entries of a search do not match.
    if any(needle not in entry for needle in query.needles):
        return None
    parsed = json.loads(entry)
    record, t = parsed["r"], parsed["c"]["t"]
    if any(record.get(k) != v for k, v in query.wanted.items()):
        return None
    return Found(log, seq, leaf_hash(entry), t, record) if query.since <= t <= query.until else None
