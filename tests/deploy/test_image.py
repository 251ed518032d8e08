"""deploy/image: what the image is made of, and that the same commit makes the same. No container engine is needed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from dockerfile_parse import DockerfileParser

from harness import ROOT

DOCKERFILE = ROOT / "deploy" / "image" / "Dockerfile"
LOCKED = re.compile(r"^([a-z0-9-]+)==(\S+)", re.MULTILINE)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """build/image as `make image-context` fills it."""
    return _context(tmp_path_factory.mktemp("image"))


def _context(work: Path) -> Path:
    """In a copy of what git tracks: two builds must not share a directory that one of them left something in."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], capture_output=True, cwd=ROOT)
    names = [n for n in listed.stdout.decode().split("\0") if n and (ROOT / n).is_file()]
    for name in names:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes((ROOT / name).read_bytes())
    (work / "deploy" / "setup.sh").write_text("")  # the environment is this one, and is there
    (work / ".venv").symlink_to(Path(sys.prefix))
    made = subprocess.run(
        ["make", "image-context"], cwd=work, capture_output=True, env={**os.environ, "SOURCE_DATE_EPOCH": "1790000000"}
    )
    assert made.returncode == 0, made.stderr.decode()
    return work / "build" / "image"


def steps() -> list[dict[str, str]]:
    """The instructions of the Dockerfile, each with the name of its stage."""
    found, stage = [], ""
    with DOCKERFILE.open("rb") as file:
        structure = DockerfileParser(fileobj=file).structure
    for step in structure:
        if step["instruction"] == "FROM":
            stage = step["value"].split(" AS ")[-1] if " AS " in step["value"] else ""
        found.append({"stage": stage, "name": step["instruction"], "value": step["value"]})
    return found


def of(stage: str, *names: str) -> list[str]:
    return [s["value"] for s in steps() if s["stage"] == stage and s["name"] in names]


def test_the_image_runs_as_a_numbered_user_that_is_not_root() -> None:
    # A number: Kubernetes cannot tell of a name that it is not root.
    assert of("runtime", "USER") == ["10001:10001"]
    assert of("evaluation", "USER")[-1] == "10001:10001"
    assert [s["value"] for s in steps() if s["name"] == "FROM"][-1] == "runtime"  # what a build without --target makes


def test_nothing_is_resolved_while_the_image_is_built() -> None:
    assert not [s for s in steps() if s["name"] == "ADD"]
    fetched = [v for s in steps() if s["stage"] != "evaluation" for v in [s["value"]] if s["name"] == "RUN"]
    assert not [v for v in fetched if re.search(r"apt-get|curl|wget", v)]
    installs = re.findall(r"pip .*? install ([^&]*)", " ".join(fetched))
    assert len(installs) == 2
    for arguments in installs:
        assert "--no-deps" in arguments
        assert "--require-hashes" in arguments or "--no-index" in arguments


def test_everything_that_is_copied_is_in_the_context(context: Path) -> None:
    sources = [
        word for v in of("build", "COPY") + of("runtime", "COPY") if "--from" not in v for word in v.split()[:-1]
    ]
    assert {s for s in sources if not list(context.glob(s))} == set()
    assert {p.name for p in context.iterdir()} == {
        p.name for s in sources for p in context.glob(s)
    }  # and nothing else goes to the engine


def test_the_sbom_names_all_that_the_image_installs_with_hashes(context: Path) -> None:
    written = (context / "sbom.cdx.json").read_text()
    sbom = json.loads(written)
    wrong = JsonStrictValidator(SchemaVersion.from_version(sbom["specVersion"])).validate_str(written)
    assert wrong is None, wrong
    assert sbom["metadata"]["component"]["name"] == "sovereign-kms"
    listed = {(c["name"], c["version"]): c for c in sbom["components"]}
    assert set(listed) == set(LOCKED.findall((ROOT / "requirements.lock").read_text()))
    for component in listed.values():
        hashes = [h for r in component["externalReferences"] for h in r.get("hashes", [])]
        assert hashes, component["name"]


def test_the_same_commit_gives_the_same_bytes(context: Path, tmp_path: Path) -> None:
    again = _context(tmp_path)
    digests = [
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in made.iterdir()} for made in (context, again)
    ]
    assert digests[0] == digests[1]


def test_the_build_steps_make_an_environment_that_serves_from_read_only_files(context: Path, tmp_path: Path) -> None:
    (step,) = of("build", "RUN")
    step = step.replace("/opt/skms", f"{tmp_path}/skms").replace("/tmp/in", str(context))
    step = step.replace("python -m", f"{sys.executable} -m")
    made = subprocess.run(["sh", "-ec", step], capture_output=True, cwd=tmp_path)
    assert made.returncode == 0, made.stderr.decode()[-2_000:]
    installed = tmp_path / "skms" / "lib"
    before = {p: p.stat().st_mtime_ns for p in installed.rglob("*")}
    environment = {"PATH": f"{tmp_path}/skms/bin:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [f"{tmp_path}/skms/bin/skms", "config", "check", str(ROOT / "deploy" / "skms.example.toml")]
    asked = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path)
    assert asked.returncode in {0, 2}, asked.stderr  # 2: the example's witness policy is not on this machine
    assert b"internal" not in asked.stderr
    assert {p: p.stat().st_mtime_ns for p in installed.rglob("*")} == before
    compiled = list(installed.rglob("service/__pycache__/kms.*.pyc"))
    assert compiled
    assert compiled[0].read_bytes()[4:8] == b"\x01\0\0\0"  # PEP 552: by hash, and unchecked
