"""`skms-verify` on exports: offline, by exit status and code, with receipts and with a state of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from audit_lab import ORIGIN, Lab, now, op

from audit import export, tables, verify
from audit.checkpoint import parse_note
from audit.notary import Notary
from audit.stored import verify_database
from audit.timestamp import load_authority, question, token_in
from tsa import tsa

pytestmark = pytest.mark.anyio


class Exported:
    """An export, its receipts, and the verifier run on it."""

    def __init__(self, made: Lab, directory: Path) -> None:
        self.made, self.directory, self.tmp = made, directory / "export", directory
        self.receipts: list[str] = []

    async def write(self, count: int = 40) -> Exported:
        writer = self.made.writer()
        await writer.start()
        self.receipts += [(await writer.append(op(f"t{i % 3}"))).header() for i in range(count)]
        await writer.close()
        export.export(self.made.engine, self.directory, self.made.trust)
        (self.tmp / "receipts.txt").write_text("\n".join(self.receipts))
        return self

    @property
    def chain(self) -> Path:
        return self.directory / "kms.example/audit/n0-0"

    def run(self, *arguments: str) -> int:
        return verify.main([str(self.directory), "--trust", str(self.directory / "trust.txt"), *arguments])

    def receipted(self) -> int:
        return self.run("--receipts", str(self.tmp / "receipts.txt"))


@pytest.fixture
async def exported(made: Lab, tmp_path: Path) -> Exported:
    return await Exported(made, tmp_path).write()


async def test_the_exit_statuses(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    assert exported.run() == 2
    assert "U_NOANCHOR" in capsys.readouterr().out
    assert exported.run("--accept-unanchored") == 0
    assert exported.receipted() == 0
    assert capsys.readouterr().out.count("intact kms.example/audit/n0-0: 42 records") == 2
    assert exported.run("--level", "link", "--accept-unanchored") == 0
    assert verify.main(["/nonexistent", "--trust", "x"]) == 3
    assert verify.main([str(exported.directory)]) == 3
    assert verify.main([str(exported.directory), "--trust", str(exported.directory / "none")]) == 3
    assert [exported.run("--accept-unanchored", "--jobs", jobs) for jobs in ("0", "-1", "x", "1")] == [3, 3, 3, 0]


def entries_file(exported: Exported) -> Path:
    return next(p for p in sorted((exported.chain / "tile/entries").rglob("*")) if p.is_file())


def edit_entry(exported: Exported) -> None:
    path = entries_file(exported)
    path.write_bytes(path.read_bytes().replace(b'"tenant":"t1"', b'"tenant":"t2"', 1))


def cut_bundle(exported: Exported) -> None:
    path = entries_file(exported)
    path.write_bytes(path.read_bytes()[:-40])


def cut_tail(exported: Exported) -> None:
    """As a clever operator would: the last groups and their seals, consistently."""
    seals = (exported.chain / "seals.jsonl").read_bytes().splitlines(keepends=True)
    kept = seals[:-5]
    (exported.chain / "seals.jsonl").write_bytes(b"".join(kept))
    count = sum(json.loads(line)["n"] for line in kept)
    from audit.chain import pack, unpack

    path = entries_file(exported)
    entries = unpack(path.read_bytes())[:count]
    path.unlink()
    (path.parent / str(count)).write_bytes(pack(entries))
    tile = next(p for p in (exported.chain / "tile/0").rglob("*") if p.is_file())
    (tile.parent / str(count)).write_bytes(tile.read_bytes()[: 32 * count])
    tile.unlink()


def forge_seal(exported: Exported) -> None:
    path = exported.chain / "seals.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    row = json.loads(lines[3])
    row["seal"] = "00" * 64
    lines[3] = json.dumps(row, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    path.write_bytes(b"".join(lines))


def drop_seal(exported: Exported) -> None:
    path = exported.chain / "seals.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3] + lines[4:]))


def double_seal(exported: Exported) -> None:
    path = exported.chain / "seals.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], lines[3], *lines[4:]]))


def drop_chain(exported: Exported) -> None:
    exported.chain.rename(exported.directory / "elsewhere")


def rename_chain(exported: Exported) -> None:
    exported.chain.rename(exported.chain.parent / "n9-0")


def respell(exported: Exported) -> None:
    path = exported.chain / "seals.jsonl"
    path.write_bytes(path.read_bytes().replace(b'":', b'": ', 1))


ATTACKS: dict[Callable[[Exported], None], set[str]] = {
    edit_entry: {"E_LINK", "E_TSEQ", "E_TLINK", "E_DERIVED"},
    cut_bundle: {"E_PARSE", "E_TRUNC"},
    cut_tail: {"E_TRUNC"},
    forge_seal: {"E_SEAL"},
    drop_seal: {"E_SEQ", "E_DERIVED", "E_TRUNC"},
    double_seal: {"E_SEQ", "E_TRUNC"},
    drop_chain: {"E_MISSING"},
    rename_chain: {"E_MISSING", "E_ORIGIN"},
    respell: {"E_CANON"},
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.__name__)
async def test_S_06_every_attack_is_named(
    exported: Exported, attack: Callable[[Exported], None], capsys: pytest.CaptureFixture[str]
) -> None:
    attack(exported)
    assert exported.receipted() == 1
    found = capsys.readouterr().out
    first = found.splitlines()[0]
    assert first.split()[0] in ATTACKS[attack], first
    assert in_parts(exported) == found


def in_parts(exported: Exported) -> str:
    """What is found when every few records are a part of their own."""
    trust = verify.load_trust(exported.directory / "trust.txt")
    receipts = verify.load_receipts(exported.tmp / "receipts.txt")
    with ThreadPoolExecutor(2) as pool:
        report, _ = verify.verify_export(exported.directory, trust, receipts=receipts, pool=pool, part=7)
    return "".join(f"{finding}\n" for finding in report.findings)


async def test_parts_that_are_checked_apart_join_to_the_same_report(exported: Exported) -> None:
    await exported.write(30)
    trust = verify.load_trust(exported.directory / "trust.txt")
    receipts = verify.load_receipts(exported.tmp / "receipts.txt")
    alone, chains = verify.verify_export(exported.directory, trust, receipts=receipts)
    with ThreadPoolExecutor(2) as pool:
        parted, joined = verify.verify_export(exported.directory, trust, receipts=receipts, pool=pool, part=7)
    assert parted == alone
    assert joined == chains
    assert chains is not None
    assert exported.run("--receipts", str(exported.tmp / "receipts.txt"), "--jobs", "2") == 0


async def test_a_cut_tail_shows_only_against_a_receipt_or_a_state(
    exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    state = exported.tmp / "state.json"
    assert exported.run("--accept-unanchored", "--save", str(state)) == 0
    cut_tail(exported)
    assert exported.run("--accept-unanchored") == 0, (
        "nothing inside the log shows it: this is the gap that is documented"
    )
    assert exported.run("--since", str(state)) == 1
    assert "E_TRUNC" in capsys.readouterr().out


async def test_a_state_accepts_growth_and_refuses_another_history(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state.json"
    assert exported.run("--accept-unanchored", "--save", str(state)) == 0
    await exported.write(10)
    assert exported.run("--since", str(state)) == 0
    other = tmp_path / "other"
    other.mkdir()
    lab = Lab(other)
    lab.signer = exported.made.signer
    forged = await Exported(lab, other).write(60)
    capsys.readouterr()
    assert forged.run("--since", str(state)) == 1
    assert "E_FORK" in capsys.readouterr().out


async def test_an_auditors_key_that_did_not_certify_the_writer_is_noticed(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    stranger = Lab(other)
    trust = exported.directory / "trust.txt"
    import base64

    trust.write_text(f"origin kms.example/audit\nkey {base64.b64encode(stranger.signer.public_key()).decode()}\n")
    assert exported.receipted() == 1
    assert "E_CERT kms.example/audit/n0-0/0" in capsys.readouterr().out


async def test_an_export_verifies_with_neither_database_nor_web_library(exported: Exported) -> None:
    script = (
        "import sys\nfrom audit.verify import main\n"
        f"given = [{str(exported.directory)!r}, '--trust', {str(exported.directory / 'trust.txt')!r}]\n"
        "status = main([*given, '--accept-unanchored'])\n"
        "bad = {'sqlalchemy', 'fastapi', 'starlette', 'uvicorn', 'httpx', 'pkcs11', 'cedarpy', 'service', 'keystore', 'policy'}\n"
        "print(sorted(bad & set(sys.modules)))\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


async def test_receipts_are_taken_as_HTTP_writes_them_and_two_histories_are_told(
    exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    file = exported.tmp / "receipts.txt"
    file.write_text("".join(f"audit-receipt: {r}\n" for r in exported.receipts))
    assert exported.receipted() == 0
    other = exported.receipts[4].split("leaf=")[1]
    file.write_text("\n".join([*exported.receipts, exported.receipts[3].split("leaf=")[0] + "leaf=" + other]))
    assert exported.receipted() == 3
    assert "E_FORK kms.example/audit/n0-0/" in capsys.readouterr().err
    file.write_bytes(b"\xff\xfe")
    assert exported.receipted() == 3


async def test_a_receipt_speaks_for_its_own_chain_alone(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    other = exported.made.writer(node="n1")
    await other.start()
    theirs = (await other.append(op())).header()
    await other.close()
    export.export(exported.made.engine, exported.directory, exported.made.trust)
    assert exported.receipted() == 2
    assert capsys.readouterr().out.startswith("U_NOANCHOR kms.example/audit/n1-0: ")
    (exported.tmp / "receipts.txt").write_text("\n".join([*exported.receipts, theirs]))
    assert exported.receipted() == 0
    assert not verify_database(exported.made.engine, exported.made.trust).anchored, "a database vouches for no end"


async def test_tokens_of_a_trusted_authority_are_verified_in_exports_and_databases(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, notary = exported.made, Notary(exported.made.engine, origin=ORIGIN, signer=exported.made.signer, clock=now)
    signed = notary.round(1, lambda _: None)
    assert signed is not None
    text, table = parse_note(signed.note).text, tables.checkpoint_table
    with tsa(tmp_path / "one") as ours, tsa(tmp_path / "other") as stranger:
        asked = question(text)
        with urllib.request.urlopen(
            urllib.request.Request(ours.url, asked.as_bytes(), {"content-type": "application/timestamp-query"})
        ) as answer:
            token, _ = token_in(answer.read(), asked, text, load_authority(ours.authority))
        with made.engine.begin() as connection:
            connection.execute(sa.update(table).values(tst=token))
        export.export(made.engine, exported.directory, made.trust)
        assert verify_database(made.engine, made.trust).findings == []
        given = ["--accept-unanchored", "--timestamp-authority", str(ours.authority)]
        assert exported.run(*given, "--json") == 0
        assert json.loads(capsys.readouterr().out)["timestamps"] == 1
        assert exported.run("--accept-unanchored", "--timestamp-authority", str(stranger.authority)) == 1
        assert capsys.readouterr().out.startswith("E_ANCHOR kms.example/audit/checkpoints.jsonl 0: ")
        assert exported.run(*given, "--timestamp-authority", str(tmp_path / "none")) == 3


class Growing:
    """A chain and its root log that grow between two exports, and what the verifier says of the newest."""

    def __init__(self, made: Lab, directory: Path) -> None:
        self.made, self.tmp, self.state = made, directory, directory / "state.json"
        self.notary = Notary(made.engine, origin=ORIGIN, signer=made.signer, clock=now)
        self.count = 0

    async def write(self, *groups: int, committed: bool = True) -> None:
        writer = self.made.writer()
        await writer.start()
        for group in groups:
            await writer.append_many([op(f"t{i % 5}") for i in range(group)])
        await writer.close()
        if committed:
            assert self.notary.round(1, lambda _: None)

    def export(self) -> Path:
        self.count += 1
        made = self.tmp / f"export{self.count}"
        export.export(self.made.engine, made, self.made.trust)
        return made

    def run(self, exported: Path, *given: str) -> int:
        return verify.main([str(exported), "--trust", str(exported / "trust.txt"), *given])


def spoil_before(exported: Path, log: str, bundles: int) -> None:
    """Garble the first entry bundle, remove the others and the hash tiles over all of them."""
    for number in range(bundles):
        (exported / log / f"tile/0/{number:03}").unlink()
        path = exported / log / f"tile/entries/{number:03}"
        path.unlink() if number else path.write_bytes(b"garbled")


CHAIN = f"{ORIGIN}/n0-0"


async def test_a_run_since_a_state_opens_only_what_came_after_it(
    made: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Growing(made, tmp_path)
    await log.write(250, 250, 80)
    assert log.run(log.export(), "--accept-unanchored", "--save", str(log.state)) == 0
    await log.write(300)
    whole, spoilt = log.export(), log.export()
    spoil_before(spoilt, CHAIN, 2)
    later = tmp_path / "later.json"
    capsys.readouterr()
    assert log.run(spoilt, "--since", str(log.state), "--save", str(later)) == 0
    assert "; the first 582 as the earlier run found them" in capsys.readouterr().out
    assert log.run(spoilt, "--accept-unanchored") == 1
    again = tmp_path / "again.json"
    assert log.run(whole, "--accept-unanchored", "--save", str(again)) == 0
    kept, anew = (json.loads(path.read_bytes()) for path in (later, again))
    assert kept == anew, "going on leads to the same state as beginning anew"
    assert log.run(whole, "--since", str(later), "--level", "link") == 0


async def test_what_the_notary_commits_between_two_exports_is_checked_since_a_state(made: Lab, tmp_path: Path) -> None:
    log = Growing(made, tmp_path)
    await log.write(300)
    early = log.export()
    await log.write(40)
    await log.write(20, committed=False)
    late = log.export()
    shutil.copytree(
        late / CHAIN, early / CHAIN, dirs_exist_ok=True
    )  # read before the notary committed what it has read
    assert log.run(early, "--accept-unanchored", "--save", str(log.state)) == 0
    saved = json.loads(log.state.read_bytes())["logs"][CHAIN]
    assert (saved["n"], saved["resume"]["state"]["n"]) == (366, 302)
    assert log.run(late, "--since", str(log.state)) == 0
    for jobs in ("1", "2"):
        assert log.run(early, "--accept-unanchored", "--save", str(tmp_path / jobs), "--jobs", jobs) == 0
        assert (tmp_path / jobs).read_bytes() == log.state.read_bytes()


@pytest.mark.parametrize("groups", [(20,), (250, 256)])
async def test_another_history_up_to_a_state_is_a_fork(
    groups: tuple[int, ...], made: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Growing(made, tmp_path)
    await log.write(*groups)
    assert log.run(log.export(), "--accept-unanchored", "--save", str(log.state)) == 0
    (tmp_path / "other").mkdir()
    other = Lab(tmp_path / "other")
    other.signer = made.signer
    forged = Growing(other, tmp_path / "other")
    await forged.write(*groups)
    await forged.write(30)
    exported = forged.export()
    assert log.run(exported, "--accept-unanchored") == 0
    capsys.readouterr()
    assert log.run(exported, "--since", str(log.state)) == 1
    assert f"E_FORK {CHAIN}/" in capsys.readouterr().out


def other_origin(state: dict[str, Any]) -> None:
    state["origin"] = "other.example/audit"


def other_keys(state: dict[str, Any]) -> None:
    state["keys"] = ["0" * 64]


def other_root(state: dict[str, Any]) -> None:
    state["root"]["roots"][-1][1] = "0" * 64


def fewer_roots(state: dict[str, Any]) -> None:
    state["logs"][CHAIN]["resume"]["state"]["frontier"].pop()


def unknown_field(state: dict[str, Any]) -> None:
    state["logs"][CHAIN]["more"] = 1


@pytest.mark.parametrize("damage", [other_origin, other_keys, other_root, fewer_roots, unknown_field, None])
async def test_a_state_that_cannot_be_used_is_refused(
    damage: Callable[[dict[str, Any]], None] | None, made: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Growing(made, tmp_path)
    await log.write(5)
    exported = log.export()
    assert log.run(exported, "--accept-unanchored", "--level", "link", "--save", str(log.state)) == 3
    assert log.run(exported, "--accept-unanchored", "--save", str(log.state)) == 0
    state = json.loads(log.state.read_bytes())
    if damage is None:
        log.state.write_bytes(log.state.read_bytes()[:-9])
    else:
        damage(state)
        log.state.write_text(json.dumps(state))
    assert log.run(exported, "--since", str(log.state)) == 3
    assert f"skms-verify: state {log.state}" in capsys.readouterr().err
