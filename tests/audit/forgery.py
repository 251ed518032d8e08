"""Exports to damage: a real one of a real database, and chains that an insider with the writer's key could make."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from audit_lab import ORIGIN, Lab, intent, now, op, outcome
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection

from audit import event
from audit.chain import (
    BUNDLE,
    DAY_US,
    ZERO,
    Chain,
    leaf_hash,
    pack,
    seal_statement,
    tree_hash,
    unpack,
    writer_statement,
)
from audit.checkpoint import COSIGNATURE, Checkpoint, Note, NoteKey, cosigned, format_vkey, key_of
from audit.export import export
from audit.notary import Notary

FIRST, SECOND = f"{ORIGIN}/n0-0", f"{ORIGIN}/n1-0"


class CurveSigner:
    """An audit key on P-256, without an HSM."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())

    def public_key(self) -> bytes:
        form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        return self._key.public_key().public_bytes(*form)

    def known_keys(self) -> tuple[bytes, ...]:
        return (self.public_key(),)

    def sign(self, statement: bytes) -> bytes:
        return self._key.sign(statement, ec.ECDSA(hashes.SHA256()))


class Export:
    """An export on disk, with the keys that made it, to be damaged."""

    def __init__(self, directory: Path, signer: Any, *, origin: str = ORIGIN) -> None:
        self.directory, self.signer, self.origin = directory, signer, origin
        self.witness_key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
        self.witness = NoteKey("w.example", COSIGNATURE, self.witness_key.public_key().public_bytes_raw())

    @property
    def root(self) -> Path:
        return self.directory / self.origin

    @property
    def trust(self) -> Path:
        return self.directory / "trust.txt"

    @property
    def receipts(self) -> Path:
        return self.directory / "receipts.txt"

    @property
    def held(self) -> Path:
        """The checkpoint that the auditor kept from earlier."""
        return self.directory / "held"

    def copy(self, directory: Path) -> Export:
        shutil.copytree(self.directory, directory)
        return Export(directory, self.signer)

    # ---- entries, of a chain or of the root log

    def place(self, log: str) -> Path:
        return self.root if log == self.origin else self.root / log.rpartition("/")[2]

    def entries(self, log: str) -> list[bytes]:
        found: list[bytes] = []
        for path in sorted((self.place(log) / "tile/entries").rglob("*"), key=lambda p: (".p" in str(p), str(p))):
            found += unpack(path.read_bytes()) if path.is_file() else []
        return found

    def write(self, log: str, entries: Sequence[bytes]) -> None:
        """Put these entries and their hash tiles in the place of a log's own."""
        shutil.rmtree(self.place(log) / "tile", ignore_errors=True)
        write_log(self.place(log), entries)

    def edit(self, log: str, n: int, old: bytes, new: bytes) -> None:
        """Change one entry in its bundle, and nothing else."""
        self.swap(log, n, lambda entry: replaced(entry, old, new))

    def swap(self, log: str, n: int, change: Callable[[bytes], bytes]) -> None:
        for path in (self.place(log) / "tile/entries").rglob("*"):
            first = (
                int(path.name if ".p" not in path.parent.name else path.parent.name.removesuffix(".p")) * BUNDLE
                if path.is_file()
                else -1
            )
            if path.is_file() and first <= n < first + BUNDLE:
                entries = unpack(path.read_bytes())
                entries[n - first] = change(entries[n - first])
                path.write_bytes(pack(entries))

    # ---- seals

    def seals(self, log: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.place(log) / "seals.jsonl").read_text().splitlines()]

    def reseal(self, log: str, rows: Sequence[dict[str, Any]]) -> None:
        (self.place(log) / "seals.jsonl").write_bytes(b"".join(event.encode_plain(row) + b"\n" for row in rows))

    def cut_chain(self, log: str, groups: int) -> None:
        """Cut the last groups and their seals, consistently."""
        kept = self.seals(log)[:-groups]
        self.write(log, self.entries(log)[: sum(row["n"] for row in kept)])
        self.reseal(log, kept)

    # ---- the root log and its checkpoints

    def sign(self, checkpoint: Checkpoint, *, witnessed: bool = False) -> bytes:
        text = checkpoint.text()
        note = Note(text, ()).signed_by(key_of(self.origin, self.signer.public_key()), self.signer.sign(text))
        if witnessed:
            seconds = int(time.time())
            value = seconds.to_bytes(8, "big") + self.witness_key.sign(cosigned(text, seconds))
            note = note.signed_by(self.witness, value)
        return note.encode()

    def rewrite_root(
        self, change: Callable[[list[dict[str, Any]]], None], *, t: Callable[[int], int] = lambda t: t
    ) -> None:
        """As an operator with the audit key could: other entries in the root log, well linked and signed."""
        old = self.entries(ORIGIN)
        bodies = [json.loads(e)["r"] for e in old]
        times = [json.loads(e)["c"]["t"] for e in old]
        change(bodies)
        chain, made = Chain(ORIGIN), []
        for i, body in enumerate(bodies):
            chain.t = 0  # the time is written as it is given
            made.append(chain.append(event.encode_plain(body), t(times[min(i, len(times) - 1)]), None))
        self.write(ORIGIN, made)
        self.checkpoints([len(made)])

    def checkpoints(self, sizes: Sequence[int], *, witnessed: bool = False) -> None:
        """Sign checkpoints of these sizes in the place of those that are there."""
        leaves = [leaf_hash(e) for e in self.entries(self.origin)]
        notes = [self.sign(Checkpoint(self.origin, n, tree_hash(leaves[:n])), witnessed=witnessed) for n in sizes]
        self.list_notes(notes)
        (self.root / "checkpoint").write_bytes(notes[-1])

    def notes(self) -> list[bytes]:
        lines = (self.root / "checkpoints.jsonl").read_text().splitlines()
        return [json.loads(line)["note"].encode() for line in lines]

    def list_notes(self, notes: Sequence[bytes]) -> None:
        rows = [event.encode_plain({"at": 1, "note": note.decode()}) + b"\n" for note in notes]
        (self.root / "checkpoints.jsonl").write_bytes(b"".join(rows))

    def put_newest(self, note: bytes) -> None:
        """This note in the place of the newest, wherever it stands."""
        self.list_notes([*self.notes()[:-1], note])
        (self.root / "checkpoint").write_bytes(note)

    def drop_root(self) -> None:
        """As an export of the first release was: chains alone."""
        shutil.rmtree(self.root / "tile")
        for name in ("checkpoint", "checkpoints.jsonl"):
            (self.root / name).unlink()

    def trust_witness(self, quorum: int = 1) -> None:
        with self.trust.open("a") as file:
            file.write(f"witness w.example {format_vkey(self.witness)}\nquorum {quorum}\n")


