"""Rotation of a region's root KEK: the ceremony, the switch, and every row wrapped anew while the service goes on.

It runs as a command beside the serving workers, as one more writer of the audit log, because the officer's trust in it
must end with a process. Killed at any point it is started again and goes on: which root is current stands in SQL, what is
left to do is seen in the rows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import Connection

from audit.log import Change, ChangeFailed
from keystore import Catalog, Rewrapping, RewrapRow, RowDamaged, StaleKey
from keystore.pkcs11 import CeremonyRefused, TokenConfig, Transcript, destroy_root, next_root, rewrapper
from service.config import Config
from service.database import migrate, open_engine
from service.kms import Kms
from service.wiring import Node, now, serving_tokens, wire

ROUNDS: Final = 20  # of catching up with rows that other workers wrote meanwhile
Say = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True, slots=True)
class Rotated:
    """What came of it. `left` is what is still under the old root KEK, by kind."""

    region: str
    old: int
    new: int
    rewrapped: int
    damaged: tuple[str, ...]  # rows that were changed outside the service: not touched
    left: dict[str, int]


def _tokens(config: Config, region: str) -> list[TokenConfig]:
    found = [t for t in serving_tokens(config) if t.region == region]
    if not found:
        raise CeremonyRefused(f"the configuration names no HSM in region {region!r}")
    return found


def _current(config: Config, region: str) -> tuple[int, dict[str, int]]:
    """(current version, what is left under the one before)."""
    engine = open_engine(config.database.url)
    try:
        migrate(engine, lock_dir=config.node.state_dir)
        catalog = Catalog(engine)
        version = next((row.version for row in catalog.roots() if row.region == region), 1)
        before = _tokens(config, region)[0].object_id("root-kek", version - 1)
        return version, catalog.count_under(before) if version > 1 else {}
    finally:
        engine.dispose()


async def rotate(
    config: Config, region: str, *, so_pin_file: Path | None, transcript: Transcript, rate: int, say: Say
) -> Rotated:
    """Make the next root KEK of a region, use it for new keys, and wrap every row anew, at most `rate` a second.

    If an earlier rotation left rows behind, it goes on with those instead. CeremonyRefused, HsmUnavailable or
    SelfTestFailed with the reason.
    """
    tokens = _tokens(config, region)
    current, left = _current(config, region)
    resumed = any(count for kind, count in left.items() if kind != "open import tokens")
    if resumed:
        old, new = current - 1, current
    else:
        old = current
        new = await asyncio.to_thread(next_root, tokens, current, so_pin_file=so_pin_file, transcript=transcript)
    async with wire(config) as node:
        if not resumed:
            write, applied = node.kms.fleet.plan_root(region, new)
            await node.kms.log.append(node.kms.admin_record("rotate_root"), change=Change(write, applied))
        with rewrapper(tokens[0], old=old, new=new, so_pin_file=so_pin_file, transcript=transcript) as made:
            group = node.kms.fleet.groups[region]
            work = Rewrapping(node.kms.keystore, node.catalog, group, old=made.old_id, rewrap=made.rewrap)
            done, damaged = await _all(node, work, rate, say)
        transcript.add("rewrapped", rows=done, damaged=len(damaged))
        return Rotated(region, old, new, done, tuple(sorted(damaged)), work.left())


async def _all(node: Node, work: Rewrapping, rate: int, say: Say) -> tuple[int, set[str]]:
    """Round after round until nothing is left but what is damaged: workers may still have written under the old root."""
    total, done, damaged = sum(await asyncio.to_thread(lambda: work.left().values())), 0, set[str]()
    for _ in range(ROUNDS):
        before = done
        for row in work.rows():
            name = row.tenant if row.key is None else str(row.key.id)
            try:
                await _one(node.kms, work, row, name)
            except StaleKey:
                continue  # it changed meanwhile: the next round sees it
            except RowDamaged:
                damaged.add(name)
                continue
            done += 1
            say(done, max(total, done))
            await asyncio.sleep(1 / rate)
        if done == before:
            break
    return done, damaged


async def _one(kms: Kms, work: Rewrapping, row: RewrapRow, name: str) -> None:
    plan = await asyncio.to_thread(row.plan)
    key = {} if row.key is None else {"key": name}
    record = kms.admin_record("rewrap_root", tenant=row.tenant, **key)
    try:
        await kms.log.append(record, change=Change(plan.write, plan.applied))
    except ChangeFailed as failed:
        raise failed.__cause__ or failed from None


async def retire(config: Config, region: str, version: int, *, transcript: Transcript) -> None:
    """Destroy an old root KEK on every token of the region; CeremonyRefused while anything is wrapped under it."""
    tokens = _tokens(config, region)
    async with wire(config) as node:

        def fence(c: Connection) -> None:
            left = node.catalog.retire_root(c, tokens[0].object_id("root-kek", version), now=now())
            if left:
                told = ", ".join(f"{count} {kind}" for kind, count in left.items())
                raise CeremonyRefused(
                    f"root KEK version {version} of region {region} is still needed by {told}: run `skms hsm "
                    "rotate-root` to its end; import tokens end after 24 hours"
                )

        try:  # recorded, and closed to every writer, before it is gone
            await node.kms.log.append(node.kms.admin_record("retire_root"), change=Change(fence, lambda: None))
        except ChangeFailed as failed:
            raise failed.__cause__ or failed from None
        for token in tokens:
            await asyncio.to_thread(destroy_root, token, version, transcript=transcript)
