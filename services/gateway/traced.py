"""The place where an HTTP request becomes part of a trace: the one that its `traceparent` names, or a new one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from starlette.types import Scope

from common import log
from services import trace_context
from services.gateway.metrics import PATHS
from services.tracing import Tracer

_NAME = trace_context.NAME.encode()


class Ending(NamedTuple):
    """How a request ended."""

    status: int  # of its answer; 0 where it got none
    failed: int  # the status of what its stream failed by after it had begun, or 0
    is_known: bool  # whether its caller showed a key that the scheduler takes, or took of late


@contextmanager
def traced(tracer: Tracer | None, scope: Scope, ending: Callable[[], Ending]) -> Iterator[None]:
    """What is done meanwhile is part of the trace. With a tracer it has a span, which ends as `ending()` says.

    Without one the trace is only passed on to the scheduler. Whether a span is recorded the caller may say, if his key
    is known, and the sampler otherwise: the span of a stranger who says so is thrown away.
    """
    given = next((value for name, value in scope["headers"] if name == _NAME), b"")
    context = caller_s = trace_context.parse(given.decode("latin-1"))
    span = None
    if tracer is not None:
        told = {
            "http.request.method": scope["method"],
            "url.path": scope["path"][:256],
            "url.scheme": scope.get("scheme", "http"),
        }
        route = scope["path"] if scope["path"] in PATHS else "other"  # names of spans are few
        span = tracer.begin(f"{scope['method']} {route}", context, "server", told)
        context = span.context
    trace_context.enter(context)  # also none: uvicorn starts a request that waited from inside the one before it
    log.about(trace_id=context.trace_id if context is not None else "")
    try:
        yield
    finally:
        if span is not None:
            end = ending()
            code = end.failed or end.status
            if end.is_known or caller_s is None or not caller_s.sampled:
                span.end({"http.response.status_code": end.status}, error=str(code) if code >= 500 else "")
