"""Backups: from one site's database into another's whose only token was joined, and everything that must not be restored."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from audit.anchors import checkpoint_in
from audit.verify import Trust, load_trust
from databases import behind, empty
from harness import ROOT, Files, prepare_apart, prepared, serving, skms
from postgres import Cluster
from service import backup
from service.backup import BackupRefused
from service.config import load
from service.database import SCHEMA, migrate, open_engine
from service.dev import free_port

B64 = base64.b64encode(b"kept").decode()
KEYS = int(os.environ.get("RESTORE_DRILL_KEYS", "100"))


@dataclass
class Site:
    """One installation's node with one of its two HSMs, and a database of its own."""

    files: Files
    directory: Path

    @property
    def url(self) -> str:
        return str(self.files.config.database.url)

    @property
    def config_file(self) -> Path:
        return Path(self.files.config_file)


def site(node: Path, directory: Path, *, hsm: int, url: str | None = None) -> Site:
    """The node of `prepare` at another place, with the first or the second token alone."""
    directory.mkdir(exist_ok=True)
    found = prepared(node)
    sections = re.split(r"(?m)^(?=\[)", found.config_file.read_text())
    hsms = [part for part in sections if part.startswith("[[hsm]]")]
    text = "".join(part for part in sections if not part.startswith("[[hsm]]") or part is hsms[hsm])
    for option, value in {
        "name": f'"n{hsm}"',
        "state_dir": f'"{directory}/state"',
        "url": f'"{url or empty(directory)}"',
        "port": str(free_port()),
    }.items():
        text = re.sub(rf"(?m)^{option} = .*", f"{option} = {value}", text, count=1)
    path = directory / "skms.toml"
    path.write_text(text)
    return Site(dataclasses.replace(found, config=load(path), config_file=path), directory)


@dataclass
class Made:
    """A backup of a site that had keys in several states, and what they protected."""

    node: Path
    file: Path
    ciphertexts: dict[str, str]
    disabled: str
    frozen: str
    strict: str
    grant: str
    later: Path  # a checkpoint that was signed after the backup
    seconds: float  # that it took to write

    @property
    def trust_file(self) -> Path:
        return self.node / "trust.txt"

    @property
    def trust(self) -> Trust:
        return load_trust(self.trust_file)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    directory = tmp_path_factory.mktemp("backup")
    node, file, later = directory / "node", directory / "skms.backup", directory / "later.checkpoint"
    prepare_apart(node, hsms=2)
    old = site(node, directory / "old", hsm=0)
    with serving(old.files, directory / "serve.log") as served, contextlib.ExitStack() as ends:
        workload, operator, officer, auditor = (
            ends.enter_context(served.client(f"health-{role}"))
            for role in ("eu-de-1", "operator", "officer", "auditor")
        )

        def sealed(suite: str = "0x0001") -> tuple[str, str]:
            body = {"spec": "AES_256", "tier": 2, "home": "eu-de-1", "suite": suite}
            key = operator.post("/v1/keys", json=body, headers=once()).raise_for_status().json()["id"]
            answer = workload.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
            return key, answer.raise_for_status().json()["ciphertext"]

        ciphertexts = dict(sealed() for _ in range(KEYS))
        strict, disabled, frozen = (sealed(suite)[0] for suite in ("0x0002", "0x0001", "0x0001"))
        operator.post(f"/v1/keys/{disabled}/disable").raise_for_status()
        stop = {"scope": {"kind": "key", "value": frozen}, "reason": {"code": "incident"}, "mode": "halt"}
        officer.post("/v1/freezes", json=stop, headers=once()).raise_for_status()
        grantee = workload.get("/v1/whoami").json()["id"]
        end = f"{datetime.now(UTC) + timedelta(days=30):%Y-%m-%dT%H:%M:%S.000Z}"
        wanted = {"grantee": grantee, "operations": ["encrypt"], "expires_at": end}
        granted = officer.post(f"/v1/keys/{strict}/grants", json=wanted, headers=once())
        assert granted.status_code == 201, granted.text
        grant = granted.json()["id"]
        assert officer.delete(f"/v1/keys/{strict}/grants/{grant}").status_code == 204
        begun = time.monotonic()
        command = [sys.executable, "-m", "service.cli.main", "-o", "json", *creating(old, file)]
        with Popen(command, cwd=ROOT, stdout=PIPE) as writing:
            while writing.poll() is None:  # the service goes on meanwhile
                workload.post(f"/v1/keys/{strict}/encrypt", json={"plaintext": B64})
            seconds = time.monotonic() - begun
            assert writing.stdout is not None
            assert json.loads(writing.stdout.read())["keys"] == KEYS + 3
        ((size,),) = behind(old.url, "SELECT count(*) FROM audit_root")
        workload.post(f"/v1/keys/{strict}/encrypt", json={"plaintext": B64})
        deadline = time.monotonic() + 60
        while checkpoint_in(note := auditor.get("/v1/audit/checkpoint").raise_for_status().content).size <= size:
            assert time.monotonic() < deadline, "no later checkpoint"
            time.sleep(0.1)
        later.write_bytes(note)
    return Made(node, file, ciphertexts, disabled, frozen, strict, grant, later, seconds)


