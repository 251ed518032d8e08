"""`skms audit archive`: what goes and where, and that a directory which takes nothing loses nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from audit import log
from audit.anchors import checkpoint_in
from audit.chain import DAY_US
from audit.event import Op
from audit.stored import verify_database
from audit.verify import Trust
from databases import address
from harness import Files, lab_of, skms
from service.config import load
from service.database import open_engine
from service.wiring import AuditSigner, now

pytestmark = pytest.mark.anyio

RECORDS = 600


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of its own, mounted with these options; a user who may not mount is not asked."""
    there: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"mounted-{len(there)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("only who may mount a file system can fill one")
        there.append(place)
        return place

    yield mount
    for place in there:
        subprocess.run(["umount", str(place)], check=True)


async def old_records(files: Files, directory: Path) -> tuple[Path, Trust]:
    """A node's configuration, whose database holds records of 100 days ago under a checkpoint; and its trust."""
    text = files.config_file.read_text()
    database, state = address(directory, "own"), directory / "state"
    for option, value in {"name": "n7", "state_dir": str(state), "url": database}.items():
        text = re.sub(rf'(?m)^{option} = ".*"', f'{option} = "{value}"', text, count=1)
    path = directory / "skms.toml"
    path.write_text(text)
    config = load(path)
    engine = open_engine(config.database.url)
    async with lab_of(dataclasses.replace(files, config=config)) as lab:
        signer = AuditSigner(lab.node.kms.fleet, config.node.region)
        writer = log.Log(
            engine,
            origin=config.node.origin,
            node="old",
            slots=1,
            lock_dir=directory / "locks",
            signer=signer,
            open_facts=log.OpenFacts(cfg="0" * 64, dist="0" * 64, ver="1.0"),
            clock=lambda: now() - 100 * DAY_US,
            monotonic=time.monotonic,
            deadline_s=30,
        )
        await writer.start()
        for _ in range(RECORDS // 100):
            made = [Op(id=_uuid(), ts=now(), node="old", tenant="health", op="encrypt", out="ok") for _ in range(100)]
            await writer.append_many(made)
        await writer.close()
        await _checkpoint(state / "anchors" / "n7.last-checkpoint")
        trust = Trust(config.node.origin, signer.known_keys())
    engine.dispose()
    return path, trust


def _uuid() -> str:
    return str(uuid.UUID(bytes=os.urandom(16), version=4))


async def _checkpoint(path: Path) -> None:
    """Wait for two more of them: the first may have begun before the records were there."""
    size = checkpoint_in(path.read_bytes()).size if path.exists() else 0
    until = time.monotonic() + 180
    while not path.exists() or checkpoint_in(path.read_bytes()).size < size + 2:
        assert time.monotonic() < until, "no checkpoint was anchored"
        await asyncio.sleep(0.1)


async def test_old_records_are_archived_or_stay_whole_where_the_directory_takes_nothing(
    dev_files: Files, tmp_path: Path, mounted: Callable[[str], Path]
) -> None:
    config, trust = await old_records(dev_files, tmp_path)

    def archive(*options: str) -> tuple[int, str, str]:
        done = skms("-o", "json", "audit", "archive", "--config", str(config), *options)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def findings(archived: Path | None = None) -> list[str]:
        engine = open_engine(load(config).database.url)
        codes = [f.code for f in verify_database(engine, trust, archived).findings if f.code.startswith(("E_", "U_P"))]
        engine.dispose()
        return codes

    status, _, told = await asyncio.to_thread(archive, "--to", str(tmp_path / "archive"))
    assert (status, "set retention_days" in told) == (2, True), "nothing is configured: not a matter of trying again"
    status, _, told = await asyncio.to_thread(archive, "--before", "yesterday")
    assert (status, "a date as 2026-01-31" in told) == (2, True)
    config.write_text(config.read_text() + "\n[audit]\nretention_days = 30\n")
    assert load(config).audit.retention_days == 30
    for options, why in (("ro", "Read-only file system"), ("size=16k", "No space left on device")):
        status, _, told = await asyncio.to_thread(archive, "--to", str(mounted(options)))
        assert (status, f"{why}: nothing was deleted" in told) == (7, True), told
        assert findings() == []
    kept = tmp_path / "archive"
    status, out, told = await asyncio.to_thread(archive, "--to", str(kept))
    assert status == 0, told
    (segment,) = json.loads(out)
    assert (segment["from"], segment["to"]) == (0, 512)
    assert segment["uri"].startswith(kept.as_uri())
    assert findings() == ["U_PRUNED"]
    assert findings(kept) == []
