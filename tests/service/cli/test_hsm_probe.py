"""`skms hsm probe`: what a token can do, by doing it; status 8 for one that must not serve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import softhsm
from harness import Files
from softhsm import nss


def skms(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service.cli.main", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
    )


@pytest.fixture(scope="module")
def nss_token(tmp_path_factory: pytest.TempPathFactory) -> nss.Nss:
    return nss.bring_up(tmp_path_factory.mktemp("nss") / "token")


def probed(token: nss.Nss, vendor: str, output: str = "json") -> subprocess.CompletedProcess[str]:
    place = ["--module", str(token.module), "--token-label", token.label, "--token-dir", str(token.directory)]
    return skms("-o", output, "hsm", "probe", "--vendor", vendor, *place, "--pin-file", str(token.pin_file))


def test_softhsm_may_serve_all_but_ed25519_and_takes_oaep_with_sha1_only(tmp_path: Path) -> None:
    tokens = softhsm.bring_up(tmp_path / "t", ["fresh"])
    place = ["--module", str(tokens.module), "--token-label", "fresh", "--pin-file", str(tokens.pin_file("fresh"))]
    done = skms("-o", "json", "hsm", "probe", "--vendor", "softhsm2", *place, environment=dict(tokens.environment))
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)
    assert report["verdict"] == "may serve"
    assert {f["verdict"] for f in report["self_test"]} == {"passed"}
    assert [kind for kind, lacking in report["kinds"] if lacking] == ["ED25519"]
    failed = {c["what"]: c["detail"] for c in report["checks"] if not c["works"]}
    assert failed == {
        "generate and wrap (AES-KWP)": "C_WrapKey: CKR_KEY_NOT_WRAPPABLE",
        "RSA-OAEP sha256 unwrap, 3072 bits": "C_UnwrapKey: CKR_ARGUMENTS_BAD",
        "RSA-OAEP sha256 unwrap, 4096 bits": "C_UnwrapKey: CKR_ARGUMENTS_BAD",
    }
    assert not list((tmp_path / "t" / "tokens").glob("*/*.object"))[1:]  # the token's own object, and none of ours


def test_nss_must_not_serve_and_says_why(nss_token: nss.Nss) -> None:
    done = probed(nss_token, "nss")
    assert done.returncode == 8, done.stderr
    (report,) = json.loads(done.stdout)
    assert report["verdict"] == "must not serve"
    assert [reason.split(":")[0] for reason in report["reasons"]] == [
        "unwrap_template_enforced",
        "wrap_of_non_extractable_refused",
        "root_kek_leaves_only_under_a_trusted_key",
        "copy_to_extractable_refused",
    ]
    assert all(c["works"] for c in report["checks"] if c["need"] == "import")


def test_nss_may_serve_in_tests(nss_token: nss.Nss) -> None:
    done = probed(nss_token, "nss-test", "table")
    assert done.returncode == 0, done.stderr
    assert "verdict: may serve in tests" in done.stdout
    assert "AES-256-GCM, 12-byte IV, AAD, 128-bit tag" in done.stdout


def test_a_wrong_pin_is_told_and_not_tried_again(nss_token: nss.Nss, tmp_path: Path) -> None:
    (tmp_path / "pin").write_text("wrong-pin-of-nobody")
    place = ["--module", str(nss_token.module), "--token-label", nss_token.label]
    more = ["--token-dir", str(nss_token.directory), "--pin-file", str(tmp_path / "pin")]
    done = skms("hsm", "probe", "--vendor", "nss", *place, *more)
    assert done.returncode == 8
    assert "refused its PIN" in done.stderr


def test_what_is_to_be_probed_must_be_named(dev_files: Files) -> None:
    config = str(dev_files.directory / "skms.toml")
    done = skms("hsm", "probe", "--config", config, "--hsm", "none")
    assert (done.returncode, "no [[hsm]] of this name" in done.stderr) == (2, True)
    done = skms("hsm", "probe", "--vendor", "softhsm2")
    assert (done.returncode, "--token-label" in done.stderr) == (2, True)
