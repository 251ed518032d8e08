"""SoftHSM2 tokens for development and tests: in a directory of their own, never the user's own SoftHSM.

`init.sh` does the work; this drives it and says where things are.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SCRIPT: Final = Path(__file__).parent / "init.sh"
MODULES: Final = (
    Path("/usr/lib/softhsm/libsofthsm2.so"),
    Path("/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so"),
    Path("/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so"),
    Path("/usr/local/lib/softhsm/libsofthsm2.so"),
    Path("/usr/lib64/pkcs11/libsofthsm2.so"),
)


class SoftHsmUnavailable(Exception):
    """SoftHSM2 is not there or does not work; the message says what to do."""


@dataclass(frozen=True, slots=True)
class SoftHsm:
    """Tokens in one directory."""

    directory: Path
    module: Path

    @property
    def environment(self) -> Mapping[str, str]:
        """What a process must have set before it loads the module."""
        return {"SOFTHSM2_CONF": str(self.directory / "softhsm2.conf")}

    def pin_file(self, label: str) -> Path:
        """The file with a token's user PIN."""
        return self.directory / f"{label}.pin"


def module() -> Path:
    """The installed PKCS#11 module; SoftHsmUnavailable if there is none."""
    for path in MODULES:
        if path.is_file():
            return path
    raise SoftHsmUnavailable("SoftHSM2 is not installed: run `apt-get install softhsm2` (Debian, Ubuntu) as root")


def bring_up(directory: Path, labels: Sequence[str]) -> SoftHsm:
    """Make the tokens that are not there yet; a second call changes nothing."""
    found = module()
    done = subprocess.run(
        ["/bin/sh", str(SCRIPT), str(directory), *labels], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SoftHsmUnavailable(done.stderr.strip() or "softhsm2-util failed")
    return SoftHsm(directory.absolute(), found)
