"""Witnesses and those they watch: cosignatures that count, and every way in which they do not come about."""

from __future__ import annotations

import hashlib
import http.server
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from audit_lab import ORIGIN as LOG_NAME
from audit_lab import Lab, now, op
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Engine

from audit import tables
from audit.chain import Bad, tree_hash
from audit.checkpoint import NoteKey, key_of, parse_note, verified, with_cosignatures
from audit.notary import Notary
from audit.proof import subtree_of
from audit.tlogpolicy import any_of
from audit.witness import (
    SIZE_TYPE,
    Ahead,
    Answer,
    Cosigner,
    Endpoint,
    Forked,
    HttpEndpoint,
    Levels,
    Pusher,
    Witness,
    Witnessing,
)
from contracts.witness_contract import LEAVES, LOG, ORIGIN, OTHER, note_of, submission
from databases import unguarded
from postgres import Cluster
from service.database import open_engine
from service.devpki import Authority


def held(_: Connection) -> None:
    """The lease is ours."""


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    url = f"sqlite:///{tmp_path}/witness.db"
    if request.param == "postgresql":
        cluster: Cluster = request.getfixturevalue("postgres")
        url = cluster.fresh("witness")
    made = open_engine(url)
    tables.tables.create_all(made)
    yield made
    made.dispose()


def witness_on(engine: Engine, name: str = "w1.example/w", *, logs: dict[str, list[NoteKey]] | None = None) -> Witness:
    return Witness(engine, cosigner(name), {ORIGIN: [LOG]} if logs is None else logs, clock=now)


def cosigner(name: str) -> Cosigner:
    return Cosigner(name, Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32, b".")))


class Says:
    """A witness that answers as the test wants."""

    def __init__(self, *answers: Answer | Callable[[bytes], Answer]) -> None:
        self._answers = list(answers)

    def add(self, body: bytes) -> Answer:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return answer if isinstance(answer, Answer) else answer(body)


class Dead:
    def add(self, body: bytes) -> Answer:
        raise ConnectionRefusedError("nobody listens")


def pusher_of(endpoints: dict[str, Endpoint], *, threshold: int = 1, timeout_s: float = 20.0) -> Pusher:
    policy = any_of({name: cosigner(name).key for name in endpoints}, threshold)
    return Pusher(policy, endpoints, clock=now, timeout_s=timeout_s)


def push(pusher: Pusher, size: int, leaves: list[bytes] = LEAVES) -> set[str]:
    return set(pusher.push(note_of(size, leaves).encode(), subtree_of(leaves[:size])).lines)


def cosigns(name: str, *, seconds: int) -> Callable[[bytes], Answer]:
    def add(body: bytes) -> Answer:
        note, key = parse_note(body.partition(b"\n\n")[2]), cosigner(name)
        return Answer(200, note.signed_by(key.key, key.sign(note.text, seconds)).signatures[-1].line())

    return add


def test_levels_hash_every_range_of_the_tree_as_rfc_6962_does() -> None:
    levels = Levels()
    for size, leaf in enumerate(LEAVES, 1):
        levels.push(leaf)
        assert levels.subtree(0, size) == tree_hash(LEAVES[:size])
    assert levels.subtree(8, 20) == tree_hash(LEAVES[8:20])


