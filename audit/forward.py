"""From the log to receivers outside: each sink forwards every chain in order, from where it last stopped.

At least once: a position moves only after a receiver took the records, and is stored at most a second later; what a crash
leaves unsaid is sent again. Nothing here stands in the way of an operation: a forwarder only reads what is committed, in
a thread of its own, and one that hangs holds up neither the writers nor another sink.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from audit.chain import Bad, leaf_hash, unpack
from audit.tables import batch_table, shard_table, sink_table

GROUP_RECORDS: Final = 512
GROUP_BYTES: Final = 1 << 20
TRIES: Final = 5  # of one record that is refused by itself, before it may be skipped
FIRST_DELAY_S: Final = 1.0
LAST_DELAY_S: Final = 60.0
LONGEST_WAIT_S: Final = 3_600.0  # of what a receiver may ask for
STORE_S: Final = 1.0

_log: Final = logging.getLogger("skms.audit")
Fence = Callable[[Connection], None]


class Undelivered(Exception):
    """The receiver did not take the group: send it again later, after `retry_after_s` if the receiver said so."""

    def __init__(self, reason: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Refused(Exception):
    """The receiver will never take the group as it is; it may take a smaller one."""


@dataclass(frozen=True, slots=True)
class Item:
    """One record as it is stored: its number, leaf hash, time (us), exact bytes, and what it says."""

    n: int
    leaf: bytes
    t: int
    entry: bytes
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """Records of one chain in ascending order; with a filter, some numbers are left out."""

    log: str
    items: tuple[Item, ...]

    @property
    def key(self) -> str:
        """What a receiver may know a repetition by: equal for equal records, whatever the grouping was before."""
        return f"{self.log}/{self.items[0].n}-{self.items[-1].n}"


class Sink(Protocol):
    """One receiver. Used by one thread at a time."""

    def deliver(self, group: Group) -> None:
        """Return once the receiver has every record of the group, as far as its protocol can tell.

        Undelivered if it may not have all of them (some may have arrived: a repetition is allowed); Refused if it
        answered that it never will take them. Returns or raises within a few times the target's timeout.
        """

    def close(self) -> None:
        """Let go of connections; `deliver` may be called again and connects anew."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a sink sends to and how it proves itself. Comes from the configuration file and nowhere else."""

    url: str
    ca: Path | None = None  # None: the system's authorities
    certificate: Path | None = None
    key: Path | None = None
    token_file: Path | None = None
    token_scheme: str = "Bearer"  # noqa: S105  (the word before the token)
    enterprise: int = 32_473  # RFC 5424, 7.2.2; 32473 is the number for examples (RFC 5612)
    timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records a sink sends; empty means all."""

    tenants: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()

    def __contains__(self, item: Item) -> bool:
        tenant, kind = item.record.get("tenant"), item.record.get("kind")
        return (not self.tenants or tenant in self.tenants) and (not self.kinds or kind in self.kinds)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that a receiver refuses and that its sink goes past: sink, chain, record."""

    sink: str
    log: str
    item: Item


@dataclass(slots=True)
class _Chain:
    """How far one chain is delivered, and what holds it up."""

    shard: int
    at: int  # number of the next record
    stored: int | None  # None: this sink has no position in this chain yet
    width: int = GROUP_RECORDS  # how many records to try at once: halved when refused, doubled when taken
    tries: int = 0  # of the record at `at` alone
    due: float = 0.0
    refused: int | None = None  # the record the chain stands at, for everybody to see
    shown: int | None = None


