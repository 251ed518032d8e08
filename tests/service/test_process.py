"""What a serving process may not do."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from harness import ROOT

SERVE = (
    "import resource, sys; from service.cli.serving import serve; "
    "status = serve(['--config', sys.argv[1]]); print(status, resource.getrlimit(resource.RLIMIT_CORE))"
)


def _dumping() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (1_000, 1_000))


def test_it_leaves_no_core_file_whatever_its_shell_allows(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVE, str(tmp_path / "none.toml")]
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=_dumping, check=False)
    except subprocess.SubprocessError:
        pytest.skip("this shell allows no core files, so there is nothing to take away")
    assert ran.stdout == "2 (0, 0)\n", ran.stderr
