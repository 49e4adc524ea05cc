"""The place where a gRPC call becomes part of a trace: the one that its metadata names, or a new one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
from grpc import aio

from common import log
from services import trace_context
from services.tracing import Tracer

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any] | None  # of unknown messages: it is generic in the stubs alone


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
            task.add_done_callback(lambda task: span.end(error="cancelled" if task.cancelled() else ""))
        if context is not None:
            trace_context.enter(context)
            log.about(trace_id=context.trace_id)
        return await continuation(handler_call_details)
