"""Two tokens in one group, as operators meet them: status, drain, exit drills and their ends, roles, a worker's death."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml

from databases import POSTGRESQL, behind
from harness import Served, served, skms

A, B = "softhsm-eu-de-1", "softhsm-eu-de-1-2"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A node of two workers and two tokens."""
    with served(tmp_path_factory.mktemp("pair") / "node", "--hsms", "2", "--workers", "2") as running:
        yield running


@pytest.fixture
def platform(pair: Served) -> Iterator[httpx.Client]:
    with pair.client("platform") as client:
        yield client
        for drill in client.get("/v1/drills").json()["items"]:
            if drill["state"] == "running":
                client.post(f"/v1/drills/{drill['id']}/abort")
        for name in (A, B):
            client.post(f"/v1/hsms/{name}/undrain")
        until(lambda: all(h["state"] == "UP" and h["admin"] == "active" for h in hsms(client).values()))


@pytest.fixture(scope="module")
def keys(pair: Served) -> list[str]:
    made = []
    with pair.client("health-operator") as operator:
        for number in range(30):
            spec = ("AES_256", "EC_P256", "HMAC_256")[number % 3]
            body = {"spec": spec, "tier": 2, "home": "eu-de-1"}
            if number % 6 == 0:
                body["suite"] = "0x0002"
            answer = operator.post("/v1/keys", json=body, headers=fresh())
            assert answer.status_code == 201, answer.text
            made.append(answer.json()["id"])
    return made


def fresh() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


def hsms(client: httpx.Client) -> dict[str, Any]:
    return {h["name"]: h for h in client.get("/v1/hsms").json()["items"]}


