"""OpenTelemetry's spans, sent over OTLP: off unless an endpoint is given, and then nowhere near a token.

A call has a span from its arrival to its end. What happened inside, queue, prefill and decode, is read off the
request's timeline when it has ended: no step of a request that is traced does anything that another one's does not.
Spans wait in a bounded queue for a thread that sends them; what is too much is dropped. OpenTelemetry's own variables
hold, for sampling and all else. Attributes are those of its conventions for generative AI. No prompt, answer or key is
in any of them.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from common.types import FinishReason
from scheduler.timeline import Controls, Kind, Timeline
from services import trace_context
from services.lifecycle import StartupError, is_local
from services.trace_context import TraceContext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OtelSpan

_log = logging.getLogger(__name__)

ENDPOINT: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""OpenTelemetry's own variable; --otlp-endpoint wins."""

_CLOSE_S: Final = 3.0
_PROVIDER: Final = "pagewire"

Attributes = Mapping[str, str | int | float | bool | Sequence[str]]
SpanKind = Literal["internal", "server", "client"]


class Span:
    """A span that is open."""

    def __init__(self, span: OtelSpan) -> None:
        found = span.get_span_context()
        self._span = span
        self.context = TraceContext(f"{found.trace_id:032x}", f"{found.span_id:016x}", bool(found.trace_flags.sampled))

    def end(self, attributes: Attributes | None = None, *, error: str = "") -> None:
        """It is over. `error` is the kind of error that it ended with."""
        from opentelemetry.trace import StatusCode

        self._span.set_attributes({**(attributes or {}), **({"error.type": error} if error else {})})
        if error:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class Tracer:
    """Makes the spans of one process. `model` is what it serves."""

    def __init__(
        self,
        provider: TracerProvider,
        *,
        model: str = "",
        wall_ns: Callable[[], int] = time.time_ns,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.model = model
        self._provider = provider
        self._tracer = provider.get_tracer("pagewire")
        self._wall_ns = wall_ns
        self._clock_ns = clock_ns

    def begin(
        self,
        name: str,
        parent: TraceContext | None,
        kind: SpanKind,
        attributes: Attributes | None = None,
        *,
        links: Iterable[TraceContext] = (),
        started_ns: int | None = None,
    ) -> Span:
        """Open a span, of a trace of its own without a parent. `started_ns` is the time of day, now unless told."""
        from opentelemetry import trace

        return Span(
            self._tracer.start_span(
                name,
                context=_context_of(parent),
                kind=trace.SpanKind[kind.upper()],
                attributes=attributes,
                links=[trace.Link(_span_context(link)) for link in links],
                start_time=started_ns,
            )
        )

    def request_ended(self, timeline: Timeline) -> None:
        """A request has ended: its own span, and in it those of queue, prefill and decode."""
        parent = trace_context.parse(timeline.trace)
        if parent is not None and not parent.sampled:
            return
        t, ahead_ns = timeline, self._wall_ns() - self._clock_ns()
        whole = self._tracer.start_span(
            f"{t.operation} {self.model}",
            context=_context_of(parent),
            attributes=_attributes_of(t, self.model),
            start_time=t.received_ns + ahead_ns,
        )
        for event in t.events:
            if event.kind is not Kind.RECEIVED:
                at_ns = t.received_ns + event.at_ns + ahead_ns
                whole.add_event(event.kind.name.lower(), _told(event._asdict()), timestamp=at_ns)
        parts = {
            "queue": (t.received_ns, t.admitted_ns or t.ended_ns),
            "prefill": (t.admitted_ns, t.first_token_ns or t.ended_ns),
            "decode": (t.first_token_ns, t.ended_ns),
        }
        inside = _context_of(Span(whole).context)
        for name, (begin_ns, end_ns) in parts.items():
            if begin_ns:
                part = self._tracer.start_span(name, context=inside, start_time=begin_ns + ahead_ns)
                part.end(end_time=max(begin_ns, end_ns) + ahead_ns)
        if t.error or t.reason is FinishReason.ERROR:
            from opentelemetry.trace import StatusCode

            whole.set_status(StatusCode.ERROR)
        whole.end(end_time=t.ended_ns + ahead_ns)

    def close(self) -> None:
        """Send what is left, for a moment."""
        last = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        last.start()
        last.join(_CLOSE_S)


def open_tracer(process: str, endpoint: str, *, model: str = "") -> Tracer | None:
    """A tracer that sends to `endpoint`, or where OpenTelemetry's variable says; None without either.

    Raises StartupError where `endpoint` is given and OpenTelemetry is not installed. The variable may be there for
    another program's sake: then there is a warning, and no tracer.
    """
    was_asked, endpoint = bool(endpoint), endpoint or os.environ.get(ENDPOINT, "")
    if not endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        problem = (
            f"traces for {endpoint} need OpenTelemetry, which is not installed ({error.name}). Type: "
            f"pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-grpc"
        )
        if was_asked:
            raise StartupError(problem) from None
        _log.warning("%s is set, and nothing is traced: %s", ENDPOINT, problem)
        return None
    if "://" not in endpoint:
        endpoint = f"{'http' if is_local(endpoint) else 'https'}://{endpoint}"
    resource = Resource.create({"service.name": f"pagewire-{process}", "service.version": _version()})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracer(provider, model=model)


def _version() -> str:
    try:
        return importlib.metadata.version("pagewire")
    except importlib.metadata.PackageNotFoundError:  # a checkout
        return "0"


_STOPS: Final = frozenset({FinishReason.EOS, FinishReason.STOP_TOKEN, FinishReason.STOP_STRING, FinishReason.EMBEDDED})


def _reason(reason: FinishReason) -> str:
    """In the words that OpenAI has, where it has one."""
    return "stop" if reason in _STOPS else reason.name.lower()


def _attributes_of(t: Timeline, model: str) -> Attributes:
    found: dict[str, str | int | float | Sequence[str]] = {
        "gen_ai.operation.name": t.operation,
        "gen_ai.provider.name": _PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": t.request_id,
        "gen_ai.response.finish_reasons": (_reason(t.reason),),
        "gen_ai.request.choice.count": t.num_choices,
        "gen_ai.usage.input_tokens": t.num_prompt,
        "gen_ai.usage.output_tokens": t.num_output,
        "gen_ai.usage.cache_read.input_tokens": t.num_cached,
        "gen_ai.server.request.duration": (t.ended_ns - t.received_ns) / 1e9,
        "pagewire.preemptions": t.num_preemptions,
        "pagewire.drafted_tokens": t.num_drafted,
        "pagewire.accepted_tokens": t.num_accepted,
    }
    if t.first_token_ns:
        found["gen_ai.server.time_to_first_token"] = (t.first_token_ns - t.received_ns) / 1e9
    if t.error:
        found["error.type"] = t.error
    return {**found, **_controls(t.controls)} if t.controls is not None else found


_MAX_INT: Final = (1 << 63) - 1
"""That OTLP can send."""


def _controls(c: Controls) -> Attributes:
    """Those that the conventions have a name for, without what is off or cannot be sent."""
    found: dict[str, int | float] = {
        "gen_ai.request.max_tokens": c.max_tokens,
        "gen_ai.request.temperature": c.temperature,
        "gen_ai.request.top_p": c.top_p,
        "gen_ai.request.presence_penalty": c.presence_penalty,
        "gen_ai.request.frequency_penalty": c.frequency_penalty,
    }
    if c.top_k:
        found["gen_ai.request.top_k"] = c.top_k
    if c.seed <= _MAX_INT:
        found["gen_ai.request.seed"] = c.seed
    return found


def _told(event: Mapping[str, Any]) -> Attributes:
    """What an event says, without what is empty; its kind and its time are told apart."""
    return {f"pagewire.{name}": value for name, value in event.items() if value and name not in ("at_ns", "kind")}


def _span_context(context: TraceContext) -> Any:
    from opentelemetry.trace import SpanContext, TraceFlags

    flags = TraceFlags(TraceFlags.SAMPLED if context.sampled else TraceFlags.DEFAULT)
    return SpanContext(int(context.trace_id, 16), int(context.span_id, 16), is_remote=True, trace_flags=flags)


def _context_of(parent: TraceContext | None) -> Any:
    """OpenTelemetry's context for a child of `parent`. Never its current one: that is not ours."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, set_span_in_context

    return Context() if parent is None else set_span_in_context(NonRecordingSpan(_span_context(parent)), Context())
