"""What is seen of requests from outside the audit log: structured log lines and Prometheus metrics.

A line carries names, codes and numbers only. It is built from an allow-list, so that no body, header or context can get
in; control characters cannot forge a second line, because each line is one JSON object (CVE-2020-7694).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import Engine

from audit.forward import Forwarder, lags
from audit.witness import Witnessing
from keystore import Admin
from policy.exceptions import KINDS, LONGEST_US
from service.kms import Ask, Kms
from service.rows import Operations
from service.sovereignty import Sovereignty

log: Final = logging.getLogger("skms.request")
alarm: Final = logging.getLogger("skms.alarm")

_ATOMIC: Final = (
    4_096  # PIPE_BUF: workers share a pipe, and what one of them writes at once does not mix with others' lines
)
_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


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


class RequestLines:
    """Writes the line of each request to standard error: those of one turn of the event loop together.

    `logging` took a tenth of a request for the same line.
    """

    def __init__(self) -> None:
        self._waiting: list[bytes] = []
        self._second, self._text = 0, ""

    def add(self, now: int, facts: Mapping[str, Any]) -> None:
        """A request that ended at `now` (us)."""
        second, part = divmod(now // 1_000, 1_000)
        if second != self._second:
            self._second, self._text = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        whole = {"time": f"{self._text}.{part:03d}Z", "level": "info", "logger": log.name, "event": "request", **facts}
        line = msgspec.json.encode(whole)
        if not line.isascii():  # some terminals take more than a newline for the end of a line
            line = json.dumps(whole).encode()
        self._waiting.append(line + b"\n")
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._write)

    def _write(self) -> None:
        lines, self._waiting = self._waiting, []
        together = b""
        for line in lines:
            if len(together) + len(line) > _ATOMIC:
                _to_stderr(together)
                together = b""
            together += line
        _to_stderr(together)


def _to_stderr(data: bytes) -> None:
    with contextlib.suppress(OSError):  # whoever read the lines is gone: no reason to serve no more
        while data:
            data = data[os.write(2, data) :]


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


class _HsmMetrics(Collector):
    """The HSMs as they are when somebody asks. No label but the HSM's name: rates by region are for the reader."""

    def __init__(self, kms: Kms) -> None:
        self._kms = kms

    def collect(self) -> Iterator[Metric]:
        """Gauges and counters of each HSM."""
        up = GaugeMetricFamily("skms_hsm_up", "1 while the HSM serves", labels=["hsm"])
        drained = GaugeMetricFamily("skms_hsm_drained", "1 while the HSM gets no calls", labels=["hsm"])
        epoch = GaugeMetricFamily("skms_hsm_epoch", "Logins and re-initialisations so far", labels=["hsm"])
        cached = GaugeMetricFamily("skms_hsm_cached_keys", "Keys unwrapped and cached", labels=["hsm"])
        sessions = GaugeMetricFamily("skms_hsm_sessions_open", "PKCS#11 sessions open", labels=["hsm"])
        inside = GaugeMetricFamily("skms_hsm_in_flight", "Calls that have not ended", labels=["hsm"])
        calls = CounterMetricFamily("skms_hsm_calls", "Calls so far", labels=["hsm"])
        errors = CounterMetricFamily("skms_hsm_errors", "Calls that failed, by CKR name", labels=["hsm", "code"])
        failovers = CounterMetricFamily("skms_hsm_failovers", "Calls another HSM had to take over", labels=["hsm"])
        for member in self._kms.fleet.members():
            name = [member.name]
            up.add_metric(name, float(member.state == "UP"))
            drained.add_metric(name, float(member.admin is Admin.DRAINED))
            inside.add_metric(name, member.in_flight)
            calls.add_metric(name, member.calls)
            failovers.add_metric(name, member.failovers)
            for code, count in member.errors.items():
                errors.add_metric([member.name, code], count)
            if member.token is not None:
                epoch.add_metric(name, member.token.epoch)
                cached.add_metric(name, member.token.cached_keys)
                sessions.add_metric(name, member.token.sessions_open)
        yield from (up, drained, epoch, cached, sessions, inside, calls, errors, failovers)


