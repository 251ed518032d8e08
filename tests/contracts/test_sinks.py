"""One contract for every sink, against real receivers, and for the fake that other tests trust."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from audit.forward import Group, Item, Refused, Sink, Undelivered
from audit.sinks import KINDS
from audit.sinks.otlp import rejected_records
from audit.sinks.posting import retry_after_s
from audit.sinks.syslog import message
from receivers import (
    Held,
    MemorySink,
    Pki,
    http_receiver,
    of_structured_data,
    parse_syslog,
    rsyslog,
    syslog_receiver,
)

LOG = "kms.example/audit/n0-0"


def item(n: int, **facts: object) -> Item:
    record = {"v": 1, "kind": "op", "id": f"00000000-0000-4000-8000-{n:012d}", "node": "n0", "op": "encrypt", **facts}
    record = {"out": "ok", "tenant": "health", "trace": "0af7651916cd43dd8448eb211c80319c", **record}
    body = {"c": {"l": LOG, "n": n, "p": "0" * 64, "t": 1_790_000_000_123_456 + n}, "r": record}
    entry = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return Item(n, hashlib.sha256(b"\0" + entry).digest(), 1_790_000_000_123_456 + n, entry, record)


def group(first: int, count: int) -> Group:
    return Group(LOG, tuple(item(n) for n in range(first, first + count)))


@dataclass
class Subject:
    sink: Sink
    held: Held
    refuses: bool  # whether the protocol can say no


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.make(tmp_path_factory.mktemp("pki"))


@contextlib.contextmanager
def of(name: str, pki: Pki, *, timeout_s: float = 30.0) -> Iterator[Subject]:
    if name == "memory":
        yield Subject(MemorySink(held := Held()), held, True)
    elif name.startswith("syslog"):
        with syslog_receiver(pki if name == "syslog over TLS" else None, timeout_s=timeout_s) as (held, target):
            yield Subject(KINDS["syslog"](target), held, False)
    else:
        with http_receiver(pki, otlp=name == "otlp", timeout_s=timeout_s) as (held, target):
            yield Subject(KINDS[name](target), held, True)


SINKS = ["https-json", "otlp", "syslog over TLS", "syslog over TCP", "memory"]


@pytest.fixture(params=SINKS)
def subject(request: pytest.FixtureRequest, pki: Pki) -> Iterator[Subject]:
    with of(request.param, pki) as made:
        yield made
        made.sink.close()


def settled(held: Held, count: int) -> list[int]:
    """Numbers that arrived; a syslog receiver has the bytes before it has parsed them."""
    deadline = time.monotonic() + 60
    while len(held.taken) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return held.numbers(LOG)


def test_what_is_delivered_is_there_byte_for_byte_and_in_order(subject: Subject) -> None:
    for first in (0, 5):
        subject.sink.deliver(group(first, 5))
    assert settled(subject.held, 10) == list(range(10))
    for _, n, leaf, entry in subject.held.taken:
        assert entry == item(n).entry
        assert hashlib.sha256(b"\0" + entry).hexdigest() == leaf


def test_a_receiver_that_is_away_gets_the_group_when_it_is_back(subject: Subject) -> None:
    subject.sink.deliver(group(0, 1))
    settled(subject.held, 1)
    subject.held.away = True
    with pytest.raises(Undelivered):
        for n in range(1, 3_000):  # a syslog receiver closes when it sees the next message
            subject.sink.deliver(group(n, 1))
            time.sleep(0.02)
    subject.held.away = False
    subject.sink.close()
    subject.sink.deliver(group(5_000, 3))
    assert settled(subject.held, 4)[-3:] == [5_000, 5_001, 5_002]


@pytest.mark.parametrize("name", SINKS)
def test_a_receiver_that_hangs_gives_the_thread_back(name: str, pki: Pki) -> None:
    with of(name, pki, timeout_s=0.5) as subject:
        hangs(subject)
        subject.sink.close()


def hangs(subject: Subject) -> None:
    subject.held.hanging = True
    large = Group(
        LOG, tuple(item(n, actor="a" * 500, key="k" * 30_000) for n in range(300))
    )  # more than sockets buffer
    began = time.monotonic()
    with pytest.raises(Undelivered):
        subject.sink.deliver(large)
    assert time.monotonic() - began < 25  # the receiver itself gives up after 30


def test_a_refusal_is_told_from_an_absence(subject: Subject) -> None:
    subject.held.refuses = lambda taken: taken[1] == 3
    if not subject.refuses:
        subject.sink.deliver(group(0, 5))  # syslog cannot say no
        return
    with pytest.raises(Refused):
        subject.sink.deliver(group(0, 5))
    subject.sink.deliver(group(0, 3))
    assert settled(subject.held, 3) == [0, 1, 2]


@pytest.mark.parametrize("name", ["https-json", "otlp", "syslog"])
def test_a_receiver_of_another_authority_gets_nothing(name: str, pki: Pki, tmp_path: Path) -> None:
    other = Pki.make(tmp_path / "other")
    receiving = syslog_receiver(pki) if name == "syslog" else http_receiver(pki, otlp=name == "otlp")
    with receiving as (held, target):
        with pytest.raises(Undelivered, match="CERTIFICATE_VERIFY_FAILED"):
            KINDS[name](replace(target, ca=other.ca)).deliver(group(0, 2))
        assert held.taken == []


def test_client_certificate_and_token_are_shown_and_a_new_token_is_taken_up(pki: Pki, tmp_path: Path) -> None:
    token = tmp_path / "token"
    with http_receiver(pki, mutual=True) as (held, target):
        with pytest.raises(Undelivered):
            KINDS["https-json"](target).deliver(group(0, 1))
        shown = replace(target, certificate=pki.client_certificate, key=pki.client_key, token_file=token)
        sink = KINDS["https-json"](replace(shown, token_scheme="Splunk"))
        for n, text in enumerate(("first\n", "second\n")):
            token.write_text(text)
            sink.deliver(group(n, 1))
        token.write_text("be\x00gin-secret")
        with pytest.raises(Undelivered) as caught:
            sink.deliver(group(2, 1))
        sink.close()
    assert "secret" not in str(caught.value)
    assert [h.get("authorization") for h in held.headers] == ["Splunk first", "Splunk second"]


@pytest.mark.parametrize("status", [301, 401, 403, 404, 408, 429, 500, 503])
def test_no_status_but_a_refusal_of_the_body_gives_a_record_up(status: int, pki: Pki) -> None:
    with http_receiver(pki) as (held, target):
        held.away, held.status, held.retry_after = True, status, "7"
        sink = KINDS["https-json"](target)
        with pytest.raises(Undelivered) as caught:
            sink.deliver(group(0, 2))
        sink.close()
        assert caught.value.retry_after_s == 7


def test_retry_after_is_seconds_or_a_date_and_anything_else_is_ignored() -> None:
    at = 784_111_777.0  # Sun, 06 Nov 1994 08:49:37 GMT
    assert retry_after_s("120", at) == 120
    assert retry_after_s("Sun, 06 Nov 1994 08:50:07 GMT", at) == 30
    for value in ("", "-1", "soon", "1.5", "Sun, 06 Nov 1994 08:00:00 GMT"):
        assert retry_after_s(value, at) == 0


@pytest.mark.parametrize(
    ("answer", "rejected"),
    [
        (b"", 0), (b"{}", 0), (b'{"partialSuccess":{}}', 0), (b'{"partialSuccess":null}', 0),
        (b'{"partialSuccess":{"errorMessage":"a warning"}}', 0),
        (b'{"partialSuccess":{"rejectedLogRecords":"3"}}', 3), (b'{"partialSuccess":{"rejectedLogRecords":3}}', 3),
    ],
)  # fmt: skip
def test_a_partial_success_of_otlp_says_how_many(answer: bytes, rejected: int) -> None:
    assert rejected_records(answer) == rejected


@pytest.mark.parametrize("answer", [b"OK", b"[]", b'{"partialSuccess":3}', b"\x00\x01", b"[" * 9_999])
def test_an_answer_that_is_not_otlp_is_no_receipt(answer: bytes) -> None:
    with pytest.raises(Undelivered):
        rejected_records(answer)


@pytest.mark.parametrize(("out", "severity"), [("ok", 6), ("failed", 5), ("denied", 4), ("error", 3)])
def test_a_syslog_message_is_rfc_5424_whatever_the_record_says(out: str, severity: int) -> None:
    odd = item(7, out=out, tenant='a"b]c\\d', op="é\n", node="two words", kind="k" * 40)
    text = message(LOG, odd, 32_473)
    assert text.startswith(f"<{13 * 8 + severity}>1 2026-09-21T14:13:20.123463Z two_words skms - {'k' * 32} ".encode())
    assert parse_syslog(text) == (LOG, 7, odd.leaf.hex(), b"\xef\xbb\xbf" + odd.entry)  # not ASCII: MSG-UTF8
    assert b'tenant="a\\"b\\]c\\\\d"' in text


def test_rsyslog_reads_every_field_over_tls(pki: Pki, tmp_path: Path) -> None:
    with rsyslog(tmp_path, pki) as (out, target):
        sink: Sink = KINDS["syslog"](target)
        sink.deliver(group(0, 200))
        sink.deliver(Group(LOG, (item(200, key="k" * 60_000),)))
        deadline = time.monotonic() + 60
        lines: list[str] = []
        while len(lines) < 201 and time.monotonic() < deadline:
            time.sleep(0.05)
            lines = out.read_text().splitlines() if out.exists() else []
        sink.close()
    rows = [line.split("\t") for line in lines]
    assert {tuple(row[:4]) for row in rows} == {("110", "n0", "skms", "op")}
    found = [of_structured_data(row[4], row[5].encode()) for row in rows]
    wanted = [item(n) for n in range(200)] + [item(200, key="k" * 60_000)]
    assert found == [(LOG, i.n, i.leaf.hex(), i.entry) for i in wanted]
