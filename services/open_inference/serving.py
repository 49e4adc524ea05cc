"""The whole service, as a gRPC server takes it.

Only a process that serves it imports this: its stubs are those of every other program that speaks the protocol, and
one process can have them once.
"""

from __future__ import annotations

from collections.abc import Callable

import grpc

from common.sampling import RequestLimits
from protos import open_inference_pb2
from services.answering import Answerer
from services.handlers import Arrivals, Frame, Write, service_handler
from services.open_inference.service import SERVICE, OpenInferenceService
from services.open_inference.stream import Streams


def open_inference(
    answerer: Answerer,
    limits: RequestLimits,
    *,
    is_ready: Callable[[], bool],
    open_call: Frame,
    arrivals: Arrivals,
    idle: Arrivals,
    write: Write,
) -> tuple[grpc.GenericRpcHandler, Streams]:
    """The handler of all methods, and the calls of ModelStreamInfer, which are to be closed at the end.

    The rest is what services/handlers.py:service_handler takes; `idle` is for streams, where `arrivals` is for calls.
    """
    service = OpenInferenceService(answerer, limits, is_ready)
    streams = Streams(service, open_call=open_call, idle=idle, write=write)
    handler = service_handler(
        SERVICE,
        open_inference_pb2.DESCRIPTOR,
        service,
        open_call=open_call,
        arrivals=arrivals,
        others={"ModelStreamInfer": streams.handler()},
    )
    return handler, streams
