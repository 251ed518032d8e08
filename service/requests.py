"""What is seen of requests from outside the audit log: structured log lines and Prometheus metrics.

A line carries names, codes and numbers only. It is built from an allow-list, so that no body, header or context can get
in; control characters cannot forge a second line, because each line is one JSON object (CVE-2020-7694).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from service.kms import Ask, Kms

log: Final = logging.getLogger("skms.request")

_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


def uuid7(now_us: int) -> str:
    """A UUIDv7 (RFC 9562, 5.7): milliseconds, then random bits. Says when, and nothing else."""
    random = int.from_bytes(os.urandom(10), "big")
    value = (now_us // 1_000 & (1 << 48) - 1) << 80 | 0x7 << 76 | (random >> 68) << 64 | 0b10 << 62
    value |= random & (1 << 62) - 1
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class JsonLines(logging.Formatter):
    """One JSON object a line; a record's `facts` are its fields. Exceptions show type and place, never their text."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = where(record.exc_info[1])
        return json.dumps(line, default=str)


def where(error: BaseException) -> list[str]:
    """Type and code lines of an exception and its causes: its text may hold a caller's data (L-03), its place cannot."""
    found: list[str] = []
    current: BaseException | None = error
    while current is not None and len(found) < 40:
        found.append(type(current).__qualname__)
        found += [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(current.__traceback__)[-8:]]
        current = current.__cause__ or current.__context__
    return found


def configure_logging(level: str) -> None:
    """Send every logger of this process to standard error as JSON lines, UTC."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = JsonLines()
    formatter.converter = __import__("time").gmtime
    handler.setFormatter(formatter)
    logging.root.handlers = [handler]
    logging.root.setLevel(level.upper())
    # Third parties may log what they handle; what they have to say below a warning is not worth that.
    for noisy in ("uvicorn", "httpx", "httpcore", "sqlalchemy", "asyncio", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class Observer:
    """Counts and logs every request. Labels are closed sets: no tenant, key or caller is one (COSMIAN-2026-004)."""

    def __init__(self, kms: Kms, *, node: str, version: str) -> None:
        self._kms = kms
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "skms_operations_total",
            "Operations by outcome and code",
            ["op", "out", "code"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "skms_operation_seconds",
            "Time from the first byte of a request to its answer",
            ["op"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._status = Counter("skms_http_responses_total", "HTTP answers", ["status"], registry=self.registry)
        info = Gauge("skms_build_info", "Version and node", ["version", "node"], registry=self.registry)
        info.labels(version, node).set(1)
        self._gauge("skms_audit_waiting_records", "Records that wait for their commit", lambda: kms.log.waiting)
        self._gauge("skms_audit_next_seq", "Length of this worker's chain", lambda: kms.log.next_seq)
        self._gauge("skms_audit_commit_age_seconds", "Time since the last commit", kms.log.last_commit_age_s)
        self._gauge(
            "skms_audit_running",
            "1 while the chain can be written",
            lambda: float(kms.log.state == "RUNNING"),
        )
        self._gauge("skms_audit_group_records", "Records in the last commit group", lambda: kms.log.last_group_size)
        self._gauge("skms_policy_version", "Version of the policy bundle in force", lambda: kms.policy.version)
        up = Gauge("skms_hsm_up", "1 while the HSM serves", ["hsm", "region"], registry=self.registry)
        epoch = Gauge("skms_hsm_epoch", "Logins and re-initialisations so far", ["hsm"], registry=self.registry)
        cached = Gauge("skms_hsm_cached_keys", "Keys unwrapped and cached", ["hsm"], registry=self.registry)
        sessions = Gauge("skms_hsm_sessions_open", "PKCS#11 sessions open", ["hsm"], registry=self.registry)
        self._hsm = (up, epoch, cached, sessions)

    def _gauge(self, name: str, text: str, value: Any) -> None:
        Gauge(name, text, registry=self.registry).set_function(value)

    def observe(self, ask: Ask, source: str, method: str, status: int, now: int) -> None:
        """One request ended."""
        facts = ask.facts
        op, out, code = facts.get("op") or "none", facts.get("out") or "none", facts.get("why") or "ok"
        self._requests.labels(op, out, code).inc()
        self._seconds.labels(op).observe(max(0, now - ask.arrived) / 1e6)
        self._status.labels(str(status)).inc()
        if log.isEnabledFor(logging.INFO):
            line = {
                "request_id": ask.request_id,
                "source": source,
                "method": method,
                "status": status,
                "us": now - ask.arrived,
                "caller": ask.caller.id,
                "tenant": ask.caller.tenant,
                **{k: v for k, v in facts.items() if v is not None},
            }
            if ask.receipt is not None:
                line["record"] = f"{ask.receipt.log}/{ask.receipt.seq}"
            log.info("request", extra={"facts": line})

    def crash(self, ask: Ask, error: BaseException) -> None:
        """An exception nobody expected: its place goes to the log under the request's id, its text nowhere."""
        log.error("internal error", extra={"facts": {"request_id": ask.request_id, "exception": where(error)}})

    def exposition(self) -> bytes:
        """The metrics in Prometheus text format."""
        up, epoch, cached, sessions = self._hsm
        for status in self._kms.keystore.hsm_status():
            up.labels(status.name, status.region).set(float(status.state == "UP"))
            epoch.labels(status.name).set(status.epoch)
            cached.labels(status.name).set(status.cached_keys)
            sessions.labels(status.name).set(status.sessions_open)
        return generate_latest(self.registry)
