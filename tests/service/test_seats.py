"""One answer for all workers of a node: what they count adds up, and stays when one of them is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness import Served, served


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("pair") / "node", "--workers", "2") as node:
        eventually(lambda: metrics(node)["skms_workers"] == 2, "the second worker does not serve")
        yield node


def eventually(true: Callable[[], object], said: str, *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError, KeyError):  # a killed worker's connections end unanswered
            if true():
                return
        assert time.monotonic() < deadline, said
        time.sleep(0.05)


def metrics(node: Served) -> dict[str, float]:
    """What one scrape says, over a connection of its own: whichever worker takes it."""
    with node.client("platform") as client:
        text = client.get("/metrics").raise_for_status().text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
            name = sample.name + (f"{{{labels}}}" if labels else "")
            assert name not in found, f"{name} twice: two workers' samples stand beside each other"
            found[name] = sample.value
    return found


def workers(node: Served) -> list[int]:
    return [child.pid for child in psutil.Process(node.process.pid).children()]


def asked(node: Served, times: int) -> set[int]:
    """Ask, each time over a connection of its own; the workers that hold ends of connections."""
    took = set[int]()
    for _ in range(times):
        with node.client("health-eu-de-1") as client:
            client.get("/v1/whoami").raise_for_status()
            ours = {c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == "ESTABLISHED"}
            for pid in workers(node):
                if any(c.raddr and c.raddr.port in ours for c in psutil.Process(pid).net_connections("tcp")):
                    took.add(pid)
    return took


def counted(node: Served) -> float:
    with node.client("platform") as client:
        text = client.get("/metrics").raise_for_status().text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "skms_operations_total" and sample.labels["op"] == "whoami"
    )


def test_what_two_workers_count_is_one_number_whichever_is_asked(pair: Served) -> None:
    before, sent, took = counted(pair), 0, set[int]()
    while len(took) < 2:
        took |= asked(pair, 5)
        sent += 5
        assert sent < 2_000, "only one worker takes connections"
    eventually(lambda: counted(pair) == before + sent, "not every request was counted")
    assert {counted(pair) for _ in range(20)} == {before + sent}
    found = metrics(pair)
    assert found['skms_audit_state{state="RUNNING"}'] == 2
    assert found["skms_audit_running"] == 1
    assert found['skms_operation_seconds_count{op="whoami"}'] == before + sent
    assert time.time() - found["skms_worker_refreshed_timestamp_seconds"] < 30


def test_a_killed_worker_s_counts_stay_and_its_gauges_go(pair: Served) -> None:
    took = set[int]()
    while len(took) < 2:
        took |= asked(pair, 5)
    before = counted(pair)
    calls = sum(v for k, v in metrics(pair).items() if k.startswith("skms_hsm_calls_total"))
    for victim in sorted(took):  # one of them has counted most of it, and the other one the rest
        os.kill(victim, signal.SIGKILL)
        eventually(lambda gone=victim: gone not in workers(pair), "the killed worker is still there")
        eventually(lambda: metrics(pair)["skms_workers"] == 2, "no other worker came")
        assert counted(pair) == before
    found = metrics(pair)
    assert found['skms_audit_state{state="RUNNING"}'] == 2
    assert sum(v for k, v in found.items() if k.startswith("skms_hsm_calls_total")) >= calls
    directory = (pair.directory / "state" / "metrics").readlink()
    assert {name.rpartition("_")[2] for name in os.listdir(directory)} == {"0.db", "1.db"}


def test_the_directory_goes_with_the_node_and_the_next_start_removes_what_a_kill_left(tmp_path: Path) -> None:
    pointer = tmp_path / "node" / "state" / "metrics"
    with served(tmp_path / "node") as node:
        left = pointer.readlink()
        os.killpg(node.process.pid, signal.SIGKILL)
        node.process.wait(30)
    assert left.is_dir()
    with served(tmp_path / "node"):
        assert not left.exists()
        second = pointer.readlink()
        assert oct(second.stat().st_mode & 0o777) == "0o700"
    assert not second.exists()
    assert not pointer.is_symlink()