class _DrillMetrics(Collector):
    """The newest drill of each vendor and outcome, and the refused requests of all drills."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    def collect(self) -> Iterator[Metric]:
        """How long exits took, and whom they cost an answer."""
        took = GaugeMetricFamily(
            "skms_exit_drill_seconds", "Time of the newest exit drill", labels=["vendor", "outcome"]
        )
        refused = CounterMetricFamily("skms_exit_failed_requests", "Requests refused during confirmed exit drills")
        seen, failed = set(), 0
        for drill in self._operations.find(kind="drill", limit=1_000):
            if drill.state == "running":
                continue
            failed += drill.outcome.get("refused", 0)
            labels = (drill.parameters["vendor"], drill.state)
            if labels not in seen:
                seen.add(labels)
                took.add_metric(labels, drill.outcome["seconds"])
        refused.add_metric([], failed)
        yield from (took, refused)


class _ExceptionMetrics(Collector):
    """Exceptions that count now, by tier and by what they waive, and when the next of them ends."""

    def __init__(self, kms: Kms) -> None:
        self._kms = kms

    def collect(self) -> Iterator[Metric]:
        """Gauges of each tier and criterion."""
        known = self._kms.exceptions
        live = GaugeMetricFamily("skms_exceptions_live", "Exceptions that count now", labels=["tier", "criterion"])
        ends = GaugeMetricFamily(
            "skms_exception_next_end_seconds",
            "Time until the first of them ends: what it lets in is refused from then on",
            labels=["criterion"],
        )
        for kind in KINDS:
            open_now = known.live_now(kind)
            for tier in LONGEST_US:
                live.add_metric([str(tier), kind], float(sum(w.tier == tier for w in open_now)))
            ends.add_metric([kind], known.next_end_s(kind))
        yield from (live, ends)
        age = GaugeMetricFamily(
            "skms_exceptions_age_seconds",
            "Time since this worker read the exceptions: none counts if it could not for 3 s, or cannot believe them",
        )
        age.add_metric([], float("inf") if known.age_s is None else known.age_s)
        yield age


class _ComplianceMetrics(Collector):
    """Keys below the bar of their tier, and how long suppliers' labels are good for. Suppliers and labels are the charter's."""

    def __init__(self, kms: Kms) -> None:
        self._kms = kms

    def collect(self) -> Iterator[Metric]:
        """Gauges of each tier, and of each label of each supplier."""
        registry, compliance = self._kms.policy.registry, self._kms.compliance
        below = GaugeMetricFamily(
            "skms_keys_below_tier", "Keys that do not meet their tier: any is refused", labels=["tier"]
        )
        ends = GaugeMetricFamily(
            "skms_supplier_label_expires_seconds", "Time until a label ends", labels=["supplier", "label"]
        )
        try:
            counts = {tier.tier: float(tier.below) for tier in compliance.tiers(registry)}
        except Exception as error:  # the other metrics are wanted most when the database is away
            log.warning("keys below their tier not counted", extra={"facts": {"error": type(error).__name__}})
            counts = {}
        for tier in (1, 2, 3):
            below.add_metric([str(tier)], counts.get(tier, float("inf")))
        spread = GaugeMetricFamily(
            "skms_key_graph_violations", "Keys whose material is usable outside their residency: any is an alarm"
        )
        try:
            spread.add_metric([], float(compliance.leaking(registry, after=None, limit=0)[0]))
        except Exception as error:  # as above
            log.warning("the key graph was not computed", extra={"facts": {"error": type(error).__name__}})
            spread.add_metric([], float("inf"))
        for supplier, label, seconds in compliance.expiries(registry):
            ends.add_metric([supplier, label], seconds)
        yield from (below, ends, spread)


class _AuditState(Collector):
    """The state of this worker's chain: 1 for the one it is in."""

    def __init__(self, kms: Kms) -> None:
        self._kms = kms

    def collect(self) -> Iterator[Metric]:
        """One sample for each state."""
        states = GaugeMetricFamily("skms_audit_state", "1 for the state of the chain", labels=["state"])
        for state in ("STARTING", "RUNNING", "DEGRADED", "FENCED", "ROLLED_BACK", "CLOSED"):
            states.add_metric([state], float(self._kms.log.state == state))
        yield states


