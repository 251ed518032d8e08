"""Attacks on the whole database and on exports, as the operator could make them: each with the code and place it gets."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from audit_lab import ORIGIN, Lab, intent, now, op
from sqlalchemy import Connection

from audit import checkpoint as cp
from audit import event, tables, verify
from audit.chain import DAY_US, Chain, leaf_hash, pack, unpack
from audit.export import export
from audit.notary import Notary
from audit.rootlog import RootLog
from audit.stored import verify_database
from databases import unguarded

pytestmark = pytest.mark.anyio
FIRST = f"{ORIGIN}/n0-0"


def held(_: Connection) -> None:
    """The lease is ours."""


class Site:
    """A database with two chains that a notary committed after each of three rounds, and its exports."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab, self.directory = lab, directory
        self.notary = Notary(lab.engine, origin=ORIGIN, signer=lab.signer, clock=now)
        self.notes: list[bytes] = []

    async def grow(self, rounds: int = 3) -> Site:
        for _ in range(rounds):
            for node in ("n0", "n1"):
                writer = self.lab.writer(node=node)
                await writer.start()
                await writer.append_many([op(f"t{i % 3}") for i in range(8)])
                await writer.close()
            signed = self.notary.round(1, held)
            assert signed is not None
            self.notes.append(signed.note)
        return self

    def change(self, *statements: str, **values: object) -> None:
        """What the owner of the database does; the triggers stop accidents only."""
        with self.lab.engine.begin() as connection:
            unguarded(connection)
            for statement in statements:
                connection.execute(sa.text(statement), values)

    def database(self, kept: bytes | None = None) -> str:
        """The first finding in the database: code and place."""
        report = verify_database(self.lab.engine, self.lab.trust, held=kept)
        return next((f"{f.code} {f.where}" for f in report.findings), "intact")

    def exported(self, *arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
        """Exit status and first line of `skms-verify` on a fresh export."""
        shutil.rmtree(self.directory / "export", ignore_errors=True)
        made = export(self.lab.engine, self.directory / "export", self.lab.trust)
        capsys.readouterr()
        status = verify.main([str(made.directory), "--trust", str(made.directory / "trust.txt"), *arguments])
        return status, capsys.readouterr().out.splitlines()[0]

    def keep(self, number: int) -> str:
        """A checkpoint in the auditor's own file."""
        path = self.directory / "kept"
        path.write_bytes(self.notes[number])
        return str(path)


@pytest.fixture
async def site(made: Lab, tmp_path: Path) -> Site:
    return await Site(made, tmp_path).grow()


def first_batch(site: Site, where: str = "shard = 1 AND first_seq = 1") -> list[bytes]:
    with site.lab.engine.connect() as connection:
        return unpack(connection.execute(sa.text(f"SELECT entries FROM audit_batch WHERE {where}")).scalar_one())


def store(site: Site, entries: list[bytes], where: str = "shard = 1 AND first_seq = 1") -> None:
    site.change(f"UPDATE audit_batch SET entries = :e, n = :n WHERE {where}", e=pack(entries), n=len(entries))


def edit(site: Site) -> None:
    entries = first_batch(site)
    store(site, [entries[0], entries[1].replace(b'"encrypt"', b'"decrypt"'), *entries[2:]])


def delete(site: Site) -> None:
    entries = first_batch(site)
    store(site, [*entries[:2], *entries[3:]])


def insert(site: Site) -> None:
    entries = first_batch(site)
    store(site, [*entries[:2], entries[1], *entries[2:]])


def reorder(site: Site) -> None:
    entries = first_batch(site)
    store(site, [entries[1], entries[0], *entries[2:]])


def drop_a_batch(site: Site) -> None:
    site.change("DELETE FROM audit_batch WHERE shard = 1 AND first_seq = 1")


def respell(site: Site) -> None:
    entries = first_batch(site)
    store(site, [*entries[:-1], entries[-1].replace(b'"out":"ok"', b'"out": "ok"')])


def rehashed(entries: list[bytes], start: Chain, change: Callable[[bytes], bytes]) -> tuple[list[bytes], Chain]:
    """The same records, changed, in a chain whose links are right again."""
    made = []
    for entry in entries:
        body = change(entry.partition(b',"r":')[2][:-1])
        made.append(start.append(body, start.t, event.tenant_of(event.decode(body))))
    return made, start


def rehash(site: Site) -> None:
    """Edit one record, then make every link behind it right again: only seals and committed roots are left."""
    chain = Chain(FIRST)
    chain.check(first_batch(site, "shard = 1 AND first_seq = 0")[0])
    entries = first_batch(site)
    made, chain = rehashed(entries, chain, lambda body: body.replace(b'"encrypt"', b'"decrypt"', 1))
    store(site, made)
    columns = "head = :h, t = :t, day = :d"
    values = {"h": bytes.fromhex(chain.previous), "t": chain.t, "d": chain.t // DAY_US}
    site.change(f"UPDATE audit_batch SET {columns} WHERE shard = 1 AND first_seq = 1", **values)


def swap_chains(site: Site) -> None:
    ours, theirs = first_batch(site), first_batch(site, "shard = 2 AND first_seq = 1")
    store(site, theirs)
    store(site, ours, "shard = 2 AND first_seq = 1")


def swap_a_tenant(site: Site) -> None:
    entries = first_batch(site)
    store(site, [*entries[:-1], entries[-1].replace(b'"tenant":"t1"', b'"tenant":"t2"')])


def backdate(site: Site) -> None:
    entries = first_batch(site)
    t = json.loads(entries[0])["c"]["t"]
    store(site, [entries[0].replace(b'"t":%d' % t, b'"t":%d' % (t - 10**9)), *entries[1:]])


def drop_a_chain(site: Site) -> None:
    site.change(*(f"DELETE FROM audit_{name} WHERE shard = 1" for name in ("batch", "snapshot", "shard")))


def cut_the_tail(site: Site) -> None:
    """With the shard row made right: before there was a root log only receipts would have shown it."""
    site.change(
        "DELETE FROM audit_batch WHERE shard = 1 AND first_seq >= 20",
        "DELETE FROM audit_snapshot WHERE shard = 1 AND at_seq > 20",
        "UPDATE audit_shard SET next_seq = 20, epoch = (SELECT max(epoch) FROM audit_batch WHERE shard = 1),"
        " head = (SELECT head FROM audit_batch WHERE shard = 1 ORDER BY first_seq DESC LIMIT 1) WHERE shard = 1",
    )


def fake_epoch(site: Site) -> None:
    entry = first_batch(site, "shard = 1 AND first_seq = 10")[0]
    forged = entry.replace(b'"pub":"', b'"pub":"00', 1)[: len(entry) + 2]
    pub = json.loads(entry)["r"]["pub"]
    forged = entry.replace(pub.encode(), b"11" * 32)
    store(site, [forged], "shard = 1 AND first_seq = 10")


def hide_from_a_tenant(site: Site) -> None:
    site.change("DELETE FROM audit_tenant WHERE tenant = 't1'")


def lower_a_head(site: Site) -> None:
    site.change("UPDATE audit_tenant SET count = count - 1 WHERE tenant = 't1'")


def edit_the_root_log(site: Site) -> None:
    with site.lab.engine.connect() as connection:
        entry = connection.execute(sa.text("SELECT entry FROM audit_root WHERE seq = 1")).scalar_one()
    tenants = json.loads(entry)["r"]["tenants"].encode()
    forged = entry.replace(tenants, b"0" * 64)
    site.change("UPDATE audit_root SET entry = :e, leaf = :l WHERE seq = 1", e=forged, l=leaf_hash(forged))


ATTACKS: dict[Callable[[Site], None], str] = {
    edit: f"E_LINK {FIRST}/3",
    delete: f"E_SEQ {FIRST}/3",
    insert: f"E_SEQ {FIRST}/3",
    reorder: f"E_SEQ {FIRST}/1",
    drop_a_batch: f"E_SEQ {FIRST}/1",
    respell: f"E_CANON {FIRST}/8",
    rehash: f"E_SEAL {FIRST}/1",
    swap_chains: f"E_ORIGIN {FIRST}/1",
    swap_a_tenant: f"E_TLINK {FIRST}/8",
    backdate: f"E_TIME {FIRST}/1",
    drop_a_chain: f"E_MISSING {FIRST}",
    cut_the_tail: f"E_TRUNC {FIRST}/20",
    fake_epoch: f"E_CERT {FIRST}/10",
    hide_from_a_tenant: f"E_DERIVED {ORIGIN}/2",
    lower_a_head: f"E_DERIVED {ORIGIN}/2",
    edit_the_root_log: f"E_LINK {ORIGIN}/2",
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.__name__)
async def test_every_attack_on_the_database_is_named_with_its_record(
    site: Site, attack: Callable[[Site], None]
) -> None:
    assert site.database() == "intact"
    attack(site)
    assert site.database() == ATTACKS[attack]


def rewritten_root(site: Site, change: Callable[[event.Heads], event.Heads]) -> None:
    """A root log that says something else, signed by the real key: a stolen one."""
    root = RootLog(ORIGIN)
    with site.lab.engine.connect() as connection:
        rows = connection.execute(sa.select(tables.root_table).order_by(tables.root_table.c.seq)).mappings().all()
    key = cp.key_of(ORIGIN, site.lab.signer.public_key())
    for row in rows:
        heads = RootLog(ORIGIN).check(row["entry"]) if row["seq"] == 0 else event.decode_heads(_body(row["entry"]))
        assert heads is not None
        t, heads = json.loads(row["entry"])["c"]["t"], change(heads)
        tenants = bytes.fromhex(heads.tenants)
        entry = root.append(heads.shards, tenants=tenants, epoch=heads.epoch, full=heads.full, t=t)
        text = cp.Checkpoint(ORIGIN, root.chain.n, root.chain.frontier.root()).text()
        note = cp.Note(text, ()).signed_by(key, site.lab.signer.sign(text)).encode()
        leaf = bytes.fromhex(root.chain.previous)
        site.change("UPDATE audit_root SET entry = :e, leaf = :l WHERE seq = :s", e=entry, l=leaf, s=row["seq"])
        site.change("UPDATE audit_checkpoint SET note = :n WHERE size = :s", n=note, s=root.chain.n)


def _body(entry: bytes) -> bytes:
    return entry.partition(b',"r":')[2][:-1]


async def test_another_root_of_a_chain_is_named_with_the_records_between_two_commits(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    def lie(heads: event.Heads) -> event.Heads:
        shards = tuple((log, n, "0" * 64 if (log, n) == (FIRST, 20) else root) for log, n, root in heads.shards)
        return event.Heads(epoch=heads.epoch, full=heads.full, shards=shards, tenants=heads.tenants, v=1)

    rewritten_root(site, lie)
    assert site.database() == f"E_ROOT {FIRST}/20"
    status, said = site.exported("--accept-unanchored", capsys=capsys)
    assert (status, "records [10,20)" in said) == (1, True)


async def test_another_map_of_the_tenants_is_named(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    def lie(heads: event.Heads) -> event.Heads:
        return event.Heads(epoch=heads.epoch, full=heads.full, shards=heads.shards, tenants="0" * 64, v=1)

    rewritten_root(site, lie)
    assert site.database() == f"E_TMAP {ORIGIN}/0"
    assert site.exported("--accept-unanchored", capsys=capsys)[1].startswith(f"E_TMAP {ORIGIN}/0: ")


async def test_a_checkpoint_of_a_stranger_is_no_checkpoint(site: Site, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    theirs = await Site(Lab(stranger), stranger).grow(1)
    site.change("UPDATE audit_checkpoint SET note = :n WHERE size = 1", n=theirs.notes[0])
    assert site.database() == f"E_SIG {ORIGIN}/1"


# ---- what only an anchor outside shows: one old checkpoint is enough ---------------------------------------------------


async def test_an_old_backup_is_caught_with_one_checkpoint(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with site.lab.engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql(f"VACUUM INTO '{site.directory / 'backup.db'}'")
        connection.exec_driver_sql("BEGIN")
    await site.grow(1)
    kept = site.keep(-1)
    assert site.exported("--checkpoint", kept, capsys=capsys)[0] == 0
    with sa.create_engine(f"sqlite:///{site.directory / 'backup.db'}").connect() as connection:
        names = ("shard", "batch", "snapshot", "intent", "root", "checkpoint", "tenant")
        old = {n: connection.exec_driver_sql(f"SELECT * FROM audit_{n}").mappings().all() for n in names}
    site.change(*(f"DELETE FROM audit_{name}" for name in old))
    with site.lab.engine.begin() as connection:
        for name, rows in old.items():
            if rows:
                connection.execute(sa.insert(tables.tables.tables[f"audit_{name}"]), [dict(r) for r in rows])
    assert site.database() == "intact", "nothing inside shows it"
    assert site.database(site.notes[-1]) == f"E_TRUNC {ORIGIN}/3"
    status, said = site.exported("--checkpoint", kept, capsys=capsys)
    assert (status, said.split(":")[0]) == (1, f"E_TRUNC {ORIGIN}/3")


async def test_a_cut_root_log_is_caught_with_one_checkpoint(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.change("DELETE FROM audit_root WHERE seq = 2", "DELETE FROM audit_checkpoint WHERE size = 3")
    status, said = site.exported("--checkpoint", site.keep(-1), capsys=capsys)
    assert (status, said.split(":")[0]) == (1, f"E_TRUNC {ORIGIN}/2")
    assert site.exported("--checkpoint", site.keep(0), capsys=capsys)[0] == 0


async def test_a_new_history_signed_by_the_real_key_is_caught_with_one_checkpoint(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stolen key, or two forks of one log: whoever kept one checkpoint of the other one notices."""
    other = tmp_path / "other"
    other.mkdir()
    lab = Lab(other)
    lab.signer = site.lab.signer
    forged = await Site(lab, other).grow(4)
    assert forged.exported("--accept-unanchored", capsys=capsys)[0] == 0, "by itself it is a perfect log"
    status, said = forged.exported("--checkpoint", site.keep(0), capsys=capsys)
    assert (status, said.split(":")[0]) == (1, f"E_FORK {ORIGIN}/1")
    assert forged.database(site.notes[0]) == f"E_FORK {ORIGIN}/1"
    status, said = site.exported("--checkpoint", forged.keep(0), capsys=capsys)
    assert (status, said.split(":")[0]) == (1, f"E_FORK {ORIGIN}/1")


async def test_without_its_quorum_of_witnesses_the_newest_checkpoint_does_not_pass(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    secret = Ed25519PrivateKey.generate()
    key = cp.NoteKey("w1", cp.COSIGNATURE, secret.public_key().public_bytes_raw())
    policy = site.directory / "policy"
    policy.write_text(f"witness one {cp.format_vkey(key)}\ngroup g any one\nquorum g\n")
    given = ("--policy", str(policy), "--accept-unanchored")
    assert site.exported(*given, capsys=capsys)[1].split(":")[0] == f"E_WITNESS {ORIGIN}/3"
    text, seconds = cp.parse_note(site.notes[-1]).text, now() // 1_000_000
    value = seconds.to_bytes(8, "big") + secret.sign(cp.cosigned(text, seconds))
    line = cp.Signature(key.name, key.id, value).line()
    site.change("UPDATE audit_checkpoint SET cosigs = :c WHERE size = 3", c=line)
    assert site.exported(*given, capsys=capsys)[0] == 0
    forged = base64.b64encode(key.id + value[:-1] + bytes([value[-1] ^ 1])).decode()
    site.change("UPDATE audit_checkpoint SET cosigs = :c WHERE size = 3", c=f"\u2014 w1 {forged}\n".encode())
    assert site.exported(*given, capsys=capsys)[1].startswith("E_SIG")


async def test_a_mark_holds_the_root_log_to_what_its_writer_saw(site: Site) -> None:
    writer = site.lab.writer()
    writer.checkpoint = (9, "0" * 64)
    await writer.start()
    await writer.append(event.Mark(id="0" * 8 + "-0000-4000-8000-" + "0" * 12, ts=now(), node="n0", root=(9, "0" * 64)))
    await writer.close()
    assert site.database() == f"E_TRUNC {ORIGIN}/3"


async def test_an_intent_open_for_an_hour_is_a_warning_and_no_verdict(made: Lab) -> None:
    writer = made.writer(clock=lambda: now() - 7_200_000_000)
    await writer.start()
    await writer.append(intent())
    await writer.close()
    other = made.writer(node="n1")  # another node goes on; nobody has taken over the first one's chain
    await other.start()
    await other.close()
    report = verify_database(made.engine, made.trust)
    assert [f.code for f in report.findings] == ["W_INTENT"]
    assert report.exit_status == 0
