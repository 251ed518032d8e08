"""The search index: which records of a span of a chain have which tenant, key, actor, operation and outcome.

Derived from the entries, made beside the commit path, never trusted: each segment is authenticated under a key from the
HSM, so that a changed, moved or foreign row counts as a missing one, and what a missing one covered is read entry by
entry. One row for 4,096 records and not a row for each: an index row a record would make five more trees grow inside the
one write lock of SQLite, with every encryption.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError

from audit.chain import unpack
from audit.tables import batch_table, index_table, shard_table

SPAN: Final = 4_096  # records of a segment; it begins at a multiple of it
COLUMNS: Final = ("key", "actor", "tenant", "op", "out")  # the most selective first
HASH: Final = 8  # bytes


class _Facts(msgspec.Struct, frozen=True):
    tenant: str = ""
    key: str = ""
    actor: str = ""
    op: str = ""
    out: str = ""


class _Frame(msgspec.Struct, frozen=True):
    t: int


class _Entry(msgspec.Struct, frozen=True):
    c: _Frame
    r: _Facts


_decode: Final = msgspec.json.Decoder(_Entry).decode


@dataclass(frozen=True, slots=True)
class Segment:
    """A row of the index without its facts: records `first` to `first + SPAN - 1` lie between two times (us)."""

    first: int
    t_min: int
    t_max: int
    digest: bytes
    mac: bytes


class IndexKey:
    """What authenticates segments and hides values. Each region's HSMs have a key of their own, and so an index."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.id = hmac.digest(secret, b"skms-audit-index-id/v1", "sha256").hex()[:16]

    def __repr__(self) -> str:
        return f"IndexKey({self.id})"

    def value(self, column: str, value: str) -> bytes:
        """A value as the index has it. Two that look alike cost a look at a record too many, no more."""
        return hashlib.blake2b(
            value.encode("utf-8", "surrogatepass"), digest_size=HASH, key=self._secret[:64], person=column.encode()
        ).digest()

    def mac(self, log: str, first: int, t_min: int, t_max: int, digest: bytes) -> bytes:
        """What a segment is authenticated by."""
        statement = f"skms-audit-index/v1\n{log}\n{first}\n{t_min}\n{t_max}\n{digest.hex()}\n"
        return hmac.digest(self._secret, statement.encode(), "sha256")

    def made(self, log: str, segment: Segment) -> bool:
        """Whether a segment of this chain was made under this key."""
        expected = self.mac(log, segment.first, segment.t_min, segment.t_max, segment.digest)
        return hmac.compare_digest(expected, segment.mac)


class _Column:
    """The values of one column of a segment, each kept once, and which of them every record has."""

    def __init__(self, name: str) -> None:
        self._name, self._seen, self._order = name, {"": 0}, array("H")

    def add(self, value: str) -> None:
        self._order.append(self._seen.setdefault(value, len(self._seen)))

    def facts(self, key: IndexKey) -> bytes:
        hashes = [key.value(self._name, value) for value in self._seen if value]
        ordered = sorted(set(hashes))
        place = {digest: i for i, digest in enumerate(ordered, 1)}
        code = [0, *map(place.__getitem__, hashes)]  # by order of appearance; the empty value came first
        codes = _little(array(_type(len(ordered)), map(code.__getitem__, self._order)))
        return b"".join([len(ordered).to_bytes(2, "big"), *ordered, codes.tobytes()])


def facts_of(entries: Iterable[bytes], key: IndexKey) -> tuple[int, int, int, bytes]:
    """(number, first time, last time, facts) of a segment's entries. ValueError if one is not ours.

    Holds one entry at a time: a whole segment is megabytes, and each thread that ever held one would keep its own.

    The facts are, for each column: the number of its values (big-endian, two bytes), their hashes, sorted, and a code a
    record: 0 for none, else the value's place from 1 on, in one byte if they fit, else in two, little-endian.
    """
    columns = {name: _Column(name) for name in COLUMNS}
    first = last = number = 0
    for number, entry in enumerate(entries, 1):  # noqa: B007 - the last number is how many there were
        parsed = _decode(entry)
        last = parsed.c.t
        first = first or last
        for name, column in columns.items():
            column.add(getattr(parsed.r, name))
    return number, first, last, b"".join(column.facts(key) for column in columns.values())


