"""The schedulers, as the gateway asks them: each call under the API key of whoever asked the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2

from common.errors import PagewireError, Unauthenticated, Unavailable
from pagewire.aio import AsyncClient, AsyncStream
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from services import trace_context
from services.client import bearer
from services.grpc_options import client_options
from services.lifecycle import StartupError, is_local
from services.status import DETAILS_KEY, from_rpc_error
from services.tls import Dialer, PemFiles

_NO_HURRY_S: Final = 86_400.0  # whoever reads the answer ends it
_UNARY_S: Final = 5.0
_LOOK_S: Final = 2.0  # one that stands still is told of within the 5 s that a scrape often has
_LOOK_AGAIN_S: Final = 0.1

_T = TypeVar("_T")


class Upstream:
    """One scheduler, or the first of several that is there."""

    def __init__(self, asking: AsyncClient, channels: Sequence[aio.Channel], *, begin_patience_s: float) -> None:
        self._asking = asking
        self._channels = list(channels)  # who answered last comes first
        self._begin_patience_s = begin_patience_s

    def ask(self, request: pb.GenerateStreamRequest, key: str) -> AsyncStream:
        """The answer as it is made, also by a scheduler that was started again meanwhile."""
        metadata = (*bearer(key), *trace_context.outgoing())
        return self._asking.send(request, begin_patience_s=self._begin_patience_s, metadata=metadata)

    async def model(self, name: str, key: str) -> pb.GetModelResponse:
        """What is served. Raises PagewireErrors; UnknownModel where `name` is another's."""

        async def ask(channel: aio.Channel) -> pb.GetModelResponse:
            stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
            return await stub.GetModel(pb.GetModelRequest(model=name), timeout=_UNARY_S, metadata=bearer(key))

        return await self._first(ask)

    async def embed(self, request: pb.EmbedRequest, key: str) -> pb.EmbedResponse:
        """Vectors, also by a scheduler that was started again meanwhile: it makes the same. Raises PagewireErrors."""
        metadata = (*bearer(key), *trace_context.outgoing())

        async def ask(channel: aio.Channel) -> pb.EmbedResponse:
            stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
            return await stub.Embed(request, timeout=_NO_HURRY_S, metadata=metadata)

        until_s: float | None = None  # none was lost yet
        while True:
            try:
                return await self._first(ask)
            except Unavailable:
                now_s = asyncio.get_running_loop().time()
                until_s = now_s + self._begin_patience_s if until_s is None else until_s
                if now_s >= until_s:
                    raise
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def text(self, ids: Sequence[int], key: str) -> str:
        """The text of tokens, also of special ones. Raises PagewireErrors."""
        request = pb.DetokenizeRequest(token_ids=ids, skip_special_tokens=False)

        async def ask(channel: aio.Channel) -> pb.DetokenizeResponse:
            stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
            return await stub.Detokenize(request, timeout=_UNARY_S, metadata=bearer(key))

        return (await self._first(ask)).text

    async def is_serving(self) -> bool:
        """Whether one says that it can answer requests. Raises Unavailable where none is there."""

        async def ask(channel: aio.Channel) -> health_pb2.HealthCheckResponse:
            answer = await _health(channel, _UNARY_S)
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                raise Unavailable("no executor is connected, or the scheduler drains")
            return answer

        try:
            await self._first(ask)
        except Unavailable:
            return False
        return True

    async def is_reachable(self) -> bool:
        """Whether one answers, also one that can answer no requests now."""

        async def answers(channel: aio.Channel) -> bool:
            try:
                await _health(channel, _LOOK_S)
            except aio.AioRpcError:
                return False
            return True

        return any(await asyncio.gather(*map(answers, self._channels)))

    async def asks_for_keys(self) -> bool:
        """Whether the scheduler refuses who shows no API key. Raises Unavailable where none is there."""
        try:
            await self.model("", "")
        except Unauthenticated:
            return True
        return False

    async def _first(self, ask: Callable[[aio.Channel], Awaitable[_T]]) -> _T:
        """What the first says that is there."""
        problem: PagewireError = Unavailable("no scheduler is there")
        for channel in tuple(self._channels):
            try:
                answer = await ask(channel)
            except aio.AioRpcError as error:
                problem = _meaning(error)
            except Unavailable as error:
                problem = error
            else:
                if channel is not self._channels[0]:
                    self._channels.remove(channel)
                    self._channels.insert(0, channel)
                return answer
            if not isinstance(problem, Unavailable):
                break
        raise problem


@asynccontextmanager
async def connect(
    addresses: Sequence[str],
    files: PemFiles | None,
    *,
    insecure: bool,
    patience_s: float,
    begin_patience_s: float,
) -> AsyncIterator[Upstream]:
    """Schedulers at these addresses.

    `patience_s` is how long a stream that has begun may find none that goes on with it, `begin_patience_s` how long one
    is looked for before that. Raises StartupError where keys would go over a network that anybody can listen to.
    """
    for address in addresses:
        if files is None and not insecure and not is_local(address):
            raise StartupError(
                f"callers' API keys are not passed on to {address} without TLS: give --tls-ca, or type --insecure if "
                f"the network itself is trusted"
            )
    dials = [Dialer(address, client_options(), files) for address in addresses]
    channels = [dial() for dial in dials]
    try:
        async with AsyncClient(
            addresses,
            api_key="",  # each call has its own
            insecure=insecure,
            timeout_s=_NO_HURRY_S,
            patience_s=patience_s,
            credentials=dials[0].credentials(),
        ) as asking:
            yield Upstream(asking, channels, begin_patience_s=begin_patience_s)
    finally:
        for channel in channels:
            await channel.close()


async def _health(channel: aio.Channel, limit_s: float) -> health_pb2.HealthCheckResponse:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    return await check(health_pb2.HealthCheckRequest(), timeout=limit_s)


def _meaning(error: aio.AioRpcError) -> PagewireError:
    """What a failed call means. gRPC's own words stay here: they name addresses, which are no caller's business."""
    if DETAILS_KEY not in (error.trailing_metadata() or ()):
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return Unavailable("no scheduler is there")
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:  # it stands still: another one may answer
            return Unavailable("the scheduler did not answer in time")
    known = from_rpc_error(error)
    return known if isinstance(known, PagewireError) else PagewireError(f"the scheduler answered {error.code().name}")
