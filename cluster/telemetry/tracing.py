"""One trace per problem across coordinator, worker, engines and sandbox; off by default.

    problem r3/p17/0                          the worker's span, with derived ids
      +- coordinator.grant                    when its job was leased, to whom
      +- policy.generate                      the pool's view: queue wait, replica, attempts
      |    +- policy.generate at policy-0     the replica's own
      +- sandbox.run
      |    +- sandbox.run at sandbox-2
      +- preference model.evaluate ...
      +- coordinator.complete

The ids of a trace and of its first span follow from run, round, problem and tree index, and so does
whether it is sampled. So processes that never talk about it agree, a search that is gone on with
elsewhere stays in one trace, and nothing has to be handed around but a W3C `traceparent` in calls
that are sampled.

Spans (OpenTelemetry) go to RUN/traces/PROCESS.jsonl, one JSON object a line, which
`rstar logs --problem` shows without any server, and to an OTLP/HTTP collector if one is given. Not
sampled, a span costs the look at one context variable.

Not covered: spans inside vLLM and inside the sandbox's processes; a process that is killed loses
the spans of its last second.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, Status, StatusCode, TraceFlags
from pydantic import Field

from cluster.folder.config_file import Config
from cluster.telemetry.lines import Lines
from rollout.run_store import RunStore

FOLDER = "traces"

EXPORT_PAUSE_S = 1.0
"""Spans wait so long before they are written, which a killed process loses."""

MAX_TEXT = 1024
"""Longest attribute value; prompts and codes are in the tree, not in the trace."""


class TracingConfig(Config):
    """Which problems leave a trace, and where it goes."""

    sample: float = Field(
        0.0, ge=0.0, le=1.0, description="share of the problems that are traced; 0: tracing is off"
    )
    otlp_endpoint: str | None = Field(
        None,
        description="OTLP/HTTP collector, as http://host:4318/v1/traces; null: only the run folder",
    )


class TracingError(RuntimeError):
    """Spans cannot be sent where the config says."""


class _KnownIds(IdGenerator):
    """Random ids, but for the first span of a trace, which follows from what it is about."""

    def __init__(self) -> None:
        self._random = RandomIdGenerator()
        self.next: ContextVar[SpanContext | None] = ContextVar("next_ids", default=None)

    def generate_span_id(self) -> int:
        known = self.next.get()
        return known.span_id if known is not None else self._random.generate_span_id()

    def generate_trace_id(self) -> int:
        known = self.next.get()
        return known.trace_id if known is not None else self._random.generate_trace_id()


class _File(SpanExporter):
    """Appends spans to a file, a JSON object a line."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.lines.add("".join(json.dumps(_as_record(span)) + "\n" for span in spans))
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self.lines.close()


class Tracing:
    """How this process traces; `begin` makes it current."""

    def __init__(self, config: TracingConfig, *, store: RunStore, process: str) -> None:
        """
        Args:
            store: of the run; where it is is part of every trace's id.
            process: unique in the run, for people: "policy-0".
        Raises:
            TracingError: the OTLP exporter is asked for and not installed.
        """
        self.config = config
        self.run = store.root
        self.process = process
        self._ids = _KnownIds()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,  # `first` has decided
            id_generator=self._ids,
            resource=Resource.create(
                {
                    "service.name": "rstar",
                    "service.instance.id": process,
                    "rstar.run": store.root.rpartition("/")[2],
                }
            ),
            span_limits=SpanLimits(max_attribute_length=MAX_TEXT),
            shutdown_on_exit=True,
        )
        file = _File(Lines(store, f"{FOLDER}/{process}.jsonl"))
        for exporter in (file, *_otlp(config)):
            self._provider.add_span_processor(
                BatchSpanProcessor(exporter, schedule_delay_millis=1000 * EXPORT_PAUSE_S)
            )
        self.tracer = self._provider.get_tracer("rstar")

    def first(self, round: int, problem_id: str, index: int) -> SpanContext | None:
        """Ids of the trace of a search and of its first span; None: it is not sampled."""
        digest = hashlib.sha256(json.dumps([self.run, round, problem_id, index]).encode()).digest()
        if int.from_bytes(digest[24:32]) / 2**64 >= self.config.sample:
            return None
        return SpanContext(
            trace_id=int.from_bytes(digest[:16]) or 1,
            span_id=int.from_bytes(digest[16:24]) or 1,
            is_remote=True,
            trace_flags=TraceFlags(TraceFlags.SAMPLED),
        )

    def top(self, first: SpanContext, name: str, attributes: Mapping[str, Any]) -> Span:
        """The first span of a trace, with ids from `first`; the caller ends it."""
        token = self._ids.next.set(first)
        try:
            return self.tracer.start_span(name, context=Context(), attributes=dict(attributes))
        finally:
            self._ids.next.reset(token)

    def under(self, parent: SpanContext, name: str, attributes: Mapping[str, Any]) -> Span:
        """A span below one that may live in another process; the caller ends it."""
        context = trace.set_span_in_context(NonRecordingSpan(parent))
        return self.tracer.start_span(name, context=context, attributes=dict(attributes))

    def shutdown(self) -> None:
        """Write out what waits and end the threads that do so."""
        self._provider.shutdown()