@pytest.mark.parametrize(("old", "size"), [(0, 5), (5, 9)])
def test_of_two_forks_at_the_same_time_exactly_one_is_cosigned(engine: Engine, old: int, size: int) -> None:
    forks = (LEAVES, LEAVES[:old] + OTHER[old:])
    if old:
        assert witness_on(engine).add(submission(0, old)).status == 200
    barrier, answers = threading.Barrier(6), list[tuple[int, int]]()

    def ask(fork: int) -> None:
        barrier.wait()
        answers.append((fork, witness_on(engine).add(submission(old, size, forks[fork])).status))

    threads = [threading.Thread(target=ask, args=(i % 2,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(status for _, status in answers) == [200] + [409] * 5


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_a_checkpoint_that_was_not_stored_is_not_cosigned(engine: Engine) -> None:
    witness = witness_on(engine)
    assert witness.add(submission(0, 5)).status == 200
    with engine.begin() as connection:  # an update that changes no row, as when another process was first
        connection.execute(
            sa.text("CREATE TRIGGER lost BEFORE UPDATE ON audit_witness BEGIN SELECT RAISE(IGNORE); END")
        )
    answer = witness.add(submission(5, 9))
    assert (answer.status, b"w1.example" in answer.body) == (503, False)
    assert witness.latest(hashlib.sha256(ORIGIN.encode()).hexdigest()).body.startswith(b"log.example/audit\n5\n")


def test_its_time_never_goes_back_and_its_checkpoint_is_shown_with_its_cosignature(engine: Engine) -> None:
    times = iter([2_000_000_000_000_000, 1_000_000_000_000_000])
    witness = Witness(engine, cosigner("w"), {ORIGIN: [LOG]}, clock=lambda: next(times))
    stamps = []
    for old, size in ((0, 3), (3, 4)):
        line = parse_note(b"x\n\n" + witness.add(submission(old, size)).body).signatures[0]
        stamps.append(int.from_bytes(line.value[:8], "big"))
    assert stamps == [2_000_000_000, 2_000_000_000]
    shown = witness.latest(hashlib.sha256(ORIGIN.encode()).hexdigest())
    assert verified(parse_note(shown.body), [LOG, cosigner("w").key]) == (LOG, cosigner("w").key)
    assert witness.latest("0" * 64).status == 404


def test_a_pusher_that_forgot_everything_proves_from_the_size_it_is_told(engine: Engine) -> None:
    witness = witness_on(engine)
    assert push(pusher_of({"w1.example/w": witness}), 5) == {"w1.example/w"}
    assert push(pusher_of({"w1.example/w": witness}), 20) == {"w1.example/w"}


def test_a_witness_that_saw_more_proves_a_rollback_at_every_later_round_too(engine: Engine) -> None:
    witness = witness_on(engine)
    push(pusher_of({"w1.example/w": witness}), 20)
    rolled_back = pusher_of({"w1.example/w": witness})
    for _ in range(2):
        with pytest.raises(Ahead) as found:
            push(rolled_back, 9)
        assert (found.value.size, found.value.who) == (20, "w1.example/w")


@pytest.mark.parametrize("size", [5, 9])
def test_a_split_view_is_caught_by_the_witness_that_saw_the_other_tree(engine: Engine, size: int) -> None:
    witness = witness_on(engine)
    push(pusher_of({"w1.example/w": witness}), 5)
    other = pusher_of({"w1.example/w": witness, "w2.example/w": Dead()})
    with pytest.raises(Forked) as found:
        push(other, size, OTHER)
    assert found.value.who == "w1.example/w"


@pytest.mark.parametrize(
    "lie",
    [
        cosigns("w2", seconds=now() // 1_000_000),  # another key
        cosigns("w1", seconds=now() // 1_000_000 - 3_600),
        cosigns("w1", seconds=now() // 1_000_000 + 3_600),
        Answer(200, b""),
        Answer(200, b"hello\n"),
        Answer(200, "\u2014 w1 AAAA\n".encode()),
        Answer(200, "\u2014 w1 ".encode() + b"A" * 100 + b"\n"),
        Answer(409, b"1\n", "text/plain"),
        Answer(409, b" 1\n", SIZE_TYPE),
        Answer(409, b"01\n", SIZE_TYPE),
        Answer(409, b"1", SIZE_TYPE),
        Answer(409, b"\xff\n", SIZE_TYPE),
        Answer(409, b"3\n", SIZE_TYPE),  # again and again
        Answer(422),
        Answer(302),
        Answer(404),
        Answer(500),
    ],
)
def test_what_is_no_cosignature_counts_for_nothing_and_the_others_still_do(lie: Answer) -> None:
    good = cosigns("w2", seconds=now() // 1_000_000)
    pusher = pusher_of({"w1": Says(lie), "w2": Says(good)})
    assert push(pusher, 5) == {"w2"}
    assert pusher.seen["w1"].failures == 1
    assert pusher.seen["w1"].problem


def test_a_witness_whose_time_goes_back_is_not_believed() -> None:
    seconds = now() // 1_000_000
    pusher = pusher_of({"w1": Says(cosigns("w1", seconds=seconds), cosigns("w1", seconds=seconds - 60))})
    assert push(pusher, 5) == {"w1"}
    assert push(pusher, 6) == set()


def test_a_witness_that_hangs_costs_the_timeout_once_and_is_not_asked_twice() -> None:
    release, calls = threading.Event(), list[int]()

    def hang(_: bytes) -> Answer:
        calls.append(1)
        release.wait(60)
        return Answer(500)

    pusher = pusher_of({"w1": Says(hang), "w2": Dead()}, timeout_s=0.3)
    try:
        for _ in range(2):
            assert push(pusher, 5) == set()
        assert len(calls) == 1
        assert pusher.seen["w1"].failures == 2
    finally:
        release.set()


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[Callable[[Endpoint], HttpEndpoint]]:
    """Serves a witness over TLS; gives how to reach it."""
    authority = Authority.create("test")
    authority.write(tmp_path / "ca.pem", tmp_path / "ca.key")
    certificate, key = tmp_path / "tls.pem", tmp_path / "tls.key"
    for path, data in zip(
        (certificate, key), authority.issue("localhost", hosts=("localhost",), server=True), strict=True
    ):
        path.write_bytes(data)
    servers: list[http.server.ThreadingHTTPServer] = []

    def serve(witness: Endpoint) -> HttpEndpoint:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                answer = witness.add(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(answer.status)
                self.send_header("content-type", answer.media)
                self.send_header("content-length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        trust = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        return HttpEndpoint(f"https://localhost:{server.server_port}/witness", trust, timeout_s=20.0)

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.anyio
async def test_cosignatures_of_two_of_three_are_stored_with_the_checkpoint(
    made: Lab, tmp_path: Path, tls: Callable[[Endpoint], HttpEndpoint]
) -> None:
    writer = made.writer()
    await writer.start()
    notary = Notary(made.engine, origin=LOG_NAME, signer=made.signer, clock=now)
    logs = {LOG_NAME: [key_of(LOG_NAME, made.signer.public_key())]}
    endpoints: dict[str, Endpoint] = {"w3": Dead()}
    engines = []
    for name in ("w1", "w2"):
        engines.append(open_engine(f"sqlite:///{tmp_path}/{name}.db"))
        tables.tables.create_all(engines[-1])
        endpoints[name] = tls(witness_on(engines[-1], name, logs=logs))
    witnessing = Witnessing(made.engine, pusher_of(endpoints, threshold=2))
    assert witnessing.round(held) is None
    for size in (1, 2):
        await writer.append(op())
        signed = notary.round(1, held)
        assert signed is not None
        assert witnessing.round(held) == witnessing.witnessed == size
        witnessing.round(held)  # once more the same: its lines replace those that are there
    await writer.close()
    with made.engine.connect() as connection:
        row = connection.execute(sa.text("SELECT note, cosigs FROM audit_checkpoint WHERE size = 2")).one()
    note = parse_note(with_cosignatures(row.note, row.cosigs))
    assert len(note.signatures) == 3
    assert set(verified(note, [cosigner("w1").key, cosigner("w2").key])) == {cosigner("w1").key, cosigner("w2").key}
    with made.engine.begin() as connection:
        unguarded(connection)
        connection.execute(sa.text("UPDATE audit_root SET leaf = zeroblob(32) WHERE seq = 1"))
    with pytest.raises(Bad, match="another root"):
        Witnessing(made.engine, pusher_of(endpoints)).round(held)
    for engine in engines:
        engine.dispose()
