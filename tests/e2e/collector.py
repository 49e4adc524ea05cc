"""An OTLP collector in the test's own process: what real processes send to it, by name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc


class Seen(NamedTuple):
    """A span as it came."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str  # empty for the first of its trace
    attributes: Mapping[str, Any]
    events: tuple[str, ...]
    links: tuple[str, ...]  # traces
    seconds: float
    failed: bool


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens on `address` until it is closed."""

    def __init__(self) -> None:
        self.said = b""  # all that came, as it came
        self._spans: list[Seen] = []
        self._came = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._came:
            self.said += request.SerializeToString()
            for resource in request.resource_spans:
                service = attributes(resource.resource)["service.name"]
                self._spans += [seen(service, span) for scope in resource.scope_spans for span in scope.spans]
            self._came.notify_all()
        return pb.ExportTraceServiceResponse()

    def until(self, holds: Callable[[list[Seen]], bool]) -> list[Seen]:
        """All spans, once it holds of them."""
        with self._came:
            assert self._came.wait_for(lambda: holds(self._spans), timeout=120), [s[:2] for s in self._spans]
            return list(self._spans)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.stop(grace=None).wait()


def seen(service: str, span: Any) -> Seen:
    return Seen(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        attributes(span),
        tuple(event.name for event in span.events),
        tuple(link.trace_id.hex() for link in span.links),
        (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        span.status.code == 2,
    )


def attributes(message: Any) -> dict[str, Any]:
    found = {}
    for each in message.attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        found[each.key] = [part.string_value for part in value.values] if kind == "array_value" else value
    return found
