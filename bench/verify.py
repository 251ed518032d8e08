"""Records a second of `skms-verify` at each level, by one process and by two, beside SHA-256 alone over the same bytes.

`make bench-verify`: one log of RECORDS records (default 200,000) in groups of GROUP (default 500) with root log, checkpoints
and hash tiles, verified ROUNDS times (default 5) in turns; medians. Processor time of a step, of all its processes, is beside
its wall time, because the cores may not be ours alone.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit import event, verify
from audit.chain import BUNDLE, DAY_US, Batch, Chain, leaf_hash, pack, seal_statement, unpack, writer_statement
from audit.checkpoint import Checkpoint, Note, key_of
from audit.proof import TenantMap
from audit.rootlog import RootLog
from audit.segments import seal_line
from audit.tiles import ENTRIES, HashTiles, tile_path

RECORDS = int(os.environ.get("RECORDS", "200000"))
GROUP = int(os.environ.get("GROUP", "500"))
ROUNDS = int(os.environ.get("ROUNDS", "5"))
ORIGIN = "bench.example/audit"
LOG = f"{ORIGIN}/n0-0"
COMMITTED = 10_000  # records between two entries of the root log


def record(number: int, at: int) -> event.Op:
    """What an encryption leaves; each third has a context, each fiftieth is refused."""
    made = str(uuid.uuid4())
    denied = number % 50 == 0
    return event.Op(
        id=made,
        ts=at,
        node="n0",
        op="decrypt" if number % 2 else "encrypt",
        out="denied" if denied else "ok",
        why="residency" if denied else None,
        tenant=f"t{number % 7}",
        actor="mtls:spiffe://eu-de-1.gov.example/health/worker",
        authn="mtls",
        src="10.0.0.1",
        key=made,
        req=made,
        region="eu-de-1",
        ctx={"purpose": f"h1:{number:032x}"} if number % 3 == 0 else None,
        in_len=64,
        kver=1,
        us=412,
        pol="0" * 32,
    )


class Made:
    """The export of one chain by one writer, and its root log."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.signer, self.writer = directory, Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        self.public = self.signer.public_key().public_bytes(*form)
        self.chain, self.root, self.tenants = Chain(LOG), RootLog(ORIGIN), TenantMap()
        self.files = {LOG: HashTiles(), ORIGIN: HashTiles()}
        self.pending: dict[str, list[bytes]] = {LOG: [], ORIGIN: []}
        self.count = dict.fromkeys(self.pending, 0)
        self.notes: list[bytes] = []

    def write(self) -> None:
        """All of it; `trust.txt` beside it."""
        at = 1_790_000_000_000_000
        (self.directory / LOG).mkdir(parents=True)
        with (self.directory / LOG / "seals.jsonl").open("wb") as seals:
            seals.write(self._group([self._open(at)], at))
            for first in range(0, RECORDS, GROUP):
                bodies = [record(n, at + n) for n in range(first, min(RECORDS, first + GROUP))]
                seals.write(self._group(bodies, at + first + GROUP))
                if self.chain.n % COMMITTED < GROUP or self.chain.n > RECORDS:
                    self._commit(at + first + GROUP)
        for log in self.files:
            self._put(log, self.files[log].partial())
            if self.pending[log]:
                path = tile_path(ENTRIES, self.count[log] // BUNDLE, len(self.pending[log]))
                self._put(log, [(path, pack(self.pending[log]))])
        lines = [event.encode_plain({"at": at, "note": note.decode()}) + b"\n" for note in self.notes]
        (self.directory / ORIGIN / "checkpoints.jsonl").write_bytes(b"".join(lines))
        (self.directory / ORIGIN / "checkpoint").write_bytes(self.notes[-1])
        key = base64.b64encode(self.public).decode()
        (self.directory / "trust.txt").write_text(f"origin {ORIGIN}\nkey {key}\n")

    def _open(self, at: int) -> event.Open:
        public = self.writer.public_key().public_bytes_raw().hex()
        cert = self.signer.sign(writer_statement(LOG, 1, 0, self.chain.previous, public)).hex()
        facts = {"cfg": "0" * 64, "dist": "0" * 64, "ver": "1", "clk": "ok"}
        return event.Open(id=str(uuid.uuid4()), ts=at, node="n0", epoch=1, pub=public, cert=cert, **facts)

    def _group(self, records: Iterable[event.Record], t: int) -> bytes:
        first = self.chain.n
        entries = [self.chain.append(event.encode(r), t, event.tenant_of(r)) for r in records]
        self._push(LOG, entries)
        statement = seal_statement(LOG, 1, first, len(entries), self.chain.previous)
        head, seal = bytes.fromhex(self.chain.previous), self.writer.sign(statement)
        return seal_line(Batch(LOG, first, len(entries), 1, t, b"", head, seal, t // DAY_US))

    def _commit(self, t: int) -> None:
        for tenant, head in self.chain.tenants.items():
            self.tenants.put(tenant, {LOG: head})
        shard = LOG, self.chain.n, self.chain.frontier.root().hex()
        self._push(ORIGIN, [self.root.append([shard], tenants=self.tenants.root(), epoch=1, full=True, t=t)])
        text = Checkpoint(ORIGIN, self.root.chain.n, self.root.chain.frontier.root()).text()
        note = Note(text, ()).signed_by(key_of(ORIGIN, self.public), self.signer.sign(text))
        self.notes.append(note.encode())

    def _push(self, log: str, entries: Iterable[bytes]) -> None:
        for entry in entries:
            self.pending[log].append(entry)
            self.count[log] += 1
            self._put(log, self.files[log].push([leaf_hash(entry)]))
            if len(self.pending[log]) == BUNDLE:
                self._put(log, [(tile_path(ENTRIES, self.count[log] // BUNDLE - 1), pack(self.pending[log]))])
                self.pending[log].clear()

    def _put(self, log: str, files: Iterable[tuple[str, bytes]]) -> None:
        for name, data in files:
            path = self.directory / log / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def timed(act: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall, and of processor time of this process and those that it started."""
    begun, used = time.perf_counter(), os.times()
    act()
    after = os.times()
    return time.perf_counter() - begun, sum(after[:4]) - sum(used[:4])


def verified(directory: Path, level: str, jobs: int) -> None:
    """As the command does it; SystemExit if it finds anything."""
    options = ["--level", level, "--jobs", str(jobs), "--accept-unanchored", "--json"]
    with contextlib.redirect_stdout(io.StringIO()):
        status = verify.main([str(directory), "--trust", str(directory / "trust.txt"), *options])
    if status:
        raise SystemExit(f"the export that was made here does not verify: status {status}")


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        Made(directory).write()
        bundles = [p.read_bytes() for p in (directory / LOG / "tile/entries").rglob("*") if p.is_file()]
        entries = [entry for bundle in bundles for entry in unpack(bundle)]
        size = sum(map(len, entries)) // len(entries)

        def alone() -> None:
            for entry in entries:
                hashlib.sha256(entry).digest()

        steps: dict[str, Callable[[], object]] = {"SHA-256 alone": alone}
        for level in ("hash", "link", "full"):
            for jobs in (1, 2):
                steps[f"{level}, {jobs} process{'es' * (jobs > 1)}"] = lambda level=level, jobs=jobs: verified(
                    directory, level, jobs
                )
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                took[name].append(timed(step))
        base = statistics.median(wall for wall, _ in took["SHA-256 alone"])
        print(f"{len(entries)} records of {size} bytes, groups of {GROUP}, medians of {ROUNDS}\n")
        print("| | records/s | of SHA-256 alone | of one process | processor time of one, us |\n|---|---|---|---|---|")
        for name, found in took.items():
            wall, cpu = (statistics.median(x) for x in zip(*found, strict=True))
            one = statistics.median(w for w, _ in took[name.replace("2 processes", "1 process")]) / wall
            figures = f"{len(entries) / wall:,.0f} | {base / wall:.2f} | {one:.2f} | {cpu * 1e6 / len(entries):.2f}"
            print(f"| {name} | {figures} |")


if __name__ == "__main__":
    main()
