"""A wired node forwards its own records to what its configuration names, and says how far it is."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import time
import uuid
from pathlib import Path

import pytest
from msgspec import structs

from audit.forward import Item, Skipped
from harness import Files, lab_of
from receivers import Pki, http_receiver, syslog_receiver
from service.config import SinkSection
from service.wiring import skip_recorder

pytestmark = pytest.mark.anyio


async def test_a_node_forwards_to_every_sink_and_shows_how_far(dev_files: Files, tmp_path: Path) -> None:
    pki = Pki.make(tmp_path)
    with http_receiver(pki) as (siem, one), syslog_receiver(pki) as (syslog, two):
        sinks = (
            SinkSection(name="siem", kind="https-json", url=one.url, ca=pki.ca),
            SinkSection(name="syslog", kind="syslog", url=two.url, ca=pki.ca),
            SinkSection(name="gone", kind="otlp", url="https://127.0.0.1:1/v1/logs", ca=pki.ca),
        )
        node = structs.replace(dev_files.config.node, name="n7")
        config = structs.replace(dev_files.config, node=node, audit=structs.replace(dev_files.config.audit, sink=sinks))
        async with lab_of(dataclasses.replace(dev_files, config=config)) as lab:
            answer = await lab.client("health-operator").get("/v1/whoami")
            leaf = answer.headers["audit-receipt"].split("leaf=:")[1].strip(":")
            left_out = Item(5, b"", 0, b"", {"id": str(uuid.uuid4())})
            record = skip_recorder(lab.node.kms, asyncio.get_running_loop())
            await asyncio.to_thread(record, Skipped("siem", "some/chain", left_out))
            log, length = lab.node.kms.log.name, lab.node.kms.log.next_seq
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and not (
                len(siem.numbers(log)) >= length and len(syslog.numbers(log)) >= length
            ):
                await asyncio.sleep(0.05)
            metrics = (await lab.client("platform").get("/metrics")).text
    for held in (siem, syslog):
        assert held.numbers(log)[:length] == list(range(length))
        assert any(bytes.fromhex(taken[2]) == base64.b64decode(leaf) for taken in held.taken)
        skips = [entry for *_, entry in held.taken if b'"skip_record"' in entry]
        assert len(skips) == 1
        assert str(left_out.record["id"]).encode() in skips[0]
    assert 'skms_audit_sink_refused{sink="siem"} 0.0' in metrics
    shown = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("skms_audit_sink"))
    assert float(shown['skms_audit_sink_lag_records{sink="gone"}']) >= length
    assert float(shown['skms_audit_sink_lag_seconds{sink="gone"}']) > 0
    assert float(shown['skms_audit_sink_failures_total{sink="gone"}']) > 0
