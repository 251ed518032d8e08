"""Three verifiers without a line in common agree on the same exports, whole and damaged: exit status, code and place."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from audit_lab import ORIGIN, MemorySigner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from forgery import FIRST, SECOND, CurveSigner, Export, Insider, make_export, replaced
from test_checkpoint import C2SP_CHECKPOINT, GO_KEY, GO_NOTE, MALFORMED, VECTORS, corrupted, raw

from audit import verify
from audit.chain import ZERO, Chain, leaf_hash, parse_frame
from audit.checkpoint import Checkpoint, Signature, format_vkey, parse_checkpoint, parse_note, with_cosignatures
from audit.event import encode_plain
from audit.postquantum import PostQuantumKey

INDEPENDENT = Path(__file__).parents[2] / "audit" / "independent"


def load() -> ModuleType:
    """The single file, as a module."""
    spec = importlib.util.spec_from_file_location("skms_verify", INDEPENDENT / "skms_verify.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["skms_verify"] = module
    spec.loader.exec_module(module)
    return module


STDLIB = load()


@pytest.fixture(scope="session")
def go_verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Go program, built once for the session; unoptimised, which builds faster where nothing is cached yet."""
    built = tmp_path_factory.mktemp("go") / "skms-go-verify"
    command = ["sh", str(INDEPENDENT / "go/build.sh"), str(built), "-gcflags=all=-N -l"]
    beside = Path(sys.executable).parent / "go"  # where the wheel puts it
    environment = {**os.environ, "GO": str(beside)} if beside.exists() else dict(os.environ)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return built


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return make_export(tmp_path_factory.mktemp("whole") / "made")


@pytest.fixture
def damaged(whole: Export, tmp_path: Path) -> Export:
    """A copy, to be damaged."""
    return whole.copy(tmp_path / "export")


Verdict = tuple[int, list[str]]
Ask = Callable[..., dict[str, Verdict]]


def in_process(main: Callable[[list[str]], int], arguments: list[str]) -> Verdict:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        status = main(arguments)
    return status, out.getvalue().splitlines()


@pytest.fixture
def ask(go_verifier: Path) -> Ask:
    """Run every verifier on an export, with the same arguments: name -> exit status and lines."""

    def run(made: Export, *arguments: str) -> dict[str, Verdict]:
        given = [str(made.directory), "--trust", str(made.trust), *arguments]
        done = subprocess.run([str(go_verifier), *given], capture_output=True, text=True)
        return {
            "product": in_process(verify.main, given),
            "stdlib": in_process(STDLIB.main, given),
            "go": (done.returncode, done.stdout.splitlines()),
        }

    return run


def agree(found: dict[str, Verdict], status: int, first: str = "") -> bool:
    """Whether all of them say this status, and their first line begins so: code, and place if it is given."""
    otherwise = {
        name: (given, lines[:1])
        for name, (given, lines) in found.items()
        if given != status or not (lines or [""])[0].startswith(first)
    }
    if otherwise:
        print(f"expected {status} {first!r}: {otherwise}")  # pytest shows it beside the assertion that failed
    return not otherwise and bool(found)


# ---- whole -----------------------------------------------------------------------------------------------------------


def test_all_accept_a_whole_export_and_compute_the_same_roots(whole: Export, ask: Ask) -> None:
    found = ask(whole, "--receipts", str(whole.receipts))
    assert agree(found, 0, "intact ")
    assert len({tuple(line for line in lines if line.startswith("intact ")) for _, lines in found.values()}) == 1
    assert agree(ask(whole, "--accept-unanchored"), 0)
    assert agree(ask(whole), 2, f"U_NOANCHOR {ORIGIN}: ")
    reports = [
        json.loads("\n".join(lines)) for _, lines in ask(whole, "--json", "--receipts", str(whole.receipts)).values()
    ]
    for report in reports:
        assert (report["verdict"], report["findings"], report["anchored"]) == ("intact", [], True)
        assert report["logs"] == reports[0]["logs"]


def test_all_pass_over_a_post_quantum_line_that_their_trust_does_not_name(damaged: Export, ask: Ask) -> None:
    """An export of a log that ML-DSA-44 signs too stays verifiable by who knows the audit key alone."""
    second = PostQuantumKey(ORIGIN, MLDSA44PrivateKey.generate())

    def signed(note: bytes) -> bytes:
        value = second.cosign(parse_checkpoint(parse_note(note).text), 1_800_000_000)
        return with_cosignatures(note, Signature(second.key.name, second.key.id, value).line())

    notes = [signed(note) for note in damaged.notes()]
    damaged.list_notes(notes)
    damaged.put_newest(notes[-1])
    assert len(notes[-1]) > 3_000
    assert agree(ask(damaged, "--receipts", str(damaged.receipts)), 0, "intact ")
    # It counts for nothing: a note with that line alone is signed by nobody.
    only = parse_note(notes[-1])
    damaged.put_newest(only.text + b"\n" + only.signatures[-1].line())
    assert agree(ask(damaged, "--receipts", str(damaged.receipts)), 1, "E_SIG ")


def test_receipts_of_one_chain_leave_the_end_of_the_others_open(damaged: Export, ask: Ask) -> None:
    lines = damaged.receipts.read_text().splitlines()
    damaged.receipts.write_text("\n".join(line for line in lines if f'"{SECOND}"' not in line))
    assert agree(ask(damaged, "--receipts", str(damaged.receipts)), 2, f"U_NOANCHOR {SECOND}: ")


def test_all_accept_an_audit_key_on_p256_and_refuse_another_one(tmp_path: Path, ask: Ask) -> None:
    made = make_export(tmp_path / "made", CurveSigner())
    assert agree(ask(made, "--receipts", str(made.receipts)), 0, "intact ")
    other = base64.b64encode(CurveSigner().public_key()).decode()
    made.trust.write_text(f"origin {ORIGIN}\nkey {other}\n")
    assert agree(ask(made, "--receipts", str(made.receipts)), 1, f"E_CERT {FIRST}/0")


