"""One contract for every HSM that is here: SoftHSM2, NSS, and the fake that other tests trust."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import softhsm
from contracts import hsm_contract
from softhsm import nss

ROOT = Path(__file__).parents[2]


def in_a_process(place: dict[str, Any], environment: dict[str, str], locks: Path) -> dict[str, str]:
    facts = {"name": "contract", "region": "eu-de-1", "installation": str(uuid.uuid4()), "lock_dir": str(locks)}
    given = json.dumps({k: str(v) for k, v in (facts | place).items()})
    done = subprocess.run(
        [sys.executable, hsm_contract.__file__, given],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def of_softhsm(directory: Path) -> dict[str, str]:
    made = softhsm.bring_up(directory / "t", ["contract"])
    place = {"vendor": "softhsm2", "module": made.module, "token_label": "contract"}
    return in_a_process(place | {"pin_file": made.pin_file("contract")}, dict(made.environment), directory)


def of_nss(directory: Path) -> dict[str, str]:
    made = nss.bring_up(directory / "n")
    place = {"vendor": "nss-test", "module": made.module, "token_label": made.label}
    return in_a_process(place | {"pin_file": made.pin_file, "token_dir": made.directory}, {}, directory)


def of_memory(_: Path) -> dict[str, str]:
    sys.path.insert(0, str(ROOT / "tests" / "keystore"))
    from keystore_lab import TestHsm

    hsm = TestHsm()
    return hsm_contract.held(hsm_contract.Subject(hsm, lambda: hsm.calls["unwrap"]))


@pytest.mark.parametrize("results", [of_softhsm, of_nss, of_memory])
def test_an_hsm_keeps_the_contract(results: Callable[[Path], dict[str, str]], tmp_path: Path) -> None:
    assert results(tmp_path) == dict.fromkeys(hsm_contract.CLAIMS, "")
