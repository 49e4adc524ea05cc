"""gRPC's reflection, in the frame of our own calls: counted, bounded in time, and ended with a status.

What it tells of, and how, is grpc_reflection's. Its own handler is an async generator that gRPC runs: where its task is
cancelled its client would never hear of it, and one that says nothing and reads nothing would be there for ever.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import nullcontext
from typing import Any, Final

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from services.handlers import Arrivals, Context, Frame, Write, answer, parse, plain_write, send_headers
from services.open_call import open_call as this_call

SERVICE: Final = reflection.SERVICE_NAME


def reflection_handler(
    services: Iterable[str],
    *,
    open_call: Frame = nullcontext,
    arrivals: Arrivals | None = None,
    write: Write = plain_write,
) -> grpc.GenericRpcHandler:
    """What a gRPC server serves beside `services`, whose names and messages it tells.

    The others are those of services/handlers.py:service_handler. Every message of the caller is waited for as the one
    message of other calls is.
    """
    servicer: Any = reflection.aio.ReflectionServicer((*services, SERVICE))
    waiting = Arrivals() if arrivals is None else arrivals

    async def respond(context: Context) -> None:
        if (this := this_call()) is not None:
            this.begin()
        data = await waiting.next_message(context)
        with open_call():
            await send_headers(context)
            async for response in servicer.ServerReflectionInfo(_requests(data, waiting, context), context):
                await write(context, response.SerializeToString())

    async def info(_: object, context: Context) -> None:
        await answer(f"{SERVICE}.ServerReflectionInfo", context, respond(context))

    return grpc.method_handlers_generic_handler(
        SERVICE, {"ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(info)}
    )


async def _requests(
    data: bytes | None, arrivals: Arrivals, context: Context
) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
    """What is asked, from `data` on, until the caller has said all. Raises InvalidRequest for what is no message."""
    while data is not None:
        yield parse(reflection_pb2.ServerReflectionRequest, data)
        data = await arrivals.next_message(context)
