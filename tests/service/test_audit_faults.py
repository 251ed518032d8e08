"""What callers and operators see of a node whose log cannot be written."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from msgspec import structs

from audit.clock import confirmation
from databases import address, behind, sqlite_only
from harness import ROOT, Files, Lab, lab_of, new_key, skms, until, with_database
from postgres import Cluster
from service.database import open_engine
from service.serve import FENCED

DEADLINE_S = 2.0
ANSWERED_S = 15.0  # without a deadline an answer would never come; this much a busy machine may add to it


@sqlite_only
@pytest.mark.anyio
async def test_S_04_a_node_whose_database_is_locked_answers_503_and_says_why_and_comes_back(
    dev_files: Files, tmp_path: Path
) -> None:
    async with lab_of(with_database(dev_files, tmp_path), deadline_s=DEADLINE_S) as lab:
        key, body = await settled_key(lab), {"plaintext": "eA=="}
        client, path = lab.client("health-eu-de-1"), f"/v1/keys/{key}/encrypt"
        blocker = sqlite3.connect(tmp_path / "skms.db", isolation_level=None)
        blocker.execute("PRAGMA busy_timeout=60000")
        blocker.execute("BEGIN IMMEDIATE")
        try:
            begun = time.monotonic()
            answers = await asyncio.gather(*(client.post(path, json=body) for _ in range(8)))
            assert time.monotonic() - begun < ANSWERED_S
            for answer in answers:
                assert (answer.status_code, answer.json()["code"]) == (503, "audit_unavailable")
                assert answer.json()["executed"] is False
                assert "ciphertext" not in answer.text
            took = []
            for _ in range(5):
                begun = time.monotonic()
                behind = await client.post(path, json=body)
                took.append(time.monotonic() - begun)
                assert (behind.status_code, behind.headers["retry-after"]) == (503, answers[0].headers["retry-after"])
            assert min(took) < DEADLINE_S / 2, f"requests behind a commit that hangs waited for it: {took}"
            ready = await lab.client("platform").get("/readyz")
            assert ready.status_code == 503
            assert (await client.get("/livez")).status_code == 200
        finally:
            blocker.execute("ROLLBACK")
            blocker.close()
        await settled_key(lab)
        await until(lambda: lab.node.kms.log.state == "RUNNING", "the log did not come back")


async def settled_key(lab: Lab) -> str:
    """A key that was used, on a machine where a commit may for once take longer than the deadline."""
    operator, deadline = lab.client("health-operator"), time.monotonic() + 60
    body = {"spec": "AES_256", "tier": 2, "home": "eu-de-1"}
    while True:
        made = await operator.post("/v1/keys", json=body, headers={"Idempotency-Key": uuid.uuid4().hex})
        if made.status_code == 201:
            path = f"/v1/keys/{made.json()['id']}/encrypt"
            if (await lab.client("health-eu-de-1").post(path, json={"plaintext": "eA=="})).status_code == 200:
                return str(made.json()["id"])
        assert time.monotonic() < deadline, made.text
        await asyncio.sleep(0.1)


@pytest.mark.anyio
async def test_S_04_a_node_whose_PostgreSQL_hangs_answers_503_in_time_and_comes_back(
    dev_files: Files, postgres: Cluster, tmp_path: Path
) -> None:
    section = structs.replace(dev_files.config.node, state_dir=tmp_path)
    database = structs.replace(dev_files.config.database, url=postgres.fresh("node"))
    config = structs.replace(dev_files.config, node=section, database=database)
    async with lab_of(dataclasses.replace(dev_files, config=config), deadline_s=DEADLINE_S) as lab:
        key, body = await settled_key(lab), {"plaintext": "eA=="}
        client = lab.client("health-eu-de-1")
        servers = Path(f"/proc/{postgres.postmaster()}/task/{postgres.postmaster()}/children").read_text().split()
        for pid in servers:
            os.kill(int(pid), signal.SIGSTOP)
        # From a thread: should the event loop hang, this still ends.
        mending = threading.Timer(30, go_on, (servers,))
        mending.start()
        try:
            took = []
            for _ in range(4):
                begun = time.monotonic()
                answer = await client.post(f"/v1/keys/{key}/encrypt", json=body)
                took.append(time.monotonic() - begun)
                assert (answer.status_code, answer.json()["code"]) == (503, "audit_unavailable")
            assert max(took) < ANSWERED_S, took
            assert sorted(took)[1] < DEADLINE_S / 2, f"requests behind a commit that hangs waited for it: {took}"
        finally:
            mending.cancel()
            go_on(servers)
        await settled_key(lab)


@pytest.mark.anyio
async def test_S_04_a_key_that_the_database_must_be_asked_for_holds_up_who_asks_for_it_alone(
    dev_files: Files, postgres: Cluster, tmp_path: Path
) -> None:
    section = structs.replace(dev_files.config.node, state_dir=tmp_path)
    url = postgres.fresh("node")
    config = structs.replace(
        dev_files.config, node=section, database=structs.replace(dev_files.config.database, url=url)
    )
    async with lab_of(dataclasses.replace(dev_files, config=config)) as lab:
        client, body = lab.client("health-eu-de-1"), {"plaintext": "eA=="}
        warm, cold = await settled_key(lab), await new_key(lab, "AES_256")

        async def used(key: str) -> tuple[int, str]:
            answer = await client.post(f"/v1/keys/{key}/encrypt", json=body)
            return answer.status_code, answer.json().get("code", "")

        engine = open_engine(url)
        with engine.begin() as connection:
            connection.execute(sa.text("LOCK TABLE keystore_version"))  # uses cannot be counted ahead
            first, others, begun = asyncio.create_task(used(cold)), 0, time.monotonic()
            while not first.done():
                assert await used(warm) == (200, "")
                others += 1
            assert time.monotonic() - begun < ANSWERED_S
            assert await first == (503, "database_unavailable")
            assert others > 20, "the event loop waited for the database"
        engine.dispose()
        await until_used(lambda: used(cold))


async def until_used(use: Callable[[], Awaitable[tuple[int, str]]]) -> None:
    """A thread whose caller went away may still wait for the database."""
    deadline = time.monotonic() + 60
    while (told := await use()) != (200, ""):
        assert told == (503, "database_unavailable")
        assert time.monotonic() < deadline


def go_on(servers: list[str]) -> None:
    for pid in servers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGCONT)


@pytest.mark.anyio
async def test_the_log_s_condition_is_in_the_metrics(lab: Lab) -> None:
    told = (await lab.client("platform").get("/metrics")).text.splitlines()
    samples = {name: float(value) for name, _, value in (line.rpartition(" ") for line in told if line[:1] != "#")}
    assert samples['skms_audit_state{state="RUNNING"}'] == 1
    assert samples['skms_audit_state{state="DEGRADED"}'] == 0
    assert samples["skms_audit_commit_group_records_count"] > 0
    assert samples["skms_audit_commit_seconds_count"] == samples["skms_audit_commit_group_records_count"]
    assert 0 <= samples["skms_audit_disk_used_ratio"] < 1  # 0 until the first look, a second after the start
    for name in ("withheld_total", "clock_steps_total", "waiting_records", "exposed_seconds", "checkpoint_age_seconds"):
        assert f"skms_audit_{name}" in samples


def test_an_operator_confirms_the_clock_by_saying_what_time_it_is(dev_files: Files) -> None:
    config = ("--config", str(dev_files.config_file))
    state_dir: Path = dev_files.config.node.state_dir
    wrong = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)).isoformat(timespec="minutes")
    refused = skms("audit", "confirm-clock", *config, "--time", wrong)
    assert refused.returncode != 0
    assert b"from the time you say" in refused.stderr
    assert confirmation(state_dir) is None
    true = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    done = skms("audit", "confirm-clock", *config, "--time", true)
    assert done.returncode == 0, done.stderr
    said = confirmation(state_dir)
    assert said is not None
    assert abs(said.at - time.time_ns() // 1_000) < 120_000_000
    (state_dir / "clock-confirmed").unlink()


def test_a_worker_whose_chain_another_writer_took_ends_so_that_a_fresh_one_can_start(
    dev_files: Files, tmp_path: Path
) -> None:
    said, database = tmp_path / "serve.log", address(tmp_path)
    own = {"SKMS_DATABASE_URL": database, "SKMS_NODE_STATE_DIR": str(tmp_path)}
    with said.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli.main", "serve", "--config", str(dev_files.config_file)],
            stdout=sink,
            stderr=sink,
            cwd=ROOT,
            env={**os.environ, **own},
        )
    try:
        begun = time.monotonic()
        while '"event": "serving"' not in said.read_text():
            assert process.poll() is None, said.read_text()
            assert time.monotonic() - begun < 180
            time.sleep(0.05)
        behind(database, "UPDATE audit_shard SET epoch = epoch + 1")
        assert process.wait(180) == FENCED  # its next record is a mark of the checkpoint that covers its start
    finally:
        process.kill()
        process.wait()
    assert "fenced" in said.read_text()
