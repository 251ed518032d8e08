"""The root KEK on its way from token to token: real tokens of two vendors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `ceremony_lab`: this folder is named like a package of the product

import ceremony_lab as lab
from ceremony_lab import in_process


@pytest.mark.parametrize(("source", "target"), [("one", "two"), ("one", "nss"), ("nss", "one")])
def test_rows_need_no_change_on_the_token_that_joined(tmp_path: Path, source: str, target: str) -> None:
    report, equal, left = in_process(lab.move, tmp_path, source, target)
    assert report.moved == ("root-kek/1", "row-mac/1", "audit")
    assert equal == dict.fromkeys(("AES_256", "KDK_512", "HMAC_256", "EC_P256", "RSA_3072"), True)
    assert left == 0
    flags = in_process(lab.root_flags, tmp_path, target)
    assert flags == in_process(lab.root_flags, tmp_path, source), "the root is the same object on both"
    assert {name for name, on in flags.items() if on} == {
        *("TOKEN", "PRIVATE", "SENSITIVE", "EXTRACTABLE", "WRAP_WITH_TRUSTED", "WRAP", "UNWRAP")
    }


def test_the_user_pin_alone_takes_no_root_away(tmp_path: Path) -> None:
    answers = in_process(lab.take_away_with_the_user_pin, tmp_path)
    assert answers["wrap"] == "CKR_KEY_NOT_WRAPPABLE"
    assert "CKR_OK" not in answers.values(), answers


def test_a_wrong_pin_of_the_security_officer_is_tried_once_and_leaves_nothing(tmp_path: Path) -> None:
    refusal, logins, left = in_process(lab.wrong_officer, tmp_path)
    assert "refused the security officer's PIN (CKR_PIN_INCORRECT); it was tried once" in refusal
    assert (logins, left) == (1, 0)


@pytest.mark.parametrize(("step", "there"), [("transport-key-trusted", ()), ("transferred", ("root-kek/1",))], ids=str)
def test_a_join_killed_between_two_steps_goes_on_where_it_was(tmp_path: Path, step: str, there: tuple[str]) -> None:
    assert in_process(lab.die_at, tmp_path, step) == 9
    report, before, after = in_process(lab.join_again, tmp_path)
    assert report.existing == there
    assert before == 1, "the trusted key was left behind, and the next ceremony found it"
    assert after == 0
    report, _, _ = in_process(lab.join_again, tmp_path)
    assert report.moved == (), "a third call changes nothing"


def test_joins_that_cannot_be_say_why_and_what_to_do(tmp_path: Path) -> None:
    answers = in_process(lab.refused_joins, tmp_path)
    assert "is sealed" in answers["sealed"]
    assert "re-encrypt their data" in answers["sealed"]
    assert "another root-kek key under the same CKA_ID" in answers["foreign"]
    assert "are the same token" in answers["same"]
    assert "never leaves its region" in answers["region"]
    assert "skms hsm init" in answers["empty"]
    assert "--so-pin-file" in answers["no officer"]
    assert answers["left"] == "0"
