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
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import Engine

from audit.forward import Forwarder, lags
from audit.witness import Witnessing
from keystore import Admin
from policy.exceptions import KINDS, LONGEST_US
from service.kms import Ask, Kms
from service.loglines import where
from service.rows import Operations
from service.seats import of_all_workers
from service.sovereignty import Sovereignty
from service.turns import Turns

log: Final = logging.getLogger("skms.request")
alarm: Final = logging.getLogger("skms.alarm")

_ATOMIC: Final = (
    4_096  # PIPE_BUF: workers share a pipe, and what one of them writes at once does not mix with others' lines
)
disable_created_metrics()  # type: ignore[no-untyped-call]  # when a counter began is told by no worker for the others
_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


Across = Literal["livesum", "livemin", "livemax"]  # what is told of the workers' values of a gauge


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


class _Total:
    """A counter whose value is kept elsewhere in this process."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._seen: dict[tuple[str, ...], float] = {}

    def set(self, value: float, *labels: str) -> None:
        """Count what came since the last time."""
        counter = self._counter.labels(*labels) if labels else self._counter
        counter.inc(max(0.0, value - self._seen.get(labels, 0.0)))
        self._seen[labels] = value


class _HsmMetrics:
    """The HSMs as a worker has them. No label but the HSM's name: rates by region are for the reader."""

    def __init__(self, kms: Kms, registry: CollectorRegistry) -> None:
        self._kms, hsm = kms, ["hsm"]
        self._up = Gauge("skms_hsm_up", "1 while the HSM serves", hsm, registry=registry, multiprocess_mode="livemin")
        self._drained = Gauge(
            "skms_hsm_drained", "1 while the HSM gets no calls", hsm, registry=registry, multiprocess_mode="livemin"
        )
        self._epoch = Gauge(
            "skms_hsm_epoch",
            "Logins and re-initialisations so far",
            hsm,
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._cached = Gauge(
            "skms_hsm_cached_keys", "Keys unwrapped and cached", hsm, registry=registry, multiprocess_mode="livesum"
        )
        self._sessions = Gauge(
            "skms_hsm_sessions_open", "PKCS#11 sessions open", hsm, registry=registry, multiprocess_mode="livesum"
        )
        self._inside = Gauge(
            "skms_hsm_in_flight", "Calls that have not ended", hsm, registry=registry, multiprocess_mode="livesum"
        )
        self._calls = _Total(Counter("skms_hsm_calls_total", "Calls so far", hsm, registry=registry))
        self._errors = _Total(
            Counter("skms_hsm_errors_total", "Calls that failed, by CKR name", ["hsm", "code"], registry=registry)
        )
        self._failovers = _Total(
            Counter("skms_hsm_failovers_total", "Calls another HSM had to take over", hsm, registry=registry)
        )

    def refresh(self) -> None:
        """Gauges and counters of each HSM."""
        for member in self._kms.fleet.members():
            name, token = member.name, member.token
            self._up.labels(name).set(member.state == "UP")
            self._drained.labels(name).set(member.admin is Admin.DRAINED)
            self._inside.labels(name).set(member.in_flight)
            self._calls.set(member.calls, name)
            self._failovers.set(member.failovers, name)
            for code, count in list(member.errors.items()):
                self._errors.set(count, name, code)
            self._epoch.labels(name).set(0 if token is None else token.epoch)
            self._cached.labels(name).set(0 if token is None else token.cached_keys)
            self._sessions.labels(name).set(0 if token is None else token.sessions_open)


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


class _ExceptionMetrics:
    """Exceptions that count now, by tier and by what they waive, and when the next of them ends."""

    def __init__(self, kms: Kms, registry: CollectorRegistry) -> None:
        self._kms = kms
        self._live = Gauge(
            "skms_exceptions_live",
            "Exceptions that count now",
            ["tier", "criterion"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._ends = Gauge(
            "skms_exception_next_end_seconds",
            "Time until the first of them ends: what it lets in is refused from then on",
            ["criterion"],
            registry=registry,
            multiprocess_mode="livemin",
        )

    def refresh(self) -> None:
        """Gauges of each tier and criterion."""
        known = self._kms.exceptions
        for kind in KINDS:
            open_now = known.live_now(kind)
            for tier in LONGEST_US:
                self._live.labels(str(tier), kind).set(sum(w.tier == tier for w in open_now))
            self._ends.labels(kind).set(known.next_end_s(kind))


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


class _AuditState:
    """The states of the workers' chains."""

    def __init__(self, kms: Kms, registry: CollectorRegistry) -> None:
        self._kms = kms
        self._states = Gauge(
            "skms_audit_state",
            "Workers whose chain is in the state",
            ["state"],
            registry=registry,
            multiprocess_mode="livesum",
        )

    def refresh(self) -> None:
        """One sample for each state."""
        for state in ("STARTING", "RUNNING", "DEGRADED", "FENCED", "ROLLED_BACK", "CLOSED"):
            self._states.labels(state).set(self._kms.log.state == state)


class _LimitMetrics:
    """What was refused because it was too much."""

    def __init__(self, kms: Kms, registry: CollectorRegistry) -> None:
        self._kms = kms
        self._limited = _Total(
            Counter(
                "skms_rate_limited_total", "Requests and batch items above a rate limit", ["limit"], registry=registry
            )
        )

    def refresh(self) -> None:
        """Counters of each limit."""
        for limit, count in self._kms.rates.refused.items():
            self._limited.set(count, limit)


class _SinkLag(Collector):
    """How far the receivers of the log are behind, as the database has it."""

    def __init__(self, engine: Engine, sinks: Sequence[Forwarder], clock: Callable[[], int]) -> None:
        self._engine, self._sinks, self._clock = engine, sinks, clock

    def collect(self) -> Iterator[Metric]:
        """Gauges of each sink. No label but its name."""
        records = GaugeMetricFamily("skms_audit_sink_lag_records", "Records still to be forwarded", labels=["sink"])
        seconds = GaugeMetricFamily("skms_audit_sink_lag_seconds", "Age of the oldest of them", labels=["sink"])
        refused = GaugeMetricFamily(
            "skms_audit_sink_refused", "1 while the receiver refuses a record: any is an alarm", labels=["sink"]
        )
        for name, lag in lags(self._engine, tuple(s.name for s in self._sinks), self._clock()).items():
            records.add_metric([name], lag.records)
            seconds.add_metric([name], lag.seconds)
            refused.add_metric([name], float(lag.refused))
        yield from (records, seconds, refused)


class _SinkMetrics:
    """What went wrong with the receivers of the log."""

    def __init__(self, sinks: Sequence[Forwarder], registry: CollectorRegistry) -> None:
        self._sinks = sinks
        self._failures = _Total(
            Counter("skms_audit_sink_failures_total", "Deliveries that failed", ["sink"], registry=registry)
        )
        self._skipped = _Total(
            Counter("skms_audit_sink_skipped_total", "Records given up, each recorded", ["sink"], registry=registry)
        )

    def refresh(self) -> None:
        """Counters of each sink. No label but its name."""
        for sink in self._sinks:
            self._failures.set(sink.failures, sink.name)
            self._skipped.set(sink.skips, sink.name)


class _WitnessMetrics:
    """What each witness has cosigned for the worker that asked it last."""

    def __init__(self, witnessing: Witnessing, registry: CollectorRegistry) -> None:
        self._witnessing = witnessing
        self._witnessed = Gauge(
            "skms_audit_witnessed_size",
            "Entries of the root log that a quorum cosigned",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._lag = Gauge(
            "skms_audit_witness_lag_seconds",
            "Time since a witness last cosigned",
            ["witness"],
            registry=registry,
            multiprocess_mode="livemin",
        )
        self._failures = _Total(
            Counter("skms_audit_witness_failures_total", "Rounds without its answer", ["witness"], registry=registry)
        )

    def refresh(self) -> None:
        """Sizes, and failures of each witness."""
        self._witnessed.set(self._witnessing.witnessed)
        for name, seen in list(self._witnessing.pusher.seen.items()):
            if seen.time:
                self._lag.labels(name).set(max(0.0, time.time() - seen.time))
            self._failures.set(seen.failures, name)


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


def _age(seconds: float | None) -> float:
    return float("inf") if seconds is None else seconds


class Observer:
    """Counts and logs every request. Labels are closed sets: no tenant, key or caller is one (COSMIAN-2026-004).

    What the database tells is read when somebody asks, by the worker that is asked. All else is the worker's own, and kept
    where every worker of the node can read it (`service.seats`); a gauge's `across` says what becomes of their values.
    """

    def __init__(self, kms: Kms, operations: Operations, *, node: str, version: str) -> None:
        self.registry, self._told = CollectorRegistry(), CollectorRegistry()
        self._copies: list[Callable[[], None]] = []
        self._copying = threading.Lock()
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
        info = Gauge(
            "skms_build_info",
            "Version and node",
            ["version", "node"],
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        info.labels(version, node).set(1)
        self._gauge("skms_workers", "Workers that live", lambda: 1, "livesum")
        self._gauge(
            "skms_worker_refreshed_timestamp_seconds",
            "When each worker had last told how it is: the longest ago",
            time.time,
            "livemin",
        )
        self._watch_log(kms)
        self._gauge(
            "skms_policy_version", "Version of the policy bundle in force", lambda: kms.policy.version, "livemin"
        )
        self._gauge(
            "skms_transfer_agreement_expires_seconds",
            "Time until the first of the agreements in force ends: what crosses under it is refused from then on",
            kms.agreements_end_s,
            "livemin",
        )
        self._count(
            "skms_policy_oracle_checked_total", "Decisions made again by Cedar itself", lambda: kms.shadow.checked
        )
        self._count(
            "skms_policy_oracle_mismatch_total",
            "Of those, decided otherwise: must be 0",
            lambda: kms.shadow.mismatches,
        )
        self._watch_rows(kms)
        self._copies.append(_LimitMetrics(kms, self.registry).refresh)
        self._copies.append(_HsmMetrics(kms, self.registry).refresh)
        self._told.register(_DrillMetrics(operations))
        self._told.register(_ComplianceMetrics(kms))

    def _watch_log(self, kms: Kms) -> None:
        log = kms.log
        self._gauge("skms_audit_waiting_records", "Records that wait for their commit", lambda: log.waiting, "livesum")
        self._gauge("skms_audit_next_seq", "Length of the workers' chains together", lambda: log.next_seq, "livesum")
        self._gauge("skms_audit_commit_age_seconds", "Time since the last commit", log.last_commit_age_s, "livemax")
        self._gauge(
            "skms_audit_running", "1 while every chain can be written", lambda: log.state == "RUNNING", "livemin"
        )
        self._gauge(
            "skms_audit_checkpoint_age_seconds",
            "Age of the newest checkpoint",
            lambda: log.checkpoint_age_s,
            "livemax",
        )
        self._gauge(
            "skms_audit_exposed_seconds", "How long a record stands without one", lambda: log.exposed_s, "livemax"
        )
        self._group = Histogram(
            "skms_audit_commit_group_records",
            "Records in a commit",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
            registry=self.registry,
        )
        self._commit = Histogram(
            "skms_audit_commit_seconds", "Time of a commit", buckets=_BUCKETS, registry=self.registry
        )
        log.observe = self._committed
        self._gauge(
            "skms_audit_disk_used_ratio", "Part of the audit log's disk in use", lambda: log.disk_used, "livemax"
        )
        self._count("skms_audit_withheld_total", "Records whose results were not released", lambda: log.withheld)
        self._count("skms_audit_clock_steps_total", "Steps of the clock", lambda: log.clock_steps)
        self._copies.append(_AuditState(kms, self.registry).refresh)

    def _watch_rows(self, kms: Kms) -> None:
        self._gauge(
            "skms_key_rows_damaged",
            "Uses of key rows that were changed outside the service: any is an alarm",
            lambda: kms.damaged_rows,
            "livesum",
        )
        self._gauge(
            "skms_grants",
            "Grants that were not revoked, as a worker knows them",
            lambda: len(kms.grants.rows),
            "livemin",
        )
        self._gauge(
            "skms_grants_age_seconds",
            "Time since a worker read the grants: none counts if it could not for 3 s, or cannot believe them",
            lambda: _age(kms.grants.age_s),
            "livemax",
        )
        self._copies.append(_ExceptionMetrics(kms, self.registry).refresh)
        self._gauge(
            "skms_exceptions_age_seconds",
            "Time since a worker read the exceptions: none counts if it could not for 3 s, or cannot believe them",
            lambda: _age(kms.exceptions.age_s),
            "livemax",
        )
        self._gauge("skms_freezes", "Freezes in force", lambda: len(kms.freezes.now.freezes), "livemin")
        self._gauge(
            "skms_freezes_age_seconds",
            "Time since a worker read the freezes: above the lease of a tier it refuses that tier's keys",
            lambda: _age(kms.freezes.age_s),
            "livemax",
        )

    def _gauge(self, name: str, text: str, value: Callable[[], float], across: Across) -> None:
        gauge = Gauge(name, text, registry=self.registry, multiprocess_mode=across)
        self._copies.append(lambda: gauge.set(value()))

    def _count(self, name: str, text: str, value: Callable[[], float]) -> None:
        total = _Total(Counter(name, text, registry=self.registry))
        self._copies.append(lambda: total.set(value()))

    def refresh(self) -> None:
        """Copy what is kept elsewhere in this worker to where whoever is asked finds it."""
        with self._copying:  # a thread that answers and the task of `follow` would count twice
            for copy in self._copies:
                copy()

    async def follow(self) -> None:
        """Refresh each second, for ever: another worker may be asked."""
        while True:
            try:
                self.refresh()
            except Exception as error:  # the next round tries again; `skms_worker_refreshed_timestamp_seconds` tells
                log.warning("metrics not refreshed", extra={"facts": {"error": type(error).__name__}})
            await asyncio.sleep(1)

    def _committed(self, records: int, seconds: float) -> None:
        self._group.observe(records)
        self._commit.observe(seconds)

    def watch_sinks(self, engine: Engine, sinks: Sequence[Forwarder], clock: Callable[[], int]) -> None:
        """Show how far the receivers of the log are behind."""
        self._told.register(_SinkLag(engine, sinks, clock))
        self._copies.append(_SinkMetrics(sinks, self.registry).refresh)

    def watch_turns(self, turns: Turns) -> None:
        """Show how many requests are under way and wait, and what was refused for it."""
        self._gauge("skms_requests_in_flight", "Requests that have a place", lambda: turns.inside, "livesum")
        self._gauge("skms_requests_waiting", "Requests that wait for one", lambda: turns.waiting, "livesum")
        refused = _Total(
            Counter("skms_overloaded_total", "Requests refused under overload", ["limit"], registry=self.registry)
        )

        def copy() -> None:
            for limit, count in turns.refused.items():
                refused.set(count, limit)

        self._copies.append(copy)

    def watch_sovereignty(self, figures: Sovereignty) -> None:
        """Show the figures of sovereignty."""
        self._told.register(_SovereigntyMetrics(figures))

    def watch_witnesses(self, witnessing: Witnessing) -> None:
        """Show what the witnesses cosign."""
        self._copies.append(_WitnessMetrics(witnessing, self.registry).refresh)

    def watch_certificates(self, ends: Callable[[], Mapping[str, float]], refused: Callable[[], bool]) -> None:
        """Show when the files of TLS end, and whether newer ones were refused."""
        gauge = Gauge(
            "skms_certificate_expires_seconds",
            "Time until the first certificate or revocation list of a file ends",
            ["certificate"],
            registry=self.registry,
            multiprocess_mode="livemin",
        )

        def copy() -> None:
            for kind, seconds in ends().items():
                gauge.labels(kind).set(seconds)

        self._copies.append(copy)
        self._gauge(
            "skms_tls_files_refused",
            "1 while changed files of TLS cannot be used, and the ones before go on",
            refused,
            "livemax",
        )

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

    def failed(self, ask: Ask, op: str, code: str, error: BaseException) -> None:
        """A request, or an item of a batch, failed by our fault: what the caller is not told."""
        if code == "internal":
            self.crash(ask, error)
        elif code == "database_unavailable":
            self.unasked(op, error)

    def unasked(self, what: str, error: BaseException) -> None:
        """The database refused, or did not answer: where, and with which code."""
        refused = getattr(error, "orig", None)
        code = getattr(refused, "sqlstate", None) or getattr(refused, "sqlite_errorname", None)
        log.warning(
            "the database was asked in vain", extra={"facts": {"op": what, "code": code, "exception": where(error)}}
        )

    def exposition(self) -> bytes:
        """The metrics of the node in Prometheus text format, whichever of its workers is asked."""
        self.refresh()
        return generate_latest(of_all_workers(self.registry)) + generate_latest(self._told)