def test_an_export_without_a_root_log_still_verifies(damaged: Export, ask: Ask) -> None:
    damaged.drop_root()
    assert agree(ask(damaged, "--receipts", str(damaged.receipts)), 0, "intact ")
    assert agree(ask(damaged), 2, "U_NOANCHOR")


def test_what_an_auditor_gives_wrongly_is_usage_and_not_tampering(whole: Export, tmp_path: Path, ask: Ask) -> None:
    bad = tmp_path / "bad"
    for arguments in (["--receipts", str(bad)], ["--nonsense"], ["--trust", str(bad)]):
        bad.write_text("nonsense\n")
        assert agree(ask(whole, *arguments), 3)
    assert agree(ask(whole, "--receipts", str(tmp_path / "none")), 3)


# ---- one thing changed -------------------------------------------------------------------------------------------------

Attack = Callable[[Export], object]


def in_record(old: bytes, new: bytes, *, log: str = FIRST, n: int = 20) -> Attack:
    return lambda made: made.edit(log, n, old, new)


def move_entry(made: Export) -> None:
    entries = made.entries(FIRST)
    entries[20], entries[21] = entries[21], entries[20]
    made.write(FIRST, entries)


def delete_entry(made: Export) -> None:
    entries = made.entries(FIRST)
    del entries[20]
    made.write(FIRST, entries)


def insert_entry(made: Export) -> None:
    entries = made.entries(FIRST)
    entries.insert(20, entries[19])
    made.write(FIRST, entries)


def rehash(made: Export) -> None:
    """Change a record and every hash after it, seals aside."""
    chain, rows = Chain(FIRST), made.seals(FIRST)
    entries = []
    for n, entry in enumerate(made.entries(FIRST)):
        frame = parse_frame(entry, FIRST)
        body = replaced(frame.body, b'"out":"ok"', b'"out":"denied"') if n == 20 else frame.body
        entries.append(chain.append(body, frame.t, json.loads(body).get("tenant")))
    made.write(FIRST, entries)
    for row in rows:
        row["head"] = leaf_hash(entries[row["first"] + row["n"] - 1]).hex()
    made.reseal(FIRST, rows)


def in_seal(number: int, **changed: object) -> Attack:
    def attack(made: Export) -> None:
        rows = made.seals(FIRST)
        rows[number] = {**rows[number], **changed}
        made.reseal(FIRST, rows)

    return attack


def swap_seals(made: Export) -> None:
    rows = made.seals(FIRST)
    rows[2]["seal"], rows[3]["seal"] = rows[3]["seal"], rows[2]["seal"]
    made.reseal(FIRST, rows)


def drop_batch(made: Export) -> None:
    rows = made.seals(FIRST)
    made.reseal(FIRST, rows[:2] + rows[3:])


def double_batch(made: Export) -> None:
    rows = made.seals(FIRST)
    made.reseal(FIRST, [*rows[:3], rows[2], *rows[3:]])


def an_empty_batch(made: Export) -> None:
    rows = made.seals(FIRST)
    made.reseal(FIRST, [*rows[:3], {**rows[3], "n": 0}, *rows[3:]])


def join_batches(made: Export) -> None:
    """The same entries in fewer groups: nothing but the seal tells."""
    rows = made.seals(FIRST)
    joined = {**rows[2], **{k: rows[3][k] for k in ("head", "seal", "t", "day")}, "n": rows[2]["n"] + rows[3]["n"]}
    made.reseal(FIRST, [*rows[:2], joined, *rows[4:]])


def on_file(path: str, change: Callable[[bytes], bytes]) -> Attack:
    def attack(made: Export) -> None:
        (file,) = made.root.glob(path)
        file.write_bytes(change(file.read_bytes()))

    return attack


def swap_chains(made: Export) -> None:
    (made.root / "n0-0").rename(made.root / "x")
    (made.root / "n1-0").rename(made.root / "n0-0")
    (made.root / "x").rename(made.root / "n1-0")


def drop(name: str) -> Attack:
    def attack(made: Export) -> None:
        (made.root / name).rename(made.directory / "elsewhere")

    return attack


def at_time_1000(entry: bytes) -> bytes:
    return re.sub(rb'"t":[0-9]+', b'"t":1000', entry, count=1)


