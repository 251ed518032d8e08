"""The auditor's report, from a real log: right numbers, each of which its own command gives again, and nothing else."""

from __future__ import annotations

import base64
import json
import shlex
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from audit_lab import ORIGIN, Lab, MemorySigner, now, op
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection
from typer.testing import CliRunner

from audit import event
from audit.chain import Receipt
from audit.checkpoint import COSIGNATURE, NoteKey, cosigned, format_vkey, parse_note
from audit.export import export
from audit.notary import Notary
from audit.report import Evidence, Gap, Source, Wanted, as_html, as_json, gaps, make, moment
from audit.verify import load_trust
from service.cli.client import Failed
from service.cli.commands import app
from service.protocols.wire import microseconds

pytestmark = pytest.mark.anyio
SECOND = 1_000_000
CANARY = "canary<script>alert(1)</script>"


def held(_: Connection) -> None:
    """The lease is ours."""


class Witness:
    """A witness's key and its line below a note."""

    def __init__(self, name: str) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.key = NoteKey(name, COSIGNATURE, self._key.public_key().public_bytes_raw())

    def cosign(self, note: bytes) -> bytes:
        parsed, at = parse_note(note), now() // SECOND
        value = at.to_bytes(8, "big") + self._key.sign(cosigned(parsed.text, at))
        return parsed.signed_by(self.key, value).encode()


async def written(made: Lab, start: int) -> None:
    """Three tenants, two chains, 30 s in which records stood without a checkpoint."""

    async def write(at: int, node: str, *records: event.Record) -> None:
        writer = made.writer(node=node, clock=lambda: at)
        await writer.start()
        await writer.append_many(records)
        await writer.close()

    denied = {"out": "denied", "why": "policy_denied", "rule": ("residency:eu", "tier:3")}

    def notary(at: int) -> Notary:
        return Notary(made.engine, origin=ORIGIN, signer=made.signer, clock=lambda: at)

    await write(start, "n0", *(op("health", region="eu-de-1") for _ in range(5)), op("health", op="sign", **denied))
    await write(start, "n1", op("health", region="eu-de-2", out="failed", why="bad_tag"), op("tax", region="eu-fr-1"))
    assert notary(start + SECOND).round(1, held) is not None
    await write(start + 100 * SECOND, "n0", op("health", region="eu-de-1"), op(None, op="whoami"))
    assert notary(start + 130 * SECOND).round(2, held) is not None
    stranger = {"actor": CANARY, "region": "eu-canary", "rule": ("canary:rule",), "why": "canary_why"}
    await write(start + 131 * SECOND, "n1", op("tax", op="mac", out="denied", **stranger))
    assert notary(start + 132 * SECOND).round(3, held) is not None


def exported(made: Lab, directory: Path, change: Callable[[int, bytes], bytes] = lambda _, note: note) -> Source:
    export(made.engine, directory, made.trust)
    stored = directory / ORIGIN / "checkpoints.jsonl"
    rows = [json.loads(line) for line in stored.read_bytes().splitlines()]
    rows = [row | {"note": change(size, row["note"].encode()).decode()} for size, row in enumerate(rows, 1)]
    stored.write_bytes(b"".join(event.encode_plain(row) + b"\n" for row in rows))
    (directory / ORIGIN / "checkpoint").write_text(rows[-1]["note"])
    return Source(directory, directory / "trust.txt", load_trust(directory / "trust.txt"))


@pytest.fixture
async def start(made: Lab) -> int:
    at = now() // SECOND * SECOND - 3_600 * SECOND + 123_457  # a time with microseconds
    await written(made, at)
    return at


@pytest.fixture
def source(made: Lab, start: int, tmp_path: Path) -> Source:
    return exported(made, tmp_path / "an export")