def until(done: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def begin(client: httpx.Client, *, observe: str = "PT0S", rate: int = 10_000, **more: Any) -> dict[str, Any]:
    body = {"kind": "exit", "from": A, "to": B, "observe": observe, "rate": rate, "window": "PT1S", **more}
    answer = client.post("/v1/drills", json=body, headers=fresh())
    deadline = time.monotonic() + 30
    # The worker that is asked may not have seen its canary yet, nor that the test before undrained the HSM through another one.
    while re.search("is SUSPECT|is drained", answer.text) and time.monotonic() < deadline:
        time.sleep(0.05)
        answer = client.post("/v1/drills", json=body, headers=fresh())
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/operations/{answer.json()['id']}"
    made: dict[str, Any] = answer.json()
    return made


def reach(client: httpx.Client, drill: str, step: str, seconds: float = 30.0) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def there() -> bool:
        found.update(client.get(f"/v1/operations/{drill}").json())
        assert found["state"] == "running", found
        return bool(found["step"] == step)

    until(there, seconds)
    return found


def wanted(client: httpx.Client) -> dict[str, str]:
    return {name: h["admin"] for name, h in hsms(client).items()}


def test_status_shows_each_member(platform: httpx.Client) -> None:
    found = hsms(platform)
    assert set(found) == {A, B}
    assert len({h["token_serial"] for h in found.values()}) == 2
    assert len({h["root_kek"] for h in found.values()}) == 1
    for h in found.values():
        assert (h["admin"], h["state"], h["last_error"], h["waivers"]) == ("active", "UP", "", [])


def test_a_drained_member_gets_no_call_on_any_worker_and_nobody_is_refused(
    pair: Served, platform: httpx.Client, keys: list[str]
) -> None:
    answer = platform.post(f"/v1/hsms/{A}/drain")
    assert (answer.status_code, answer.json()["admin"]) == (200, "drained")
    time.sleep(0.5)
    with pair.client("health-eu-de-1") as workload:
        for _ in range(30):
            assert workload.post(f"/v1/keys/{keys[0]}/encrypt", json={"plaintext": "aGk="}).status_code == 200
    last = platform.post(f"/v1/hsms/{B}/drain")
    assert (last.status_code, last.json()["code"]) == (409, "hsm_state_invalid")
    assert "no usable HSM would be left" in last.json()["detail"]
    assert platform.post(f"/v1/hsms/{A}/undrain").json()["admin"] == "active"
    until(lambda: hsms(platform)[A]["state"] == "UP")
    assert platform.post("/v1/hsms/nothing/drain").status_code == 404
    told = platform.get("/metrics").text
    assert f'skms_hsm_calls_total{{hsm="{B}"}}' in told
    assert f'skms_hsm_in_flight{{hsm="{A}"}}' in told


@pytest.mark.parametrize("name", ["health-operator", "health-officer", "health-auditor", "health-eu-de-1"])
def test_nobody_of_a_tenant_moves_hsms(pair: Served, keys: list[str], name: str) -> None:
    unknown = uuid.uuid4()
    with pair.client(name) as client:
        body = {"kind": "exit", "from": A, "to": B}
        for method, path, sent in (
            ("POST", f"/v1/hsms/{A}/drain", None),
            ("POST", f"/v1/hsms/{A}/undrain", None),
            ("POST", "/v1/drills", body),
            ("GET", "/v1/drills", None),
            ("GET", f"/v1/drills/{unknown}", None),
            ("GET", f"/v1/drills/{unknown}/report", None),
            ("POST", f"/v1/drills/{unknown}/abort", None),
            ("POST", f"/v1/drills/{unknown}/confirm", None),
            ("GET", f"/v1/operations/{unknown}", None),
        ):
            answer = client.request(method, path, json=sent, headers=fresh())
            assert (answer.status_code, answer.json()["code"]) == (403, "policy_denied"), (path, answer.text)


def test_a_drill_proves_every_key_switches_and_is_confirmed(
    pair: Served, platform: httpx.Client, keys: list[str]
) -> None:
    drill = begin(platform)["id"]
    shown = reach(platform, drill, "confirm")
    assert shown["progress"]["done"] == shown["progress"]["total"] >= len(keys)
    assert wanted(platform) == {A: "fallback", B: "active"}
    refused = platform.post(f"/v1/hsms/{A}/drain")
    assert (refused.status_code, drill in refused.json()["detail"]) == (409, True)
    second = platform.post("/v1/drills", json={"kind": "exit", "from": A, "to": B}, headers=fresh())
    assert second.status_code == 409
    report = platform.get(f"/v1/drills/{drill}/report").json()
    assert report["keys"]["keys"] >= len(keys)
    assert report["keys"]["mismatches"] == []
    assert [s["step"] for s in report["steps"]] == ["switched", "observed"]
    assert report["refused"] == {}
    done = platform.post(f"/v1/drills/{drill}/confirm").json()
    assert (done["state"], done["result"]["refused"]) == ("succeeded", 0)
    assert wanted(platform) == {A: "drained", B: "active"}
    assert 'skms_exit_drill_seconds{outcome="succeeded",vendor="softhsm2"}' in platform.get("/metrics").text
    assert platform.post(f"/v1/drills/{drill}/abort").status_code == 409


def test_the_report_counts_the_same_as_the_exported_records(
    pair: Served, platform: httpx.Client, keys: list[str]
) -> None:
    drill = begin(platform, observe="PT1S")["id"]
    with pair.client("health-eu-de-1") as workload:
        sent = 0
        while platform.get(f"/v1/drills/{drill}").json()["step"] != "confirm":
            assert workload.post(f"/v1/keys/{keys[0]}/encrypt", json={"plaintext": "aGk="}).status_code == 200
            sent += 1
    report = platform.get(f"/v1/drills/{drill}/report").json()
    assert report["requests"] == sent
    assert report["phases"]["switch"]["p99_us"] >= report["phases"]["switch"]["p50_us"] > 0
    assert sum(span["records"] for span in report["logs"]) >= sent
    shown = skms("-o", "json", "drill", "report", drill, env=identified(pair))
    assert b'"requests": %d' % sent in shown.stdout


def identified(pair: Served) -> dict[str, str]:
    return {**os.environ, "SKMS_DEV_DIR": str(pair.directory), "SKMS_IDENTITY": "platform"}


@pytest.mark.parametrize("step", ["verify", "observe", "confirm"])
def test_a_drill_is_aborted_at_any_step_and_all_is_as_before(
    pair: Served, platform: httpx.Client, keys: list[str], step: str
) -> None:
    with pair.client("health-eu-de-1") as workload:
        sealed = workload.post(f"/v1/keys/{keys[0]}/encrypt", json={"plaintext": "aGk="}).json()["ciphertext"]
        slow: dict[str, dict[str, Any]] = {"verify": {"rate": 1}, "observe": {"observe": "PT60S"}}
        drill = begin(platform, **slow.get(step, {}))["id"]
        reach(platform, drill, step)
        ended = platform.post(f"/v1/drills/{drill}/abort").json()
        assert (ended["state"], ended["result"]["why"]) == ("cancelled", "aborted")
        until(lambda: wanted(platform) == {A: "active", B: "active"})  # the other worker follows within its poll
        time.sleep(0.6)  # the job, had it not noticed, would have gone on by now
        assert wanted(platform) == {A: "active", B: "active"}
        opened = workload.post("/v1/decrypt", json={"ciphertext": sealed})
        assert opened.json()["plaintext"] == "aGk="
    assert platform.get(f"/v1/drills/{drill}").json()["state"] == "cancelled"


def test_a_key_that_differs_stops_the_drill_and_is_named(pair: Served, platform: httpx.Client) -> None:
    with pair.client("health-operator") as operator:
        body = {"spec": "AES_256", "tier": 2, "home": "eu-de-1"}
        key = operator.post("/v1/keys", json=body, headers=fresh()).json()["id"]
    database = pair.environment["database_url"]
    zeros = "decode(repeat('00', 72), 'hex')" if POSTGRESQL else "zeroblob(72)"
    forge(database, f"UPDATE keystore_version SET blob = {zeros} WHERE key_id = '{key}'")
    drill = begin(platform)["id"]
    until(lambda: platform.get(f"/v1/drills/{drill}").json()["state"] == "failed")
    result = platform.get(f"/v1/drills/{drill}").json()["result"]
    assert (result["why"], result["mismatches"]) == ("mismatch", [f"{key}/1: row_damaged"])
    assert wanted(platform) == {A: "active", B: "active"}
    forge(database, f"DELETE FROM keystore_key WHERE key_id = '{key}'")


def forge(database: str, statement: str) -> None:
    behind(database, statement, "UPDATE keystore_epoch SET epoch = epoch + 1")


def test_what_cannot_be_drilled_is_refused_with_its_reason(platform: httpx.Client) -> None:
    def refused(**body: Any) -> tuple[int, str]:
        answer = platform.post("/v1/drills", json={"kind": "exit", **body}, headers=fresh())
        return answer.status_code, answer.json()["code"]

    assert refused(**{"from": A, "to": A}) == (422, "validation_failed")
    assert refused(**{"from": A, "to": "nothing"}) == (422, "validation_failed")
    assert refused(**{"from": "nothing", "to": A}) == (404, "not_found")
    platform.post(f"/v1/hsms/{B}/drain")
    assert refused(**{"from": A, "to": B}) == (409, "hsm_state_invalid")


def test_a_drill_outlives_the_workers_that_moved_it(pair: Served, platform: httpx.Client, keys: list[str]) -> None:
    drill = begin(platform, rate=20)["id"]
    until(lambda: platform.get(f"/v1/drills/{drill}").json()["progress"]["done"] >= 10)
    children = subprocess.run(
        ["pgrep", "-P", str(pair.process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(children) == 2
    for child in children:
        os.kill(int(child), signal.SIGKILL)

    def back() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return platform.get("/readyz").status_code == 200
        return False

    until(back)
    shown = reach(platform, drill, "confirm", 45)
    assert shown["progress"]["done"] == shown["progress"]["total"]
    report = platform.get(f"/v1/drills/{drill}/report").json()
    assert report["keys"]["keys"] >= len(keys)
    assert len({s["log"] for s in report["logs"]}) >= 1


def test_the_log_verifies_with_the_keys_of_both_tokens(pair: Served) -> None:
    config = str(pair.directory / "skms.toml")
    exported = pair.directory / "exported"
    assert skms("audit", "export", "--config", config, "--to", str(exported)).returncode == 0
    trust = pair.directory / "trust.txt"
    assert sum(line.startswith("key ") for line in trust.read_text().splitlines()) == 2
    from audit.verify import main

    assert main([str(exported), "--trust", str(trust), "--accept-unanchored"]) == 0


def test_neither_a_drill_nor_a_join_brings_material_outside_its_residency(
    pair: Served, keys: list[str], platform: httpx.Client
) -> None:
    """The last one here: the charter says of the second token that it stands elsewhere, and no key is usable then."""
    charter = pair.directory / "policy/charter.yaml"
    read = yaml.safe_load(charter.read_text())
    read["copies"] = {B: {"kind": "wrap", "of": "eu-de-1", "places": ["eu-fr-1"]}}
    charter.write_text(yaml.safe_dump(read | {"version": read["version"] + 1}))
    assert platform.post("/v1/policy/reload").status_code == 200
    told = f"key -wrap-> root:eu-de-1 -wrap-> {B} in eu-fr-1, outside eu-de-1"
    body = {"kind": "exit", "from": A, "to": B, "observe": "PT1S", "window": "PT1S"}
    answer = platform.post("/v1/drills", json=body, headers=fresh())
    assert (answer.status_code, answer.json()["code"]) == (409, "hsm_state_invalid")
    assert told in answer.json()["detail"]
    joined = skms("hsm", "join", "--config", str(pair.directory / "skms.toml"), "--from", A, "--to", B)
    assert joined.returncode != 0
    assert told in " ".join(joined.stderr.decode().split())
