"""A number that only rises, kept in a file of a node beside its database: what an owner of the database cannot set back."""

from __future__ import annotations

import os
from pathlib import Path


class MarkDamaged(Exception):
    """The file holds no number."""


class Mark:
    """The highest number seen on this node, in the file `path`; its directory is the node's own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def value(self) -> int:
        """The highest number so far, 0 if there was none; MarkDamaged."""
        try:
            return int(self.path.read_text())
        except FileNotFoundError:
            return 0
        except ValueError:
            raise MarkDamaged(f"{self.path} holds no number") from None

    def rise(self, number: int) -> None:
        """Keep a number, if it is the highest; MarkDamaged, OSError."""
        if number > self.value():
            new = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            new.write_text(f"{number}\n")
            new.replace(self.path)
