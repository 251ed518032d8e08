"""Throw-away tokens: own directory, own configuration, random PINs in files nobody else reads."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

import softhsm


def test_tokens_are_made_once_in_their_own_directory(tmp_path: Path) -> None:
    made = softhsm.bring_up(tmp_path / "t", ["one", "two"])
    pins = {label: made.pin_file(label).read_bytes() for label in ("one", "two")}
    assert pins["one"] != pins["two"]
    assert all(len(pin) == 32 for pin in pins.values())
    for path in (tmp_path / "t").glob("*pin"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o700
    again = softhsm.bring_up(tmp_path / "t", ["one", "two", "three"])
    assert {label: again.pin_file(label).read_bytes() for label in ("one", "two")} == pins
    text = (tmp_path / "t" / "softhsm2.conf").read_text()
    assert f"directories.tokendir = {tmp_path / 't' / 'tokens'}" in text
    assert "library.reset_on_fork = true" in text


def test_a_missing_softhsm_is_told_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        ["/bin/sh", str(softhsm.SCRIPT), str(tmp_path), "x"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 69
    assert "apt-get install softhsm2" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_failure_of_the_tool_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(softhsm.SoftHsmUnavailable):
        softhsm.bring_up(tmp_path / "file" / "below", ["x"])
