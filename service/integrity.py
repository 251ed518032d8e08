"""The installed files against the hashes that were installed with them (RECORD), before any of them serves.

Our packages have plain names (docs/adr/0002): another distribution with a folder `policy/` overwrites ours, pip says nothing,
and what was denied is allowed. This finds that, and files that a disk or a hand changed. It does not find who may write to the
environment and changes RECORD, too: that is what file permissions and a signed image are for.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
from importlib.metadata import Distribution, PackagePath, distribution
from pathlib import Path
from typing import Final

NAME: Final = "sovereign-kms"
PACKAGES: Final = ("service", "keystore", "policy", "audit", "softhsm")


class Altered(Exception):
    """An installed file is not what was installed: which, and how."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}: install {NAME} anew, in an environment of its own")
        self.path, self.reason = path, reason


def check() -> str:
    """What was found; Altered for the first file that differs or is missing, or a package that comes from elsewhere."""
    installed = distribution(NAME)
    if _editable(installed):
        return "an editable installation, for development: not checked"
    files = [file for file in installed.files or () if file.hash is not None]
    named = {str(file) for file in files}
    for package in PACKAGES:
        path, found = Path(str(installed.locate_file(f"{package}/__init__.py"))), importlib.util.find_spec(package)
        if f"{package}/__init__.py" not in named:
            raise Altered(path, "not in RECORD")
        origin = None if found is None else found.origin
        if origin is None or Path(origin).resolve() != path.resolve():
            raise Altered(path, f"Python takes the package {package} from {origin} instead")
    for file in files:
        _compare(installed, file)
    return f"{len(files)} files are what RECORD says"


def _editable(installed: Distribution) -> bool:
    told = json.loads(installed.read_text("direct_url.json") or "{}")
    return bool(told.get("dir_info", {}).get("editable"))


def _compare(installed: Distribution, file: PackagePath) -> None:
    assert file.hash is not None
    path = Path(str(installed.locate_file(file))).resolve()
    if file.hash.mode != "sha256":
        raise Altered(path, f"RECORD has a hash of kind {file.hash.mode}, not sha256")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Altered(path, f"cannot be read: {error.strerror}") from None
    if base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode() != file.hash.value:
        raise Altered(path, "its SHA-256 is not the one in RECORD")
