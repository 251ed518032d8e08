"""Two operators' nodes, as users run them, that witness each other over HTTPS; one of them witnesses a third log too."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit import verify
from audit.chain import unpack
from audit.checkpoint import Note, NoteKey, format_vkey, parse_checkpoint, parse_note, parse_vkey, verified
from audit.export import export
from audit.tables import batch_table, checkpoint_table
from audit.verify import load_trust
from audit.witness import MAX_BODY, SIZE_TYPE, Submission
from contracts.witness_contract import LEAVES, LOG, ORIGIN, OTHER, note_of, submission
from databases import address
from harness import ROOT, Files, prepare_apart, skms, tls_of
from service.database import open_engine, reader
from service.witnesses import new_cosigner

INDEPENDENT = ROOT / "audit" / "independent" / "skms_verify.py"


@dataclass
class Operator:
    """One operator's node: its files, its witness's key, and the process that serves."""

    name: str
    files: Files
    vkey: str
    cosigner: str = ""
    serving: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def origin(self) -> str:
        return f"{self.name}.example/audit"

    @property
    def keys(self) -> tuple[bytes, ...]:
        return load_trust(Path(self.files.environment["trust_file"])).keys

    @property
    def policy(self) -> Path:
        return self.files.directory / "witnesses.policy"

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.files.url, verify=tls_of(self.files, None), timeout=30)

    def add(self, body: bytes) -> httpx.Response:
        """Ask it to cosign; what is asked too often is asked again when the answer says."""
        with self.client() as client:
            while (answer := client.post("/witness/add-checkpoint", content=body)).status_code == 429:
                time.sleep(int(answer.headers["retry-after"]))
            return answer

    def latest(self, origin: str) -> httpx.Response:
        with self.client() as client:
            digest = hashlib.sha256(origin.encode()).hexdigest()
            while (answer := client.get(f"/witness/{digest}/checkpoint")).status_code == 429:
                time.sleep(int(answer.headers["retry-after"]))
            return answer

    def configure(self, partner: Operator) -> None:
        """Cosign the partner's log and the tests', and have the partner cosign ours."""
        url = f"{partner.files.url}/witness"
        self.policy.write_text(f"witness {partner.name} {partner.vkey} {url}\nquorum {partner.name}\n")
        logs = [(partner.origin, base64.b64encode(key).decode()) for key in partner.keys]
        sections = [f'[[witness.log]]\norigin = "{origin}"\nkey = "{key}"' for origin, key in logs]
        text = self.files.config_file.read_text().replace("dev.skms.example/audit", self.origin)
        self.files.config_file.write_text(
            "\n".join(
                [
                    text,
                    f'[audit.witnesses]\npolicy = "{self.policy}"\nca = "{partner.files.environment["ca_file"]}"',
                    f'[witness]\nname = "{self.name}.example/w"\nkey_file = "{self.files.directory / "witness.key"}"',
                    *sections,
                    f'[[witness.log]]\norigin = "{ORIGIN}"\nkey = "{format_vkey(LOG)}"\n',
                ]
            )
        )

    def serve(self) -> None:
        command = [sys.executable, "-m", "service.cli.main", "serve", "--config", str(self.files.config_file)]
        with (self.files.directory / "serve.log").open("ab") as sink:
            self.serving.append(subprocess.Popen(command, stdout=sink, stderr=sink, cwd=ROOT))

    def ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.serving[-1].poll() is None:
            with contextlib.suppress(httpx.TransportError), self.client() as client:
                if client.get("/readyz").status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError("not ready:\n" + (self.files.directory / "serve.log").read_text()[-3_000:])


def by_command(*arguments: str) -> str:
    made = skms(*arguments)
    assert made.returncode == 0, made.stderr.decode()
    return made.stdout.decode().strip()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Operator, Operator]]:
    base = tmp_path_factory.mktemp("witnesses")
    files = [prepare_apart(base / "one"), prepare_apart(base / "two")]
    one_key, two_key = base / "one" / "witness.key", base / "two" / "witness.key"
    one = Operator(
        "one",
        files[0],
        by_command("witness", "init", "--name", "one.example/w", "--key-file", str(one_key)),
    )
    two = Operator("two", files[1], new_cosigner("two.example/w", two_key))
    one.configure(two)
    two.configure(one)
    config, pq_key = ("--config", str(one.files.config_file)), base / "one" / "pq.key"
    one.cosigner = "cosigner " + by_command("audit", "post-quantum-key", *config, "--key-file", str(pq_key))
    with one.files.config_file.open("a") as file:
        file.write(f'[audit]\npost_quantum_key = "{pq_key}"\n')
    try:
        for node in (one, two):
            node.serve()
        for node in (one, two):
            node.ready()
        yield one, two
    finally:
        for process in (p for node in (one, two) for p in node.serving):
            process.send_signal(signal.SIGKILL)
            process.wait(10)


def exported(node: Operator, partner: Operator, to: Path) -> Path:
    """An export of a moment when the partner had just cosigned the newest checkpoint."""
    engine = open_engine(address(node.files.directory))
    newest = sa.select(checkpoint_table.c.cosigs).order_by(checkpoint_table.c.size.desc()).limit(1)
    deadline, line = time.monotonic() + 60, f"{partner.name}.example/w ".encode()
    with engine.execution_options(reading=True).connect() as connection:
        while line not in (connection.execute(newest).scalar() or b""):
            assert time.monotonic() < deadline, f"{partner.name} cosigns nothing"
            connection.rollback()
            time.sleep(0.05)
    export(reader(engine), to, verify.Trust(node.origin, node.keys))
    engine.dispose()
    return to


def test_two_operators_witness_each_other_and_both_exports_show_it(
    pair: tuple[Operator, Operator], tmp_path: Path
) -> None:
    for node, partner in (pair, pair[::-1]):
        deadline, attempt, status = time.monotonic() + 60, 0, -1
        while status != verify.INTACT:  # the newest checkpoint of a moment may not be cosigned yet
            assert time.monotonic() < deadline, f"{node.name}: no export with a quorum"
            attempt += 1
            copy = exported(node, partner, tmp_path / node.name / str(attempt))
            trust = copy / "mine.txt"
            trust.write_text((copy / "trust.txt").read_text() + node.cosigner)
            arguments = [str(copy), "--trust", str(trust), "--accept-unanchored"]
            arguments += ["--policy", str(node.policy)]
            status = verify.main(arguments)
        others = [str(copy / "trust.txt") if a == str(trust) else a for a in arguments]  # it knows no ML-DSA
        second = subprocess.run([sys.executable, str(INDEPENDENT), *others], capture_output=True)
        assert second.returncode == 0, second.stdout.decode()
        note = parse_note((copy / node.origin / "checkpoint").read_bytes())
        cosigner = parse_vkey(partner.vkey)
        assert verified(note, [cosigner]) == (cosigner,)
        stranger = tmp_path / f"{node.name}.policy"
        other = NoteKey("w.example", 4, Ed25519PrivateKey.generate().public_key().public_bytes_raw())
        stranger.write_text(f"witness w {format_vkey(other)}\nquorum w\n")
        assert verify.main([*arguments[:-1], str(stranger)]) == verify.TAMPERED


def test_checkpoints_are_cosigned_stored_and_shown(pair: tuple[Operator, Operator]) -> None:
    node, _ = pair
    key = parse_vkey(node.vkey)
    assert node.latest(ORIGIN).status_code == 404
    for old, size in ((0, 3), (3, 8), (8, 8), (8, 20)):
        answer = node.add(submission(old, size))
        assert (answer.status_code, "audit-receipt" in answer.headers) == (200, True), answer.text
        assert verified(parse_note(note_of(size).text + b"\n" + answer.content), [key]) == (key,)
        shown = parse_note(node.latest(ORIGIN).content)
        assert set(verified(shown, [key, LOG])) == {key, LOG}
        assert parse_checkpoint(shown.text).size == size


def test_what_cannot_be_cosigned_is_answered_as_c2sp_says(pair: tuple[Operator, Operator]) -> None:
    _, node = pair
    node.add(submission(0, 5))
    stranger = Ed25519PrivateKey.generate()
    unsigned = Note(note_of(8).text, ()).signed_by(parse_vkey(node.vkey), bytes(72))
    for body, status in (
        (submission(0, 8), 409),
        (submission(3, 8), 409),
        (submission(5, 5, OTHER), 409),
        (submission(5, 9, OTHER), 422),
        (submission(5, 9).replace(base64.b64encode(LEAVES[8]), base64.b64encode(LEAVES[7])), 422),
        (Submission(0, (), note_of(4, origin="other.example")).encode(), 404),
        (Submission(0, (), note_of(4, key=stranger)).encode(), 403),
        (Submission(0, (), unsigned).encode(), 403),
        (submission(9, 8), 400),
        (b"", 400),
        (b"old 5\n", 400),
        (b"old 05" + submission(5, 8)[5:], 400),
        (submission(5, 8)[:-1], 400),
        (b"\xff" * 100, 400),
        (bytes(MAX_BODY + 1), 413),
    ):
        answer = node.add(body)
        assert answer.status_code == status, (body[:40], answer.text)
        if status == 409:
            assert (answer.headers["content-type"].partition(";")[0], answer.content) == (SIZE_TYPE, b"5\n")
    assert parse_checkpoint(parse_note(node.latest(ORIGIN).content).text).size == 5
    assert node.add(submission(5, 9)).status_code == 200


def recorded(node: Operator) -> tuple[int, int]:
    """(refusals of strangers that have a record of their own, those that were only counted)."""
    engine = open_engine(address(node.files.directory))
    with reader(engine).connect() as connection:
        bundles = connection.execute(sa.select(batch_table.c.entries)).scalars().all()
    engine.dispose()
    records = [json.loads(entry)["r"] for bundle in bundles for entry in unpack(bundle)]
    own = sum(r.get("op") == "witness_checkpoint" and r["out"] != "ok" for r in records)
    return own, sum(r["count"] for r in records if r["kind"] == "suppressed")


def test_a_flood_of_refusals_is_counted_to_the_last_one_and_makes_few_records(pair: tuple[Operator, Operator]) -> None:
    node, _ = pair
    own, counted = recorded(node)
    with node.client() as client:
        for _ in range(150):
            answer = client.post("/witness/add-checkpoint", content=bytes(MAX_BODY + 1))  # 413, whatever the rate
            assert answer.status_code == 413
        deadline = time.monotonic() + 30
        while sum(found := recorded(node)) - own - counted < 150:
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
    assert sum(found) - own - counted == 150
    assert found[0] - own < 75


def test_a_flood_is_told_to_wait_and_does_not_keep_others_out_for_long(pair: tuple[Operator, Operator]) -> None:
    node, _ = pair
    told, until = list[httpx.Response](), time.monotonic() + 60

    def flood() -> None:
        with node.client() as client:
            while not told and time.monotonic() < until:
                answer = client.post("/witness/add-checkpoint", content=b"")
                if answer.status_code == 429:
                    told.append(answer)

    threads = [threading.Thread(target=flood) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(told[0].content)["code"] == "rate_limited"
    assert int(told[0].headers["retry-after"]) >= 1
    assert node.add(submission(20, 20)).status_code in {200, 409}