class Forwarder:
    """One sink's work. Call `round` again and again while this process holds the sink's lease, from one thread.

    `skipped` makes a record of what is left out, durable before it returns; it is called only with on_reject="skip".
    """

    def __init__(
        self,
        name: str,
        sink: Sink,
        engine: Engine,
        *,
        clock: Callable[[], int],
        skipped: Callable[[Skipped], None],
        wanted: Wanted = Wanted(),
        on_reject: Literal["stop", "skip"] = "stop",
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self._sink, self._engine = name, sink, engine
        self._reading = engine.execution_options(reading=True)
        self._wanted, self._on_reject, self._skipped = wanted, on_reject, skipped
        self._clock, self._monotonic = clock, monotonic
        self._chains: dict[str, _Chain] = {}
        self._epoch = 0
        self._delay = 0.0
        self._due = self._stored_at = 0.0
        self.failures = self.delivered = self.skips = 0
        self._said: set[str] = set()  # reasons logged since the last delivery
        self.last_error = ""

    def round(self, epoch: int, fence: Fence) -> bool:
        """Send one group of each chain that has something; whether more waits and may be sent now.

        Whatever `fence` raises ends the round: another process has the lease, and nothing is stored.
        """
        if epoch != self._epoch:  # another process may have gone on in between
            self._chains, self._epoch = {}, epoch
        moved = False
        try:
            if self._monotonic() >= self._due:
                moved = self._send()
        finally:
            if self._monotonic() >= self._stored_at + STORE_S:
                self._store(fence)
        return moved

    def finish(self, fence: Fence) -> None:
        """Store what is delivered and let go of the receiver."""
        self._sink.close()
        self._store(fence)

    def drop(self) -> None:
        """Forget everything: another process has the lease."""
        self._chains, self._epoch = {}, 0
        self._sink.close()

    def _send(self) -> bool:
        moved = False
        for log, chain, size in self._grown():
            if chain.at >= size or self._monotonic() < chain.due:
                continue
            try:
                moved |= self._forward(log, chain, size)
            except Bad as bad:  # this chain's trouble alone: the notary and `skms audit verify` say more
                self._failed(f"{bad.code} {bad.where}")
                chain.refused, chain.due = chain.at, self._monotonic() + LAST_DELAY_S
            except Undelivered as late:
                self._failed(str(late))
                self._delay = min(max(FIRST_DELAY_S, self._delay * 2), LAST_DELAY_S)
                wait = max(_jittered(self._delay), min(late.retry_after_s, LONGEST_WAIT_S))
                self._due = self._monotonic() + wait
                self._sink.close()
                return False
        return moved

    def _forward(self, log: str, chain: _Chain, size: int) -> bool:
        """One group of a chain; whether the chain moved or may move with a smaller group at once."""
        items, after = self._read(log, chain, size)
        chosen = tuple(item for item in items if item in self._wanted)
        try:
            if chosen:
                self._sink.deliver(Group(log, chosen))
                self._delay = 0.0
                self._said.clear()
        except Refused as refused:
            self._failed(str(refused))
            if len(items) > 1:
                chain.width = max(1, len(items) // 2)
                return True
            return self._stuck(log, chain, items[0])
        self.delivered += len(chosen)
        chain.at, chain.tries, chain.refused = after, 0, None
        chain.width = min(chain.width * 2, GROUP_RECORDS)
        return True

    def _stuck(self, log: str, chain: _Chain, item: Item) -> bool:
        """A record that is refused alone: try again for a while, then skip it with a record, or stay."""
        chain.tries += 1
        chain.refused = item.n
        if self._on_reject == "skip" and chain.tries >= TRIES:
            self._skipped(Skipped(self.name, log, item))
            self.skips += 1
            chain.at, chain.tries, chain.refused = item.n + 1, 0, None
            return True
        chain.due = self._monotonic() + _jittered(min(FIRST_DELAY_S * 2 ** min(chain.tries - 1, 10), LAST_DELAY_S))
        return False

    def _failed(self, reason: str) -> None:
        self.failures += 1
        self.last_error = reason[:200]
        if self.last_error not in self._said:  # once, not once a minute for as long as a receiver is away
            self._said.add(self.last_error)
            _log.warning("sink failed", extra={"facts": {"sink": self.name, "reason": self.last_error}})

    # ---- the database ----------------------------------------------------------------------------------------------

    def _grown(self) -> list[tuple[str, _Chain, int]]:
        """Every chain, where it stands and how long it is."""
        with self._reading.connect() as connection:
            rows = connection.execute(sa.select(shard_table).order_by(shard_table.c.shard)).mappings().all()
            if any(row["log_id"] not in self._chains for row in rows):
                stored = positions(connection).get(self.name, {})
                for row in rows:
                    at = stored.get(row["log_id"])
                    begin = _oldest(connection, row) if at is None else at
                    self._chains.setdefault(row["log_id"], _Chain(row["shard"], begin, at))
        return [(row["log_id"], self._chains[row["log_id"]], int(row["next_seq"])) for row in rows]

    def _read(self, log: str, chain: _Chain, size: int) -> tuple[tuple[Item, ...], int]:
        """The next records of a chain, and the number after them. Bad if they are not there, or not what they should be."""
        entries: list[bytes] = []
        with self._reading.connect() as connection:
            first = connection.execute(
                sa.select(sa.func.max(batch_table.c.first_seq)).where(
                    batch_table.c.shard == chain.shard, batch_table.c.first_seq <= chain.at
                )
            ).scalar()
            chosen = (
                sa.select(batch_table.c.first_seq, batch_table.c.entries)
                .where(batch_table.c.shard == chain.shard, batch_table.c.first_seq >= (first or 0))
                .order_by(batch_table.c.first_seq)
                .limit(chain.width + 1)  # a batch holds at least one record
            )
            length = 0
            with connection.execution_options(stream_results=True).execute(chosen) as rows:
                for row in rows:
                    try:
                        batch = unpack(row.entries)
                    except ValueError as error:
                        raise Bad("E_PARSE", f"{log}/{row.first_seq}", str(error)) from None
                    at = chain.at + len(entries)
                    if row.first_seq > at:
                        raise Bad(
                            "U_PRUNED", f"{log}/{at}", "not in the database any more: forward it from the archive"
                        )
                    for entry in batch[at - row.first_seq :]:
                        if len(entries) == chain.width or (entries and length + len(entry) > GROUP_BYTES):
                            break
                        entries.append(entry)
                        length += len(entry)
                    if chain.at + len(entries) < row.first_seq + len(batch):
                        break
        if not entries:
            raise Bad("E_TRUNC", f"{log}/{chain.at}", f"the shard row says {size} records")
        return tuple(_item(log, n, entry) for n, entry in enumerate(entries, chain.at)), chain.at + len(entries)

    def _store(self, fence: Fence) -> None:
        """Make the positions durable, if this process still holds the lease."""
        self._stored_at = self._monotonic()
        changed = {log: c for log, c in self._chains.items() if (c.at, c.refused) != (c.stored, c.shown)}
        if not changed:
            return
        with self._engine.begin() as connection:
            fence(connection)
            for log, chain in changed.items():
                values = {"seq": chain.at, "at": self._clock(), "refused": chain.refused}
                there = (sink_table.c.name == self.name) & (sink_table.c.log_id == log)
                if connection.execute(sa.update(sink_table).where(there).values(**values)).rowcount == 0:
                    connection.execute(sa.insert(sink_table), [{"name": self.name, "log_id": log, **values}])
        for chain in changed.values():
            chain.stored, chain.shown = chain.at, chain.refused


def _oldest(connection: Connection, row: Any) -> int:
    """Where a sink that is new begins: with what earlier pruning left. From then on nothing may go unsent."""
    chosen = sa.select(sa.func.min(batch_table.c.first_seq)).where(batch_table.c.shard == row["shard"])
    found = connection.execute(chosen).scalar()
    return int(row["next_seq"] if found is None else found)


def _item(log: str, n: int, entry: bytes) -> Item:
    try:
        parsed = json.loads(entry)
        frame, record = parsed["c"], parsed["r"]
        if (frame["l"], frame["n"]) != (log, n):
            raise ValueError("another record's frame")
        return Item(n, leaf_hash(entry), int(frame["t"]), entry, record)
    except (ValueError, KeyError, TypeError) as error:
        raise Bad("E_PARSE", f"{log}/{n}", str(error)) from None


def _jittered(delay: float) -> float:
    """Between half of a delay and all of it, so that nodes do not come back together."""
    return delay * random.uniform(0.5, 1.0)  # noqa: S311  (no secret)


# ---- what every worker sees ------------------------------------------------------------------------------------------


def positions(connection: Connection) -> dict[str, dict[str, int]]:
    """Sink -> chain -> number of the next record to be sent. What is pruned must lie below all of them."""
    found: dict[str, dict[str, int]] = {}
    for row in connection.execute(sa.select(sink_table)).mappings():
        found.setdefault(row["name"], {})[row["log_id"]] = int(row["seq"])
    return found


@dataclass(frozen=True, slots=True)
class Lag:
    """How far a sink is behind: records, age of the oldest of them (s), and whether a record is refused."""

    records: int
    seconds: float
    refused: bool


def lags(engine: Engine, names: tuple[str, ...], now: int) -> dict[str, Lag]:
    """How far each sink is behind, as the database has it."""
    found = {}
    with engine.execution_options(reading=True).connect() as connection:
        at = positions(connection)
        stuck = set(connection.execute(sa.select(sink_table.c.name).where(sink_table.c.refused.is_not(None))).scalars())
        shards = connection.execute(sa.select(shard_table)).mappings().all()
        for name in names:
            records, oldest = 0, now
            for row in shards:
                next_one = at.get(name, {}).get(row["log_id"], 0)
                if next_one >= row["next_seq"]:
                    continue
                records += row["next_seq"] - next_one
                waits = sa.select(batch_table.c.t).where(
                    batch_table.c.shard == row["shard"], batch_table.c.first_seq <= next_one
                )
                oldest = min(
                    oldest, connection.execute(waits.order_by(batch_table.c.first_seq.desc()).limit(1)).scalar() or now
                )
            found[name] = Lag(records, max(0.0, (now - oldest) / 1e6), name in stuck)
    return found