class _SinkMetrics(Collector):
    """How far the receivers of the log are behind, as the database has it, and what went wrong in this worker."""

    def __init__(self, engine: Engine, sinks: Sequence[Forwarder], clock: Callable[[], int]) -> None:
        self._engine, self._sinks, self._clock = engine, sinks, clock

    def collect(self) -> Iterator[Metric]:
        """Gauges and counters of each sink. No label but its name."""
        records = GaugeMetricFamily("skms_audit_sink_lag_records", "Records still to be forwarded", labels=["sink"])
        seconds = GaugeMetricFamily("skms_audit_sink_lag_seconds", "Age of the oldest of them", labels=["sink"])
        refused = GaugeMetricFamily(
            "skms_audit_sink_refused", "1 while the receiver refuses a record: any is an alarm", labels=["sink"]
        )
        failures = CounterMetricFamily("skms_audit_sink_failures", "Deliveries that failed", labels=["sink"])
        skipped = CounterMetricFamily("skms_audit_sink_skipped", "Records given up, each recorded", labels=["sink"])
        for name, lag in lags(self._engine, tuple(s.name for s in self._sinks), self._clock()).items():
            records.add_metric([name], lag.records)
            seconds.add_metric([name], lag.seconds)
            refused.add_metric([name], float(lag.refused))
        for sink in self._sinks:
            failures.add_metric([sink.name], sink.failures)
            skipped.add_metric([sink.name], sink.skips)
        yield from (records, seconds, refused, failures, skipped)


class _WitnessMetrics(Collector):
    """What each witness has cosigned, on the worker that asks them."""

    def __init__(self, witnessing: Witnessing) -> None:
        self._witnessing = witnessing

    def collect(self) -> Iterator[Metric]:
        """Sizes, and failures of each witness."""
        witnessed = GaugeMetricFamily("skms_audit_witnessed_size", "Entries of the root log that a quorum cosigned")
        lag = GaugeMetricFamily(
            "skms_audit_witness_lag_seconds", "Time since a witness last cosigned", labels=["witness"]
        )
        failures = CounterMetricFamily("skms_audit_witness_failures", "Rounds without its answer", labels=["witness"])
        witnessed.add_metric([], self._witnessing.witnessed)
        for name, seen in self._witnessing.pusher.seen.items():
            if seen.time:
                lag.add_metric([name], max(0.0, time.time() - seen.time))
            failures.add_metric([name], seen.failures)
        yield from (witnessed, lag, failures)


