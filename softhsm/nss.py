"""An NSS softokn token for development and tests: a second PKCS#11 module with other answers than SoftHSM2's.

`nss.sh` does the work; this drives it and says where things are.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from softhsm import SoftHsmUnavailable

SCRIPT: Final = Path(__file__).parent / "nss.sh"
LABEL: Final = "NSS Certificate DB"  # NSS names its token with keys itself; the other slot holds none
MODULES: Final = (
    Path("/usr/lib/x86_64-linux-gnu/libsoftokn3.so"),
    Path("/usr/lib/aarch64-linux-gnu/libsoftokn3.so"),
    Path("/usr/lib64/libsoftokn3.so"),
    Path("/usr/lib/libsoftokn3.so"),
)


class NssUnavailable(SoftHsmUnavailable):
    """NSS softokn is not there or does not work; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Nss:
    """One token in one directory. A process can load the module for one directory only."""

    directory: Path
    module: Path

    @property
    def label(self) -> str:
        """The token's label."""
        return LABEL

    @property
    def pin_file(self) -> Path:
        """The file with the user PIN."""
        return self.directory / "pin"

    @property
    def reserved(self) -> str:
        """pReserved of C_Initialize; NSS refuses to start without, and needs the blank at the end."""
        return f"configdir='sql:{self.directory}' certPrefix='' keyPrefix='' secmod='secmod.db' flags= "

    @property
    def environment(self) -> Mapping[str, str]:
        """What a process must have set before it makes token keys.

        Each token key is stored under a password hash of 10,000 rounds and only the last one used is remembered: without
        this, two keys used in turn cost 14 to 20 ms a pair.
        """
        return {"NSS_MAX_MP_PBE_ITERATION_COUNT": "1"}


def module() -> Path:
    """The installed PKCS#11 module; NssUnavailable if there is none."""
    for path in MODULES:
        if path.is_file():
            return path
    raise NssUnavailable("NSS softokn is not installed: run `apt-get install libnss3 libnss3-tools` as root")


def bring_up(directory: Path) -> Nss:
    """Make the token if it is not there yet; a second call changes nothing."""
    found = module()
    done = subprocess.run(["/bin/sh", str(SCRIPT), str(directory)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NssUnavailable(done.stderr.strip() or "certutil failed")
    return Nss(directory.absolute(), found)