def matching(facts: bytes, wanted: Mapping[str, bytes]) -> Sequence[int]:
    """Places in a segment, in order, whose record may have all the wanted values, as `IndexKey.value` has them."""
    found: Sequence[int] | None = None
    at = 0
    for name in COLUMNS:
        count = int.from_bytes(facts[at : at + 2], "big")
        begin, at = at + 2, at + 2 + count * HASH
        codes = array(_type(count))
        size = SPAN * codes.itemsize
        if name in wanted:
            code = _code(facts, begin, at, wanted[name])
            if code is None:
                return ()
            codes.frombytes(facts[at : at + size])
            codes = _little(codes)
            found = list(_places(codes, code)) if found is None else [i for i in found if codes[i] == code]
            if not found:
                return ()
        at += size
    return range(SPAN) if found is None else found


def _type(values: int) -> str:
    return "B" if values < 256 else "H"


def _code(facts: bytes, begin: int, end: int, wanted: bytes) -> int | None:
    at = facts.find(wanted, begin, end)
    while at >= 0 and (at - begin) % HASH:
        at = facts.find(wanted, at + 1, end)
    return None if at < 0 else (at - begin) // HASH + 1


def _places(codes: array[int], code: int) -> Iterator[int]:
    at = 0
    with contextlib.suppress(ValueError):  # `index` says by it that there is none left
        while True:
            at = codes.index(code, at)
            yield at
            at += 1


def _little(codes: array[int]) -> array[int]:
    if sys.byteorder == "big":
        codes.byteswap()
    return codes


# ---- the table ---------------------------------------------------------------------------------------------------------


_shard: Final = sa.bindparam("shard", type_=sa.Integer)
_at: Final = sa.bindparam("at", type_=sa.BigInteger)
_end: Final = sa.bindparam("end", type_=sa.BigInteger)
_key_id: Final = sa.bindparam("key_id", type_=sa.String)
_index, _batch = index_table.c, batch_table.c
# Made once: composing them costs more than running them.
_SEGMENTS: Final = sa.select(_index.first_seq, _index.t_min, _index.t_max, _index.digest, _index.mac).where(
    _index.shard == _shard, _index.key_id == _key_id
)
_FACTS: Final = sa.select(_index.facts).where(_index.shard == _shard, _index.key_id == _key_id, _index.first_seq == _at)
_BEGIN: Final = sa.select(sa.func.max(_batch.first_seq)).where(_batch.shard == _shard, _batch.first_seq <= _at)
_BATCHES: Final = (
    sa.select(_batch.first_seq, _batch.entries)
    .where(_batch.shard == _shard, _batch.first_seq >= _at, _batch.first_seq < _end)
    .order_by(_batch.first_seq)
)
_CONTAINING: Final = (
    sa.select(_batch.first_seq, _batch.entries)
    .where(_batch.shard == _shard, _batch.first_seq <= _at)
    .order_by(_batch.first_seq.desc())
    .limit(1)
)
_EXTENT: Final = sa.select(sa.func.min(_batch.first_seq), sa.func.max(_batch.first_seq)).where(_batch.shard == _shard)


def segments(connection: Connection, key: IndexKey, shard: int) -> dict[int, Segment]:
    """Every row of a chain that claims this key, by its first record; not checked yet."""
    rows = connection.execute(_SEGMENTS, {"shard": shard, "key_id": key.id})
    return {row[0]: Segment(*row) for row in rows}


def stored_facts(connection: Connection, key: IndexKey, shard: int, segment: Segment) -> bytes | None:
    """The facts of a segment that `IndexKey.made`, None if they are others."""
    facts = connection.execute(_FACTS, {"shard": shard, "key_id": key.id, "at": segment.first}).scalar()
    return facts if facts is not None and hmac.compare_digest(hashlib.sha256(facts).digest(), segment.digest) else None


