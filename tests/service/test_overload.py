"""More than a node can do: who is refused, how, and what is answered all the same (R8, W-15)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec import structs

from harness import Files, Lab, lab_of, new_key, until, with_database
from service.turns import Turns

FULL = 8  # places; a tenant has six of them at the most
BEHIND = 4


@pytest.fixture(scope="module")
async def small(dev_files: Files, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    """A node with few places; what waits, waits for as long as a test takes."""
    section = structs.replace(dev_files.config.limits, in_flight=FULL, queue=BEHIND, queue_wait_s=30.0)
    async with lab_of(with_database(dev_files, tmp_path_factory.mktemp("small"), limits=section)) as made:
        yield made


def places(lab: Lab) -> Turns:
    """The places for requests of a node."""
    native: Any = lab.node.app
    assert isinstance(native.front.turns, Turns)
    return native.front.turns


class Request:
    """A request whose body comes when the test says so."""

    def __init__(
        self, lab: Lab, who: str | None, path: str = "/v1/random", body: bytes = b'{"bytes":16}', **extensions: object
    ) -> None:
        chain = [] if who is None else [lab.files.identities[who].cert_file.read_text()]
        headers = [(b"host", b"x"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        self._scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
            "client": ("127.0.0.1", 40_000),
            "extensions": {"tls": {"client_cert_chain": chain}, **extensions},
        }
        self._body, self._whole = body, asyncio.Event()
        self.asked_for_body = False
        self.status, self.headers, self.answer = 0, dict[str, str](), b""
        self.task = asyncio.create_task(lab.node.app(self._scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        self.asked_for_body = True
        await self._whole.wait()
        return {"type": "http.request", "body": self._body, "more_body": False}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        self.answer += message.get("body", b"")

    async def ended(self, *, whole: bool = True) -> int:
        """Its status, after the rest of its body if it wants that."""
        if whole:
            self._whole.set()
        await asyncio.wait_for(self.task, 60)
        return self.status

    def problem(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/problem+json"
        found: dict[str, Any] = json.loads(self.answer)
        return found


@contextlib.asynccontextmanager
async def crowd(lab: Lab) -> AsyncIterator[list[Request]]:
    """As many requests of `health` as it may have under way, and as many behind them as may wait."""
    turns = places(lab)
    requests = [Request(lab, "health-eu-de-1") for _ in range(6)]
    await until(lambda: all(r.asked_for_body for r in requests), "the first ones have no place")
    behind = [Request(lab, "health-eu-de-1") for _ in range(BEHIND)]
    await until(lambda: turns.waiting == BEHIND, "nobody waits")
    try:
        yield [*requests, *behind]
    finally:
        for request in (*requests, *behind):
            await request.ended()
        assert turns.inside == turns.waiting == 0


@pytest.mark.anyio
async def test_R8_a_full_node_refuses_early_and_typed_and_only_whoever_fills_it(small: Lab) -> None:
    async with crowd(small) as held:
        refused = Request(small, "health-eu-de-1")
        assert await refused.ended(whole=False) == 503
        told = refused.problem()
        assert (told["code"], told["retryable"], told["executed"]) == ("overloaded", True, False)
        assert refused.headers["retry-after"] == "1"
        assert not refused.asked_for_body
        assert not any(r.asked_for_body for r in held[6:])  # nor is the body of one that waits
        other = Request(small, "defence-eu-de-1")
        assert await other.ended() == 200
        answers = [await small.client("defence-eu-de-1").get("/v1/whoami") for _ in range(20)]
        assert {a.status_code for a in answers} == {200}
        metrics = (await small.client("platform").get("/metrics")).text
        assert "skms_requests_in_flight 6.0" in metrics
        assert f"skms_requests_waiting {BEHIND}.0" in metrics
        assert 'skms_overloaded_total{limit="queue"} 1.0' in metrics
    assert [r.status for r in held] == [200] * 10


@pytest.mark.anyio
async def test_what_stops_something_and_tells_how_the_node_is_is_never_shed(small: Lab) -> None:
    key = await new_key(small, "AES_256")
    token = {"scopes": ["encrypt"]}
    async with crowd(small):
        for path in ("/livez", "/readyz", "/openapi.json"):
            assert (await small.client(None).get(path)).status_code == 200
        assert (await small.client("platform").get("/metrics")).status_code == 200
        operator, officer = small.client("health-operator"), small.client("health-officer")
        assert (await operator.post("/v1/tokens", json=token)).status_code == 503  # the tenant's line is full
        reason = {"reason": {"code": "incident"}}
        stopped = await operator.post(f"/v1/keys/{key}/disable", json=reason)
        assert stopped.status_code == 200, stopped.text
        body = {"scope": {"kind": "key", "value": key}, "mode": "halt", **reason}
        frozen = await officer.post("/v1/freezes", json=body, headers={"Idempotency-Key": uuid.uuid4().hex})
        assert frozen.status_code == 201, frozen.text


@pytest.mark.anyio
async def test_one_that_waited_is_answered_in_its_turn(small: Lab) -> None:
    async with crowd(small) as held:
        for request in held[:3]:
            assert await request.ended() == 200
        await until(lambda: sum(r.asked_for_body for r in held[6:]) == 3, "no turn came")
        assert places(small).waiting == BEHIND - 3


@pytest.mark.anyio
async def test_one_that_waits_for_too_long_is_refused(dev_files: Files, tmp_path: Any) -> None:
    section = structs.replace(dev_files.config.limits, in_flight=1, queue=4, queue_wait_s=0.05)
    async with lab_of(with_database(dev_files, tmp_path / "short", limits=section)) as lab:
        first, second = Request(lab, "health-eu-de-1"), Request(lab, "health-eu-de-1")
        assert await second.ended(whole=False) == 503
        assert second.problem()["code"] == "overloaded"
        assert await first.ended() == 200


@pytest.mark.anyio
async def test_a_connection_too_many_is_for_urgent_requests_alone(small: Lab) -> None:
    refused = Request(small, "health-eu-de-1", crowded=True)
    assert await refused.ended(whole=False) == 503
    assert refused.problem()["code"] == "overloaded"
    missing = f"/v1/keys/{uuid.uuid4()}/disable"
    assert await Request(small, "health-operator", missing, b"", crowded=True).ended() == 404
    assert 'skms_overloaded_total{limit="connections"} 1.0' in (await small.client("platform").get("/metrics")).text


@pytest.mark.anyio
async def test_W_15_the_body_of_a_caller_without_a_credential_is_never_read(small: Lab) -> None:
    large = base64.b64encode(bytes(500_000))
    stranger = Request(small, None, body=b'{"plaintext":"' + large + b'"}')
    assert await stranger.ended(whole=False) == 401
    assert stranger.problem()["code"] == "unauthenticated"
    assert not stranger.asked_for_body
    assert places(small).inside == 0  # nor has it a place


@pytest.mark.anyio
async def test_W_15_a_flood_of_strangers_is_recorded_up_to_a_rate_and_answered_ever_later(small: Lab) -> None:
    log, loop = small.node.kms.log, asyncio.get_running_loop()
    before, begun = log.next_seq, loop.time()
    strangers = [Request(small, None) for _ in range(600)]
    busy = [await small.client("health-eu-de-1").get("/v1/whoami") for _ in range(10)]
    assert {a.status_code for a in busy} == {200}
    assert {await s.ended(whole=False) for s in strangers} == {401}
    assert loop.time() - begun >= 1.0, "refusals cost whoever floods nothing"
    recorded = sum("audit-receipt" in s.headers for s in strangers)
    assert 100 <= recorded <= 450
    await small.node.kms.tell_refusals()
    assert before + recorded < log.next_seq < before + 500


@pytest.mark.anyio
async def test_a_burst_of_heavy_signatures_of_one_tenant_does_not_hold_up_another(lab: Lab) -> None:
    mine = await new_key(lab, "RSA_4096")
    theirs, light = [await new_key(lab, spec, tenant="defence") for spec in ("RSA_4096", "AES_256")]
    message = {"message": "aGk=", "algorithm": "RSA_PSS_SHA_256"}
    left = 80

    async def sign() -> None:
        nonlocal left
        assert (await lab.client("health-eu-de-1").post(f"/v1/keys/{mine}/sign", json=message)).status_code == 200
        left -= 1

    burst = [asyncio.create_task(sign()) for _ in range(left)]
    await until(lambda: left < 80, "no signature")
    other = lab.client("defence-eu-de-1")
    for path, body in ((f"/v1/keys/{theirs}/sign", message), (f"/v1/keys/{light}/encrypt", {"plaintext": "aGk="})):
        before = left
        assert (await other.post(path, json=body)).status_code == 200
        assert before - left < 35, "it waited for the other tenant's burst"
    await asyncio.gather(*burst)