def once() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


def creating(at: Site, to: Path) -> list[str]:
    return ["backup", "create", "--config", str(at.config_file), "--to", str(to)]


def restoring(made: Made, at: Site, file: Path | None = None, trust: Path | None = None) -> list[str]:
    """The command without what it says of an anchor."""
    files = "--backup", str(file or made.file), "--trust", str(trust or made.trust_file)
    return ["backup", "restore", "--config", str(at.config_file), *files]


def restored(made: Made, at: Site, file: Path | None = None) -> dict[str, Any]:
    done = skms("-o", "json", *restoring(made, at, file), "--accept-unanchored")
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def refused(command: Sequence[str], why: str, status: int = 8) -> None:
    done = skms(*command)
    assert done.returncode == status, done
    assert re.search(why, done.stderr.decode()), done.stderr


def tables(url: str) -> list[str]:
    engine = open_engine(url)
    try:
        return sa.inspect(engine).get_table_names()
    finally:
        engine.dispose()


# ---- the drill -------------------------------------------------------------------------------------------------------


def test_an_empty_installation_with_a_joined_token_serves_what_the_lost_one_did(made: Made, tmp_path: Path) -> None:
    fresh = site(made.node, tmp_path, hsm=1)
    refused(restoring(made, fresh), "--accept-unanchored", status=2)
    assert tables(fresh.url) == []
    begun = time.monotonic()
    told = restored(made, fresh)
    took = time.monotonic() - begun
    assert told["keys"] == KEYS + 3
    assert told["root KEKs"] == "eu-de-1 version 1"
    assert list((tmp_path / "state" / "ceremonies").glob("restore-*.json"))
    with serving(fresh.files, tmp_path / "serve.log") as served, contextlib.ExitStack() as ends:
        workload, operator, auditor = (
            ends.enter_context(served.client(f"health-{role}")) for role in ("eu-de-1", "operator", "auditor")
        )
        answered = 0.0
        for key, ciphertext in made.ciphertexts.items():
            opened = workload.post("/v1/decrypt", json={"ciphertext": ciphertext})
            assert opened.json().get("plaintext") == B64, (key, opened.text)
            answered = answered or time.monotonic() - begun
        print(
            f"restore drill: {KEYS:,} keys, a backup of {made.file.stat().st_size / 2**20:.1f} MiB written in "
            f"{made.seconds:.1f} s under load; {took:.1f} s until restored, {answered:.1f} s until the first key answered"
        )
        for key, code in (made.disabled, "key_state_invalid"), (made.frozen, "frozen"):
            denied = workload.post(f"/v1/keys/{key}/encrypt", json={"plaintext": B64})
            assert denied.json()["code"] == code
        (grant,) = auditor.get(f"/v1/keys/{made.strict}/grants").json()["items"]
        assert (grant["id"], grant["state"]) == (made.grant, "revoked")
        # How many nonces its first version used after the backup, nobody here knows.
        deadline = time.monotonic() + 60
        while operator.get(f"/v1/keys/{made.strict}").json()["latest_version"] != 2:
            assert time.monotonic() < deadline, "it does not rotate"
            time.sleep(0.1)
    verified = skms("audit", "verify", "--config", str(fresh.config_file))
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_a_backup_is_verified_anywhere_and_restored_on_the_other_engine(
    made: Made, tmp_path: Path, postgres: Cluster
) -> None:
    verified = skms("-o", "json", "backup", "verify", "--backup", str(made.file), "--trust", str(made.trust_file))
    told = json.loads(verified.stdout)
    assert (told["intact"], told["keys"]) == (True, KEYS + 3)
    other = site(made.node, tmp_path / "other", hsm=1, url=postgres.fresh("restored"))
    restored(made, other)
    again = tmp_path / "again.backup"
    back = site(made.node, tmp_path / "back", hsm=0, url=f"sqlite:///{tmp_path}/back.db")
    assert skms(*creating(other, again)).returncode == 0
    joined = {"keystore_audit_key": 2}  # the second token's own came with it
    assert backup.opened(again, made.trust).rows == backup.opened(made.file, made.trust).rows | joined
    restored(made, back, again)
    key, ciphertext = next(iter(made.ciphertexts.items()))
    with serving(back.files, tmp_path / "serve.log") as served, served.client("health-eu-de-1") as workload:
        opened = workload.post("/v1/decrypt", json={"ciphertext": ciphertext})
        assert opened.json().get("plaintext") == B64, key


