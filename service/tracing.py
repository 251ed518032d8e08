"""Spans of requests in OpenTelemetry, sent by OTLP over HTTP: none unless `[tracing] url` names a collector.

A span has the times of a request and of its two waits, for the HSM and for the audit log. The trace id stands in the audit
record, and the record's place in the span. No key, no input and no output is in it. A collector that is away, or slow, costs
spans and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from service.config import TracingSection

if TYPE_CHECKING:  # not loaded where it is off
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

SEND_S: Final = 5.0  # for one delivery, and at the end of the worker for all that is left
_traced: ContextVar[Traced | None] = ContextVar("traced", default=None)
_NOTHING: Final = contextlib.nullcontext()


class TracingUnavailable(Exception):
    """It was asked for, and its packages are not installed."""


class Traced:
    """A sampled request, from its beginning to `end`. What runs in the same context adds its `stage`s."""

    __slots__ = ("_own", "_span", "_tracing", "trace")

    def __init__(self, tracing: Tracing, span: Span) -> None:
        self._tracing, self._span = tracing, span
        self.trace = f"{span.get_span_context().trace_id:032x}"
        self._own = _traced.set(self)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The block, as a span within this one."""
        begun = time.time_ns()
        try:
            yield
        finally:
            self._tracing.child(self._span, name, begun)

    def end(self, status: int | None, **facts: str | None) -> None:
        """The answer has left; no status if there was none."""
        _traced.reset(self._own)
        if status is not None:
            self._span.set_attribute("http.response.status_code", status)
        self._span.set_attributes({f"skms.{name}": value for name, value in facts.items() if value is not None})
        self._tracing.failed(self._span, status)
        self._span.end()


def stage(name: str) -> contextlib.AbstractContextManager[None]:
    """The block as a span of the request it runs in, if that one is traced."""
    traced = _traced.get()
    return _NOTHING if traced is None else traced.stage(name)


class Tracing:
    """The tracer of one worker. `TracingUnavailable` without the packages of the extra `tracing`."""

    def __init__(self, section: TracingSection, *, node: str, region: str) -> None:
        try:
            import requests
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise TracingUnavailable(
                "[tracing] url: OpenTelemetry is not installed: `pip install 'sovereign-kms[tracing]'`, or take the option away"
            ) from None
        facts = {"service.name": "skms", "service.instance.id": node, "cloud.region": region}
        self._provider: TracerProvider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(section.sample)), resource=Resource(facts), shutdown_on_exit=False
        )
        authorities = None if section.ca is None else str(section.ca)
        session = requests.Session()
        session.trust_env = False  # REQUESTS_CA_BUNDLE would take the place of `ca`, a proxy that of the collector
        exporter = OTLPSpanExporter(section.url, certificate_file=authorities, session=session, timeout=SEND_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("skms")
        self._api, self._propagator = trace, TraceContextTextMapPropagator()

    def begin(self, op: str, *, method: str, route: str, parent: str | None, arrived: int) -> Traced | None:
        """A request that arrived at `arrived` (us since 1970), with its `traceparent`; None unless it is sampled."""
        above = None if parent is None else self._propagator.extract({"traceparent": parent})
        span = self._tracer.start_span(
            op,
            context=above,
            kind=self._api.SpanKind.SERVER,
            start_time=arrived * 1_000,
            attributes={"http.request.method": method, "http.route": route},
        )
        return Traced(self, span) if span.is_recording() else None

    def child(self, span: Span, name: str, begun: int) -> None:
        """A span within another one, from `begun` (ns since 1970) until now."""
        above = self._api.set_span_in_context(span)
        self._tracer.start_span(name, context=above, start_time=begun).end()

    def failed(self, span: Span, status: int | None) -> None:
        """Mark a span as failed where the fault was ours."""
        if status is None or status >= 500:
            span.set_status(self._api.StatusCode.ERROR)

    async def close(self) -> None:
        """Send what is left, and end; a collector that does not answer is waited for SEND_S seconds."""
        # The SDK waits for half a minute, and a thread of the loop's executor is waited for at the end of the process.
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        until = time.monotonic() + SEND_S
        while ending.is_alive() and time.monotonic() < until:  # noqa: ASYNC110 - a thread, no event
            await asyncio.sleep(0.02)
