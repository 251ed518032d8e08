"""The job that has checkpoints cosigned: its policy file, and what it does when a witness contradicts the database."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from msgspec import structs
from sqlalchemy import Engine

from audit.anchors import AnchorUnusable
from audit.checkpoint import ED25519, NoteKey, format_vkey, parse_checkpoint
from audit.generation import KIND, digest_of
from audit.log import Log, RolledBack
from audit.postquantum import create
from audit.witness import SIZE_TYPE, Answer, Cosigner, Endpoint, Pusher, parse_submission
from databases import address, owned
from harness import ROOT, Files, lab_of, officer
from service.approvals import approve
from service.config import ApproverSection, Config, ConfigInvalid, WitnessedLog, WitnessesSection, WitnessSection, load
from service.database import open_engine
from service.recovery import prepare, recover
from service.rows import Lease
from service.wiring import now, observations_of
from service.witnesses import Witnesses, checked, cosigner_name, known_of, new_cosigner, pusher_of

KEY = Cosigner("partner.example/w", Ed25519PrivateKey.generate()).key


def policy_at(path: Path, url: str) -> WitnessesSection:
    path.write_text(f"witness w1 {format_vkey(KEY)} {url}\nquorum w1\n")
    return WitnessesSection(policy=path)


def test_a_witness_without_an_https_url_is_a_configuration_error(tmp_path: Path) -> None:
    assert set(pusher_of(policy_at(tmp_path / "good", "https://partner.example/witness"), clock=now).seen) == {"w1"}
    for url in ("", "http://partner.example/witness"):
        with pytest.raises(ConfigInvalid, match="https"):
            pusher_of(policy_at(tmp_path / "bad", url), clock=now)
    with pytest.raises(ConfigInvalid, match=r"audit\.witnesses"):
        pusher_of(WitnessesSection(policy=tmp_path / "missing"), clock=now)


CONFIG = load(ROOT / "deploy" / "skms.example.toml", environment={})
ALONE = structs.replace(CONFIG, audit=structs.replace(CONFIG.audit, witnesses=None))
LOG_KEY = format_vkey(NoteKey("log.example", ED25519, Ed25519PrivateKey.generate().public_key().public_bytes_raw()))


def witness_at(path: Path, *, name: str = "kms.example/w", origin: str = "log.example", key: str = LOG_KEY) -> Config:
    if not path.exists():
        new_cosigner("kms.example/w", path)
    return structs.replace(ALONE, witness=WitnessSection(name, path, (WitnessedLog(origin, key),)))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"key": "AAAA"}, "log.example: key: not a SubjectPublicKeyInfo"),
        ({"key": "?"}, "log.example: key: "),
        ({"key": "log.example+00000000+" + LOG_KEY.split("+", 2)[2]}, "log.example: key: the verifier key's id"),
        ({"origin": "partner.example/w", "key": format_vkey(KEY)}, "this is a cosigner's, not a log's"),
        ({"origin": CONFIG.node.origin + "/g2"}, "nobody is a witness of their own log"),
        ({"name": "two words"}, "name: not a verifier key"),
    ],
)
def test_a_witness_section_that_cannot_be_used_is_told_with_the_log_and_the_reason(
    tmp_path: Path, wrong: dict[str, str], said: str
) -> None:
    checked(witness_at(tmp_path / "good"))
    with pytest.raises(ConfigInvalid) as caught:
        checked(witness_at(tmp_path / "w.key", **wrong))
    assert said in str(caught.value)


def test_a_witnesss_key_is_private_ed25519_and_no_logs(tmp_path: Path) -> None:
    path = tmp_path / "w.key"
    good = witness_at(path)
    own = Cosigner("log.example", load_pem_private_key(path.read_bytes(), None))  # type: ignore[arg-type]  # Ed25519
    same = format_vkey(NoteKey("log.example", ED25519, own.key.material))
    with pytest.raises(ConfigInvalid, match="a witness's key is no log's"):
        checked(witness_at(path, key=same))
    path.chmod(0o640)
    with pytest.raises(ConfigInvalid, match="chmod 600"):
        checked(good)
    path.chmod(0o600)
    path.write_text("no key")
    with pytest.raises(ConfigInvalid, match="not a private key in PEM"):
        checked(good)
    path.unlink()
    with pytest.raises(ConfigInvalid, match="No such file"):
        checked(good)


def test_a_post_quantum_key_is_checked_before_the_start_and_no_log_key(tmp_path: Path) -> None:
    path = tmp_path / "pq.key"
    config = structs.replace(ALONE, audit=structs.replace(ALONE.audit, post_quantum_key=path))
    with pytest.raises(ConfigInvalid, match=r"post_quantum_key: .*cannot be read"):
        checked(config)
    key = create(path, cosigner_name(config.node.origin)).key
    checked(config)
    assert known_of(config).known == (key,)
    log = format_vkey(create(tmp_path / "other.key", "log.example").key)
    with pytest.raises(ConfigInvalid, match=r"log\.example: key: this is a cosigner's, not a log's"):
        checked(witness_at(tmp_path / "w.key", key=log))


def test_a_node_does_not_count_itself_into_its_quorum(tmp_path: Path) -> None:
    vkey = new_cosigner("kms.example/w", tmp_path / "w.key")
    policy = tmp_path / "policy"
    policy.write_text(f"witness self {vkey} https://kms.example/witness\nquorum self\n")
    config = witness_at(tmp_path / "w.key")
    audit = structs.replace(config.audit, witnesses=WitnessesSection(policy))
    with pytest.raises(ConfigInvalid, match="witness self is this service itself"):
        checked(structs.replace(config, audit=audit))


class SawMore:
    def add(self, body: bytes) -> Answer:
        return Answer(409, b"1000000\n", SIZE_TYPE)


class SawAnother:
    def add(self, body: bytes) -> Answer:
        return Answer(409, b"%d\n" % parse_checkpoint(parse_submission(body).note.text).size, SIZE_TYPE)


def job_of(config: Config, engine: Engine, log: Log, witness: Endpoint) -> Witnesses:
    policy = pusher_of(policy_at(config.node.state_dir / "policy", "https://w.example/w"), clock=now).policy
    pusher = Pusher(policy, {"w1": witness}, clock=now, timeout_s=20.0)
    lease = Lease(engine, clock=now)
    return Witnesses(engine, lease, log, pusher, owner="test", observations=observations_of(config), clock=now)


@pytest.fixture
def own(dev_files: Files, tmp_path: Path) -> Config:
    """The node's tokens over a database of its own, and two officers."""
    officers = {name: officer(tmp_path, name)[1] for name in ("alice", "bob")}
    config = dev_files.config
    return structs.replace(
        config,
        node=structs.replace(config.node, name="n6", state_dir=tmp_path / "state"),
        database=structs.replace(config.database, url=address(tmp_path, "own")),
        approvals=structs.replace(config.approvals, approver=tuple(ApproverSection(n, k) for n, k in officers.items())),
    )


