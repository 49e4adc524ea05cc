"""The spans of gRPC calls: how they say that one failed."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc import aio

from common.errors import InvalidRequest, Unavailable
from protos import inference_pb2 as pb
from services.handlers import service_handler
from services.traced_calls import TracedCalls
from tests.services.served import HANG_S
from tests.services.spans import Spans, told
from tests.services.test_handlers import SERVICE, Service, call, raising


@pytest.mark.parametrize(
    ("error", "code", "blamed"),
    [
        (Unavailable("no executor"), grpc.StatusCode.UNAVAILABLE, "unavailable"),
        (RuntimeError("a bug"), grpc.StatusCode.INTERNAL, "internal"),
        (InvalidRequest("seed", "is no number"), grpc.StatusCode.INVALID_ARGUMENT, None),
    ],
)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_the_span_of_a_call_has_its_status_and_fails_where_we_are_to_blame(
    method: str, error: Exception, code: grpc.StatusCode, blamed: str | None
) -> None:
    spans = Spans()

    async def main() -> None:
        service = Service(raising(error))
        server = aio.server(interceptors=(TracedCalls(spans.tracer, SERVICE),))
        server.add_generic_rpc_handlers((service_handler(SERVICE, pb.DESCRIPTOR, service),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(aio.AioRpcError) as failed:
                await call(channel, method)
            assert failed.value.code() is code
            await call(channel, "GetModel")
            async with asyncio.timeout(HANG_S):
                while len(spans.ended) < 2:
                    await asyncio.sleep(0)
        await server.stop(0)

    asyncio.run(main())
    spans_by_name = {span.name.rpartition("/")[2]: span for span in spans.ended}
    names = ("rpc.grpc.status_code", "error.type")
    assert told(spans_by_name[method], *names) == [code.value[0], blamed]
    assert spans_by_name[method].status.is_ok == (blamed is None)
    assert told(spans_by_name["GetModel"], *names) == [0, None]
