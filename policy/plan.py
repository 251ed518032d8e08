"""What a change of the bundle comes to before anybody makes it: files, meaning, proofs, and who would be locked out."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from policy.engine import Policy
from policy.lockout import lost

_LINES: Final = 400  # of one file's diff: whoever changed more reads the file


@dataclass(frozen=True, slots=True)
class FileChange:
    """One file of the bundle and how it differs, as `diff -u` tells it."""

    path: str
    change: Literal["added", "removed", "changed"]
    diff: tuple[str, ...]


def files(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[FileChange]:
    """The files that differ, by path."""
    found = []
    for path in sorted(before.keys() | after.keys()):
        was, becomes = before.get(path), after.get(path)
        if was != becomes:
            change: Literal["added", "removed", "changed"] = "changed"
            change = "added" if was is None else "removed" if becomes is None else change
            found.append(FileChange(path, change, _diff(path, was or b"", becomes or b"")))
    return found


@dataclass(frozen=True, slots=True)
class MemberChange:
    """Somebody whose tenant, role or person differs; `was` or `becomes` is None where the identity is not listed."""

    id: str
    was: dict[str, Any] | None
    becomes: dict[str, Any] | None


def members(old: Policy, new: Policy) -> list[MemberChange]:
    """Who is listed otherwise: roles are facts of a request, so no semantic difference tells of them."""
    before, after = old.registry.members, new.registry.members
    found = []
    for name in sorted(before.keys() | after.keys()):
        was, becomes = before.get(name), after.get(name)
        if was != becomes:
            sides = (None if m is None else dataclasses.asdict(m) for m in (was, becomes))
            found.append(MemberChange(name, *sides))
    return found


def _diff(path: str, was: bytes, becomes: bytes) -> tuple[str, ...]:
    lines = list(
        difflib.unified_diff(
            was.decode(errors="replace").splitlines(),
            becomes.decode(errors="replace").splitlines(),
            f"a/{path}",
            f"b/{path}",
            lineterm="",
        )
    )
    left = len(lines) - _LINES
    return tuple(lines if left <= 0 else [*lines[:_LINES], f"… {left} more lines"])


def told(old: Policy, new: Policy, *, now: int, given_up: Callable[[str], bool] = lambda _: False) -> dict[str, Any]:
    """A plan as plain values. `unproved` says why proofs and meaning cannot be told, if a rule has no formula."""
    from policy import proofs  # loads Z3, which a node needs for nothing else

    shown: dict[str, Any] = {
        "replaces": {"digest": old.digest, "version": old.version},
        "draft": {"digest": new.digest, "version": new.version, "development": new.development},
        "files": [dataclasses.asdict(change) for change in files(old.bundle.sources, new.bundle.sources)],
        "members": [dataclasses.asdict(change) for change in members(old, new)],
        "locked_out": [dataclasses.asdict(one) for one in lost(old, new, now=now, given_up=given_up)],
        "unproved": None,
    }
    try:
        return shown | proofs.told(new, old)
    except proofs.NotEncodable as error:
        return shown | {"unproved": str(error), "refuted": [], "undecided": [], "changes": []}


def broken(shown: dict[str, Any]) -> bool:
    """Whether a plan tells of something that an apply is refused for."""
    return bool(shown["refuted"] or shown["locked_out"])