class _SovereigntyMetrics(Collector):
    """The figures of sovereignty. Labels are names of the charter and criteria."""

    def __init__(self, figures: Sovereignty) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """What there is evidence for; a figure of nothing is left out."""
        found = self._figures.lately()
        critical = GaugeMetricFamily("skms_critical_systems", "Critical systems of the charter")
        critical.add_metric([], found.control.critical)
        sovereign = GaugeMetricFamily("skms_critical_systems_sovereign", "Of those, under sovereign control")
        sovereign.add_metric([], found.control.sovereign)
        gaps = GaugeMetricFamily(
            "skms_critical_system_gaps", "Critical systems that do not meet a criterion", labels=["criterion"]
        )
        for criterion, count in found.control.gaps.items():
            gaps.add_metric([criterion], count)
        share = GaugeMetricFamily("skms_supplier_share", "Keys by tier that hang on a supplier", labels=["supplier"])
        loss = GaugeMetricFamily(
            "skms_supplier_loss_key_ratio",
            "Part of the keys that no other supplier's HSM could use",
            labels=["supplier"],
        )
        for supplier, value in found.diversity.share.items():
            share.add_metric([supplier], value)
            loss.add_metric([supplier], found.diversity.loss[supplier])
        index = GaugeMetricFamily("skms_supplier_diversity", "0: all on one supplier, 1: evenly on all approved ones")
        if found.diversity.index is not None:
            index.add_metric([], found.diversity.index)
        contained = GaugeMetricFamily(
            "skms_incident_contain_seconds", "Longest time to contain of a year", labels=["kind"]
        )
        for kind, times in (("real", found.containment.real), ("drill", found.containment.drills)):
            if times.max_s is not None:
                contained.add_metric([kind], times.max_s)
        detected = GaugeMetricFamily("skms_incident_detect_seconds", "Longest time to detect an incident of a year")
        if found.containment.detected.max_s is not None:
            detected.add_metric([], found.containment.detected.max_s)
        drilled = GaugeMetricFamily("skms_containment_drilled", "1 if containment was drilled within 90 days")
        drilled.add_metric([], float(found.containment.drilled))
        yield from (critical, sovereign, gaps, share, loss, index, detected, contained, drilled)


class _Count(Collector):
    """A counter that is kept elsewhere."""

    def __init__(self, name: str, text: str, value: Callable[[], float]) -> None:
        self._name, self._text, self._value = name, text, value

    def collect(self) -> list[Metric]:
        """Its value now."""
        return [CounterMetricFamily(self._name, self._text, value=self._value())]