CHAIN_ATTACKS: dict[str, tuple[Attack, str]] = {
    "edit a record": (in_record(b'"out":"ok"', b'"out":"denied"'), f"E_LINK {FIRST}/21: "),
    "edit the last record": (lambda m: m.swap(SECOND, 304, lambda e: replaced(e, b'"count":305', b'"count":306')), "E_EPOCH"),
    "delete a record": (delete_entry, "E_"),
    "insert a record": (insert_entry, "E_"),
    "reorder records": (move_entry, f"E_SEQ {FIRST}/20: "),
    "edit and re-hash": (rehash, f"E_SEAL {FIRST}/"),
    "backdate": (lambda m: m.swap(FIRST, 20, at_time_1000), f"E_TIME {FIRST}/20: "),
    "number": (in_record(b'"n":20', b'"n":22'), f"E_SEQ {FIRST}/20: "),
    "origin": (in_record(b'"l":"kms', b'"l":"kmt'), f"E_ORIGIN {FIRST}/20: "),
    "swap tenant": (in_record(b'"tenant":"t0"', b'"tenant":"t2"'), "E_T"),
    "drop a batch": (drop_batch, f"E_TRUNC {FIRST}/0: "),
    "double a batch": (double_batch, "E_"),
    "join two batches": (join_batches, f"E_SEAL {FIRST}/"),
    "swap two seals": (swap_seals, f"E_SEAL {FIRST}/"),
    "forge a seal": (in_seal(3, seal="00" * 64), f"E_SEAL {FIRST}/"),
    "cut a seal": (in_seal(3, seal="00"), f"E_SEAL {FIRST}/"),
    "column t": (in_seal(3, t=1), f"E_DERIVED {FIRST}/"),
    "column day": (in_seal(3, day=1), f"E_DERIVED {FIRST}/"),
    "column head": (in_seal(3, head="00" * 32), f"E_DERIVED {FIRST}/"),
    "column epoch": (in_seal(3, epoch=9), f"E_EPOCH {FIRST}/"),
    "column first": (in_seal(3, first=0), f"E_SEQ {FIRST}/"),
    "an empty batch": (an_empty_batch, f"E_SCHEMA {FIRST}/"),
    "a field in a seal": (in_seal(3, more=1), f"E_CANON {FIRST}/seal 3: "),
    "a float in a seal": (on_file("n0-0/seals.jsonl", lambda d: d.replace(b'"n":8,', b'"n":8.0,', 1)), f"E_CANON {FIRST}/seal "),
    "a space in a seal": (on_file("n0-0/seals.jsonl", lambda d: d.replace(b'":', b'": ', 1)), f"E_CANON {FIRST}/seal 0: "),
    "no last newline": (on_file("n0-0/seals.jsonl", lambda d: d[:-1]), f"E_CANON {FIRST}/seal "),
    "cut a bundle": (on_file("n1-0/tile/entries/000", lambda d: d[:-7]), f"E_PARSE {SECOND}/0: "),
    "cut a bundle at an entry": (on_file("n1-0/tile/entries/000", lambda d: d[: -2 - int.from_bytes(d[:2], "big")]), "E_"),
    "drop a bundle": (drop("n1-0/tile/entries/000"), f"E_TRUNC {SECOND}/0: "),
    "drop seals.jsonl": (drop("n1-0/seals.jsonl"), f"E_MISSING {SECOND}/0: "),
    "drop a chain": (drop("n1-0"), f"E_MISSING {SECOND}"),
    "drop every chain": (lambda m: (drop("n1-0")(m), (m.root / "n0-0").rename(m.directory / "more")), "E_MISSING"),
    "swap two chains": (swap_chains, f"E_ORIGIN {FIRST}/0: "),
    "rename a chain": (lambda m: (m.root / "n1-0").rename(m.root / "n9-0"), "E_"),
    "cut the tail": (lambda m: m.cut_chain(FIRST, 2), f"E_TRUNC {FIRST}/"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAIN_ATTACKS)
def test_every_attack_on_a_chain_is_named_alike(name: str, damaged: Export, ask: Ask) -> None:
    attack, expected = CHAIN_ATTACKS[name]
    attack(damaged)
    found = ask(damaged, "--receipts", str(damaged.receipts))
    damaged.drop_root()
    bare = ask(damaged, "--receipts", str(damaged.receipts))
    for verdicts in (found, bare):
        assert agree(verdicts, 1, expected)
        firsts = {lines[0].partition(": ")[0] for _, lines in verdicts.values()}
        assert len(firsts) == 1, verdicts


def test_a_receipt_of_another_record_is_noticed(damaged: Export, ask: Ask) -> None:
    lines = damaged.receipts.read_text().splitlines()
    leaves = [line.partition("leaf=")[2] for line in lines[:2]]
    damaged.receipts.write_text(lines[0].replace(*leaves) + "\n")
    seq = lines[0].partition("seq=")[2].partition(",")[0]
    assert agree(ask(damaged, "--receipts", str(damaged.receipts)), 1, f"E_RECEIPT {FIRST}/{seq}")


SPELLINGS = {
    "a doubled key": (b'"node":"n0"', b'"node":"n0","node":"n0"', "E_CANON"),
    "an escape": (b'"node":"n0"', b'"node":"\\u006e0"', "E_CANON"),
    "an escape in a key": (b'"node"', b'"nod\\u0065"', "E_CANON"),
    "an escaped slash": (b'CN=', b'CN\\/=', "E_CANON"),
    "1.0": (b'"kver":1', b'"kver":1.0', "E_CANON"),
    "1e0": (b'"kver":1', b'"kver":1e0', "E_CANON"),
    "-0": (b'"kver":1', b'"kver":-0', "E_CANON"),
    "-1": (b'"kver":1', b'"kver":-1', "E_SCHEMA"),
    "01": (b'"kver":1', b'"kver":01', "E_PARSE"),
    "+1": (b'"kver":1', b'"kver":+1', "E_PARSE"),
    "2^53 - 1": (b'"kver":1', b'"kver":9007199254740991', "E_LINK"),
    "2^53": (b'"kver":1', b'"kver":9007199254740992', "E_CANON"),
    "2^53 + 1": (b'"kver":1', b'"kver":9007199254740993', "E_CANON"),
    "5,000 digits": (b'"kver":1', b'"kver":' + b"9" * 5000, "E_CANON"),
    "NaN": (b'"kver":1', b'"kver":NaN', "E_PARSE"),
    "Infinity": (b'"kver":1', b'"kver":-Infinity', "E_PARSE"),
    "null": (b'"kver":1', b'"kver":null', "E_CANON"),
    "true": (b'"kver":1', b'"kver":true', "E_SCHEMA"),
    "a string": (b'"kver":1', b'"kver":"1"', "E_SCHEMA"),
    "a space": (b'"kver":1', b'"kver": 1', "E_CANON"),
    "a newline": (b'"kver":1', b'"kver":\n1', "E_CANON"),
    "a comma too many": (b'"kver":1', b'"kver":1,', "E_PARSE"),
    "other order": (b'"node":"n0","op":"encrypt"', b'"op":"encrypt","node":"n0"', "E_CANON"),
    "nested": (b'"kver":1', b'"kver":[[[[[1]]]]]', "E_CANON"),
    "a lone surrogate": (b'"node":"n0"', b'"node":"\\ud800"', "E_CANON"),
    "not UTF-8": (b'"node":"n0"', b'"node":"\xff"', "E_PARSE"),
    "beyond ASCII": (b'"node":"n0"', '"node":"ñ0"'.encode(), "E_SCHEMA"),
    "a key beyond ASCII": (b'"node"', '"ñode"'.encode(), "E_CANON"),
    "a control character": (b'"node":"n0"', b'"node":"n\t0"', "E_PARSE"),
    "upper case": (b'"node":"n0"', b'"node":"N0"', "E_SCHEMA"),
    "an unknown field": (b'"kver":1', b'"kverx":1', "E_SCHEMA"),
    "a field left out": (b'"node":"n0",', b"", "E_SCHEMA"),
    "another kind": (b'"kind":"op"', b'"kind":"ops"', "E_SCHEMA"),
    "a context out of order": (b'"a":"h1:' + b"0" * 32 + b'","b"', b'"b":"h1:' + b"0" * 32 + b'","a"', "E_CANON"),
    "a context doubled": (b'"a":"h1:' + b"0" * 32 + b'","b"', b'"a":"h1:' + b"0" * 32 + b'","a"', "E_CANON"),
    "a context in the clear": (b'"a":"h1:' + b"0" * 32, b'"a":"secret', "E_SCHEMA"),
    "an actor of a control character": (b'a\\\\b', b'a\\u0001b', "E_SCHEMA"),
    "an actor otherwise escaped": (b'a\\\\b', b'a\\u005cb', "E_CANON"),
    "version 1.0": (b'"v":1', b'"v":1.0', "E_CANON"),
    "version 0": (b'"v":1', b'"v":0', "E_SCHEMA"),
    "a frame otherwise spelt": (b'{"c":{"l":', b'{"c": {"l":', "E_"),
    "a number in the frame": (b'"n":16', b'"n":016', "E_SCHEMA"),
    "a frame without time": (b'"t":1', b'"u":1', "E_SCHEMA"),
    "no frame": (b'{"c":', b'["c":', "E_PARSE"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_other_spelling_is_refused_alike(name: str, damaged: Export, ask: Ask) -> None:
    old, new, expected = SPELLINGS[name]
    n = 16
    if not old.startswith(b'"n":') and old not in damaged.entries(FIRST)[n]:
        n = next(i for i, e in enumerate(damaged.entries(FIRST)) if old in e)
    damaged.edit(FIRST, n, old, new)
    damaged.drop_root()
    found = ask(damaged, "--receipts", str(damaged.receipts))
    at = n + 1 if expected == "E_LINK" else n
    assert agree(found, 1, f"{expected} {FIRST}/{at}: " if expected != "E_" else "E_")


# ---- what an insider with a certified writer's key could write --------------------------------------------------------------


def tenant_record(made: Insider, tenant: str) -> bytes:
    return encode_plain(made.record("op", op="encrypt", out="ok", tenant=tenant))


def hidden_from_tenant(made: Insider) -> None:
    made.entry(tenant_record(made, "t"), tenant=(0, ZERO))
    made.seal()
    made.entry(tenant_record(made, "t"), tenant=(2, made.previous))
    made.seal()


def other_link(made: Insider) -> None:
    made.entry(tenant_record(made, "t"), tenant=(0, ZERO))
    made.seal()
    made.entry(tenant_record(made, "t"), tenant=(1, ZERO))
    made.seal()


def no_link(made: Insider) -> None:
    made.entry(tenant_record(made, "t"))
    made.seal()


def needless_link(made: Insider) -> None:
    made.entry(encode_plain(made.record()), tenant=(0, ZERO))
    made.seal()


def runs_back(made: Insider) -> None:
    made.entry(json.dumps(made.record(), sort_keys=True, separators=(",", ":")).encode(), t=made.t - 1)
    made.seal()


def zombie(made: Insider) -> None:
    old = made.key
    made.open(2)
    made.key = old
    made.add()


INSIDERS: dict[str, tuple[Callable[[Insider], object], int, str]] = {
    "nothing wrong": (lambda m: m.add(), 0, "intact"),
    "hide a record from its tenant": (hidden_from_tenant, 1, f"E_TSEQ {FIRST}/2: "),
    "another record for the tenant's last": (other_link, 1, f"E_TLINK {FIRST}/2: "),
    "a tenant's record without its link": (no_link, 1, f"E_SCHEMA {FIRST}/1: "),
    "a link without a tenant": (needless_link, 1, f"E_SCHEMA {FIRST}/1: "),
    "time runs back": (runs_back, 1, f"E_TIME {FIRST}/1: "),
    "a fake epoch": (lambda m: m.open(2, signer=MemorySigner()), 1, f"E_CERT {FIRST}/1: "),
    "an old epoch": (lambda m: m.open(1), 1, f"E_EPOCH {FIRST}/1: "),
    "a zombie": (zombie, 1, f"E_SEAL {FIRST}/2: "),
    "a false close": (lambda m: m.add(kind="close", epoch=1, count=9), 1, f"E_EPOCH {FIRST}/1: "),
    "a record after the close": (lambda m: m.add(kind="close", epoch=1, count=2).add(), 1, f"E_EPOCH {FIRST}/2: "),
    "every other kind": (
        lambda m: m.add(kind="mark").add(kind="clock", was=1, now=2)
        .add(kind="suppressed", why="malformed", count=3, to=2, **{"from": 1}).add(kind="auth", why="no_route", src="10.0.0.1")
        .add(kind="withheld", intent="00000000-0000-4000-8000-000000000000"),
        0, "intact",
    ),
    "a mark of a root log that is not there": (lambda m: m.add(kind="mark", root=[3, ZERO]), 1, f"E_MISSING {ORIGIN}: "),
    "a kind without what it needs": (lambda m: m.add(kind="withheld"), 1, f"E_SCHEMA {FIRST}/1: "),
    "heads in a writer's chain": (lambda m: m.add(kind="heads"), 1, f"E_SCHEMA {FIRST}/1: "),
    "too long an actor": (lambda m: m.add(kind="auth", why="x", actor="a" * 513), 1, f"E_SCHEMA {FIRST}/1: "),
    "an actor of 512 backslashes": (lambda m: m.add(kind="auth", why="x", actor="\\" * 512), 0, "intact"),
    "eight rules": (lambda m: m.add(kind="auth", why="x", rule=["r"] * 8), 0, "intact"),
    "nine rules": (lambda m: m.add(kind="auth", why="x", rule=["r"] * 9), 1, f"E_SCHEMA {FIRST}/1: "),
    "a later version": (lambda m: m.add(v=2, new=1).add(), 2, f"U_VERSION {FIRST}"),
    "too large a record": (lambda m: m.add(v=2, new="x" * 32_700), 1, f"E_SCHEMA {FIRST}/1: "),
    "large, and of a later version": (lambda m: m.add(v=2, new="x" * 32_600), 2, f"U_VERSION {FIRST}"),
    "beyond ASCII, and of a later version": (lambda m: m.add(v=2, new="ñ\u2028\x7f"), 2, f"U_VERSION {FIRST}"),
    "a record that is an empty object": (lambda m: m.add(b"{}"), 1, f"E_SCHEMA {FIRST}/1: "),
    "two records in one": (lambda m: m.add(b'{"v":1},{"v":1}'), 1, f"E_PARSE {FIRST}/1: "),
    "depth 10,000": (lambda m: m.add(b'{"v":' + b"[" * 10_001 + b"]" * 10_001 + b"}"), 1, f"E_PARSE {FIRST}/1: "),
}  # fmt: skip


@pytest.mark.parametrize("name", INSIDERS)
def test_what_an_insider_writes_is_judged_alike(name: str, tmp_path: Path, ask: Ask) -> None:
    act, status, expected = INSIDERS[name]
    made = Insider(MemorySigner()).open(1)
    act(made)
    assert agree(ask(made.write(tmp_path / "export"), "--accept-unanchored"), status, expected)


@pytest.mark.parametrize(
    ("changed", "status", "first"),
    [({}, 0, "intact"), ({"log": "A"}, 1, "E_SCHEMA"), ({"at": -1}, 1, "E_SCHEMA"), ({"more": 1}, 1, "E_SCHEMA")],
)
def test_a_record_of_a_pruned_range_is_judged_alike(
    changed: dict[str, object], status: int, first: str, tmp_path: Path, ask: Ask
) -> None:
    made = Insider(MemorySigner()).open(1)
    facts = {
        "at": 4,
        "from": 0,
        "to": 4,
        "hash": ZERO,
        "log": SECOND,
        "policy": "age",
        "op": "archive_records",
        "out": "ok",
    }
    made.add(kind="prune", **{**facts, **changed})
    assert agree(ask(made.write(tmp_path / "export"), "--accept-unanchored"), status, first)


def test_a_pruned_chain_is_never_called_intact_by_those_who_do_not_read_archives(damaged: Export, ask: Ask) -> None:
    (damaged.place(SECOND) / "pruned.json").write_text("{}")
    found = ask(damaged, "--receipts", str(damaged.receipts))
    assert found.pop("product")[0] == 1, "it reads the manifest, and this is none"
    assert agree(found, 2, f"U_PRUNED {SECOND}/0: ")


# ---- the root log, its checkpoints and witnesses ----------------------------------------------------------------------------


def root_entry(n: int, old: bytes, new: bytes) -> Attack:
    return lambda made: made.edit(ORIGIN, n, old, new)


def in_heads(change: Callable[[list[dict[str, Any]]], object]) -> Attack:
    """The notary itself lies: another entry, well linked, its checkpoint signed by the audit key."""

    def attack(made: Export) -> None:
        made.rewrite_root(lambda bodies: change(bodies) and None)

    return attack


def set_shard(entry: int, place: int, value: object) -> Attack:
    return in_heads(lambda bodies: bodies[entry]["shards"][0].__setitem__(place, value))


def edit_checkpoint(made: Export) -> None:
    origin, size, rest = made.notes()[-1].split(b"\n", 2)
    made.put_newest(b"\n".join([origin, b"%d" % (int(size) - 1), rest]))


def signed(size: int, *, origin: str = ORIGIN, by: Any = None) -> Attack:
    """A newest checkpoint of this many entries more than there are, and of another root."""

    def attack(made: Export) -> None:
        signer = made if by is None else Export(made.directory, by(), origin=origin)
        made.put_newest(signer.sign(Checkpoint(origin, len(made.entries(ORIGIN)) + size, bytes(32))))

    return attack


def fork_before(made: Export) -> None:
    notes = made.notes()
    made.list_notes([made.sign(Checkpoint(ORIGIN, 1, bytes(32))), *notes[1:]])


def another_copy(made: Export) -> None:
    (made.root / "checkpoint").write_bytes(made.notes()[-2])


def cut_root(made: Export) -> None:
    made.write(ORIGIN, made.entries(ORIGIN)[:-1])


def chain_behind(made: Export) -> None:
    made.cut_chain(FIRST, 2)


def new_history(made: Export) -> None:
    """Every record of a chain anew, by one who holds the audit key, root log and checkpoint too."""
    forged = Insider(made.signer, log=SECOND).open(9)
    forged.add().write(made.directory / "forged")
    made.write(SECOND, forged.entries)
    made.reseal(SECOND, forged.rows)


def two_roots(bodies: list[dict[str, Any]]) -> None:
    bodies.append({**bodies[-1], "shards": [[*bodies[-1]["shards"][0][:2], ZERO]]})


def full_without_one(bodies: list[dict[str, Any]]) -> None:
    bodies.append({**bodies[-1], "full": True, "shards": bodies[-1]["shards"][:1]})


def another_root(entry: bytes) -> bytes:
    return re.sub(rb'"[0-9a-f]{64}"\]', b'"' + b"0" * 64 + b'"]', entry, count=1)


def wide_tile(made: Export) -> None:
    (made.root / "tile/entries/000.p/300").write_bytes(b"")


ROOT_ATTACKS: dict[str, tuple[Attack, str]] = {
    "edit an entry": (root_entry(2, b'"tenants":"', b'"tenantz":"'), f"E_SCHEMA {ORIGIN}/2: "),
    "respell an entry": (root_entry(2, b'"full":', b'"full": '), f"E_CANON {ORIGIN}/2: "),
    "a root in an entry": (lambda m: m.swap(ORIGIN, 2, another_root), f"E_ROOT {FIRST}/"),
    "an entry's number": (root_entry(2, b'"n":2', b'"n":3'), f"E_SEQ {ORIGIN}/2: "),
    "an entry's name": (root_entry(2, b'"l":"kms', b'"l":"kmt'), f"E_ORIGIN {ORIGIN}/2: "),
    "cut an entry's tile": (cut_root, f"E_TRUNC {ORIGIN}/"),
    "edit the checkpoint": (edit_checkpoint, f"E_SIG {ORIGIN}/checkpoints.jsonl "),
    "another copy of the checkpoint": (another_copy, f"E_DERIVED {ORIGIN}/checkpoint: "),
    "two checkpoints of one size": (lambda m: m.list_notes([*m.notes(), m.notes()[-1]]), f"E_SEQ {ORIGIN}/checkpoints.jsonl "),
    "a checkpoint by a stranger": (signed(0, by=MemorySigner), f"E_SIG {ORIGIN}/checkpoints.jsonl "),
    "a checkpoint of another origin": (signed(0, origin="kms.example/other"), f"E_SIG {ORIGIN}/checkpoints.jsonl "),
    "a checkpoint of another root": (signed(0), f"E_ROOT {ORIGIN}/"),
    "an old checkpoint of another root": (fork_before, f"E_ROOT {ORIGIN}/1: "),
    "a checkpoint beyond the root log": (signed(1), f"E_TRUNC {ORIGIN}/"),
    "drop the checkpoint": (drop("checkpoint"), f"E_MISSING {ORIGIN}"),
    "a float in checkpoints.jsonl": (on_file("checkpoints.jsonl", lambda d: d.replace(b'"at":1', b'"at":1.0', 1)), "E_CANON"),
    "the last line of checkpoints.jsonl cut": (on_file("checkpoints.jsonl", lambda d: d[:-1]), "E_CANON"),
    "a partial tile of 256": (wide_tile, f"E_SCHEMA {ORIGIN}/0: "),
    "cut a chain's tail": (chain_behind, f"E_TRUNC {FIRST}/"),
    "another history of a chain": (new_history, f"E_TRUNC {SECOND}/2: "),
    "a root that the chain never had": (set_shard(2, 2, "0" * 64), f"E_ROOT {FIRST}/"),
    "a chain that shrinks": (in_heads(lambda b: b[-1].update(shards=[[FIRST, 1, "0" * 64]])), f"E_ROOTSEQ {ORIGIN}/"),
    "two roots of one size": (in_heads(two_roots), f"E_FORK {ORIGIN}/"),
    "a size that no batch ends at": (in_heads(lambda b: b[0]["shards"][0].__setitem__(1, 3)), f"E_ROOT {FIRST}/3: "),
    "a chain that never was": (in_heads(lambda b: b[-1]["shards"].append([f"{ORIGIN}/z-0", 1, ZERO])), f"E_MISSING {ORIGIN}/z-0"),
    "a chain of another log": (in_heads(lambda b: b[-1]["shards"].insert(0, ["a/b/n7-0", 1, ZERO])), f"E_ORIGIN {ORIGIN}/"),
    "a full entry that omits a chain": (in_heads(full_without_one), f"E_ROOTSEQ {ORIGIN}/"),
    "an epoch that runs back": (in_heads(lambda b: b[-1].update(epoch=0)), f"E_EPOCH {ORIGIN}/"),
    "another map of the tenants": (in_heads(lambda b: b[2].update(tenants="0" * 64)), f"E_TMAP {ORIGIN}/2: "),
    "a float in an entry": (root_entry(2, b'"epoch":1', b'"epoch":1.0'), f"E_CANON {ORIGIN}/2: "),
}  # fmt: skip


@pytest.mark.parametrize("name", ROOT_ATTACKS)
def test_every_attack_on_the_root_log_is_named_alike(name: str, damaged: Export, ask: Ask) -> None:
    attack, expected = ROOT_ATTACKS[name]
    attack(damaged)
    found = ask(damaged, "--accept-unanchored")
    assert agree(found, 1, expected)


@pytest.mark.parametrize("log", [ORIGIN, SECOND])
@pytest.mark.parametrize("cut", [False, True])
def test_a_false_hash_tile_is_named_alike(log: str, cut: bool, damaged: Export, ask: Ask) -> None:
    path = next(p for p in sorted((damaged.place(log) / "tile/0").rglob("*")) if p.is_file())
    path.write_bytes(path.read_bytes()[:-32] + (b"" if cut else bytes(32)))
    found = ask(damaged, "--receipts", str(damaged.receipts))
    assert agree(found, 1, f"E_DERIVED {log}/tile/0/000")
    path.unlink()
    found = ask(damaged, "--receipts", str(damaged.receipts))
    assert agree(found, 1, f"E_TRUNC {log}/tile/0/000")


def test_a_checkpoint_kept_from_earlier_shows_a_cut_a_fork_and_a_new_history(
    whole: Export, tmp_path: Path, ask: Ask
) -> None:
    kept = str(whole.held)
    assert agree(ask(whole, "--checkpoint", kept), 0, "intact")
    cut = whole.copy(tmp_path / "cut")
    cut.write(ORIGIN, cut.entries(ORIGIN)[:1])
    cut.checkpoints([1])
    assert agree(ask(cut, "--accept-unanchored"), 0)
    assert agree(ask(cut, "--checkpoint", kept), 1, f"E_TRUNC {ORIGIN}/1: ")
    forked = whole.copy(tmp_path / "forked")
    forked.rewrite_root(lambda bodies: bodies[1].update(epoch=1, full=not bodies[1]["full"], shards=whole_list(bodies)))
    assert agree(ask(forked, "--accept-unanchored"), 0)
    assert agree(ask(forked, "--checkpoint", kept), 1, f"E_FORK {ORIGIN}/2: ")
    bare = whole.copy(tmp_path / "bare")
    bare.drop_root()
    assert agree(ask(bare, "--checkpoint", kept), 1, f"E_MISSING {ORIGIN}")
    strange = tmp_path / "strange"
    strange.write_bytes(Export(tmp_path, MemorySigner()).sign(Checkpoint(ORIGIN, 2, bytes(32))))
    assert agree(ask(whole, "--checkpoint", str(strange)), 3)


def whole_list(bodies: list[dict[str, Any]]) -> list[list[object]]:
    """Every chain known after the second entry, at its newest size."""
    newest = {shard[0]: shard for body in bodies[:2] for shard in body["shards"]}
    return [newest[log] for log in sorted(newest)]


def test_a_quorum_of_witnesses_is_asked_for_where_the_auditor_wants_one(
    damaged: Export, tmp_path: Path, ask: Ask
) -> None:
    size = len(damaged.entries(ORIGIN))
    plain = damaged.trust.read_text()
    damaged.trust_witness()
    assert agree(ask(damaged, "--accept-unanchored"), 1, f"E_WITNESS {ORIGIN}/{size}: ")
    damaged.checkpoints([1, size], witnessed=True)
    assert agree(ask(damaged, "--accept-unanchored"), 0)
    note = (damaged.root / "checkpoint").read_bytes()
    last = base64.b64decode(note.split()[-1])
    damaged.put_newest(note.replace(note.split()[-1], base64.b64encode(flipped(last, 8 * len(last) - 9))))
    assert agree(ask(damaged, "--accept-unanchored"), 1, "E_SIG")
    damaged.checkpoints([1, size], witnessed=True)
    damaged.trust.write_text(plain)
    policy = tmp_path / "policy"
    witness = f"witness w {verify_key(damaged)} https://w.example/\n"
    for lines, status in (
        (f"{witness}group g 1 w\nquorum g\n", 0),
        (f"{witness}quorum w\n", 0),
        ("quorum none\n", 0),
        (f"{witness}", 3),
        ("quorum w\n", 3),
        (f"{witness}group g 2 w\nquorum g\n", 3),
        (f"{witness}{witness}quorum w\n", 3),
        (witness.replace("+", "-") + "quorum w\n", 3),
    ):
        policy.write_text(lines)
        assert agree(ask(damaged, "--accept-unanchored", "--policy", str(policy)), status)
    policy.write_text(f"{witness}group g all w\nquorum g\n")
    damaged.checkpoints([1, size])
    assert agree(ask(damaged, "--accept-unanchored", "--policy", str(policy)), 1, f"E_WITNESS {ORIGIN}/{size}: ")


def verify_key(made: Export) -> str:
    return format_vkey(made.witness)


def recover_entry(made: Export, **changed: object) -> dict[str, object]:
    recovers = {
        "anchor": "the node file of n1 – ñ",
        "anchored": made.held.read_text(),
        "asked": 1,
        "installation": "00000000-0000-4000-8000-000000000000",
        "lost": [2, 3],
        "origin": f"{ORIGIN}/g2",
        "predecessor": ORIGIN,
        "stands": [2, ZERO],
    }
    heads: dict[str, object] = {"epoch": 3, "full": False, "shards": [], "tenants": ZERO, "v": 1}
    appr = [["officer-1", "00"], ["officer-2", "01"]]
    return {**heads, "appr": appr, "kind": "recover", "recovers": {**recovers, **changed}}


@pytest.mark.parametrize(
    ("changed", "status", "first"),
    [
        ({}, 0, "intact"),
        ({"predecessor": f"{ORIGIN}/g2"}, 1, "E_ORIGIN"),
        ({"predecessor": "nonsense"}, 1, "E_ORIGIN"),
        ({"origin": ORIGIN}, 1, "E_ORIGIN"),
        ({"lost": [2]}, 1, "E_SCHEMA"),
        ({"more": 1}, 1, "E_SCHEMA"),
        (None, 1, "E_SCHEMA"),
    ],
)
def test_a_later_generation_begins_by_saying_what_was_lost(
    changed: dict[str, object] | None, status: int, first: str, whole: Export, tmp_path: Path, ask: Ask
) -> None:
    made = Export(tmp_path / "export", whole.signer, origin=f"{ORIGIN}/g2")
    insider = Insider(whole.signer, log=f"{ORIGIN}/g2/n0-0").open(1)
    insider.write(made.directory, origin=made.origin)
    chain = Chain(made.origin)
    listed = [[insider.log, len(insider.entries), leaf_hash(insider.entries[0]).hex()]]
    heads = {"epoch": 3, "full": True, "kind": "heads", "shards": listed, "tenants": ZERO, "v": 1}
    bodies = [*([] if changed is None else [recover_entry(whole, **changed)]), heads]
    made.write(made.origin, [chain.append(encode_plain(body), insider.t, None) for body in bodies])
    made.checkpoints([len(bodies)])
    assert agree(ask(made, "--accept-unanchored"), status, first)


# ---- the single file against published vectors and other implementations -------------------------------------------------------


@pytest.mark.parametrize("v", VECTORS["inclusion"], ids=lambda v: f"{v['leafIdx']}-of-{v['treeSize']}")
def test_published_inclusion_proofs(v: dict[str, Any]) -> None:
    index, size = int(v["leafIdx"]), int(v["treeSize"])
    leaf, root, path = raw(v["leafHash"]), raw(v["root"]), [raw(p) for p in v["proof"]]
    assert STDLIB.root_from_inclusion(index, size, leaf, path) == root
    for wrong in corrupted(path, root, leaf):
        assert STDLIB.root_from_inclusion(index, size, leaf, wrong) != root
    for i, n in ((-1, size), (index - 1, size), (index + 1, size), (index ^ 2, size), (index, 0), (index, size // 2)):
        assert STDLIB.root_from_inclusion(i, n, leaf, path) != root


@pytest.mark.parametrize("v", VECTORS["consistency"], ids=lambda v: f"{v['size1']}-to-{v['size2']}")
def test_published_consistency_proofs(v: dict[str, Any]) -> None:
    old, size = int(v["size1"]), int(v["size2"])
    before, root, path = raw(v["root1"]), raw(v["root2"]), [raw(p) for p in v["proof"]]
    assert STDLIB.consistent(old, size, before, root, path)
    for wrong in corrupted(path, before, root):
        assert not STDLIB.consistent(old, size, before, root, wrong)
    for a, b in ((0, size), (-1, size), (old + 1, size), (old, 0), (old, size * 2), (old, size // 2)):
        assert not STDLIB.consistent(a, b, before, root, path)


def test_the_published_note_verifies_and_malformed_ones_do_not() -> None:
    key = STDLIB.parse_vkey(GO_KEY)
    assert STDLIB.open_note(GO_NOTE, [key])[1] == [key]
    with pytest.raises(STDLIB.BadNote, match="false"):
        STDLIB.open_note(GO_NOTE.replace(b"cryptography", b"steganography"), [key])
    text, _ = STDLIB.open_note(C2SP_CHECKPOINT, [])
    assert C2SP_CHECKPOINT.startswith(text + b"\n\xe2\x80\x94 ")
    for data in MALFORMED.values():
        with pytest.raises(STDLIB.BadNote):
            STDLIB.open_note(data.encode(), [])


def test_rfc_8032_vectors() -> None:
    for public, message, signature in (
        ("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a", "",
         "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"),
        ("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c", "72",
         "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"),
        ("fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025", "af82",
         "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"),
    ):  # fmt: skip
        key = STDLIB.Ed25519(bytes.fromhex(public))
        value, text = bytes.fromhex(signature), bytes.fromhex(message)
        assert key.verifies(value, text)
        beyond = value[:32] + (int.from_bytes(value[32:], "little") + STDLIB.L).to_bytes(32, "little")
        assert not any((key.verifies(beyond, text), key.verifies(value, text + b"x"), key.verifies(value[:-1], text)))
        assert not any(key.verifies(flipped(value, i), text) for i in range(0, 512, 37))


@pytest.mark.parametrize("uses", [1, 5_000])
def test_ed25519_agrees_with_cryptography(uses: int) -> None:
    private = Ed25519PrivateKey.generate()
    key = STDLIB.Ed25519(private.public_key().public_bytes_raw(), uses)
    for i in range(40):
        message = os.urandom(i)
        assert key.verifies(private.sign(message), message)
        assert not key.verifies(flipped(private.sign(message), i * 12), message)
    assert not STDLIB.Ed25519(b"\xff" * 32).verifies(bytes(64), b"")


def test_ecdsa_agrees_with_cryptography() -> None:
    signer = CurveSigner()
    key = STDLIB.load_key(signer.public_key())
    for i in range(30):
        message = os.urandom(i)
        signature = signer.sign(message)
        assert key.verifies(signature, message)
        assert not key.verifies(signature, message + b"x")
        assert not key.verifies(flipped(signature, i * 17 % (8 * len(signature))), message)
    for bad in (b"", b"0", bytes(8), signature + b"\0", b"\x30\x06\x02\x01\0\x02\x01\0", b"\x30\x81" + signature[1:]):
        assert not key.verifies(bad, message)
    with pytest.raises(STDLIB.Unusable):
        form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        STDLIB.load_key(ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(*form))


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_the_single_file_imports_nothing_but_the_standard_library(whole: Export, tmp_path: Path) -> None:
    """Isolated: no site-packages, no working directory, one file copied elsewhere."""
    alone = tmp_path / "skms_verify.py"
    alone.write_bytes((INDEPENDENT / "skms_verify.py").read_bytes())
    given = [str(whole.directory), "--trust", str(whole.trust), "--receipts", str(whole.receipts)]
    done = subprocess.run([sys.executable, "-I", "-S", str(alone), *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = {
        line.split()[1].split(".")[0]
        for line in alone.read_text().splitlines()
        if line.startswith(("import ", "from "))
    }
    assert imported <= set(sys.stdlib_module_names)


def test_building_without_go_says_what_to_do(tmp_path: Path) -> None:
    script = tmp_path / "a/b/c/build.sh"
    script.parent.mkdir(parents=True)
    script.write_bytes((INDEPENDENT / "go/build.sh").read_bytes())
    done = subprocess.run(["/bin/sh", str(script), "x"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 1
    assert "no Go toolchain" in done.stderr
    assert "make setup" in done.stderr
