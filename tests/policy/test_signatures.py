"""Signed bundles: what may change without a new signature, and what may not."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from harness import officer
from policy import BundleRefused, Policy
from policy.bundle import SHIPPED, Bundle, read
from policy.signatures import Signer, add, check, is_part, statement
from service.cli.client import Failed
from service.cli.commands import app
from service.keyfiles import private_key, public_key

AUTHORITY, HEALTH, STRANGER = (Ed25519PrivateKey.generate() for _ in range(3))
SIGNERS = (Signer("bundle", AUTHORITY.public_key()), Signer("tenants/health", HEALTH.public_key()))
RULES = "tenants/health/00-roles.cedar"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The shipped bundle, signed by the authority and by one tenant."""
    made = Path(shutil.copytree(SHIPPED, tmp_path / "bundle"))
    sign(made, "bundle", AUTHORITY)
    sign(made, "tenants/health", HEALTH)
    return made


def sign(directory: Path, part: str, key: Ed25519PrivateKey) -> Path:
    return add(directory, part, key.sign(statement(read(directory), part)))


def checked(directory: Path) -> Bundle:
    bundle = read(directory)
    check(directory, bundle, SIGNERS)
    return bundle


def test_signatures_are_no_part_of_what_they_sign(directory: Path) -> None:
    assert checked(directory).digest == read(SHIPPED).digest


def test_what_is_signed_can_be_made_again_by_whoever_has_the_files() -> None:
    bundle = read(SHIPPED)
    for part, version in (("bundle", "1"), ("tenants/health", "-")):
        files = {
            path: hashlib.sha256((SHIPPED / path).read_bytes()).hexdigest()
            for path in bundle.sources
            if part == "bundle" or path.startswith("tenants/health/")
        }
        manifest = json.dumps({"files": files, "part": part}, sort_keys=True, separators=(",", ":")).encode()
        said = f"skms-policy-signature/v1\n{part} {version}\n{hashlib.sha256(manifest).hexdigest()}\n"
        assert statement(bundle, part) == said.encode()


def test_a_new_signature_takes_the_place_of_earlier_ones(tmp_path: Path) -> None:
    for signature in (bytes(64), b"\1" * 64):
        path = add(tmp_path, "tenants/health", signature)
        assert path == tmp_path / "signatures/tenants/health.sig"
        assert path.read_text() == base64.b64encode(signature).decode() + "\n"


def append(path: str, text: str = "\n") -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / path).write_text((directory / path).read_text() + text)

    return change


def raise_version(directory: Path) -> None:
    charter = directory / "charter.yaml"
    version = read(directory).version
    charter.write_text(charter.read_text().replace(f"version: {version}", f"version: {version + 1}", 1))
    assert read(directory).version == version + 1


def remove(path: str) -> Callable[[Path], None]:
    return lambda directory: (directory / path).unlink()


@pytest.mark.parametrize(
    ("change", "by_tenant"),
    [
        (append("charter/00-charter.cedar"), False),
        (append("charter.yaml"), False),
        (append("cases/charter.yaml"), False),
        (append("tenants/defence/members.yaml"), False),
        (raise_version, False),
        (remove("cases/charter.yaml"), False),
        (append(RULES), True),
        (remove("tenants/health/members.yaml"), True),
    ],
)
def test_a_changed_part_wants_the_signatures_of_all_to_whom_it_belongs(
    directory: Path, change: Callable[[Path], None], by_tenant: bool
) -> None:
    change(directory)
    with pytest.raises(BundleRefused, match=r"signatures/bundle\.sig:0: no signature of a signer of 'bundle'"):
        checked(directory)
    sign(directory, "bundle", AUTHORITY)
    if by_tenant:  # the authority alone does not change a tenant's rules
        with pytest.raises(BundleRefused, match=r"signatures/tenants/health\.sig:0: no signature of a signer"):
            checked(directory)
        sign(directory, "tenants/health", HEALTH)
    checked(directory)


