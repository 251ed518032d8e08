"""deploy/systemd: units that systemd takes, and a node that serves under their system-call filter."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import parses
from databases import behind
from harness import ROOT, Served, prepared

UNITS = ROOT / "deploy" / "systemd"
SERVICES = sorted(p.name for p in UNITS.glob("*.service"))


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.fail("systemd-analyze is not installed: run `make setup`, or apt-get install systemd")
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with a command that is there."""
    made = tmp_path / "system"
    shutil.copytree(UNITS, made)
    for unit in made.glob("*.service"):
        unit.write_text(unit.read_text().replace("/opt/skms/bin/skms", str(Path(sys.prefix) / "bin" / "skms")))
    return made


@pytest.mark.parametrize("unit", [*SERVICES, *(p.name for p in UNITS.glob("*.timer"))])
def test_systemd_takes_every_line(units: Path, unit: str) -> None:
    checked = analyze("verify", "--man=no", str(units / unit))
    assert (checked.returncode, checked.stderr) == (0, "")  # an unknown directive is a line on stderr only


@pytest.mark.parametrize("unit", SERVICES)
def test_a_unit_is_hardened(units: Path, unit: str) -> None:
    judged = analyze("security", "--offline=true", "--no-pager", "--threshold=16", str(units / unit))
    assert judged.returncode == 0, judged.stdout  # 1.6 of 10: it has the network, and may ask how good the clock is


@pytest.mark.parametrize("unit", SERVICES)
def test_commands_of_units_are_commands_of_skms(unit: str) -> None:
    commands = re.findall(r"^Exec\w+=(\S+) (.*)$", (UNITS / unit).read_text(), re.MULTILINE)
    assert commands
    for program, arguments in commands:
        assert program == "/opt/skms/bin/skms"
        parses(shlex.split(arguments))


def hardening() -> dict[str, list[str]]:
    """The directives of the drop-in that both services have."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / "skms-.service.d" / "hardening.conf").read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def allowed() -> set[str]:
    """The system calls that the filter lets through."""
    left: set[str] = set()
    for line in hardening()["SystemCallFilter"]:
        named = {call for word in line.removeprefix("~").split() for call in members(word)}
        left = left - named if line.startswith("~") else left | named
    return left


def members(name: str) -> set[str]:
    if not name.startswith("@"):
        return {name}
    told = analyze("syscall-filter", name).stdout.split("\n")[1:]
    return {call for line in told if (word := line.strip()) and not word.startswith("#") for call in members(word)}


@pytest.fixture
def filtered(tmp_path: Path) -> Iterator[tuple[Served, Path]]:
    """`skms serve` as the unit starts it, each call that the filter does not let through answered by EPERM."""
    if shutil.which("strace") is None:
        pytest.fail("strace is not installed: run `make setup`")
    # In a process of its own: SoftHSM2 reads its configuration once, and other tests of this one have given it theirs.
    make = f"import pathlib, service.dev as d; d.prepare(pathlib.Path({str(tmp_path / 'node')!r}), port=0)"
    subprocess.run([sys.executable, "-c", make], cwd=ROOT, check=True)
    files = prepared(tmp_path / "node")
    trace, denied = tmp_path / "trace", "!" + ",".join(f"?{call}" for call in sorted(allowed()))
    command = ["strace", "-f", "-qq", "-o", str(trace), "-e", "trace=all", "-e", f"inject={denied}:error=EPERM"]
    command += [sys.executable, "-m", "service.cli.main", "serve", "--config", str(files.config_file), "--workers", "2"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
    try:
        _ready(process, tmp_path / "log")
        yield Served(tmp_path / "node", process, files.environment), trace
    finally:
        if process.poll() is None:
            for child in _children(process.pid):
                os.kill(child, signal.SIGTERM)
            process.wait(60)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _ready(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while log.read_text().count('"event": "serving"') < 2:  # both workers
        if time.monotonic() > deadline or process.poll() is not None:
            pytest.fail("not ready: " + log.read_text()[-3_000:])
        time.sleep(0.2)


def test_a_node_serves_under_the_filter_and_maps_nothing_writable_and_executable(
    filtered: tuple[Served, Path],
) -> None:
    node, trace = filtered
    with contextlib.ExitStack() as stack:
        operator, workload, platform = (
            stack.enter_context(node.client(name)) for name in ("health-operator", "health-eu-de-1", "platform")
        )
        asked = {"spec": "AES_256", "tier": 2, "home": "eu-de-1"}
        made = operator.post("/v1/keys", json=asked, headers={"idempotency-key": "k" * 20}).raise_for_status()
        sealed = workload.post(f"/v1/keys/{made.json()['id']}/encrypt", json={"plaintext": "aGk="}).raise_for_status()
        opened = workload.post("/v1/decrypt", json={"ciphertext": sealed.json()["ciphertext"]}).raise_for_status()
        assert opened.json()["plaintext"] == "aGk="
        assert platform.get("/metrics").status_code == 200
    (supervisor,) = _children(node.process.pid)
    os.kill(supervisor, signal.SIGTERM)
    assert node.process.wait(60) == 0
    written = "".join(repr(row) for row in behind(node.environment["database_url"], "SELECT * FROM audit_batch"))
    assert (written.count('"op":"start"'), written.count('"op":"stop"')) == (2, 2)  # each worker drained and said so
    calls = trace.read_text(errors="replace").splitlines()
    refused = {m[1] for line in calls if "(INJECTED)" in line and (m := re.match(r"\d+ +(?:<\.\.\. )?(\w+)", line))}
    assert "io_uring_setup" in refused  # that the filter was in force
    assert refused <= {"io_uring_setup", "fchown"}  # SQLite asks for fchown as root only, which the unit's user is not
    # What MemoryDenyWriteExecute refuses.
    memory = [line for line in calls if re.search(r" (mmap|mprotect|pkey_mprotect|shmat)\(", line)]
    assert memory
    assert not [line for line in memory if "PROT_WRITE|PROT_EXEC" in line or ("mprotect(" in line and "EXEC" in line)]
    families = {f"AF_{m[1]}" for line in calls if (m := re.search(r" socket\(AF_(\w+)", line))}
    assert families <= set(hardening()["RestrictAddressFamilies"][0].split())
