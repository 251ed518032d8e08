"""Where a node keeps the transcripts of its ceremonies: canonical JSON to check, text to read and sign."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import Final

from sqlalchemy import Connection

import audit.log
from keystore import HsmUnavailable
from keystore.pkcs11 import TokenConfig, Transcript, TranscriptDamaged, held, verify_transcript
from service.config import Config
from service.devpki import write_private
from service.kms import Kms
from service.rows import Settings

alarm: Final = logging.getLogger("skms.alarm")


def begin(kind: str, config: Config, region: str) -> Transcript:
    """A transcript in the making, about this installation and a region."""
    about = {"installation": str(config.node.installation), "region": region, "node": config.node.name}
    return Transcript(kind, about, lambda: time.time_ns() // 1_000)


def keep(transcript: Transcript, config: Config) -> Path:
    """Write the transcript into the node's state directory, named by its hash; where its JSON is."""
    directory = config.node.state_dir / "ceremonies"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = directory / f"{transcript.kind}-{transcript.sha256[:16]}.json"
    write_private(file, transcript.to_json())
    write_private(file.with_suffix(".txt"), transcript.to_text().encode())
    return file


def founder_of(members: list[TokenConfig]) -> tuple[TokenConfig, list[TokenConfig]]:
    """(the token that has or gets the region's root KEK, those that lack it). Two roots in a region never arise.

    HsmUnavailable if no token has one and not all could be asked.
    """
    has, unknown = {}, None
    for member in members:
        try:
            has[member.name] = "root-kek" in held(member)
        except HsmUnavailable as error:
            unknown = unknown or error
    founder = next((m for m in members if has.get(m.name)), None)
    if founder is None:
        if unknown is not None:
            raise unknown  # it may hold the root KEK of the region
        founder = members[0]
    return founder, [m for m in members if has.get(m.name) is False and m is not founder]


async def record_ceremonies(kms: Kms, settings: Settings, state_dir: Path) -> None:
    """Record the hash of each transcript that no record names yet: once, however many workers start."""
    for path in sorted((state_dir / "ceremonies").glob("*.json")):
        try:
            transcript = verify_transcript(await asyncio.to_thread(path.read_bytes))
        except (TranscriptDamaged, OSError) as error:
            facts = {"file": str(path), "reason": str(error)}
            alarm.critical("the transcript of a ceremony was changed or cannot be read", extra={"facts": facts})
            continue
        name = f"ceremony/{transcript.sha256[:48]}"
        if await asyncio.to_thread(settings.get, name) is not None:
            continue

        def write(connection: Connection, name: str = name, kind: str = transcript.kind) -> None:
            Settings.add(connection, name, kind)

        record = kms.admin_record("ceremony", rh=transcript.sha256, out="ok", why=transcript.kind)
        with contextlib.suppress(audit.log.ChangeFailed):  # another worker was first: its record says `ok`
            await kms.log.append(record, change=audit.log.Change(write, lambda: None))
