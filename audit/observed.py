"""What a witness saw of our log that the database does not hold: kept on the node's own disk until a recovery.

The witness says it once, to the process that asks; a restart must not be a way to forget it, and whoever can put an old
database in place can restart a node too.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated

import msgspec

from audit.anchors import AnchorUnusable, checkpoint_in, sync_folder
from audit.checkpoint import BadNote
from audit.rootlog import split_origin

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class Observation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A witness saw `size` entries, or another tree at `size` (`forked`), when it was shown our `note`; `at` in us."""

    at: Count
    forked: bool
    note: Annotated[str, msgspec.Meta(min_length=1, max_length=8_192)]
    size: Count
    who: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]

    def __str__(self) -> str:
        if self.forked:
            return f"witness {self.who} saw another tree at {self.size} entries of the root log"
        return f"witness {self.who} saw {self.size} entries of the root log: the database is an older one"


class Observations:
    """A folder with at most one file for each generation of the log. Safe to use from several processes at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, seen: Observation) -> None:
        """Durable on return; the first one of a generation stays. AnchorUnusable if it cannot be written."""
        path = self._path(checkpoint_in(seen.note.encode()).origin)
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            fresh = self._folder / f".{path.name}.{os.getpid()}.new"
            with fresh.open("wb") as file:
                file.write(msgspec.json.encode(seen, order="sorted"))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(fresh)
            fresh.unlink()
            sync_folder(self._folder)
            sync_folder(self._folder.parent)
        except OSError as error:
            raise AnchorUnusable(f"what a witness saw, {path}: {error.strerror}") from None

    def of(self, origin: str) -> Observation | None:
        """What was seen of this generation; AnchorUnusable if there is a file that cannot be read: never taken for none."""
        path = self._path(origin)
        try:
            found = msgspec.json.decode(path.read_bytes(), type=Observation)
            if checkpoint_in(found.note.encode()).origin != origin:
                raise BadNote("its checkpoint is another log's")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise AnchorUnusable(f"what a witness saw, {path}: {error.strerror}") from None
        except (msgspec.MsgspecError, ValueError) as bad:
            raise AnchorUnusable(f"what a witness saw, {path}: not as this service wrote it ({bad})") from None
        return found

    def _path(self, origin: str) -> Path:
        return self._folder / f"g{split_origin(origin)[1]}"