_tracing: Tracing | None = None
_span: ContextVar[Span | None] = ContextVar("rstar_span", default=None)
"""The span of the sampled search this task works for; None: there is none."""


def begin(tracing: Tracing | None) -> None:
    """Trace in this process from now on; None: no more."""
    global _tracing
    before, _tracing = _tracing, tracing
    if before is not None and before is not tracing:
        before.shutdown()


def traceparent() -> str:
    """W3C header of the span this task is in; "" if it is in none."""
    span = _span.get()
    if span is None:
        return ""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"


@contextmanager
def problem_span(
    round: int, problem_id: str, index: int, attributes: Mapping[str, Any]
) -> Iterator[None]:
    """All a worker does for one search, if the search is sampled."""
    tracing = _tracing
    first = tracing.first(round, problem_id, index) if tracing is not None else None
    if tracing is None or first is None:
        yield
        return
    facts = {"problem": problem_id, "round": round, "index": index, **attributes}
    with _current(tracing.top(first, f"problem r{round}/{problem_id}/{index}", facts)):
        yield


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[Span | None]:
    """A part of the sampled search this task works for; yields None where there is none."""
    tracing = _tracing
    parent = _span.get()
    if tracing is None or parent is None:
        yield None
        return
    own = tracing.under(parent.get_span_context(), name, attributes)
    with _current(own):
        yield own


@contextmanager
def remote_span(name: str, parent: str, **attributes: Any) -> Iterator[None]:
    """The other end of a call that carried a `traceparent`."""
    tracing = _tracing
    context = _parse(parent)
    if tracing is None or context is None:
        yield
        return
    own = tracing.under(context, f"{name} at {tracing.process}", attributes)
    with _current(own):
        yield


def note(round: int, problem_ids: Sequence[str], index: int, name: str, **attributes: Any) -> None:
    """An instant in the traces of those of these searches that are sampled."""
    tracing = _tracing
    if tracing is None:
        return
    for problem_id in problem_ids:
        first = tracing.first(round, problem_id, index)
        if first is not None:
            tracing.under(first, name, attributes).end()


class Traced:
    """An actor whose calls can carry a trace; mixed into replicas and sandbox workers."""

    async def traced(self, parent: str, name: str, method: str, *arguments: Any) -> Any:
        """Call a method of this actor inside a span.

        Args:
            parent: W3C traceparent of the caller's span.
            name: of the span.
        """
        with remote_span(name, parent):
            return await getattr(self, method)(*arguments)


@contextmanager
def _current(span: Span) -> Iterator[None]:
    token = _span.set(span)
    try:
        yield
    except BaseException as error:
        span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"[:MAX_TEXT]))
        raise
    finally:
        _span.reset(token)
        span.end()


def _parse(parent: str) -> SpanContext | None:
    parts = parent.split("-")
    if len(parts) != 4 or parts[3] != "01":
        return None
    return SpanContext(
        trace_id=int(parts[1], 16),
        span_id=int(parts[2], 16),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
    )


def _otlp(config: TracingConfig) -> list[SpanExporter]:
    if config.otlp_endpoint is None:
        return []
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise TracingError(
            f"tracing.otlp_endpoint={config.otlp_endpoint!r} needs the package "
            f"opentelemetry-exporter-otlp-proto-http: {error}"
        ) from error
    return [OTLPSpanExporter(endpoint=config.otlp_endpoint)]


def _as_record(span: ReadableSpan) -> dict[str, Any]:
    context = span.get_span_context()
    assert context is not None
    began_ns = span.start_time or time.time_ns()
    return {
        "trace": f"{context.trace_id:032x}",
        "span": f"{context.span_id:016x}",
        "parent": f"{span.parent.span_id:016x}" if span.parent is not None else "",
        "process": span.resource.attributes.get("service.instance.id", ""),
        "name": span.name,
        "start_unix_s": began_ns / 1e9,
        "seconds": ((span.end_time or began_ns) - began_ns) / 1e9,
        "error": span.status.description or "" if not span.status.is_ok else "",
        "attributes": dict(span.attributes or {}),
    }