def bundles_between(connection: Connection, shard: int, low: int, high: int) -> Iterator[tuple[int, bytes]]:
    """Batches with records from `low` up to, not including, `high`: (number of the first record, bundle), in order.

    Read as they are asked for: the connection must stay open until then.
    """
    begin = connection.execute(_BEGIN, {"shard": shard, "at": low}).scalar()
    wanted = {"shard": shard, "at": low if begin is None else begin, "end": high}
    with connection.execute(_BATCHES, wanted, execution_options={"yield_per": 8}) as rows:
        yield from rows


def bundle_with(connection: Connection, shard: int, seq: int) -> tuple[int, list[bytes]]:
    """(number of the first record, entries) of the batch that has a record, if there is one."""
    row = connection.execute(_CONTAINING, {"shard": shard, "at": seq}).first()
    return (0, []) if row is None else (int(row[0]), unpack(row[1]))


def extent(connection: Connection, shard: int) -> tuple[int, int]:
    """(first stored record, number after the last one) of a chain."""
    low, high = connection.execute(_EXTENT, {"shard": shard}).one()
    if low is None:
        return 0, 0
    return int(low), int(high) + len(bundle_with(connection, shard, high)[1])


class Indexer:
    """Makes segments of what has been stored. Its position is the segments themselves, so a lost one is made again."""

    def __init__(self, engine: Engine, key: IndexKey) -> None:
        self._engine, self._key = engine, key
        self._reading = engine.execution_options(reading=True)
        self._sound: set[tuple[int, int, bytes]] = set()  # (shard, first, MAC) of rows whose facts were checked

    @property
    def key_id(self) -> str:
        """Whose segments these are."""
        return self._key.id

    def round(self, limit: int = 64) -> int:
        """Make up to `limit` segments that are missing or not sound; how many were made."""
        with self._reading.connect() as connection:
            shards = [(r.shard, r.log_id) for r in connection.execute(sa.select(shard_table))]
        made = 0
        for shard, log in shards:
            with self._reading.connect() as connection:
                low, high = extent(connection, shard)
                there = segments(connection, self._key, shard)
            for first in range(-(-low // SPAN) * SPAN, high - SPAN + 1, SPAN):
                if made >= limit:
                    return made
                if not self._is_sound(shard, log, there.get(first)):
                    self._make(shard, log, first)
                    made += 1
        return made

    def _is_sound(self, shard: int, log: str, segment: Segment | None) -> bool:
        if segment is None or not self._key.made(log, segment):
            return False
        seen = (shard, segment.first, segment.mac)
        if seen not in self._sound:
            with self._reading.connect() as connection:
                if stored_facts(connection, self._key, shard, segment) is None:
                    return False
            self._sound.add(seen)
        return True

    def _make(self, shard: int, log: str, first: int) -> None:
        with self._reading.connect() as connection:
            batches = bundles_between(connection, shard, first, first + SPAN)
            entries = (e for at, b in batches for e in unpack(b)[max(0, first - at) : first + SPAN - at])
            number, t_min, t_max, facts = facts_of(entries, self._key)
        if number != SPAN:
            raise ValueError(f"{log}/{first}: {number} of {SPAN} records are stored: run `skms audit verify`")
        digest = hashlib.sha256(facts).digest()
        values: dict[str, Any] = {
            "shard": shard,
            "key_id": self._key.id,
            "first_seq": first,
            "t_min": t_min,
            "t_max": t_max,
            "digest": digest,
            "mac": self._key.mac(log, first, t_min, t_max, digest),
            "facts": facts,
        }
        c = index_table.c
        mine = (c.shard == shard) & (c.key_id == self._key.id) & (c.first_seq == first)
        try:
            with self._engine.begin() as connection:
                connection.execute(sa.delete(index_table).where(mine))
                connection.execute(sa.insert(index_table), [values])
        except IntegrityError:  # another worker, whose lease ended late, made the same one
            return


def forget(engine: Engine) -> int:
    """Empty the index: the workers make it again from the entries. The number of segments that were there."""
    with engine.begin() as connection:
        return int(connection.execute(sa.delete(index_table)).rowcount)
