"""`skms-verify` on exports: offline, by exit status and code, with receipts and with a state of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from audit_lab import Lab, op

from audit import log, verify

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
        log.export(self.made.engine, self.directory, self.made.trust)
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
    first = capsys.readouterr().out.splitlines()[0]
    assert first.split()[0] in ATTACKS[attack], first


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
