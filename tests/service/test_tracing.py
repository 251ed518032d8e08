"""Spans over OTLP to a real TLS server that parses OpenTelemetry's own protobuf messages."""

from __future__ import annotations

import contextlib
import gzip
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from harness import ROOT, Files, Lab, lab_of, new_key, prepare_apart, serving, with_database
from receivers import Pki
from service.config import ConfigInvalid, TracingSection, load
from service.dev import free_port
from service.tracing import SEND_S, Tracing, TracingUnavailable

BODY = {"plaintext": "c2VjcmV0", "context": {"row": "in-confidence"}}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass
class Collector:
    """What a collector has been sent."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    resources: list[dict[str, str]] = field(default_factory=list)
    raw: bytes = b""

    def of(self, trace: str) -> dict[str, Span]:
        return {s.name: s for s in self.spans if s.trace_id.hex() == trace}


@contextlib.contextmanager
def collecting(pki: Pki) -> Iterator[Collector]:
    held = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
            assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
            held.raw += body
            for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                held.resources.append({a.key: a.value.string_value for a in of_resource.resource.attributes})
                for scope in of_resource.scope_spans:
                    held.spans += scope.spans
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = pki.server().wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    held.url = f"https://127.0.0.1:{server.server_address[1]}/v1/traces"
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()


def told(span: Span) -> dict[str, str | int]:
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


def sending(files: Files, directory: Path, url: str, ca: Path | None = None, sample: float = 0.0) -> Files:
    return with_database(files, directory, tracing=TracingSection(url, ca, sample))


async def encrypted(lab: Lab, key: str, **headers: str) -> str:
    """The receipt of an encryption."""
    answer = await lab.client("health-eu-de-1").post(f"/v1/keys/{key}/encrypt", json=BODY, headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.headers["audit-receipt"])


@pytest.mark.anyio
async def test_a_sampled_request_is_a_span_with_its_waits_and_its_trace_stands_in_the_record(
    dev_files: Files, tmp_path: Path
) -> None:
    pki = Pki.make(tmp_path / "pki")
    with collecting(pki) as collector:
        async with lab_of(sending(dev_files, tmp_path / "node", collector.url, pki.ca)) as lab:
            key = await new_key(lab, "AES_256")
            await encrypted(lab, key)  # its caller says nothing, and a share of 0 is taken
            receipt = await encrypted(lab, key, traceparent=f"00-{TRACE}-{PARENT}-01")
            await encrypted(lab, key, traceparent=f"00-{'1' * 32}-{PARENT}-00")
            begun = time.time_ns()
            denied = await lab.client("health-eu-de-1").post(
                f"/v1/keys/{uuid.uuid4()}/encrypt", json=BODY, headers={"traceparent": f"00-{'2' * 32}-{PARENT}-01"}
            )
            stranger = await lab.client(None).post(
                f"/v1/keys/{key}/encrypt", json=BODY, headers={"traceparent": f"00-{'3' * 32}-{PARENT}-01"}
            )
            found = await lab.client("health-auditor").get(f"/v1/audit/records?key={key}&op=encrypt&page_size=10")
        assert (denied.status_code, stranger.status_code) == (404, 401)
        # The node has ended: all is sent.
        assert {s.trace_id.hex() for s in collector.spans} == {TRACE, "2" * 32}
        spans = collector.of(TRACE)
        assert set(spans) == {"encrypt", "hsm", "audit"}
        server = spans["encrypt"]
        assert (server.parent_span_id.hex(), server.kind) == (PARENT, Span.SPAN_KIND_SERVER)
        assert {spans[name].parent_span_id for name in ("hsm", "audit")} == {server.span_id}
        for inner in spans.values():
            assert server.start_time_unix_nano <= inner.start_time_unix_nano <= inner.end_time_unix_nano
            assert inner.end_time_unix_nano <= server.end_time_unix_nano < begun
        facts = told(server)
        assert (facts["http.route"], facts["http.request.method"]) == ("/v1/keys/{key}/encrypt", "POST")
        assert facts["http.response.status_code"] == 200
        log, _, seq = str(facts["skms.record"]).rpartition("/")
        assert receipt.startswith(f'log="{log}", seq={seq}, ')
        assert server.status.code == Status.STATUS_CODE_UNSET
        assert told(collector.of("2" * 32)["encrypt"])["http.response.status_code"] == 404
        assert {r["service.name"] for r in collector.resources} == {"skms"}
        for secret in (b"c2VjcmV0", b"in-confidence", key.encode()):
            assert secret not in collector.raw
        records = {item["seq"]: item["record"].get("trace") for item in found.json()["items"]}
        assert (records[int(seq)], sorted(filter(None, records.values()))) == (TRACE, sorted([TRACE, "1" * 32]))


@pytest.mark.anyio
async def test_of_a_share_each_request_has_a_trace_of_its_own(dev_files: Files, tmp_path: Path) -> None:
    pki = Pki.make(tmp_path / "pki")
    with collecting(pki) as collector:
        async with lab_of(sending(dev_files, tmp_path / "node", collector.url, pki.ca, sample=1.0)) as lab:
            key = await new_key(lab, "AES_256")
            for _ in range(3):
                await encrypted(lab, key)
            items = [{"key": key, **BODY}] * 3
            await lab.client("health-eu-de-1").post("/v1/batch/encrypt", json={"items": items})
            found = await lab.client("health-auditor").get(f"/v1/audit/records?key={key}&page_size=20")
        by_trace = {item["record"]["trace"] for item in found.json()["items"]}
        assert len(by_trace) == 5  # the key's own, three, the batch's: its records have one
        assert by_trace <= {s.trace_id.hex() for s in collector.spans}
        batch = next(s for s in collector.spans if told(s).get("http.route") == "/v1/batch/encrypt")
        assert {s.name for s in collector.spans if s.trace_id == batch.trace_id} == {batch.name, "hsm", "audit"}


@pytest.mark.anyio
@pytest.mark.parametrize("at", ["nobody", "who distrusts"])
async def test_a_collector_that_cannot_be_reached_costs_no_request(dev_files: Files, tmp_path: Path, at: str) -> None:
    with collecting(Pki.make(tmp_path / "pki")) as collector:
        url = f"https://127.0.0.1:{free_port()}/v1/traces" if at == "nobody" else collector.url
        async with lab_of(sending(dev_files, tmp_path / "node", url, sample=1.0)) as lab:
            key = await new_key(lab, "AES_256")
            for _ in range(20):
                await encrypted(lab, key)
        assert not collector.spans  # its certificate is of an authority that nobody named


def test_a_collector_that_never_answers_holds_up_no_end_of_a_worker(tmp_path: Path) -> None:
    files = prepare_apart(tmp_path / "node")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        text = files.config_file.read_text()
        files.config_file.write_text(f'{text}\n[tracing]\nurl = "{url}"\nsample = 1\n')
        with serving(files, tmp_path / "node.log") as node:
            with node.client("health-eu-de-1") as client:
                for _ in range(1_200):  # more than two deliveries
                    client.get("/v1/whoami").raise_for_status()
            begun = time.monotonic()
            node.process.terminate()
            assert node.process.wait(60) == 0
            took = time.monotonic() - begun
        assert took < SEND_S + 10, took  # the SDK's own half a minute would be more


def test_without_a_collector_nothing_of_it_is_loaded() -> None:
    code = "import sys, service.wiring; print([m for m in sys.modules "
    code += "if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ('url = "http://collector.internal:4318/v1/traces"', "expected https://"),
        ('url = "https://me:secret@collector.internal/v1/traces"', "no secret"),
        ("sample = 2", "sample"),
    ],
)
def test_a_collector_that_would_be_told_in_clear_is_refused(
    dev_files: Files, tmp_path: Path, section: str, why: str
) -> None:
    file = tmp_path / "skms.toml"
    file.write_text(f"{dev_files.config_file.read_text()}\n[tracing]\n{section}\n")
    with pytest.raises(ConfigInvalid, match=why):
        load(file)


def test_a_node_that_lacks_the_packages_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)  # as if it were not installed
    with pytest.raises(TracingUnavailable, match=r"pip install 'sovereign-kms\[tracing\]'"):
        Tracing(TracingSection("https://collector.internal:4318/v1/traces"), node="n0", region="eu-de-1")