# ---- what is refused -------------------------------------------------------------------------------------------------


def changed(made: Made, to: Path, edit: Callable[[list[bytes]], list[bytes]]) -> Path:
    """The backup with other lines, in a whole gzip."""
    lines = gzip.decompress(made.file.read_bytes()).splitlines(keepends=True)
    to.write_bytes(gzip.compress(b"".join(edit(lines))))
    return to


def headed(**changes: object) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: [json.dumps(json.loads(lines[0]) | changes).encode() + b"\n", *lines[1:]]


CHANGES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "a row lost": (lambda lines: [*lines[:5], *lines[6:]], "changed since"),
    "two rows swapped": (lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]], "changed since"),
    "a row twice": (lambda lines: [*lines[:5], lines[5], *lines[5:]], "changed since"),
    "no end": (lambda lines: lines[:-1], "not a whole backup"),
    "only an end": (lambda lines: lines[-1:], "not a whole backup"),
    "nothing": (lambda lines: [], "not a whole backup"),
    "lines after the end": (lambda lines: [*lines, b"{}\n"], "not a whole backup"),
    "half a line": (lambda lines: [*lines[:-1], lines[-1][:-9]], "no end"),
    "no JSON": (lambda lines: [b"\x00\n", *lines[1:]], "not a whole backup"),
    "another origin": (headed(origin="other.example/audit"), "changed since"),
    "a newer format": (headed(skms_backup=2), "format 2"),
    "another signature": (
        lambda lines: [*lines[:-1], lines[-1].replace(b'"signature":"', b'"signature":"A')],
        "not a whole backup|signature is wrong",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_backup_is_refused(made: Made, tmp_path: Path, what: str) -> None:
    edit, why = CHANGES[what]
    with pytest.raises(BackupRefused, match=why):
        backup.opened(changed(made, tmp_path / "changed", edit), made.trust)


def test_a_cut_or_flipped_file_is_refused(made: Made, tmp_path: Path) -> None:
    whole, bad = made.file.read_bytes(), tmp_path / "bad"
    content, genuine = gzip.decompress(whole), backup.opened(made.file, made.trust)
    for cut in (0, 1, 10, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        bad.write_bytes(whole[:cut])
        with pytest.raises(BackupRefused):
            backup.opened(bad, made.trust)
    for at in range(0, len(content), len(content) // 50):
        bad.write_bytes(gzip.compress(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], 1))
        with pytest.raises(BackupRefused):
            backup.opened(bad, made.trust)
    refused = 0
    for at in range(12, len(whole), len(whole) // 50):
        bad.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            found = backup.opened(bad, made.trust)
        except BackupRefused:
            refused += 1
        else:  # DEFLATE can write one text in several ways (a match at another distance): then nothing was changed
            assert gzip.decompress(bad.read_bytes()) == content
            assert dataclasses.replace(found, path=made.file) == genuine
    assert refused > 40


def test_it_counts_who_signed_and_for_which_log(made: Made) -> None:
    with pytest.raises(BackupRefused, match="not in the file of trust"):
        backup.opened(made.file, dataclasses.replace(made.trust, keys=made.trust.keys[1:]))
    with pytest.raises(BackupRefused, match=r"of the log dev\.skms\.example/audit"):
        backup.opened(made.file, dataclasses.replace(made.trust, origin="other.example/audit"))


def test_an_older_backup_than_a_checkpoint_from_outside_is_refused(made: Made, tmp_path: Path) -> None:
    fresh = site(made.node, tmp_path, hsm=1)
    command = [*restoring(made, fresh), "--checkpoint", str(made.later)]
    refused(command, "the audit log in it does not verify")
    assert tables(fresh.url) == []
    head = backup.opened(made.file, made.trust).head
    _, report = backup.verify(made.file, made.trust, held=head.checkpoint.encode())
    assert report.exit_status == 0


def test_another_root_installation_or_log_and_a_used_database_are_refused(made: Made, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    shutil.copy(made.node / "skms.toml", stranger)  # the same installation for `prepare`, but a root of its own
    prepare_apart(stranger)
    fresh, own = site(made.node, tmp_path / "fresh", hsm=1), site(stranger, tmp_path / "own", hsm=0)
    command = [*restoring(made, own), "--accept-unanchored"]
    refused(command, "keys of another ceremony", status=7)
    text = own.config_file.read_text()
    own.config_file.write_text(text.replace(str(own.files.config.node.installation), str(uuid.uuid4())))
    refused(command, "of installation")
    own.config_file.write_text(text.replace("dev.skms.example/audit", "other.example/audit"))
    refused(command, r"other\.example")
    assert tables(own.url) == []
    engine = open_engine(fresh.url)
    migrate(engine, lock_dir=tmp_path)
    engine.dispose()
    refused([*restoring(made, fresh), "--accept-unanchored"], "not empty")


def test_a_backup_never_replaces_one_and_needs_the_schema_of_its_release(made: Made, tmp_path: Path) -> None:
    at = site(made.node, tmp_path, hsm=1)
    refused(creating(at, tmp_path / "new"), "schema none")
    assert not (tmp_path / "new").exists()
    restored(made, at)
    whole = made.file.read_bytes()
    refused(creating(at, made.file), "never replaces")
    assert made.file.read_bytes() == whole


def test_of_two_restores_at_once_one_finds_the_database_full(made: Made, tmp_path: Path) -> None:
    fresh = site(made.node, tmp_path, hsm=1)
    command = [sys.executable, "-m", "service.cli.main", *restoring(made, fresh), "--accept-unanchored"]
    both = [Popen(command, cwd=ROOT, stdout=DEVNULL, stderr=PIPE) for _ in range(2)]
    told = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 8], told
    assert any(b"not empty" in line for line in told), told


def signed_anew(made: Made, to: Path, edit: Callable[[list[bytes]], list[bytes]]) -> tuple[Path, Trust]:
    """The backup with other lines under a good signature, and who trusts that: what an audit key's thief would hand in."""
    lines = edit(gzip.decompress(made.file.read_bytes()).splitlines(keepends=True))
    key, end = Ed25519PrivateKey.generate(), json.loads(lines[-1])
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    end |= {"sha256": hashlib.sha256(b"".join(lines[:-1])).hexdigest(), "key": base64.b64encode(spki).decode()}
    statement = json.dumps([end["rows"], end["sha256"]], sort_keys=True, separators=(",", ":")).encode()
    end["signature"] = base64.b64encode(key.sign(b"skms/backup/1\0" + statement)).decode()
    to.write_bytes(gzip.compress(b"".join([*lines[:-1], json.dumps(end).encode() + b"\n"])))
    return to, dataclasses.replace(made.trust, keys=(*made.trust.keys, spki))


def test_a_signed_backup_of_a_later_schema_or_with_a_changed_log_is_not_restored(made: Made, tmp_path: Path) -> None:
    assert backup.opened(*signed_anew(made, tmp_path / "same", lambda lines: lines)).head.schema == SCHEMA
    with pytest.raises(BackupRefused, match="of schema 9999"):
        backup.opened(*signed_anew(made, tmp_path / "later", headed(schema="9999")))

    def edit(lines: list[bytes]) -> list[bytes]:
        rows = [json.loads(line) for line in lines]
        del lines[next(n for n, row in enumerate(rows) if row.get("t") == "audit_root")]
        rows[-1]["rows"]["audit_root"] -= 1
        return [*lines[:-1], json.dumps(rows[-1]).encode() + b"\n"]

    file, trust = signed_anew(made, tmp_path / "shortened", edit)
    trusting = tmp_path / "trust.txt"
    trusting.write_text(f"{made.trust_file.read_text()}key {base64.b64encode(trust.keys[-1]).decode()}\n")
    fresh = site(made.node, tmp_path / "fresh", hsm=1)
    refused([*restoring(made, fresh, file, trusting), "--accept-unanchored"], "does not verify")
    assert tables(fresh.url) == []


# ---- killed in the middle --------------------------------------------------------------------------------------------


def killed(command: Sequence[str], after_s: float) -> None:
    with Popen(
        [sys.executable, "-m", "service.cli.main", *command], cwd=ROOT, stdout=DEVNULL, stderr=DEVNULL
    ) as process:
        try:
            process.wait(after_s)
        except TimeoutExpired:
            process.kill()


def test_killed_at_any_moment_there_is_all_of_it_or_nothing(made: Made, tmp_path: Path) -> None:
    home = site(made.node, tmp_path / "home", hsm=0)
    begun = time.monotonic()
    restored(made, home)
    took = time.monotonic() - begun
    for n in range(1, 9):
        to, fresh = tmp_path / f"{n}.backup", site(made.node, tmp_path / f"fresh{n}", hsm=1)
        killed(creating(home, to), took * n / 7)
        killed([*restoring(made, fresh), "--accept-unanchored"], took * n / 7)
        if to.exists():
            assert backup.opened(to, made.trust).rows["keystore_key"] == KEYS + 3
        if tables(fresh.url):
            assert behind(fresh.url, "SELECT count(*) FROM keystore_key") == [(KEYS + 3,)]
        else:
            restored(made, fresh)  # nothing of the first try is in the way
