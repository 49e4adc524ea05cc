"""The place where an HTTP request becomes part of a trace: the one that its `traceparent` names, or a new one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import Scope

from common import log
from services import trace_context
from services.tracing import Tracer

_NAME = trace_context.NAME.encode()


@contextmanager
def traced(tracer: Tracer | None, scope: Scope, status: Callable[[], int]) -> Iterator[None]:
    """What is done meanwhile is part of the trace. With a tracer it has a span, which ends with `status()`.

    Without one the trace is only passed on to the scheduler.
    """
    given = next((value for name, value in scope["headers"] if name == _NAME), b"")
    context = trace_context.parse(given.decode("latin-1"))
    span = None
    if tracer is not None:
        told = {
            "http.request.method": scope["method"],
            "url.path": scope["path"][:256],
            "url.scheme": scope.get("scheme", "http"),
        }
        span = tracer.begin(f"{scope['method']} {_route(scope['path'])}", context, "server", told)
        context = span.context
    if context is not None:
        trace_context.enter(context)
        log.about(trace_id=context.trace_id)
    try:
        yield
    finally:
        if span is not None:
            code = status()
            span.end({"http.response.status_code": code}, error=str(code) if code >= 500 else "")


def _route(path: str) -> str:
    """Names of spans are few: what is not ours is not told apart."""
    return path if path.startswith("/v1/") and path.count("/") <= 3 else "other"
