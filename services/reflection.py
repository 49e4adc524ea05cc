"""gRPC's reflection, in the frame of our own calls: one that is ended from outside ends with a status.

What it tells of, and how, is grpc_reflection's. Its own handler is an async generator that gRPC runs: where its task is
cancelled its client would never hear of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from services.handlers import Context, answer, parse, send_headers
from services.open_call import open_call

SERVICE: Final = reflection.SERVICE_NAME


def reflection_handler(services: Iterable[str]) -> grpc.GenericRpcHandler:
    """What a gRPC server serves beside `services`, whose names and messages it tells."""
    servicer: Any = reflection.aio.ReflectionServicer((*services, SERVICE))

    async def respond(context: Context) -> None:
        if (this := open_call()) is not None:
            this.begin()
        await send_headers(context)
        async for response in servicer.ServerReflectionInfo(_requests(context), context):
            await context.write(response.SerializeToString())

    async def info(_: object, context: Context) -> None:
        await answer(f"{SERVICE}.ServerReflectionInfo", context, respond(context))

    return grpc.method_handlers_generic_handler(
        SERVICE, {"ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(info)}
    )


async def _requests(context: Context) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
    """What is asked, until the caller has said all. Raises InvalidRequest for a message that is none."""
    while isinstance(data := await context.read(), bytes):
        yield parse(reflection_pb2.ServerReflectionRequest, data)
