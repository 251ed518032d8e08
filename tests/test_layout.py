"""The shape of the repository, held by machines."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from harness import ROOT

PACKAGES = ("service", "keystore", "policy", "audit", "softhsm")
FORBIDDEN = {"core", "common", "utils", "models", "schemas", "repositories", "dependencies"}


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, cwd=ROOT, check=False)
    names = [n for n in listed.stdout.decode().split("\0") if n] if listed.returncode == 0 else []
    return [ROOT / n for n in names] or [p for p in ROOT.rglob("*") if p.is_file() and ".venv" not in p.parts]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "pyproject.toml",
            "service",
            "keystore",
            "policy",
            "audit",
            "deploy",
            "softhsm",
            "tests",
            "bench",
            "docs",
            "openapi.yaml",
        ),
        *(
            "README.md",
            "Makefile",
            "CHANGELOG.md",
            "SECURITY.md",
            "LICENSE",
            ".ci/run",
            "docs/adr",
            "requirements.lock",
        ),
    ],
)
def test_the_top_level_is_as_promised(name: str) -> None:
    assert (ROOT / name).exists()


def test_packages_have_a_story_and_no_drawer_for_odds_and_ends() -> None:
    for package in PACKAGES:
        for init in (ROOT / package).rglob("__init__.py"):
            assert ast.get_docstring(ast.parse(init.read_text())), init
        names = {p.stem for p in (ROOT / package).rglob("*.py")} | {p.name for p in (ROOT / package).iterdir()}
        assert not names & FORBIDDEN


def test_W_11_multipart_is_never_parsed() -> None:
    assert importlib.util.find_spec("multipart") is None
    assert importlib.util.find_spec("python_multipart") is None
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                called = node.func if isinstance(node, ast.Call) else None
                assert not (isinstance(called, ast.Attribute) and called.attr == "form"), path


def test_no_registry_host_and_no_path_of_a_machine_is_written_down() -> None:
    hosts = "|".join(("py" + "pi.org", "python" + "hosted.org", "deb.deb" + "ian.org", "npm" + "js.org"))
    pattern = re.compile(rf"{hosts}|/{'work'}/|/{'root'}/")
    for path in tracked():
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".lock", ".sh", ".yaml", ".cedar", "", ".json"}:
            found = pattern.search(path.read_text(errors="replace"))
            assert found is None, f"{path}: {found}"


def test_X_02_every_locked_dependency_has_hashes() -> None:
    for lock in ("requirements.lock", "requirements-dev.lock"):
        entries = re.split(r"\n(?=\S)", (ROOT / lock).read_text().strip())
        for entry in entries:
            assert "==" in entry.split("\n")[0], entry
            assert "--hash=sha256:" in entry, entry