def replaced(entry: bytes, old: bytes, new: bytes) -> bytes:
    assert old in entry, entry
    return entry.replace(old, new, 1)


def write_log(directory: Path, entries: Sequence[bytes]) -> None:
    """Entry bundles and hash tiles."""
    hashes_below, level = [leaf_hash(e) for e in entries], 0
    for i in range(0, len(entries), BUNDLE):
        _write(directory / "tile/entries", i // BUNDLE, pack(entries[i : i + BUNDLE]), len(entries[i : i + BUNDLE]))
    while hashes_below:
        parts = [hashes_below[i : i + BUNDLE] for i in range(0, len(hashes_below), BUNDLE)]
        for i, part in enumerate(parts):
            _write(directory / f"tile/{level}", i, b"".join(part), len(part))
        hashes_below, level = [tree_hash(part) for part in parts if len(part) == BUNDLE], level + 1


def _write(directory: Path, number: int, data: bytes, width: int) -> None:
    path = directory / (f"{number:03d}" if width == BUNDLE else f"{number:03d}.p/{width}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def held(_: Connection) -> None:
    """The notary's lease is ours."""


async def _fill(made: Lab) -> list[str]:
    notary = Notary(made.engine, origin=ORIGIN, signer=made.signer, clock=now)
    receipts: list[str] = []
    for node, groups in (("n0", 6), ("n1", 1), ("n0", 4)):
        writer = made.writer(node=node)
        await writer.start()
        for group in range(groups):
            facts = {"actor": 'CN="a\\b"', "kver": 1, "ctx": {"a": "h1:" + "0" * 32, "b": "h1:" + "1" * 32}}
            records: list[event.Record] = [op(f"t{i % 3}", **facts) for i in range(300 if node == "n1" else 5)]
            asked = intent()
            records += [op(None, rule=("r1", "r2"), dry=False), asked, outcome(asked)]
            receipts += [r.header() for r in await writer.append_many(records)]
            if group % 2 == 0:
                notary.round(1, held)
        await writer.close()
        notary.round(1, held)
    return receipts


def make_export(directory: Path, signer: Any = None) -> Export:
    """An export of two chains of two writers each way, a root log with several checkpoints, receipts, an old checkpoint."""
    directory.mkdir()
    made = Lab(directory)
    made.signer = signer or made.signer
    receipts = asyncio.run(_fill(made))
    found = Export(directory / "export", made.signer)
    export(made.engine, found.directory, made.trust)
    found.receipts.write_text("\n".join(receipts))
    found.held.write_bytes(found.notes()[1])
    made.engine.dispose()
    return found


class Insider:
    """Makes a chain of any bytes with a writer's key that the audit key certified: what is left is only the format."""

    def __init__(self, signer: Any, *, log: str = FIRST) -> None:
        self.signer, self.log = signer, log
        self.entries: list[bytes] = []
        self.rows: list[dict[str, Any]] = []
        self.t, self.previous, self.epoch = 1_790_000_000_000_000, ZERO, 0
        self.key = Ed25519PrivateKey.generate()

    def record(self, kind: str = "admin", **facts: object) -> dict[str, object]:
        always = {"id": str(uuid.uuid4()), "kind": kind, "node": "n0", "ts": 1, "v": 1}
        return {**always, **({"op": "start"} if kind == "admin" else {}), **facts}

    def entry(self, body: bytes, *, t: int | None = None, tenant: tuple[int, str] | None = None) -> bytes:
        """Frame these bytes and append them."""
        self.t = self.t if t is None else t
        link = "" if tenant is None else f',"tn":{tenant[0]},"tp":"{tenant[1]}"'
        c = f'{{"c":{{"l":"{self.log}","n":{len(self.entries)},"p":"{self.previous}","t":{self.t}{link}}},"r":'
        made = c.encode() + body + b"}"
        self.entries.append(made)
        self.previous = leaf_hash(made).hex()
        return made

    def seal(self, **changed: object) -> Insider:
        """Seal what was appended since the last seal."""
        first = sum(int(row["n"]) for row in self.rows)
        count = len(self.entries) - first
        signature = self.key.sign(seal_statement(self.log, self.epoch, first, count, self.previous))
        row = {"day": self.t // DAY_US, "epoch": self.epoch, "first": first, "head": self.previous, "n": count}
        self.rows.append({**row, "seal": signature.hex(), "t": self.t, **changed})
        return self

    def open(self, epoch: int, *, signer: Any = None) -> Insider:
        """Take over with a new key."""
        self.key, self.epoch = Ed25519PrivateKey.generate(), epoch
        public = self.key.public_key().public_bytes_raw().hex()
        statement = writer_statement(self.log, epoch, len(self.entries), self.previous, public)
        cert = (signer or self.signer).sign(statement).hex()
        facts = {"cfg": ZERO, "clk": "ok", "dist": ZERO, "ver": "1"}
        self.entry(event.encode_plain(self.record("open", epoch=epoch, pub=public, cert=cert, **facts)))
        return self.seal()

    def add(self, body: bytes | None = None, **facts: object) -> Insider:
        """One record in a group of its own."""
        self.entry(event.encode_plain(self.record(**facts)) if body is None else body)
        return self.seal()

    def write(self, directory: Path, *, origin: str = ORIGIN) -> Export:
        """The export of this chain alone."""
        made = Export(directory, self.signer, origin=origin)
        write_log(made.place(self.log), self.entries)
        made.reseal(self.log, self.rows)
        key = base64.b64encode(self.signer.public_key()).decode()
        made.trust.write_text(f"origin {origin}\nkey {key}\n")
        return made
