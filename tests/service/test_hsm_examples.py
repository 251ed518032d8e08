"""deploy/hsm: one example per vendor that a configuration accepts; and which profiles may serve."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from keystore import SelfTestFailed
from keystore.pkcs11 import VENDORS
from service.config import load
from service.wiring import refuse_test_profile, token_configs

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.mark.parametrize("example", sorted((DEPLOY / "hsm").glob("*.toml")), ids=lambda p: p.stem)
def test_an_example_is_an_entry_of_a_configuration(example: Path, tmp_path: Path) -> None:
    whole = (DEPLOY / "skms.example.toml").read_text()
    head, rest = whole.split("\n[[hsm]]\n")
    tail = rest[rest.index("\n[policy]") :]
    file = tmp_path / "skms.toml"
    file.write_text(head + "\n" + example.read_text() + tail)
    (token,) = token_configs(load(file, environment={}))
    vendor = token.profile()
    assert vendor.name == example.stem
    assert token.module in vendor.modules
    assert bool(token.reserved()) is bool(vendor.reserved)


def test_every_vendor_that_can_serve_has_an_example() -> None:
    examples = {tomllib.loads(p.read_text())["hsm"][0]["vendor"] for p in (DEPLOY / "hsm").glob("*.toml")}
    assert examples == set(VENDORS) - {"nss", "p11-kit"}  # the self-test refuses these two


def test_a_test_profile_serves_under_a_development_charter_only(tmp_path: Path) -> None:
    token = token_configs(load(DEPLOY / "skms.example.toml", environment={}))[0]
    testing = dataclasses.replace(token, name="hsm-9", vendor="nss-test")
    refuse_test_profile(testing, development=True)
    refuse_test_profile(token, development=False)
    with pytest.raises(
        SelfTestFailed, match=r"HSM hsm-9: its profile 'nss-test' is for tests .*unwrap_template_enforced"
    ):
        refuse_test_profile(testing, development=False)
