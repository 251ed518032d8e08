"""Files that are made to end, hang or fill the process that reads them: refused, with the process alive."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from policy import BundleRefused, Policy
from policy.bundle import SHIPPED, made, read
from policy.hostile import MAX_BRACKETS, MAX_LEVELS, MAX_POLICY, Refused, bound_policy, bound_yaml, read_file

ROLES, MEMBERS = "tenants/health/00-roles.cedar", "tenants/health/members.yaml"
HEAD = (
    '@id("health.x") @layer("tenant") @code("X-YZ")\n'
    'forbid (principal, action == Action::"encrypt", resource in Tenant::"health")\nwhen { '
)


def policy(condition: str) -> str:
    return f"{HEAD}{condition} }};\n"


DEEP = {
    "brackets": policy("(" * 20_000 + "true" + ")" * 20_000),
    "brackets beside comments": policy("( // )\n" * 20_000 + "true" + ")" * 20_000),
    "brackets after a carriage return": policy("// \r" + "(" * 200 + "//;\r" + "(" * 200 + "true" + ")" * 400),
    "sets": policy("[" * 20_000 + "1" + "]" * 20_000 + " == 1"),
    "records": policy("{a: " * 20_000 + "1" + "}" * 20_000 + " == 1"),
    "nots": policy("!(" * 20_000 + "true" + ")" * 20_000),
    "ifs": policy("if true then true else " * 20_000 + "true"),
    "ands": policy("true && " * 60_000 + "true"),
    "sums": policy("1 + " * 60_000 + "1 == 2"),
    "attributes": policy("context" + ".a" * 60_000 + " == 1"),
    "has": policy("context has a" + ".a" * 4_000),
    "no end": HEAD + "(" * 20_000,
    "in a string that does not end": HEAD + '"' + "(" * 20_000,
}
FLAT = {
    "YAML lists": "members: " + "[" * 100_000 + "]" * 100_000,
    "YAML blocks": "members:\n  " + "- " * 20_000 + "1",
    "YAML maps": "members: " + "{a: " * 50_000 + "1" + "}" * 50_000,
    "YAML aliases": "a: &a [x, x]\nb: &b [*a, *a]\nmembers: [*b, *b]",
    "YAML anchor": "members: &a []",
    "YAML merge": "members: [{<<: *a}]",
    "YAML long number": "members: [" + "9" * 500_000 + "]",
    "NUL": "members: []\n\0",
}
READ = """
import sys
from pathlib import Path
from policy.bundle import BundleRefused, read
try:
    read(Path(sys.argv[1]))
except BundleRefused as refused:
    print(refused.file, refused.line)
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        *(pytest.param(ROLES, t, id=n) for n, t in DEEP.items()),
        *(pytest.param(MEMBERS, t, id=n) for n, t in FLAT.items()),
    ],
)
def test_a_file_that_would_end_its_reader_is_refused_by_name(bundle: Path, file: str, text: str) -> None:
    (bundle / file).write_text(text)
    ran = subprocess.run(
        [sys.executable, "-c", READ, str(bundle)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.split()[:1] == [file]


def test_a_policy_within_the_bounds_is_taken(bundle: Path) -> None:
    """As deep as the bounds let it be, it is refused by its own compiler at the most, and ends nothing."""
    for condition in ("(" * 200 + "true" + ")" * 200, "true && " * 100 + "true", "context.now == 1 || " * 50 + "false"):
        (bundle / "tenants/health/99-more.cedar").write_text(policy(condition))
        assert read(bundle).rules["health.x"].effect == "forbid"
    bound_policy("(" * MAX_BRACKETS + "x" * (MAX_POLICY - MAX_BRACKETS))
    for more in ("(" * (MAX_BRACKETS + 1), "x" * (MAX_POLICY + 1), "." * 1_001):
        with pytest.raises(Refused):
            bound_policy(more)


def test_the_line_of_yaml_is_named() -> None:
    with pytest.raises(Refused) as refused:
        bound_yaml("a: 1\nb: 2\nc: &x 3\n")
    assert refused.value.line == 3
    bound_yaml("a: [[[{b: [1]}]]]\nc: '&x *y'\n")
    bound_yaml("[" * MAX_LEVELS + "]" * MAX_LEVELS)
    with pytest.raises(Refused, match="nested deeper than 32 levels"):
        bound_yaml("[" * (MAX_LEVELS + 1) + "]" * (MAX_LEVELS + 1))


@pytest.mark.parametrize("name", [ROLES, "charter.yaml", "cases/99.yaml"])
def test_a_pipe_a_socket_or_a_link_hangs_nobody(bundle: Path, name: str, tmp_path: Path) -> None:
    for made_of in ("pipe", "socket", "link"):
        path = bundle / name
        path.unlink(missing_ok=True)
        match made_of:
            case "pipe":
                os.mkfifo(path)
            case "socket":
                listening = socket.socket(socket.AF_UNIX)
                here = os.getcwd()
                os.chdir(path.parent)  # a socket's path is short
                listening.bind(path.name)
                os.chdir(here)
                listening.close()
            case _:
                path.symlink_to("/etc/hostname")
        with pytest.raises(BundleRefused):
            Policy.load(bundle)


def test_signatures_are_read_from_files_alone(tmp_path: Path) -> None:
    pipe = tmp_path / "bundle.sig"
    os.mkfifo(pipe)
    with pytest.raises(Refused, match="not a file"):
        read_file(pipe, most=100)
    pipe.unlink()
    pipe.write_bytes(b"x" * 101)
    with pytest.raises(Refused, match="larger than 100 bytes"):
        read_file(pipe, most=100)
    pipe.write_bytes(b"x" * 100)
    assert read_file(pipe, most=100) == b"x" * 100


def test_files_at_hand_are_bounded_as_those_of_a_directory_are() -> None:
    files = dict(Policy.load(SHIPPED).bundle.sources)
    with pytest.raises(BundleRefused) as refused:
        made({**files, ROLES: DEEP["brackets"].encode()})
    assert (refused.value.file, refused.value.line) == (ROLES, 1)
