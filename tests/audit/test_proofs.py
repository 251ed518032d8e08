"""Proofs that are taken away: of a record, of growth, and of a tenant's whole record, on a real database."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from audit_lab import ORIGIN, Lab, now, op
from sqlalchemy import Connection

from audit import checkpoint as cp
from audit import tables, verify
from audit.chain import Bad, Receipt, leaf_hash, pack
from audit.evidence import check_growth, check_record_proof, parse_record_proof
from audit.log import Log
from audit.notary import Notary
from audit.offline import moment
from audit.proofs import NotCovered, Prover
from audit.tenantbundle import check_bundle
from audit.tree import ChainEntries, Tree, in_tree
from audit.verify import Trust
from databases import unguarded
from service.database import open_engine

pytestmark = pytest.mark.anyio
CHAIN = f"{ORIGIN}/n0-0"


def held(_: Connection) -> None:
    """The lease is ours."""


def prover_of(made: Lab) -> Prover:
    return Prover(made.engine, origin=ORIGIN)


async def written(
    made: Lab, count: int, node: str = "n0", tenants: tuple[str, ...] = ("health", "defence")
) -> list[str]:
    """Records of tenants in turn, committed and covered by a checkpoint; the receipts of the first tenant."""
    writer = made.writer(node=node)
    await writer.start()
    receipts = await appended(writer, count, tenants)
    await writer.close()
    sign(made)
    return receipts


async def appended(writer: Log, count: int, tenants: tuple[str, ...]) -> list[str]:
    found: list[str] = []
    for at in range(0, count, 500):
        records = [op(tenants[i % len(tenants)]) for i in range(at, min(count, at + 500))]
        given = await writer.append_many(records)
        found += [g.header() for g, r in zip(given, records, strict=True) if r.tenant == tenants[0]]
    return found


def sign(made: Lab) -> None:
    Notary(made.engine, origin=ORIGIN, signer=made.signer, clock=now).round(1, held)


def bundle_of(made: Lab, tenant: str = "health", since: int = 0) -> list[bytes]:
    found = prover_of(made).bundle(tenant, since=since)
    return (found.header + b"".join(found.pieces)).splitlines(keepends=True)


def codes(lines: list[bytes], trust: Trust, **known: object) -> list[str]:
    return [f.code for f in check_bundle(lines, trust, **known).report.findings]


def receipt_of(text: str) -> Receipt:
    return verify.parse_receipt(text)


# ---- published examples ----------------------------------------------------------------------------------------------

# C2SP tlog-proof, the example of the specification; its signatures are abridged there.
C2SP_PROOF = """c2sp.org/tlog-proof@v1
extra YWdlLXYxLjIuMS1kYXJ3aW4tYXJtNjQudGFyLmd6kYXJ3aW4tYXJ
index 73894
gSKyXoYZUgZ6jduWYrkDOARinOMGJveXjgMkBTcdPlQ=
B95lDa8R83lS8n0eG+o0buTxRKQTYFi//1U8anccXmA=
EKNzoDWG8LGC0Yp9o+sv3qllpMP9uHQ9B20KNL+Q1zs=
RoopEkOdqkYqMB4MJXrbt/hMjOxsVn0IrWjpz1ZMMes=
AHCioX9nLjsrse6YhjRRmk1WUEirVOLLRoOQ6vfO5vk=

example.com/fancylog
109482
sFodV/vSp5O8n9a8QpW6PRY97tfOSW5bsc2Xl/EQi08=

