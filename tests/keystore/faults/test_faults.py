"""The HSM front-end under faults, on real tokens of two vendors. Each case runs in a process of its own.

CI runs short forms; `make faults` runs FAULT_PAIRS=200000 and CROWD_SECONDS=600.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PAIRS = int(os.environ.get("FAULT_PAIRS", "8000"))
SECONDS = float(os.environ.get("CROWD_SECONDS", "120"))
VENDORS = ("softhsm2", "nss-test")


def last_line(script: str, *arguments: object, timeout: float) -> dict[str, Any]:
    """Run a script of this folder; its last line is its result."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr[-3_000:]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_storm_of_faults_gives_no_wrong_result_no_false_4xx_and_hardly_a_503(tmp_path: Path, vendor: str) -> None:
    told = last_line("storm.py", vendor, tmp_path, PAIRS, timeout=180 + PAIRS / 50)
    print(told)
    results = told["results"]
    refused = results.pop("forgeries refused")
    unavailable = results.pop("unavailable", 0)
    assert set(results) == {"ok"}, results  # nothing WRONG, ACCEPTED, FALSE or raised
    assert (pairs := results["ok"] + unavailable) >= PAIRS
    assert unavailable <= 0.005 * pairs
    assert refused > 0
    assert len(told["injected"]) == 8
    assert {"log_out", "close_all_sessions"} <= set(told["rogue"]), told["rogue"]
    assert told["epochs"] > 20
    assert told["sessions_open"] <= told["sessions_max"]
    assert told["all_keys_fine"]


def test_64_threads_meet_no_operation_active_and_the_pool_stays_below_its_limit(tmp_path: Path) -> None:
    told = last_line("crowd.py", "softhsm2", tmp_path, SECONDS, timeout=180 + SECONDS)
    print(told)
    # Who gets no session within two seconds is told to come again: on a busy machine hardly one of 64 threads ever.
    assert told["results"].pop("unavailable", 0) <= told["results"]["ok"] / 10_000
    assert set(told["results"]) == {"ok"}, told["results"]
    assert told["answers"] == {}  # not one C function answered anything but CKR_OK
    assert told["most_sessions"] <= told["sessions_max"]
    assert told["epoch"] == 1


def test_a_call_that_hangs_ends_the_process_with_70_while_others_are_answered(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "hang.py"), str(tmp_path), "hung"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (70, "others answered\n"), done.stderr


def test_a_slow_key_generation_during_a_recovery_is_waited_for(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "hang.py"), str(tmp_path), "slow"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_a_process_that_was_stopped_by_SIGSTOP_inside_a_call_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "hang.py"), str(tmp_path), "stopped"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stop me\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(3.0)  # three times the limit of a call
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "fine\n"), err


@pytest.fixture
def server_ends(tmp_path: Path) -> Iterator[None]:
    """The server and its connections end with the test, stopped or not."""
    yield
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int((tmp_path / "server.pid").read_text()), signal.SIGKILL)


@pytest.mark.usefixtures("server_ends")
def test_O3_a_remote_HSM_that_is_killed_and_restarted_is_back_within_ten_seconds(tmp_path: Path) -> None:
    told = last_line("remote.py", tmp_path, "killed", timeout=240)
    print(told)
    assert set(told["results"]) == {"ok", "unavailable"}, told["results"]
    assert told["back_after_s"] <= 10.0
    assert told["after"] > 100
    assert told["state"] == "UP"


@pytest.mark.usefixtures("server_ends")
def test_a_remote_HSM_that_is_stopped_ends_the_process_with_70_for_the_supervisor(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "remote.py"), str(tmp_path), "stopped"]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    subprocess.run(
        ["pkill", "-KILL", "-f", str(tmp_path)], check=False
    )  # what was stopped stays until somebody ends it
    assert done.returncode == 70, done.stderr
    assert time.monotonic() - begun < 28  # at 30 the script would have ended by itself


def test_R6_of_two_vendors_one_dies_under_load_and_hardly_a_call_fails(tmp_path: Path) -> None:
    told = last_line("failover.py", tmp_path / "node", timeout=120)
    print(told)
    results = told["results"]
    errors = results.pop("error", 0)
    assert set(results) == {"ok"}, results
    assert errors <= 0.01 * results["ok"]
    assert told["errors_for_s"] <= 2.0
    assert told["while_down"]["softhsm-eu-de-1"] == "UP"
    assert told["while_down"]["nss-eu-de-1"] != "UP"
    assert told["back_after_s"] <= 10.0
    assert told["usable"] == 2


@pytest.mark.parametrize("vendor", VENDORS)
def test_F26_a_process_without_descriptors_uses_its_token_again_once_it_has_some(tmp_path: Path, vendor: str) -> None:
    told = last_line("descriptors.py", vendor, tmp_path, timeout=120)
    print(told)
    assert told["wrong"] == 0
    assert "HsmEmpty" in told["during"] or vendor != "softhsm2", "the fault was not made"
    assert told["fine"], told
    assert told["back_s"] < 15, told
