"""Anchors: places outside the database that hold the newest signed checkpoint.

Whoever restores an old copy of the database, or writes a new history with a stolen key, changes nothing there. What an
anchor holds is trusted no further than its signature: `audit.rollback` compares it with the root log.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from audit.checkpoint import BadNote, Checkpoint, parse_checkpoint, parse_note
from audit.rootlog import split_origin

SUFFIX: Final = ".last-checkpoint"
FOLDER_OF: Final = 1_000_000  # sizes of one folder of a write-once store


class AnchorUnusable(Exception):
    """An anchor cannot be read or written: which, and why. It is never taken for an empty one."""


@dataclass(frozen=True, slots=True)
class Held:
    """A note that an anchor holds, and where."""

    where: str
    note: bytes


class Source(Protocol):
    """Something outside the database that knows a newest checkpoint of this log."""

    @property
    def name(self) -> str:
        """As an operator knows it: kind and place."""

    def newest(self) -> Sequence[Held]:
        """The newest note of each holder in it; none if it never held one. AnchorUnusable if that cannot be told.

        What it returns is not verified, and may belong to another log. It may block.
        """


class Anchor(Source, Protocol):
    """A source that this service feeds itself. Safe to use from several processes at once."""

    def keep(self, note: bytes) -> None:
        """Hold this note: durable on return. An older checkpoint never takes the place of a newer one.

        AnchorUnusable if it cannot be written, or holds another checkpoint of the same size. It may block.
        """


def checkpoint_in(note: bytes) -> Checkpoint:
    """The checkpoint of a log of this service that a note spells, whoever signed it; BadNote if it spells none."""
    found = parse_checkpoint(parse_note(note).text)
    try:
        split_origin(found.origin)
    except ValueError as error:
        raise BadNote(str(error)) from None
    return found


def _place(note: bytes) -> tuple[int, int]:
    """(generation, size): what makes one checkpoint newer than another."""
    found = checkpoint_in(note)
    return split_origin(found.origin)[1], found.size


def _replaces(note: bytes, held: bytes, where: str) -> bool:
    """Whether a note is newer than the one that is held; AnchorUnusable if they are two at one size."""
    try:
        ours, theirs = _place(note), _place(held)
    except BadNote as bad:
        raise AnchorUnusable(f"{where} holds something else than a checkpoint ({bad}): look who wrote it") from None
    if ours == theirs and parse_note(note).text != parse_note(held).text:
        raise AnchorUnusable(f"{where} holds another checkpoint of size {ours[1]}")
    return ours > theirs


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    """A new file, durable with its name; FileExistsError if there is one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AnchorUnusable(f"{what} {path}: {error.strerror or error}") from None


class NodeFiles:
    """A folder with one file for each node, `<node>.last-checkpoint`, replaced atomically.

    In a node's own state directory it holds that node's; in a folder that nodes share, each of them sees the others'.
    """

    def __init__(self, folder: Path, node: str) -> None:
        self._folder, self._node = folder, node

    @property
    def name(self) -> str:
        """Kind and place."""
        return f"node files in {self._folder}"

    def newest(self) -> Sequence[Held]:
        """What each node has written."""
        with _told("node files in", self._folder):
            found = sorted(p for p in self._folder.iterdir() if p.name.endswith(SUFFIX))
            return [Held(str(path), path.read_bytes()) for path in found]

    def keep(self, note: bytes) -> None:
        """Replace this node's file, unless it holds a newer one."""
        path = self._folder / f"{self._node}{SUFFIX}"
        with _told("node files in", self._folder), (self._folder / f"{self._node}.anchor-lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of one node write one file
            if path.exists() and not _replaces(note, path.read_bytes(), str(path)):
                return
            fresh = self._folder / f".{self._node}{SUFFIX}.new"
            fresh.unlink(missing_ok=True)  # of a process that was killed here
            _write_new(fresh, note, mode=0o644)
            fresh.replace(path)
            sync_folder(self._folder)


class WriteOnce:
    """A folder of files that are never written again, named by generation and size: for storage that enforces it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def name(self) -> str:
        """Kind and place."""
        return f"write-once store {self._folder}"

    def newest(self) -> Sequence[Held]:
        """The note of the largest size of the latest generation."""
        with _told("write-once store", self._folder):
            for path in self._descending():
                data = path.read_bytes()
                if data:  # empty: the writer was killed between making and filling it, and may not try again
                    return [Held(str(path), data)]
        return []

    def _descending(self) -> Iterator[Path]:
        generations = [p for p in self._folder.iterdir() if re.fullmatch(r"g[1-9][0-9]{0,8}", p.name)]
        for generation in sorted(generations, key=lambda p: int(p.name[1:]), reverse=True):
            for part in sorted((p for p in generation.iterdir() if p.name.isdigit()), reverse=True):
                yield from sorted((p for p in part.iterdir() if p.name.isdigit()), reverse=True)

    def keep(self, note: bytes) -> None:
        """Write a new file, read-only from its birth. The same text once more is no news."""
        generation, size = _place(note)
        path = self._folder / f"g{generation}" / f"{size // FOLDER_OF:010d}" / f"{size:016d}"
        with _told("write-once store", path):
            for folder in (path.parent.parent, path.parent):
                if not folder.is_dir():
                    with contextlib.suppress(FileExistsError):  # another process was first
                        folder.mkdir()
                    sync_folder(folder.parent)
            try:
                _write_new(path, note, mode=0o444)
            except FileExistsError:
                if held := path.read_bytes():
                    _replaces(note, held, str(path))


class Shelf(Protocol):
    """Hardware that keeps a few bytes under a name outside every backup of the database."""

    def get(self) -> Sequence[tuple[str, bytes]]:
        """(device, what it holds) of every device that can be asked and holds something; OSError if none can."""

    def put(self, data: bytes) -> None:
        """Store on every device that can be reached; OSError if none can."""


class TokenObject:
    """The data object `audit-anchor` of the HSMs. To be written seldom: their memory wears."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    @property
    def name(self) -> str:
        """Kind and place."""
        return "HSM object audit-anchor"

    def newest(self) -> Sequence[Held]:
        """What each HSM holds."""
        try:
            return [Held(f"{self.name} of {device}", data) for device, data in self._shelf.get()]
        except OSError as error:
            raise AnchorUnusable(f"{self.name}: {error}") from None

    def keep(self, note: bytes) -> None:
        """Write to every HSM that is up, unless one of them holds a newer note."""
        newer = [_replaces(note, held.note, held.where) for held in self.newest()]  # each is compared
        if newer and not any(newer):
            return
        try:
            self._shelf.put(note)
        except OSError as error:
            raise AnchorUnusable(f"{self.name}: {error}") from None
