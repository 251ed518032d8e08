"""Vendor profiles: data that is checked whole, or refused by file and reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from keystore.pkcs11 import VENDORS, ProfileInvalid, Vendor
from keystore.pkcs11.errors import CkError, Fault, classify
from keystore.pkcs11.selftest import RULES
from keystore.pkcs11.vendors import load_profile, profile

MINIMAL = 'name = "mine"\ntitle = "Mine"\ntested = "device"\nkwp = 0x210B\n'


def written(directory: Path, text: str) -> Path:
    file = directory / "mine.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("vendor", VENDORS.values(), ids=lambda v: v.name)
def test_a_shipped_profile_says_where_its_facts_are_from(vendor: Vendor) -> None:
    assert vendor.sources
    assert vendor.notes
    assert vendor.modules
    assert set(vendor.waivers) <= {rule.__name__ for rule in RULES}


def test_only_the_test_profile_waives_anything() -> None:
    assert [v.name for v in VENDORS.values() if v.waivers or v.test] == ["nss-test"]
    assert {v.name for v in VENDORS.values() if v.tested == "device"} == set()


def test_a_vendor_is_a_file_of_the_operators_own(tmp_path: Path) -> None:
    made = profile(str(written(tmp_path, MINIMAL + '[call_limits]\nlogin = 5.0\n[environment]\nX = "1"\n')))
    assert (made.name, made.kwp, made.gcm, made.environment) == ("mine", 0x210B, 0x1087, {"X": "1"})
    assert [made.call_limit(f) for f in ("Login", "Sign", "GenerateKeyPair")] == [5.0, 10.0, 60.0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.kwp = 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (MINIMAL + "kpw = 1\n", "unknown field `kpw`"),
        (MINIMAL + "[call_limits]\nsign = 1.0\n", "unknown field `sign`"),
        (MINIMAL.replace("0x210B", '"0x210B"'), "Expected `int`"),
        (MINIMAL.replace('"device"', '"yes"'), "tested"),
        (MINIMAL.replace("kwp = 0x210B\n", ""), "missing required field `kwp`"),
        (MINIMAL.replace('"device"', '"documentation"'), "`sources` must say which"),
        (MINIMAL + 'waivers = ["gcm_vector"]\n', "only a profile with `test = true` may"),
        (MINIMAL + 'locking = "none"\n', "locking"),
        (MINIMAL + '[unwrap_extras]\nCKA_X = "ec_point"\n', "invalid literal"),
        ("name = ", "not TOML"),
    ],
)
def test_a_wrong_profile_is_refused_by_file_and_reason(tmp_path: Path, text: str, reason: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ProfileInvalid, match=reason) as refused:
        load_profile(file)
    assert str(file) in str(refused.value)


def test_a_missing_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileInvalid, match="cannot be read"):
        profile(str(tmp_path / "none.toml"))
    with pytest.raises(KeyError):
        profile("none")


def test_a_vendors_own_code_for_bad_input_is_ambiguous_where_input_is_judged() -> None:
    own = frozenset({0x16})
    assert classify(CkError(0x16, "C_Decrypt")) is Fault.DEVICE
    assert classify(CkError(0x16, "C_Decrypt"), own) is Fault.AMBIGUOUS
    assert classify(CkError(0x16, "C_Sign"), own) is Fault.DEVICE