def test_a_signature_of_one_part_or_of_a_stranger_is_none_of_another(directory: Path) -> None:
    for part, key in (("bundle", STRANGER), ("bundle", HEALTH), ("tenants/health", AUTHORITY)):
        kept = (directory / "signatures" / f"{part}.sig").read_text()
        path = sign(directory, part, key)
        with pytest.raises(BundleRefused, match="no signature of a signer"):
            checked(directory)
        path.write_text(kept)
    whole = directory / "signatures/bundle.sig"
    of_tenant = directory / "signatures/tenants/health.sig"
    of_tenant.write_text(whole.read_text())
    both = (*SIGNERS, Signer("tenants/health", AUTHORITY.public_key()))
    with pytest.raises(BundleRefused, match="tenants/health"):  # the right key, over another part
        check(directory, read(directory), both)


def test_of_several_signatures_one_is_enough_so_that_keys_can_be_changed(directory: Path) -> None:
    path = directory / "signatures/bundle.sig"
    other = base64.b64encode(STRANGER.sign(b"anything")).decode()
    path.write_text(f"{other}\n{path.read_text()}")
    checked(directory)
    check(directory, read(directory), (Signer("bundle", STRANGER.public_key()), *SIGNERS))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"bundle\.sig:0: not there, and the configuration wants it"),
        (b"", "no signature of a signer"),
        (b"\xff\xfe\n", r"bundle\.sig:1: not base64"),
        (base64.b64encode(bytes(63)), r"bundle\.sig:1: not a signature of 64 bytes"),
        (base64.b64encode(bytes(65)), r"bundle\.sig:1: not a signature of 64 bytes"),
        (base64.b64encode(bytes(64)), "no signature of a signer"),
        (base64.b64encode(bytes(64)) + b"\nno\n", r"bundle\.sig:2: not base64"),
        (base64.b64encode(bytes(64)) + b"\n\n", r"bundle\.sig:2: not a signature of 64 bytes"),
        (b"A" * 5_000, "larger than 4096 bytes"),
    ],
)
def test_a_file_that_holds_no_signature_is_refused(directory: Path, content: bytes | None, says: str) -> None:
    path = directory / "signatures/bundle.sig"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(BundleRefused, match=says):
        checked(directory)


def test_a_signer_of_a_tenant_that_left_is_asked_for_nothing_more(directory: Path) -> None:
    check(directory, read(directory), (*SIGNERS, Signer("tenants/gone", HEALTH.public_key())))


def test_names_of_parts_are_no_paths() -> None:
    assert [
        n for n in ("bundle", "tenants/a", "tenants/../a", "tenants/", "/etc", "tenants/a/b", "") if is_part(n)
    ] == [
        "bundle",
        "tenants/a",
    ]


@pytest.mark.parametrize("by_card", [False, True])
def test_a_bundle_is_signed_with_a_key_file_or_elsewhere(tmp_path: Path, by_card: bool) -> None:
    key, public = officer(tmp_path, "authority")
    directory = Path(shutil.copytree(SHIPPED, tmp_path / "bundle"))
    for part in ("bundle", "tenants/health"):
        how = ["policy", "sign", str(directory), "--part", part]
        if by_card:
            said = CliRunner().invoke(app, how).stdout_bytes
            (tmp_path / "made").write_bytes(private_key(key).sign(said))
            done = CliRunner().invoke(app, [*how, "--signature", str(tmp_path / "made")])
        else:
            done = CliRunner().invoke(app, [*how, "--key", str(key)])
        assert done.exit_code == 0, done.output
    Policy.load(directory, signers=[Signer(p, public_key(public)) for p in ("bundle", "tenants/health")], sample=25)


@pytest.mark.parametrize(
    "how", [["--part", "tenants/nobody"], ["--part", "../x"], ["--key", "nowhere.key"], ["--signature", "short"]]
)
def test_a_bundle_is_not_signed_for_a_part_or_with_a_key_that_there_is_not(tmp_path: Path, how: list[str]) -> None:
    directory = Path(shutil.copytree(SHIPPED, tmp_path / "bundle"))
    (tmp_path / "short").write_bytes(bytes(63))
    with contextlib.chdir(tmp_path):
        done = CliRunner().invoke(app, ["policy", "sign", str(directory), *how])
    assert done.exit_code != 0
    assert isinstance(done.exception, Failed)
    assert not (directory / "signatures").exists()
