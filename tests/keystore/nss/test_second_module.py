"""NSS softokn: a second module, refused for what it really does wrong. In processes of their own: a process that has SoftHSM
and another module loaded would show less."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from keystore.hsm import Material
from softhsm import nss

SCRIPT = """
import sys, uuid
from pathlib import Path
from keystore.hsm import HsmUnavailable, SelfTestFailed
from keystore.pkcs11 import TokenConfig, initialise, open_token
vendor, module, directory, locks = sys.argv[1:]
config = TokenConfig(
    name="nss", region="eu-de-1", vendor=vendor, module=Path(module), token_label="NSS Certificate DB",
    token_dir=Path(directory), pin_file=Path(directory) / "pin", lock_dir=Path(locks), installation=uuid.UUID(int=7),
)
try:
    report = initialise(config)
except SelfTestFailed as refused:
    for part in str(refused).removeprefix("self-test ").split("; "):
        print(part)
else:
    print(*report.created, report.audit_algorithm)
    print(*report.specs)
"""


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> nss.Nss:
    return nss.bring_up(tmp_path_factory.mktemp("nss") / "token")


def initialised(token: nss.Nss, vendor: str, locks: Path) -> list[str]:
    command = [sys.executable, "-c", SCRIPT, vendor, str(token.module), str(token.directory), str(locks)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_test_profile_serves_all_kinds_that_nss_has(token: nss.Nss, tmp_path: Path) -> None:
    made, specs = initialised(token, "nss-test", tmp_path)
    assert made == "root-kek row-mac audit ECDSA P-256"
    assert specs.split() == [m for m in Material if m is not Material.ED25519]


def test_without_waivers_nss_is_refused_for_exactly_what_it_does_wrong(token: nss.Nss, tmp_path: Path) -> None:
    assert initialised(token, "nss", tmp_path) == [
        "unwrap_template_enforced: CKA_UNWRAP_TEMPLATE of the root KEK is not enforced: a blob was unwrapped as readable",
        "wrap_of_non_extractable_refused: a key that is not extractable was wrapped",
        "root_kek_leaves_only_under_a_trusted_key: the root KEK was wrapped under a key that no security officer made "
        "trusted",
        "copy_to_extractable_refused: C_CopyObject made a readable or extractable copy of a key that is neither",
        "this token must not serve",
    ]
