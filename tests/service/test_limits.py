"""Rate limits: how often tenants and keys may be used, what a caller is told, and what is never limited."""

from __future__ import annotations

import base64
import re
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import structs

from harness import Files, Lab, lab_of, new_key, with_database
from service.limits import Meter, Rate, RateLimited, RateLimits

WORKLOAD = "health-eu-de-1"


class Watch:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def taken(meter: Meter, name: str, rate: Rate, times: int) -> int:
    return sum(not meter.take(name, rate) for _ in range(times))


def test_a_burst_passes_and_then_the_rate() -> None:
    watch, rate = Watch(), Rate(10.0, 5)
    meter = Meter(names=10, monotonic=watch)
    assert taken(meter, "a", rate, 20) == 5
    assert meter.take("a", rate) == pytest.approx(0.1)
    assert taken(meter, "b", rate, 20) == 5
    for _ in range(10):
        watch.now += 0.1
        assert taken(meter, "a", rate, 3) == 1
    watch.now += 60
    assert taken(meter, "a", rate, 20) == 5  # what was not used for a minute is not saved up


def test_over_a_long_time_exactly_the_rate_passes() -> None:
    watch, rate = Watch(), Rate(7.0, 3)
    meter = Meter(names=10, monotonic=watch)
    passed = 0
    for _ in range(10_000):
        watch.now += 0.01
        passed += not meter.take("a", rate)
    assert 700 <= passed <= 703


def test_what_is_charged_is_paid_before_anything_else_passes() -> None:
    watch, rate = Watch(), Rate(10.0, 5)
    meter = Meter(names=10, monotonic=watch)
    meter.charge("a", rate, 105)
    assert meter.left("a", rate) == (0, pytest.approx(10.5))
    assert meter.take("a", rate) == pytest.approx(10.1)
    watch.now += 10.1
    assert taken(meter, "a", rate, 5) == 1


def test_memory_is_bounded_and_the_quiet_are_forgotten_first() -> None:
    rate = Rate(1.0, 1)
    meter = Meter(names=100, monotonic=Watch())
    for number in range(10_000):
        meter.take("busy", rate)
        meter.charge("busy", rate, 0)
        meter.take(str(number), rate)
    assert len(meter) == 100
    assert meter.take("busy", rate) > 0


def test_a_worker_has_its_share_and_tells_it() -> None:
    limits = RateLimits(tenant=100, tenants={"big": 800, "free": 0}, key=8, burst_s=3, workers=4, monotonic=Watch())

    def admitted(tenant: str | None) -> int:
        count = 0
        try:
            for _ in range(1_000):
                limits.admit(tenant)
                count += 1
        except RateLimited:
            pass
        return count

    assert [admitted(t) for t in ("small", "big", "free", None)] == [75, 600, 1_000, 1_000]
    assert limits.told("small") == (("ratelimit-policy", '"tenant";q=75;w=3'), ("ratelimit", '"tenant";r=0;t=3'))
    assert limits.told("other") == (("ratelimit-policy", '"tenant";q=75;w=3'), ("ratelimit", '"tenant";r=75;t=0'))
    assert limits.told("free") == limits.told(None) == ()
    for _ in range(6):
        limits.use("k")
    with pytest.raises(RateLimited) as refused:
        limits.use("k")
    assert refused.value.told[0] == ("ratelimit-policy", '"key";q=6;w=3')
    assert limits.refused == {"tenant": 2, "key": 1}


def test_without_a_limit_nothing_is_kept() -> None:
    limits = RateLimits()
    for number in range(100):
        limits.admit("a")
        limits.charge("a", 500)
        limits.use(str(number))
    assert limits.told("a") == ()
    assert not limits.keyed


def test_a_flood_of_urgent_requests_is_not_urgent_and_only_its_callers() -> None:
    watch = Watch()
    limits = RateLimits(monotonic=watch)
    assert sum(limits.urgent("one") for _ in range(1_000)) == 100
    assert limits.urgent("another")
    watch.now += 1
    assert sum(limits.urgent("one") for _ in range(1_000)) == 10


