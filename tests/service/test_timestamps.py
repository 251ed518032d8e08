"""The newest checkpoint gets an RFC 3161 timestamp, which is verified before it is stored, and again by anybody later."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from audit.tables import checkpoint_table, tables
from audit.timestamp import BadTimestamp, load_authority, question, token_in, verify_token
from databases import empty
from service.config import TimestampSection
from service.database import open_engine
from service.rows import Lease
from service.rows import tables as service_tables
from service.timestamps import NoTimestamp, Timestamps
from service.wiring import now
from tsa import Tsa, tsa

TEXT = b"kms.example/audit\n1\nAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tsa]:
    with tsa(tmp_path_factory.mktemp("tsa") / "one") as made:
        yield made


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    made = open_engine(empty(tmp_path, "stamps"))
    with made.begin() as connection:
        tables.create_all(connection)
        service_tables.create_all(connection)
    yield made
    made.dispose()


def checkpoint(engine: sa.Engine, size: int, *, at: int) -> bytes:
    text = TEXT.replace(b"\n1\n", b"\n%d\n" % size)
    note = text + b"\n\xe2\x80\x94 kms.example/audit AAAAAAAA\n"
    with engine.begin() as connection:
        connection.execute(sa.insert(checkpoint_table), [{"size": size, "at": at, "note": note}])
    return text


def stamps(engine: sa.Engine, *urls: str, authority: Tsa, owner: str = "a", every_s: float = 3_600) -> Timestamps:
    sections = [TimestampSection(url=url, authority=authority.authority, every_s=every_s) for url in urls]
    return Timestamps(engine, Lease(engine, clock=now), sections, owner=owner, clock=now)


def stored(engine: sa.Engine) -> dict[int, Any]:
    with engine.connect() as connection:
        chosen = sa.select(checkpoint_table.c.size, checkpoint_table.c.tst)
        return {row.size: row.tst for row in connection.execute(chosen)}


def test_the_newest_checkpoint_is_stamped_once_an_hour_and_anybody_can_check_it(
    engine: sa.Engine, authority: Tsa
) -> None:
    made = stamps(engine, authority.url, authority=authority)
    assert made.once() is None
    begun = now()
    checkpoint(engine, 1, at=begun)
    text = checkpoint(engine, 2, at=begun + 1)
    found = made.once()
    assert found is not None
    assert found.size == 2
    assert stored(engine)[1] is None
    assert verify_token(stored(engine)[2], text, load_authority(authority.authority)) == found.time
    given = ["-token_in", "-in", "/dev/stdin", "-digest", hashlib.sha256(text).hexdigest()]
    trusted = ["-CAfile", str(authority.directory / "root.pem"), "-untrusted", str(authority.directory / "tsa.pem")]
    command = ["openssl", "ts", "-verify", *given, *trusted]
    by_openssl = subprocess.run(command, input=stored(engine)[2], capture_output=True)
    assert b"Verification: OK" in by_openssl.stdout, by_openssl.stderr
    assert abs(found.time.timestamp() - begun / 1e6) < 60
    checkpoint(engine, 3, at=begun + 3_599_000_000)
    assert made.once() is None
    checkpoint(engine, 4, at=begun + 3_601_000_000)
    assert made.once() is not None
    assert stored(engine)[4] is not None


def test_one_process_asks_and_the_next_authority_answers_for_one_that_is_away(
    engine: sa.Engine, authority: Tsa
) -> None:
    checkpoint(engine, 1, at=now())
    first = stamps(engine, "http://127.0.0.1:9/", authority.url, authority=authority)
    asked = len(authority.asked)
    assert first.once() is not None
    assert stamps(engine, authority.url, authority=authority, owner="b").once() is None
    assert len(authority.asked) == asked + 1


def test_a_wrong_answer_is_never_stored(engine: sa.Engine, authority: Tsa, tmp_path: Path) -> None:
    text = checkpoint(engine, 1, at=now())
    made = stamps(engine, authority.url, authority=authority)
    other = authority.reply(question(text).as_bytes())  # right, but to another nonce
    with tsa(tmp_path / "two") as stranger:
        foreign = stranger.reply(question(text).as_bytes())
    for answer, why in (
        (b"", "not an RFC 3161 answer"),
        (b"<html>", "not an RFC 3161 answer"),
        (other, "Nonce mismatch"),
        (foreign, "certificates"),
        (bytes.fromhex("30053003020102"), "not"),  # rejected
        (b"x" * 100_000, "more than 65536 bytes"),
    ):
        authority.answer = answer
        with pytest.raises(NoTimestamp, match=why):
            made.once()
    authority.answer = None
    assert stored(engine) == {1: None}
    assert made.once() is not None


def test_a_token_counts_for_its_text_and_no_byte_of_it_can_change_what_it_says(authority: Tsa) -> None:
    known, asked = load_authority(authority.authority), question(TEXT)
    token, time = token_in(authority.reply(asked.as_bytes()), asked, TEXT, known)
    with pytest.raises(BadTimestamp, match="Mismatch between messages"):
        verify_token(token, TEXT + b"x", known)
    refused = 0
    for at in range(len(token)):
        changed = token[:at] + bytes([token[at] ^ 1]) + token[at + 1 :]
        try:
            assert verify_token(changed, TEXT, known) == time
        except BadTimestamp:
            refused += 1
    assert refused > 0.9 * len(token)


def test_an_authority_without_its_root_or_its_purpose_is_refused(authority: Tsa, tmp_path: Path) -> None:
    for content in ("", (authority.directory / "root.pem").read_text(), (authority.directory / "tsa.pem").read_text()):
        path = tmp_path / "authority.pem"
        path.write_text(content)
        with pytest.raises(BadTimestamp, match=str(path)):
            load_authority(path)
    with pytest.raises(BadTimestamp, match="No such file"):
        load_authority(tmp_path / "none.pem")
