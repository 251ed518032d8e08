"""A wheel, installed by itself: one changed byte, and nothing starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import ROOT, Files
from service.doctor import examine
from service.integrity import check


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make wheel` does, from a copy: builds leave files behind."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], capture_output=True, cwd=ROOT)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(source / "made"), str(source))
    (made,) = (source / "made").glob("*.whl")
    return made


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, *arguments[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Iterator[Path]:
    """The wheel in a directory that Python looks in before the development environment."""
    pip("install", "--no-index", "--ignore-installed", "--prefix", str(tmp_path / "env"), str(wheel))
    (found,) = (tmp_path / "env").rglob("service/integrity.py")
    yield found.parents[1]
    shutil.rmtree(tmp_path / "env")


def serve(installed: Path, *, first: Path | None = None) -> tuple[int, str]:
    """Start a node without a configuration: with its files intact that is what it complains of."""
    path = os.pathsep.join(str(p) for p in (first, installed) if p is not None)
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "service.cli.main", "serve", "--config", "none.toml"],
        cwd=installed.parent,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    return ran.returncode, ran.stderr


def test_an_intact_installation_starts(installed: Path) -> None:
    status, told = serve(installed)
    assert (status, "none.toml: cannot be read" in told) == (2, True), told


@pytest.mark.parametrize("name", ["policy/engine.py", "service/kms.py", "policy/shipped/charter.yaml"])
def test_one_changed_byte_refuses_the_start_and_names_the_file(installed: Path, name: str) -> None:
    file = installed / name
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b" ")  # the last newline: whatever it means, it is not what was installed
    status, told = serve(installed)
    assert status == 8, told
    assert f"{file}: its SHA-256 is not the one in RECORD" in told


def test_a_missing_file_refuses_the_start(installed: Path) -> None:
    (installed / "audit" / "verify.py").unlink()
    status, told = serve(installed)
    assert (status, "verify.py: cannot be read" in told) == (8, True), told


def test_a_package_of_the_same_name_from_elsewhere_refuses_the_start(installed: Path, tmp_path: Path) -> None:
    """What adr/0002 measured: an unrelated distribution with a `policy/` folder."""
    other = tmp_path / "other" / "policy"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    status, told = serve(installed, first=other.parent)
    assert status == 8, told
    assert f"Python takes the package policy from {other / '__init__.py'} instead" in told


def test_a_development_environment_is_said_and_not_checked(dev_files: Files) -> None:
    assert "editable" in check()
    (found,) = [f for f in examine(dev_files.config) if f.check == "installed files"]
    assert (found.good, "editable" in found.detail) == (True, True)