@pytest.fixture(scope="module")
async def limited(dev_files: Files, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    """A node whose tenant `defence` may ask hardly ever, and whose keys are used hardly ever; time does not give more back."""
    section = structs.replace(
        dev_files.config.limits, tenant_rate=0.001, tenant_rates={"health": 1e6}, key_rate=0.001, burst_s=60
    )
    async with lab_of(with_database(dev_files, tmp_path_factory.mktemp("limited"), limits=section)) as made:
        yield made


async def encrypt(lab: Lab, who: str, key: str) -> httpx.Response:
    return await lab.client(who).post(f"/v1/keys/{key}/encrypt", json={"plaintext": "aGk="})


def problem(answer: httpx.Response) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    return body


@pytest.mark.anyio
async def test_a_tenant_above_its_rate_is_told_so_and_nobody_else_is(limited: Lab) -> None:
    first = await limited.client("defence-eu-de-1").get("/v1/whoami")
    assert first.status_code == 200
    assert first.headers["ratelimit-policy"] == '"tenant";q=1;w=1000'
    assert re.fullmatch(r'"tenant";r=0;t=\d+', first.headers["ratelimit"])
    before = limited.node.kms.rates.refused["tenant"]
    for path in ("/v1/whoami", "/v1/keys", "/v1/no-such-thing"):
        answer = await limited.client("defence-eu-de-1").get(path)
        assert (answer.status_code, problem(answer)["code"]) == (429, "rate_limited")
        assert problem(answer)["retryable"] is True
        assert problem(answer)["executed"] is False
        assert 900 < int(answer.headers["retry-after"]) <= 1_000
        assert answer.headers["ratelimit-policy"] == '"tenant";q=1;w=1000'
        assert answer.headers["ratelimit"].startswith('"tenant";r=0;t=')
    assert limited.node.kms.rates.refused["tenant"] == before + 3
    assert (await limited.client(WORKLOAD).get("/v1/whoami")).status_code == 200
    assert (await limited.client(None).get("/v1/whoami")).status_code == 401  # nobody's: it counts for no tenant
    metrics = (await limited.client("platform").get("/metrics")).text
    assert f'skms_rate_limited_total{{limit="tenant"}} {before + 3}.0' in metrics


@pytest.mark.anyio
async def test_freezes_and_metrics_are_answered_above_every_limit(limited: Lab) -> None:
    for _ in range(2):
        answer = await limited.client("defence-officer").get("/v1/freezes")
    assert answer.status_code == 429
    reason = {"code": "incident", "reference": "INC-1"}
    body = {"scope": {"kind": "tag", "value": "case=none"}, "reason": reason, "mode": "halt"}
    frozen = await limited.client("defence-officer").post(
        "/v1/freezes", json=body, headers={"Idempotency-Key": uuid.uuid4().hex}
    )
    assert frozen.status_code == 201, frozen.text
    for path in ("/livez", "/readyz"):
        assert (await limited.client(None).get(path)).status_code == 200
    assert (await limited.client("platform").get("/metrics")).status_code == 200


@pytest.mark.anyio
async def test_a_key_used_too_often_is_refused_by_whatever_name_and_in_batches_too(limited: Lab) -> None:
    key, other = await new_key(limited, "AES_256", alias="often"), await new_key(limited, "AES_256")
    first = await encrypt(limited, WORKLOAD, key)
    assert first.status_code == 200
    for name in (key, "alias/often"):
        answer = await encrypt(limited, WORKLOAD, name)
        assert (answer.status_code, problem(answer)["code"]) == (429, "rate_limited")
        assert answer.headers["ratelimit-policy"].startswith('"key";q=1;')
        assert int(answer.headers["retry-after"]) > 900
    opened = await limited.client(WORKLOAD).post("/v1/decrypt", json={"ciphertext": first.json()["ciphertext"]})
    assert opened.status_code == 429
    items = [{"key": name, "plaintext": "aGk="} for name in (other, other, key)]
    told = (await limited.client(WORKLOAD).post("/v1/batch/encrypt", json={"items": items})).json()
    assert [r["status"] for r in told["results"]] == [200, 429, 429]
    assert (await limited.client("health-operator").get(f"/v1/keys/{key}")).status_code == 200  # no use of it


@pytest.mark.anyio
async def test_who_may_not_use_a_key_neither_uses_it_up_nor_learns_of_it(limited: Lab) -> None:
    key, stranger = await new_key(limited, "AES_256"), str(uuid.uuid4())
    for _ in range(3):
        far = await encrypt(limited, "health-us-mkt-1", key)
        assert far.status_code == 403
        assert (await encrypt(limited, WORKLOAD, stranger)).status_code == 404
    assert (await encrypt(limited, WORKLOAD, key)).status_code == 200


@pytest.mark.anyio
async def test_the_items_of_a_batch_count_one_by_one(dev_files: Files, tmp_path: Path) -> None:
    section = structs.replace(dev_files.config.limits, tenant_rates={"health": 0.5}, burst_s=60)  # 30 at once
    files = with_database(dev_files, tmp_path / "batch", limits=section)
    async with lab_of(files) as lab:
        key = await new_key(lab, "AES_256")
        items = [{"key": key, "plaintext": base64.b64encode(b"x").decode()} for _ in range(100)]
        client = lab.client(WORKLOAD)
        passed = await client.post("/v1/batch/encrypt", json={"items": items})
        assert passed.status_code == 200
        assert passed.headers["x-batch-failed"] == "0"
        answer = await client.post("/v1/batch/encrypt", json={"items": items[:1]})
        assert answer.status_code == 429
        assert 30 < int(answer.headers["retry-after"]) <= 150  # two seconds each, but for the burst


@pytest.mark.anyio
async def test_a_flood_above_the_limit_is_recorded_up_to_a_rate_and_counted_beyond(limited: Lab) -> None:
    log = limited.node.kms.log
    client = limited.client("defence-eu-fr-1")
    answers = [await client.get("/v1/whoami") for _ in range(200)]
    assert all(a.status_code == 429 for a in answers[1:])
    recorded = sum("audit-receipt" in a.headers for a in answers[1:])
    assert recorded < 100, "each refusal costs a durable record"
    before = log.next_seq
    await limited.node.kms.tell_refusals()
    assert log.next_seq > before  # the others stand in it as a number


def test_S_09_workers_share_the_rate_of_the_node(dev_files: Files) -> None:
    from service.wiring import rates_of

    section = structs.replace(dev_files.config.limits, tenant_rate=40.0, burst_s=1)
    shares = [rates_of(section, 4) for _ in range(4)]
    admitted = 0
    for share in shares:
        for _ in range(100):
            try:
                share.admit("a")
                admitted += 1
            except RateLimited:
                break
    assert 40 <= admitted <= 60  # and what time gave back meanwhile
