"""The ML-DSA-44 key beside the audit key: C2SP's message to the byte, files, notes that carry it, and who demands it."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from audit_lab import ORIGIN, Lab, now, op
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from sqlalchemy import Connection

from audit import verify
from audit.checkpoint import (
    ML_DSA_44,
    BadNote,
    BadSignature,
    Checkpoint,
    Note,
    cosigned_message,
    format_vkey,
    key_of,
    parse_note,
    parse_vkey,
    verified,
    with_cosignatures,
)
from audit.export import export
from audit.notary import CannotCosign, Notary, PostQuantum
from audit.postquantum import PostQuantumKey, UnusableKey, create, load
from audit.verify import Trust

CHECKPOINT = Checkpoint("log.example/a", 5, bytes(range(32)))
PRIVATE = MLDSA44PrivateKey.generate()
KEY = PostQuantumKey("log.example/a", PRIVATE)


def held(_: Connection) -> None:
    """The lease is ours."""


def test_the_message_is_the_cosigned_message_of_c2sp_tlog_cosignature() -> None:
    assert cosigned_message("w.example/pq", CHECKPOINT, 1_700_000_000) == (
        b"subtree/v1\n\x00"
        b"\x0cw.example/pq"
        + bytes.fromhex("000000006553f100")
        + b"\x0dlog.example/a"
        + bytes.fromhex("00000000000000000000000000000005")
        + bytes(range(32))
    )
    for name, origin in (("", "o"), ("n" * 256, "o"), ("n", "o" * 256)):
        with pytest.raises(BadNote):
            cosigned_message(name, Checkpoint(origin, 5, bytes(32)), 0)


def test_a_line_counts_only_for_its_text_its_name_and_its_time() -> None:
    value = KEY.cosign(CHECKPOINT, 1_700_000_000)
    assert len(value) == 8 + 2420
    note = Note(CHECKPOINT.text(), ()).signed_by(KEY.key, value)
    assert verified(parse_note(note.encode()), [KEY.key]) == (KEY.key,)
    other = PostQuantumKey("log.example/b", PRIVATE)  # the name is signed
    assert not other.key.verifies(CHECKPOINT.text(), value)
    later = (1_700_000_001).to_bytes(8, "big") + value[8:]
    for text, wrong in (
        (CHECKPOINT.text(), later),
        (CHECKPOINT.text(), value[:-1] + bytes([value[-1] ^ 1])),
        (CHECKPOINT.text(), value + b"\0"),
        (CHECKPOINT.text(), value[:72]),
        (CHECKPOINT.text(), b"\x80" + value[1:]),
        (Checkpoint("log.example/a", 6, CHECKPOINT.root).text(), value),
    ):
        with pytest.raises(BadSignature):
            verified(Note(text, ()).signed_by(KEY.key, wrong), [KEY.key])


def test_a_verifier_key_has_one_spelling_and_says_its_type() -> None:
    text = format_vkey(KEY.key)
    assert parse_vkey(text) == KEY.key
    name, identity, encoded = text.split("+", 2)
    for bad in (f"{name}+00000000+{encoded}", f"{name}+{identity}+{encoded[:-4]}", text.replace("example/a", "x/a")):
        with pytest.raises(BadNote):
            parse_vkey(bad)


def test_a_key_file_is_new_private_and_an_ml_dsa_44_key(tmp_path: Path) -> None:
    path = tmp_path / "pq.key"
    made = create(path, "log.example/a")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load(path, "log.example/a").key == made.key
    with pytest.raises(UnusableKey, match="name a new file"):
        create(path, "log.example/a")
    path.chmod(0o640)
    with pytest.raises(UnusableKey, match="chmod 600"):
        load(path, "log.example/a")
    path.chmod(0o600)
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for data, why in ((pem, "not an ML-DSA-44 key"), (b"?", "no private key in PEM")):
        path.write_bytes(data)
        with pytest.raises(UnusableKey, match=why):
            load(path, "log.example/a")
    path.unlink()
    with pytest.raises(UnusableKey, match="cannot be read"):
        load(path, "log.example/a")


class Broken:
    """A key that signs something else, or nothing."""

    key = KEY.key

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent

    def cosign(self, checkpoint: Checkpoint, seconds: int) -> bytes:
        if self._silent:
            raise CannotCosign("the file is gone")
        return KEY.cosign(Checkpoint(checkpoint.origin, checkpoint.size + 1, checkpoint.root), seconds)


async def exported(made: Lab, second: PostQuantum | None, to: Path) -> tuple[Path, bytes]:
    """An export of a log that this notary signed, and its newest note with every line."""
    writer = made.writer()
    await writer.start()
    await writer.append(op())
    notary = Notary(made.engine, origin=ORIGIN, signer=made.signer, clock=now, post_quantum=second)
    assert notary.round(1, held) is not None
    await writer.close()
    assert notary.round(1, held) is not None
    export(made.engine, to, Trust(ORIGIN, (made.signer.public_key(),)))
    with made.engine.connect() as connection:
        row = connection.execute(sa.text("SELECT note, cosigs FROM audit_checkpoint ORDER BY size DESC")).first()
    assert row is not None
    return to, with_cosignatures(row.note, row.cosigs)


def verdict(copy: Path, *cosigners: PostQuantumKey) -> int:
    trust = copy / "mine.txt"
    lines = [f"cosigner {format_vkey(c.key)}\n" for c in cosigners]
    trust.write_text((copy / "trust.txt").read_text() + "".join(lines))
    return verify.main([str(copy), "--trust", str(trust), "--accept-unanchored"])


@pytest.mark.anyio
async def test_both_signatures_stand_in_the_exported_checkpoint_and_a_trust_file_demands_the_second(
    made: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, stored = await exported(made, KEY, tmp_path / "copy")
    note = (copy / ORIGIN / "checkpoint").read_bytes()
    assert note == stored
    keys = [key_of(ORIGIN, made.signer.public_key()), KEY.key]
    assert list(verified(parse_note(note), keys)) == keys
    assert parse_note(note).signatures[1].id == KEY.key.id
    assert KEY.key.type == ML_DSA_44
    assert verdict(copy, KEY) == verify.INTACT
    assert verdict(copy) == verify.INTACT  # unknown lines are passed over
    stranger = PostQuantumKey("log.example/b", MLDSA44PrivateKey.generate())
    capsys.readouterr()
    assert verdict(copy, KEY, stranger) == verify.TAMPERED
    assert "lacks the cosignature of log.example/b (ML-DSA-44)" in capsys.readouterr().out
    path = copy / ORIGIN / "checkpoints.jsonl"
    lines = path.read_text().splitlines()
    line = parse_note(note).signatures[1].line().decode().removesuffix("\n")
    forged = line[:-9] + ("A" if line[-9] != "A" else "B") + line[-8:]
    path.write_text("\n".join([*lines[:-1], lines[-1].replace(line, forged), ""]))
    assert verdict(copy, KEY) == verify.TAMPERED
    assert "E_SIG" in capsys.readouterr().out


@pytest.mark.anyio
@pytest.mark.parametrize("second", [Broken(silent=True), Broken(silent=False), None])
async def test_a_second_key_that_fails_does_not_stop_the_log_and_who_demands_it_sees_that(
    made: Lab, tmp_path: Path, second: Broken | None
) -> None:
    copy, stored = await exported(made, second, tmp_path / "copy")
    assert len(parse_note(stored).signatures) == 1
    assert verdict(copy) == verify.INTACT
    assert verdict(copy, KEY) == verify.TAMPERED


@pytest.mark.parametrize(
    "line",
    [
        lambda: f"witness w {format_vkey(KEY.key)}",
        lambda: "cosigner " + format_vkey(key_of("w", _spki())),
        lambda: "cosigner nonsense",
    ],
)
def test_a_trust_file_takes_a_post_quantum_key_as_cosigner_only(tmp_path: Path, line: Callable[[], str]) -> None:
    path = tmp_path / "trust.txt"
    path.write_text(f"origin log.example/a\n{line()}\n")
    with pytest.raises(verify.Unusable, match="line 2"):
        verify.load_trust(path)


def _spki() -> bytes:
    return Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
