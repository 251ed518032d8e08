"""What a serving process may not do."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from harness import ROOT, prepared, served, serving

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


def test_workers_leave_when_their_supervisor_is_killed_and_the_node_starts_again(tmp_path: Path) -> None:
    with served(tmp_path / "node", "--workers", "2") as node:
        workers = psutil.Process(node.process.pid).children()
        os.kill(node.process.pid, signal.SIGKILL)
        node.process.wait(30)
        _, left = psutil.wait_procs(workers, 30)
        assert len(workers) == 2
        assert not left, "workers go on without a supervisor, on the port that the next one needs"
    with serving(prepared(tmp_path / "node"), tmp_path / "again.log", "--workers", "2") as again:
        assert again.url == node.url  # as a service manager starts it: on the same port
        with again.client("health-operator") as client:
            assert client.get("/v1/whoami").status_code == 200