class Observer:
    """Counts and logs every request. Labels are closed sets: no tenant, key or caller is one (COSMIAN-2026-004)."""

    def __init__(self, kms: Kms, operations: Operations, *, node: str, version: str) -> None:
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
        self._counted: dict[tuple[str, str, str, int], tuple[Counter, Histogram, Counter]] = {}
        self._lines = RequestLines()
        self._conflicts = Counter(
            "skms_region_conflicts_total",
            "Requests whose way through forwarders was not proven: any is an alarm",
            ["reason"],
            registry=self.registry,
        )
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
        self._gauge(
            "skms_audit_checkpoint_age_seconds", "Age of the newest checkpoint", lambda: kms.log.checkpoint_age_s
        )
        self._gauge("skms_audit_exposed_seconds", "How long a record stands without one", lambda: kms.log.exposed_s)
        self._group = Histogram(
            "skms_audit_commit_group_records",
            "Records in a commit",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
            registry=self.registry,
        )
        self._commit = Histogram(
            "skms_audit_commit_seconds", "Time of a commit", buckets=_BUCKETS, registry=self.registry
        )
        kms.log.observe = self._committed
        self._gauge("skms_audit_disk_used_ratio", "Part of the audit log's disk in use", lambda: kms.log.disk_used)
        self._count("skms_audit_withheld", "Records whose results were not released", lambda: kms.log.withheld)
        self._count("skms_audit_clock_steps", "Steps of the clock", lambda: kms.log.clock_steps)
        self.registry.register(_AuditState(kms))
        self._gauge(
            "skms_key_rows_damaged",
            "Uses of key rows that were changed outside the service: any is an alarm",
            lambda: kms.damaged_rows,
        )
        self._gauge("skms_policy_version", "Version of the policy bundle in force", lambda: kms.policy.version)
        self._gauge(
            "skms_transfer_agreement_expires_seconds",
            "Time until the first of the agreements in force ends: what crosses under it is refused from then on",
            kms.agreements_end_s,
        )
        self._gauge(
            "skms_grants", "Grants that were not revoked, as this worker knows them", lambda: len(kms.grants.rows)
        )
        self._gauge(
            "skms_grants_age_seconds",
            "Time since this worker read the grants: none counts if it could not for 3 s, or cannot believe them",
            lambda: float("inf") if kms.grants.age_s is None else kms.grants.age_s,
        )
        self.registry.register(_ExceptionMetrics(kms))
        self._gauge("skms_freezes", "Freezes in force", lambda: len(kms.freezes.now.freezes))
        self._gauge(
            "skms_freezes_age_seconds",
            "Time since this worker read the freezes: above the lease of a tier it refuses that tier's keys",
            lambda: float("inf") if kms.freezes.age_s is None else kms.freezes.age_s,
        )
        self.registry.register(_HsmMetrics(kms))
        self.registry.register(_DrillMetrics(operations))
        self.registry.register(_ComplianceMetrics(kms))
        self._count("skms_policy_oracle_checked", "Decisions made again by Cedar itself", lambda: kms.shadow.checked)
        self._count(
            "skms_policy_oracle_mismatch", "Of those, decided otherwise: must be 0", lambda: kms.shadow.mismatches
        )

    def _gauge(self, name: str, text: str, value: Any) -> None:
        Gauge(name, text, registry=self.registry).set_function(value)

    def _count(self, name: str, text: str, value: Callable[[], float]) -> None:
        self.registry.register(_Count(name, text, value))

    def _committed(self, records: int, seconds: float) -> None:
        self._group.observe(records)
        self._commit.observe(seconds)

    def watch_sinks(self, engine: Engine, sinks: Sequence[Forwarder], clock: Callable[[], int]) -> None:
        """Show how far the receivers of the log are behind."""
        self.registry.register(_SinkMetrics(engine, sinks, clock))

    def watch_sovereignty(self, figures: Sovereignty) -> None:
        """Show the figures of sovereignty."""
        self.registry.register(_SovereigntyMetrics(figures))

    def watch_witnesses(self, witnessing: Witnessing) -> None:
        """Show what the witnesses cosign."""
        self.registry.register(_WitnessMetrics(witnessing))

    def observe(self, ask: Ask, source: str, method: str, status: int, now: int) -> None:
        """One request ended."""
        facts = ask.facts
        about = (facts.get("op") or "none", facts.get("out") or "none", facts.get("why") or "ok", status)
        counted = self._counted.get(about)
        if counted is None:  # finding them by their labels takes longer than counting
            op, out, code, _ = about
            counted = self._requests.labels(op, out, code), self._seconds.labels(op), self._status.labels(str(status))
            self._counted[about] = counted
        requests, seconds, answers = counted
        requests.inc()
        seconds.observe(max(0, now - ask.arrived) / 1e6)
        answers.inc()
        if log.isEnabledFor(logging.INFO):
            line = {
                "request_id": ask.request_id,
                "source": source,
                "method": method,
                "status": status,
                "us": now - ask.arrived,
                "caller": ask.caller.id,
                "tenant": ask.caller.tenant,
            }
            line |= {k: v for k, v in facts.items() if v is not None}
            if ask.receipt is not None:
                line["record"] = f"{ask.receipt.log}/{ask.receipt.seq}"
            self._lines.add(now, line)

    def conflict(self, ask: Ask, reason: str) -> None:
        """The way of a request was not proven: somebody misconfigured a forwarder, or lies about one."""
        self._conflicts.labels(reason).inc()
        told = {"request_id": ask.request_id, "source": ask.caller.source, "caller": ask.caller.id, "reason": reason}
        alarm.error("the way of a request is not proven", extra={"facts": told})

    def crash(self, ask: Ask, error: BaseException) -> None:
        """An exception nobody expected: its place goes to the log under the request's id, its text nowhere."""
        log.error("internal error", extra={"facts": {"request_id": ask.request_id, "exception": where(error)}})

    def exposition(self) -> bytes:
        """The metrics in Prometheus text format."""
        return generate_latest(self.registry)
