"""A throw-away NSS token: made once, served by the same code as every other token."""

from __future__ import annotations

import stat
import uuid
from pathlib import Path

import pytest

from keystore.hsm import HsmUnavailable
from keystore.pkcs11 import TokenConfig
from softhsm import nss


def config_of(made: nss.Nss, tmp_path: Path, **other: object) -> TokenConfig:
    facts: dict[str, object] = {
        "name": "nss",
        "region": "eu-de-1",
        "vendor": "nss-test",
        "module": made.module,
        "token_label": made.label,
        "token_dir": made.directory,
        "pin_file": made.pin_file,
        "lock_dir": tmp_path,
        "installation": uuid.uuid4(),
    }
    return TokenConfig(**(facts | other))


def test_the_token_is_made_once_with_a_pin_nobody_else_reads(tmp_path: Path) -> None:
    made = nss.bring_up(tmp_path / "n")
    pin, database = made.pin_file.read_bytes(), (tmp_path / "n" / "key4.db").read_bytes()
    assert len(pin) == 32
    assert stat.S_IMODE(made.pin_file.stat().st_mode) == 0o600
    assert nss.bring_up(tmp_path / "n") == made
    assert (made.pin_file.read_bytes(), (tmp_path / "n" / "key4.db").read_bytes()) == (pin, database)


def test_the_profile_fills_in_the_token_directory(tmp_path: Path) -> None:
    made = nss.bring_up(tmp_path / "n")
    assert config_of(made, tmp_path).reserved() == made.reserved.encode()
    with pytest.raises(HsmUnavailable, match="token_dir"):
        config_of(made, tmp_path, token_dir=None).reserved()
    with pytest.raises(HsmUnavailable, match="quotation mark"):
        config_of(made, tmp_path, token_dir=tmp_path / "it's").reserved()