@pytest.mark.anyio
async def test_what_a_witness_saw_stops_every_worker_and_each_start_until_officers_recover(
    own: Config, dev_files: Files, tmp_path: Path
) -> None:
    files, engine = dataclasses.replace(dev_files, config=own), open_engine(own.database.url)
    async with lab_of(files) as lab, lab_of(files) as other:
        await lab.client("health-operator").get("/v1/whoami")
        await job_of(own, engine, lab.node.kms.log, SawMore()).run(period_s=0.1)  # ends by itself
        deadline = time.monotonic() + 60
        while other.node.kms.log.state != "ROLLED_BACK":
            assert time.monotonic() < deadline, "the other worker goes on"
            await asyncio.sleep(0.1)
        for worker in (lab, other):
            assert (await worker.client("health-operator").get("/v1/whoami")).status_code == 503
            ready, told = await worker.node.health.ready(full=True)
            assert not ready
            assert "witness w1 saw 1000000 entries" in told["checks"]["audit"]["detail"]
    for _ in range(2):
        with pytest.raises(RolledBack, match="witness w1 saw 1000000 entries"):
            async with lab_of(files):
                pass
    recovery = await prepare(own)
    assert (recovery.lost[1], recovery.origin) == (1_000_000, f"{own.node.origin}/g2")
    assert "witness w1" in recovery.anchor
    given = [approve(KIND, digest_of(recovery), name=n, key_file=tmp_path / f"{n}.key") for n in ("alice", "bob")]
    # It takes the rights of the schema's owner, which nodes do not have.
    owner = structs.replace(own, database=structs.replace(own.database, url=owned(own.database.url)))
    await recover(owner, recovery, given)
    after = structs.replace(own, node=structs.replace(own.node, origin=recovery.origin))
    async with lab_of(dataclasses.replace(dev_files, config=after)) as lab:
        assert (await lab.client("health-operator").get("/v1/whoami")).status_code == 200
    engine.dispose()


@pytest.mark.anyio
async def test_another_tree_at_a_witness_is_kept_and_a_damaged_file_is_not_taken_for_none(
    own: Config, dev_files: Files
) -> None:
    files, engine = dataclasses.replace(dev_files, config=own), open_engine(own.database.url)
    async with lab_of(files) as lab:
        await lab.client("health-operator").get("/v1/whoami")
        await job_of(own, engine, lab.node.kms.log, SawAnother()).run(period_s=0.1)
    engine.dispose()
    with pytest.raises(RolledBack, match="witness w1 saw another tree at"):
        async with lab_of(files):
            pass
    assert (await prepare(own)).lost[0] == 0
    [kept] = (own.node.state_dir / "witness-observations").glob("g*")
    for damage in (b"", kept.read_bytes()[:-1], kept.read_bytes().replace(b"audit", b"other")):
        kept.write_bytes(damage)
        with pytest.raises(AnchorUnusable, match="what a witness saw"):
            async with lab_of(files):
                pass


@pytest.mark.anyio
async def test_a_log_is_stopped_also_when_what_was_seen_cannot_be_kept_and_that_is_tried_again(
    own: Config, dev_files: Files
) -> None:
    files, engine = dataclasses.replace(dev_files, config=own), open_engine(own.database.url)
    async with lab_of(files) as lab:
        await lab.client("health-operator").get("/v1/whoami")
        deadline, anchor = time.monotonic() + 60, own.node.state_dir / "anchors" / "n6.last-checkpoint"
        while not anchor.exists():
            assert time.monotonic() < deadline, "no checkpoint"
            await asyncio.sleep(0.1)
        folder = own.node.state_dir / "witness-observations"
        folder.write_text("in the way")
        running = asyncio.create_task(job_of(own, engine, lab.node.kms.log, SawMore()).run(period_s=0.1))
        while lab.node.kms.log.state != "ROLLED_BACK":
            assert time.monotonic() < deadline, "the log goes on"
            await asyncio.sleep(0.1)
        assert not running.done()
        folder.unlink()
        await running
        assert (folder / "g1").exists()
    engine.dispose()
