"""Signatures on a bundle in a directory: the installation's authority signs the whole, a tenant its own files.

Whoever can write the directory could otherwise change the policy. A configured signer makes a part's signature mandatory;
what a quorum puts in force is signed by those who approve it, and needs no file.

    signatures/bundle.sig             base64 of 64 bytes, one signature a line; one that verifies is enough
    signatures/tenants/health.sig
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from policy.bundle import SIGNATURES, Bundle, BundleRefused
from policy.hostile import Refused, read_file
from policy.places import NAME
from policy.signing import SIZE, PersonKey, verifies

WHOLE: Final = "bundle"
_LARGEST: Final = 4_096  # bytes of a file of signatures


@dataclass(frozen=True, slots=True)
class Signer:
    """Whose signature a part must bear: `bundle`, or `tenants/NAME`. Of several signers of a part, one is enough."""

    part: str
    key: PersonKey


def is_part(name: str) -> bool:
    """Whether something can be signed under this name: paths are made of it."""
    return name == WHOLE or re.fullmatch(rf"tenants/{NAME.pattern}", name) is not None


def statement(bundle: Bundle, part: str) -> bytes:
    """What is signed (`policy.signing`): three lines, the last one hex SHA-256 of the part's manifest.

    The whole is signed with its version, so that no earlier content passes for a later one; a tenant's files are signed
    without, so that they need no new signature when others change. The schema is the release's and stands in neither.
    """
    prefix = "" if part == WHOLE else f"{part}/"
    files = {path: hashlib.sha256(data).hexdigest() for path, data in bundle.sources.items() if path.startswith(prefix)}
    manifest = json.dumps({"files": files, "part": part}, sort_keys=True, separators=(",", ":"))
    version = bundle.version if part == WHOLE else "-"
    return f"skms-policy-signature/v1\n{part} {version}\n{hashlib.sha256(manifest.encode()).hexdigest()}\n".encode()


def add(directory: Path, part: str, signature: bytes) -> Path:
    """Write a part's signature beside the bundle, in place of earlier ones; the file's path."""
    path = _path(directory, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(base64.b64encode(signature).decode() + "\n")
    return path


def check(directory: Path, bundle: Bundle, signers: Sequence[Signer]) -> None:
    """BundleRefused if a part that has signers bears no signature of any of them; one for a tenant that left is moot."""
    for part in sorted({signer.part for signer in signers}):
        if part != WHOLE and part.removeprefix("tenants/") not in bundle.registry.tenant_names():
            continue
        said = statement(bundle, part)
        found = _signatures(_path(directory, part), directory)
        if not any(verifies(s.key, one, said) for s in signers if s.part == part for one in found):
            name = str(_path(Path(), part))
            raise BundleRefused(name, 0, f"no signature of a signer of {part!r} on what the directory holds; {_HOW}")


_HOW: Final = "the one who holds that key signs with `skms policy sign`"


def _path(directory: Path, part: str) -> Path:
    return directory / SIGNATURES / f"{part}.sig"


def _signatures(path: Path, directory: Path) -> list[bytes]:
    name = str(path.relative_to(directory))
    try:
        data = read_file(path, most=_LARGEST)
    except Refused as refused:
        raise BundleRefused(name, 0, refused.reason) from None
    except FileNotFoundError:
        raise BundleRefused(name, 0, f"not there, and the configuration wants it; {_HOW}") from None
    found = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            found.append(base64.b64decode(line, validate=True))
        except binascii.Error:
            raise BundleRefused(name, number, "not base64") from None
        if len(found[-1]) != SIZE:
            raise BundleRefused(name, number, f"not a signature of {SIZE} bytes")
    return found
