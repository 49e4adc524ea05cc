"""The place where a gRPC call becomes part of a trace: the one that its metadata names, or a new one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc import aio

from common import log
from services import call_status, trace_context
from services.call_status import CallStatus
from services.tracing import Span, Tracer

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any] | None  # of unknown messages: it is generic in the stubs alone


# By OpenTelemetry's conventions: what the server is to blame for. The rest is the caller's, and no error of a span.
_OURS: Final = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)


class TracedCalls(aio.ServerInterceptor):
    """Stands behind the gate: who is not let in is in no trace. Without a tracer the trace is only passed on."""

    def __init__(self, tracer: Tracer | None, service: str) -> None:
        """With a tracer, calls of `service` have spans."""
        self._tracer = tracer
        self._prefix = f"/{service}/"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Let the call go on in its trace."""
        context = trace_context.of_metadata(handler_call_details.invocation_metadata)
        method = handler_call_details.method
        if self._tracer is not None and method.startswith(self._prefix):
            service, _, name = method[1:].partition("/")
            span = self._tracer.begin(
                method[1:], context, "server", {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
            )
            context = span.context
            task = asyncio.current_task()
            assert task is not None, "gRPC asks interceptors in the call's own task"
            status = call_status.begin()
            task.add_done_callback(lambda task: _end(span, status, task))
        if context is not None:
            trace_context.enter(context)
            log.about(trace_id=context.trace_id)
        return await continuation(handler_call_details)


def _end(span: Span, status: CallStatus, task: asyncio.Task[Any]) -> None:
    code = grpc.StatusCode.CANCELLED if task.cancelled() else status.code
    error = "cancelled" if task.cancelled() else code.name.lower() if code in _OURS else ""
    span.end({"rpc.grpc.status_code": code.value[0]}, error=error)