def run(command: str) -> Any:
    """What a command of the report prints."""
    words = shlex.split(command)
    if words[0] != "skms":
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[0])
    done = CliRunner().invoke(app, ["-o", "json", *words[1:]], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def of(numbers: list[dict[str, Any]]) -> dict[str, int]:
    return {n["of"]: n["count"] for n in numbers}


@pytest.mark.parametrize("tenant", [None, "health"])
async def test_every_number_is_right_and_its_command_gives_it_again(
    source: Source, start: int, tenant: str | None, tmp_path: Path
) -> None:
    wanted = Wanted(tenant=tenant, since=start, until=start + 131 * SECOND)
    where = [f"--export={source.directory}", f"--trust={source.trust_file}", f"--out={tmp_path / 'report.json'}"]
    run(shlex.join(["skms", "audit", "report", "--format=json", *where, *wanted.options()]))
    shown = json.loads((tmp_path / "report.json").read_text())
    if tenant is not None:
        assert of(shown["counts"]["operations"]) == {"encrypt": 7, "sign": 1}
        assert of(shown["counts"]["outcomes"]) == {"ok": 6, "denied": 1, "failed": 1}
        assert of(shown["counts"]["regions"]) == {"eu-de-1": 6, "eu-de-2": 1}
        assert of(shown["counts"]["denials by rule"]) == {"residency:eu": 1, "tier:3": 1}
        assert of(shown["counts"]["denials by reason"]) == {"policy_denied": 1}
        assert of(shown["chains"]) == {f"{ORIGIN}/n0-0": 7, f"{ORIGIN}/n1-0": 1}
        assert shown["total"]["count"] == 8
    else:
        assert of(shown["counts"]["operations"]) == {"encrypt": 8, "mac": 1, "sign": 1, "whoami": 1}
        assert of(shown["counts"]["kinds"]) == {"op": 11, "open": 4, "close": 4}
    numbers = [shown["total"], *shown["chains"], shown["checkpoints"]]
    numbers += [n for table in shown["counts"].values() for n in table]
    assert len(numbers) > 10
    for number in numbers:
        assert run(number["command"]) == number["count"], number
    assert shown["checkpoints"]["count"] == 3
    ((gap,)) = shown["gaps"]["checkpoint"]
    assert (gap["from"], gap["seconds"], gap["open"]) == (moment(start + 100 * SECOND), 30.0, False)
    assert [{k: v for k, v in g.items() if k != "lacked"} for g in run(shown["gaps"]["command"])] == [gap]
    assert run(shlex.join(["sed", "-n", "2p", str(source.directory / ORIGIN / "checkpoint")])) == 3


async def test_a_tenants_report_holds_nothing_of_another(source: Source) -> None:
    made = make(Evidence(source), Wanted(tenant="health"))
    whole = make(Evidence(source), Wanted())
    for text in (as_json(made), as_html(made)):
        for foreign in ("tax", "mac", "canary", "eu-fr-1", "whoami"):
            assert foreign not in text.replace("ui-monospace", "").replace("max-", "")
    for word in ("mac", "canary:rule", "canary_why", "eu-canary", "eu-fr-1"):
        assert f'"of": "{word}"' in as_json(whole)


async def test_the_same_export_gives_the_same_report(source: Source) -> None:
    first, second = (make(Evidence(source), Wanted()) for _ in range(2))
    assert (as_json(first), as_html(first)) == (as_json(second), as_html(second))


async def test_the_page_is_well_formed_closed_and_escapes_what_it_shows(source: Source) -> None:
    hostile = replace(source, trust_file=Path('/x/"><script>alert(1)</script>&amp;'))
    text = as_html(make(Evidence(hostile), Wanted(tenant="health")))
    assert text.startswith("<!DOCTYPE html>\n")
    tree = ET.fromstring(text.removeprefix("<!DOCTYPE html>\n"))  # strict: any unescaped sign fails
    names = [element.tag.rpartition("}")[2] for element in tree.iter()]
    assert not {"script", "link", "img", "iframe", "object", "form", "svg", "base"} & set(names)
    attributes = {name for element in tree.iter() for name in element.attrib}
    assert attributes <= {"lang", "charset", "http-equiv", "content", "name", "class", "scope"}
    (style,) = [e.text or "" for e in tree.iter() if e.tag.endswith("}style")]
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [e.attrib["content"] for e in tree.iter() if "http-equiv" in e.attrib]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    tables = [e for e in tree.iter() if e.tag.endswith("}table")]
    for table in tables:
        heads = [e for e in table.iter() if e.tag.endswith("}th")]
        assert {e.attrib["scope"] for e in heads} == {"col", "row"}
        assert any(e.tag.endswith("}caption") for e in table.iter())
    assert len(tables) > 6


async def test_a_changed_record_is_the_verdict_and_ends_what_is_counted(
    made: Lab, source: Source, tmp_path: Path
) -> None:
    (bundle,) = (source.directory / ORIGIN / "n1-0" / "tile" / "entries").rglob("*.p/*")
    bundle.write_bytes(bundle.read_bytes().replace(b'"region":"eu-fr-1"', b'"region":"eu-xx-1"'))
    report = make(Evidence(source), Wanted())
    assert report.integrity == "tampered"
    assert report.completeness != "shown"
    assert report.findings[0].where.startswith(f"{ORIGIN}/n1-0/")
    good = int(report.findings[0].where.rpartition("/")[2])
    assert {n.of: n.value for n in report.chains}[f"{ORIGIN}/n1-0"] == good
    arguments = [f"--export={source.directory}", f"--trust={source.trust_file}", f"--out={tmp_path / 'r.html'}"]
    assert CliRunner().invoke(app, ["audit", "report", *arguments]).exit_code == 8
    page = (tmp_path / "r.html").read_text()
    assert "✗ Integrity: tampered" in page
    assert "E_" in page
    assert all(not f.why for f in make(Evidence(source), Wanted(tenant="health")).findings)


async def test_a_receipt_shows_completeness_or_its_violation(source: Source, made: Lab, tmp_path: Path) -> None:
    with made.engine.connect() as connection:
        chains = connection.execute(sa.text("SELECT log_id, next_seq, head FROM audit_shard")).all()
    kept, beyond = tmp_path / "receipts", tmp_path / "more receipts"
    kept.write_text("".join(Receipt(log, size - 1, bytes(head)).header() + "\n" for log, size, head in chains))
    beyond.write_text(Receipt(chains[0].log_id, chains[0].next_seq + 5, bytes(32)).header() + "\n")
    report = make(Evidence(replace(source, receipts=kept)), Wanted())
    assert (report.integrity, report.completeness) == ("intact", "shown")
    report = make(Evidence(replace(source, receipts=beyond)), Wanted())
    assert (report.integrity, report.completeness) == ("intact", "violated")
    assert shlex.quote(str(beyond)) in as_json(report)


async def test_witnesses_are_judged_by_the_quorum_that_the_auditor_trusts(
    made: Lab, start: int, tmp_path: Path
) -> None:
    one, two, stranger = Witness("w1.example"), Witness("w2.example"), Witness("w3.example")

    def cosigned_by(size: int, note: bytes) -> bytes:
        for witness in (one, two) if size == 1 else (one, stranger):
            note = witness.cosign(note)
        return note

    source = exported(made, tmp_path / "export", cosigned_by)
    assert make(Evidence(source), Wanted()).witness_gaps is None
    plain = source.trust_file.read_text()
    found = {}
    for quorum in (1, 2):
        lines = "".join(f"witness {w.key.name} {format_vkey(w.key)}\n" for w in (one, two))
        source.trust_file.write_text(f"{plain}{lines}quorum {quorum}\n")
        trusted = replace(source, trust=load_trust(source.trust_file))
        found[quorum] = report = make(Evidence(trusted), Wanted())
        assert [g["lacked"] for g in run(report.gaps_command)] == ["checkpoint", "witness"]
    assert found[1].witness_gaps == [Gap(start + 100 * SECOND, start + 130 * SECOND, open=False)]
    assert found[1].newest is not None
    assert found[1].newest.witnesses == 1
    assert found[2].witness_gaps == [Gap(start + 100 * SECOND, start + 131 * SECOND, open=True)]
    assert (found[2].integrity, found[2].completeness) == ("intact", "not shown")
    assert "E_WITNESS" in {f.code for f in found[2].findings}
    assert "never covered" in as_html(found[2])


async def test_a_checkpoint_that_nobody_trusted_signed_counts_for_nothing(
    made: Lab, start: int, tmp_path: Path
) -> None:
    other = MemorySigner()

    def resigned(size: int, note: bytes) -> bytes:
        if size != 2:
            return note
        line = note.rpartition(b" ")[0]
        raw = base64.b64decode(note.rpartition(b" ")[2])
        return line + b" " + base64.b64encode(raw[:4] + other.sign(parse_note(note).text)) + b"\n"

    report = make(Evidence(exported(made, tmp_path / "export", resigned)), Wanted())
    assert "E_SIG" in {f.code for f in report.findings}
    assert report.integrity == "tampered"
    assert report.checkpoints is None  # there is no command that would count the good ones alone
    assert [g.until for g in report.gaps] == [start + 132 * SECOND]


async def test_a_chain_whose_committed_root_differs_counts_nothing(made: Lab, start: int, tmp_path: Path) -> None:
    evidence = Evidence(exported(made, tmp_path / "export"))
    before = evidence.count(Wanted(chain=f"{ORIGIN}/n0-0"))
    evidence.report.add("E_ROOT", f"{ORIGIN}/n0-0/5", "records [3,5) are not those that were committed")
    assert before > 5
    assert evidence.count(Wanted(chain=f"{ORIGIN}/n0-0")) == 0
    assert evidence.count(Wanted(chain=f"{ORIGIN}/n1-0")) > 0


@pytest.mark.parametrize(
    ("times", "covered", "found"),
    [
        ([], [], []),
        ([0], [], []),  # nothing says how long it has stood
        ([0, 11], [], [(0, 11, True)]),
        ([0, 11], [0, 11], []),
        ([1], [0, 11], []),
        ([1], [0, 12], [(1, 12, False)]),
        ([5, 1, 9], [20, 0], [(1, 20, False)]),
        ([0, 30, 41, 55], [10, 42], [(30, 42, False), (55, 55, True)][:1]),
    ],
)
def test_a_gap_is_longer_than_ten_seconds(
    times: list[int], covered: list[int], found: list[tuple[int, int, bool]]
) -> None:
    made = gaps([t * SECOND for t in times], [c * SECOND for c in covered])
    assert made == [Gap(a * SECOND, b * SECOND, o) for a, b, o in found]


def test_a_time_loses_no_microsecond_on_its_way_through_a_command() -> None:
    for us in (0, 1, 1_790_000_000_123_457, 1_764_095_851_999_999, 1_234_567_890_000_001):
        assert microseconds(str(moment(us))) == us


def test_what_cannot_be_used_is_usage_and_not_a_report(tmp_path: Path) -> None:
    for arguments in (["--export=/nowhere", "--trust=x"], [f"--export={tmp_path}", "--trust=/nowhere"]):
        done = CliRunner().invoke(app, ["audit", "count", *arguments])
        assert isinstance(done.exception, Failed)