— example.com/fancylog hI2DJw[...]1roloI=
— witness1.example mJirIklj[...]qY9v2B/5bg==
— witness2.example TnKKVHLX[...]xwYwrSjgow==
— witness3.example S4X82uH5[...]3oEcROGLFQ==
"""


def test_the_example_of_tlog_proof_is_read_and_written_byte_for_byte() -> None:
    proof = cp.parse_proof(C2SP_PROOF.encode())
    assert (proof.index, len(proof.path)) == (73_894, 5)
    assert base64.b64encode(proof.path[0]) == b"gSKyXoYZUgZ6jduWYrkDOARinOMGJveXjgMkBTcdPlQ="
    assert proof.encode() == C2SP_PROOF.encode()


@pytest.mark.parametrize(
    ("level", "full", "partial"),
    [(0, 273, 112), (1, 1, 17), (2, 0, 1), (3, 0, 0)],
)
def test_a_tree_of_70000_has_the_tiles_that_tlog_tiles_names(made: Lab, level: int, full: int, partial: int) -> None:
    class Counted(Tree):
        def _extend(self) -> None:
            """Only the widths matter."""

    tree = Counted(made.engine, ChainEntries(CHAIN, 1), 70_000)
    widths = [tree.width(level, index) for index in range(full + 2)]
    assert widths == [256] * full + [partial, 0]


# ---- trees -----------------------------------------------------------------------------------------------------------


async def test_the_tiles_of_a_growing_chain_give_the_roots_and_proofs_of_its_leaves(made: Lab) -> None:
    from audit.chain import tree_hash

    await written(made, 800)
    shard = ChainEntries(CHAIN, 1)
    leaves = [leaf_hash(e) for e in shard.read(made.engine, 0, 802)]
    prover = prover_of(made)
    for size in (1, 255, 256, 257, 511, 700, 802):  # grows: tiles that are there are gone on with
        root = tree_hash(leaves[:size])
        path = in_tree(
            made.engine, shard, size, root, lambda t: [t.subtree(0, 256) if t.size > 255 else b"", t.tile(0, 0)[0]]
        )
        assert path[1] == leaves[0]
    for level, index, width, expected in [
        (0, 2, 256, b"".join(leaves[512:768])),
        (0, 3, 34, b"".join(leaves[768:802])),
        (1, 0, 3, b"".join(tree_hash(leaves[i : i + 256]) for i in (0, 256, 512))),
    ]:
        assert prover.tile("n0-0", level, index, width) == expected
    assert prover.entries("n0-0", 3, 34) == pack(list(shard.read(made.engine, 768, 802)))
    for level, index, width in [(0, 3, 35), (0, 3, 256), (1, 0, 4), (2, 0, 1), (0, 4, 1)]:
        assert prover.tile("n0-0", level, index, width) is None
    assert prover.tile("n9-0", 0, 0, 1) is None


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE audit_tile SET hashes = zeroblob(8192) WHERE level = 0 AND idx = 1",
        "UPDATE audit_tile SET hashes = zeroblob(96) WHERE level = 1",
        "UPDATE audit_tile SET hashes = substr(hashes, 1, 10) WHERE level = 1",
        "DELETE FROM audit_tile WHERE level = 0 AND idx = 0",
        "UPDATE audit_tile SET idx = 77 WHERE level = 0 AND idx = 2",
    ],
)
async def test_a_damaged_table_of_tiles_is_noticed_and_made_again(made: Lab, damage: str) -> None:
    await written(made, 800)
    before = [prover_of(made).record("n0-0", seq, tenant=None) for seq in (0, 300, 799)]
    with made.engine.begin() as connection:
        connection.execute(sa.text(damage))
    assert [prover_of(made).record("n0-0", seq, tenant=None) for seq in (0, 300, 799)] == before


async def test_a_changed_record_gives_no_proof(made: Lab) -> None:
    await written(made, 20)
    with made.engine.begin() as connection:
        unguarded(connection)
        row = connection.execute(sa.text("SELECT entries FROM audit_batch WHERE n = 20")).scalar_one()
        changed = bytes(row).replace(b'"op":"encrypt"', b'"op":"decrypt"')
        connection.execute(sa.text("UPDATE audit_batch SET entries = :e WHERE n = 20"), {"e": changed})
    with pytest.raises(Bad) as caught:
        prover_of(made).record("n0-0", 5, tenant=None)
    assert caught.value.code == "E_ROOT"


# ---- one record ------------------------------------------------------------------------------------------------------


async def test_each_receipt_verifies_under_the_next_checkpoint_and_no_other_record_passes_for_it(made: Lab) -> None:
    receipts = [receipt_of(text) for text in await written(made, 40)]
    proofs = []
    for receipt in receipts:
        data = prover_of(made).record("n0-0", receipt.seq, tenant="health")
        assert data is not None
        assert len(data) <= 4_096
        proven = check_record_proof(data, made.trust, asked=receipt)
        assert (proven.leaf, proven.committed) == (receipt.leaf, 42)
        proofs.append(data)
    # CVE-2026-22703: a valid proof of another record is no proof of this one.
    with pytest.raises(Bad) as caught:
        check_record_proof(proofs[3], made.trust, asked=receipts[4])
    assert caught.value.code == "E_RECEIPT"
    other = Receipt(receipts[3].log, receipts[3].seq, receipts[4].leaf)
    with pytest.raises(Bad, match="E_RECEIPT"):
        check_record_proof(proofs[3], made.trust, asked=other)


async def test_a_proof_is_of_the_log_that_is_trusted_and_every_changed_byte_is_found(made: Lab, tmp_path: Path) -> None:
    receipt = receipt_of((await written(made, 40))[3])
    data = prover_of(made).record("n0-0", receipt.seq, tenant="health")
    assert data is not None
    (tmp_path / "other").mkdir()
    with pytest.raises(Bad, match="E_SIG"):
        check_record_proof(data, Lab(tmp_path / "other").trust)
    proof = parse_record_proof(data)
    changes: dict[str, tuple[bytes, bytes]] = {
        "E_ROOT": (proof.entry, proof.entry.replace(b"encrypt", b"decrypt")),
        "E_SCHEMA": (proof.heads, proof.heads.replace(b'"v":1', b'"v":0')),
    }
    for old, new in changes.values():
        changed = proof.encode() if old not in (proof.entry, proof.heads) else None
        assert changed is None
        broken = type(proof)(
            new if old == proof.entry else proof.entry,
            proof.path,
            new if old == proof.heads else proof.heads,
            proof.place,
        )
        with pytest.raises(Bad) as caught:
            check_record_proof(broken.encode(), made.trust)
        assert caught.value.code == "E_ROOT"
    missed = []
    for at in range(0, len(data), 13):
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        try:
            check_record_proof(flipped, made.trust, asked=receipt)
        except Bad:
            continue
        missed.append(at)
    assert not missed, [data[m - 20 : m + 20] for m in missed[:3]]


async def test_a_trust_file_with_witnesses_takes_no_proof_without_their_quorum(made: Lab, tmp_path: Path) -> None:
    receipt = receipt_of((await written(made, 4))[0])
    data = prover_of(made).record("n0-0", receipt.seq, tenant="health")
    assert data is not None
    vkey = cp.format_vkey(cp.NoteKey("w.example", cp.COSIGNATURE, bytes(range(32))))
    file = tmp_path / "trust.txt"
    key = base64.b64encode(made.signer.public_key()).decode()
    file.write_text(f"origin {ORIGIN}\nkey {key}\nwitness w.example {vkey}\nquorum 1\n")
    with pytest.raises(Bad, match="E_WITNESS"):
        check_record_proof(data, verify.load_trust(file), asked=receipt)
    assert codes(bundle_of(made), verify.load_trust(file)) == ["E_WITNESS"]


async def test_before_the_first_checkpoint_and_for_newer_records_the_answer_is_not_yet(made: Lab) -> None:
    writer = made.writer()
    await writer.start()
    await appended(writer, 3, ("health",))
    prover = prover_of(made)
    asked: list[Callable[[], object]] = [
        prover.checkpoint,
        lambda: prover.record("n0-0", 1, tenant="health"),
        lambda: prover.tile(None, 0, 0, 1),
        lambda: prover.bundle("health"),
    ]
    for ask in asked:
        with pytest.raises(NotCovered):
            ask()
    sign(made)
    for ask in asked:
        assert ask() is not None
    (newer,) = await appended(writer, 1, ("health",))
    with pytest.raises(NotCovered):
        prover.record("n0-0", receipt_of(newer).seq, tenant="health")
    assert prover.record("n0-0", 99, tenant="health") is None
    assert prover.record("n0-0", 1, tenant="defence") is None
    assert prover.record("n0-0", 0, tenant="health") is None  # the writer's own: no tenant's
    assert prover.checkpoint(99) is None
    await writer.close()


# ---- growth ----------------------------------------------------------------------------------------------------------


async def test_every_newer_checkpoint_proves_that_it_extends_every_older_one(made: Lab) -> None:
    notes = []
    for _ in range(7):
        await written(made, 2)
        notes.append(prover_of(made).checkpoint() or b"")
    for i, old in enumerate(notes):
        proof = prover_of(made).growth(i + 1)
        assert proof is not None
        before, after = check_growth(proof, old, made.trust)
        assert (before.size, after.size) == (i + 1, 7)
    assert prover_of(made).growth(3, 5) is not None
    assert prover_of(made).growth(8) is None
    wrong = prover_of(made).growth(3)
    assert wrong is not None
    with pytest.raises(Bad, match="E_FORK"):
        check_growth(wrong, notes[4], made.trust)
    older = prover_of(made).growth(2, 3)
    assert older is not None
    with pytest.raises(Bad, match="E_TRUNC"):
        check_growth(older, notes[5], made.trust)


# ---- a tenant's whole record -----------------------------------------------------------------------------------------


async def test_a_bundle_is_complete_and_holds_nothing_of_another_tenant(made: Lab) -> None:
    receipts = await written(made, 60, tenants=("health", "defence", "zebra"))
    receipts += await written(made, 30, "n1", tenants=("health", "zebra"))
    lines = bundle_of(made)
    known: dict[str, dict[int, str]] = {}
    for text in receipts:
        log, seq, leaf = verify.parse_receipt(text)
        known.setdefault(log, {})[seq] = leaf.hex()
    verdict = check_bundle(lines, made.trust, tenant="health", receipts=known)
    assert not verdict.report.findings
    assert verdict.report.logs == {CHAIN: 20, f"{ORIGIN}/n1-0": 15}
    whole = b"".join(lines)
    assert b"defence" not in whole
    assert b"zebra" not in whole
    for row in made.engine.connect().execute(sa.select(tables.batch_table.c.entries)).scalars():
        for entry in verify.unpack(row):
            record = json.loads(entry)["r"]
            if record.get("tenant") != "health":
                assert record["id"].encode() not in whole
                assert entry not in whole
    assert codes(lines, made.trust, tenant="defence") == ["E_SCHEMA"]


async def test_one_withheld_record_anywhere_is_named(made: Lab) -> None:
    await written(made, 60)
    await written(made, 20, "n1")
    header, *entries = bundle_of(made)
    first = [e for e in entries if b'/n0-0"' in e]
    second = entries[len(first) :]
    expected = {}
    for at in range(len(first)):
        left = first[:at] + first[at + 1 :]
        code = "E_TSEQ" if at < len(first) - 1 else "E_TRUNC"
        expected[at] = (codes([header, *left, *second], made.trust), [code])
    assert [at for at, (found, code) in expected.items() if found != code] == []
    assert codes([header, *first], made.trust) == ["E_MISSING"]
    assert codes([header, *second], made.trust) == ["E_MISSING"]
    assert codes([header], made.trust) == ["E_MISSING"]
    assert codes([header, *second, *first], made.trust) == ["E_MISSING"]
    assert codes([header, *first, *second, second[-1]], made.trust) == ["E_TSEQ"]
    edited = [*first[:4], first[4].replace(b"encrypt", b"decrypt"), *first[5:]]
    assert codes([header, *edited, *second], made.trust) == ["E_TLINK"]
    edited = [*first[:-1], first[-1].replace(b"encrypt", b"decrypt")]
    assert codes([header, *edited, *second], made.trust) == ["E_TLINK"]


async def test_a_lowered_head_a_dropped_chain_or_another_tenants_heads_break_the_map(made: Lab) -> None:
    await written(made, 60)
    await written(made, 20, "n1")
    line, *entries = bundle_of(made)
    row = json.loads(line)
    leaf = leaf_hash([e for e in entries if b'/n0-0"' in e][-2][:-1]).hex()
    changes = [
        {"heads": [[CHAIN, 29, leaf], row["heads"][1]]},
        {"heads": row["heads"][:1]},
        {"heads": list(reversed(row["heads"]))},
        {"map": row["map"][:-1]},
        {"tenant": "defence"},
    ]
    for change in changes:
        header = verify.encode_plain({**row, **change}) + b"\n"
        assert codes([header, *entries], made.trust) == ["E_TMAP"], change
    other = json.loads(bundle_of(made, "defence")[0])
    assert codes(
        [verify.encode_plain({**row, "proof": other["proof"].replace("index 1", "index 0")}) + b"\n"], made.trust
    )
    assert codes([line[:-2] + b"\n"], made.trust) == ["E_PARSE"]
    assert codes([], made.trust) == ["E_PARSE"]


async def test_a_bundle_of_a_period_begins_before_it_and_hides_nothing(made: Lab) -> None:
    await written(made, 30)
    between = now()
    receipts = await written(made, 30)
    await written(made, 4, "n1", tenants=("defence",))
    lines = bundle_of(made, since=between)
    verdict = check_bundle(lines, made.trust)
    assert not verdict.report.findings
    assert (verdict.in_period, verdict.report.records) == (15, 16)
    assert codes([lines[0], *lines[2:]], made.trust) == ["E_TSEQ"]  # the first record of the period must follow one
    assert codes(lines, made.trust, since=between, until=verdict.until) == []
    assert codes(lines, made.trust, since=between - 1) == ["E_TRUNC"]
    assert codes(lines, made.trust, until=verdict.until + 1) == ["E_TRUNC"]
    log, seq, leaf = verify.parse_receipt(receipts[-1])
    assert codes(lines, made.trust, receipts={log: {seq: leaf.hex()}}) == []
    assert codes(lines, made.trust, receipts={log: {seq: "0" * 64}}) == ["E_RECEIPT"]
    assert codes(lines, made.trust, receipts={log: {seq + 9: leaf.hex()}}) == ["E_TRUNC"]
    assert codes(lines, made.trust, receipts={log: {1: leaf.hex()}}) == ["U_NOANCHOR"]
    assert codes(lines, made.trust, receipts={f"{ORIGIN}/n1-0": {1: leaf.hex()}}) == ["E_MISSING"]
    everything = bundle_of(made, since=now())
    assert check_bundle(everything, made.trust).in_period == 0
    assert not check_bundle(everything, made.trust).report.findings


async def test_records_that_the_database_lost_end_a_bundle_early(made: Lab) -> None:
    await written(made, 30)
    with made.engine.begin() as connection:
        unguarded(connection)
        connection.execute(sa.text("DELETE FROM audit_batch WHERE n = 30"))
    found = prover_of(made).bundle("health")
    with pytest.raises(Bad) as caught:
        list(found.pieces)
    assert caught.value.code == "E_SEQ"
    assert codes([found.header], made.trust) == ["E_MISSING"]


async def test_skms_verify_checks_one_file(made: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    receipts = await written(made, 20)
    trust = tmp_path / "trust.txt"
    trust.write_text(f"origin {ORIGIN}\nkey {base64.b64encode(made.signer.public_key()).decode()}\n")
    (tmp_path / "b").write_bytes(b"".join(bundle_of(made)))
    (tmp_path / "r").write_text("\n".join(receipts))
    asked = receipt_of(receipts[0])
    (tmp_path / "p").write_bytes(prover_of(made).record("n0-0", asked.seq, tenant="health") or b"")

    def run(*arguments: str) -> tuple[int, str]:
        status = verify.main([*arguments, "--trust", str(trust)])
        return status, capsys.readouterr().out

    status, text = run("tenant", str(tmp_path / "b"), "--receipts", str(tmp_path / "r"))
    assert (status, text.split(":")[0]) == (0, "complete health")
    status, text = run("tenant", str(tmp_path / "b"), "--json", "--from", "1970-01-01T00:00:00Z")
    told = json.loads(text)
    assert (status, told["tenant"], told["period"]["from"], told["checkpoint"]["origin"]) == (0, "health", 0, ORIGIN)
    status, text = run("tenant", str(tmp_path / "b"), "--to", "2999-01-01T00:00:00Z")
    assert (status, text.split(" ")[0]) == (1, "E_TRUNC")
    assert run("tenant", str(tmp_path / "b"), "--from", "yesterday")[0] == 3
    since = now()
    (tmp_path / "late").write_bytes(b"".join(bundle_of(made, since=since)))
    status, text = run("tenant", str(tmp_path / "late"))
    assert (status, f"from {moment(since)} to " in text) == (0, True), "it says which period it speaks of"
    status, text = run("tenant", str(tmp_path / "late"), "--from", "2026-01-01T00:00:00Z")
    assert (status, text.split(" ")[0]) == (1, "E_TRUNC")
    status, text = run("check-proof", str(tmp_path / "p"), "--receipt", receipts[0])
    assert (status, text.split(" of ")[0]) == (0, f"proven {CHAIN}/{asked.seq}")
    status, text = run("check-proof", str(tmp_path / "p"), "--receipt", receipts[1])
    assert (status, text.split(" ")[0]) == (1, "E_RECEIPT")
    lines = (tmp_path / "b").read_bytes().splitlines(keepends=True)
    (tmp_path / "b").write_bytes(b"".join(lines[:-1]))
    status, text = run("tenant", str(tmp_path / "b"))
    assert (status, text.split(" ")[0]) == (1, "E_TRUNC")
    assert run("tenant", str(tmp_path / "nothing"))[0] == 3
    assert run("check-proof", str(tmp_path / "p"), "--receipt", "nonsense")[0] == 3


async def test_on_postgresql_the_same_tiles_are_kept_by_two_workers(tmp_path: Path, postgres: object) -> None:
    url = postgres.fresh("proofs")
    made = Lab(tmp_path)
    made.engine = open_engine(url)
    with made.engine.begin() as connection:
        tables.tables.create_all(connection)
    await written(made, 600)
    for _ in range(2):
        data = prover_of(made).record("n0-0", 400, tenant=None)
        assert data is not None
        check_record_proof(data, made.trust)
    await written(made, 300)
    data = prover_of(made).record("n0-0", 850, tenant=None)
    assert data is not None
    check_record_proof(data, made.trust)
    assert not check_bundle(bundle_of(made), made.trust).report.findings
    made.engine.dispose()
