"""The methods of vllm.grpc.engine.VllmEngine."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import closing
from types import SimpleNamespace
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.descriptor import MethodDescriptor

from protos import inference_pb2
from services.answer import Answer, PromptLogprobs
from services.answering import Answerer
from services.caller import current_caller
from services.engine import Engine
from services.handlers import Context
from services.vllm_api.facts import Loads, model_info
from services.vllm_api.kv_events import KvEvents
from services.vllm_api.requests import embed_from_vllm, embed_in_their_words, in_their_words, request_from_vllm
from services.vllm_api.responses import Streamed, Told, Whole
from services.vllm_api.running import Running
from services.vllm_api.stubs import common_pb2 as common
from services.vllm_api.stubs import vllm_pb2 as vllm
from services.vllm_api.tokenizer_zip import TokenizerZip

Start = Callable[[inference_pb2.GenerateRequest, Context], Awaitable[Answer]]
"""Our own service's way from a message to an answer."""

Embed = Callable[[inference_pb2.EmbedRequest, Context], Awaitable[inference_pb2.EmbedResponse]]
"""And to vectors."""


class VllmEngine:
    """What of it is served; `methods` has the others, too."""

    file: Final = vllm.DESCRIPTOR
    name: Final = "vllm.grpc.engine.VllmEngine"

    def __init__(
        self, start: Start, embed: Embed, answerer: Answerer, engine: Engine, *, max_kv_streams: int = 16
    ) -> None:
        self._start = start
        self._embed = embed
        self._answerer = answerer
        self._engine = engine
        self._running = Running()
        self._loads = Loads(engine.scheduler)
        self._kv_events = KvEvents(engine.scheduler, max_streams=max_kv_streams)
        self._tells_cache = max_kv_streams > 0
        self._flushing = asyncio.Lock()
        self._tokenizer = TokenizerZip(answerer.model.path)
        self._model_info = model_info(answerer.model, answerer.max_length)

    async def Generate(  # noqa: N802
        self, request: vllm.GenerateRequest, context: Context
    ) -> AsyncGenerator[vllm.GenerateResponse, None]:
        """An answer, as it is made or whole."""
        with self._running.enter(current_caller().tenant, request.request_id) as run:
            with in_their_words(request):
                answer = await self._start(request_from_vllm(request), context)
            with closing(run.begin(answer)):
                told: Told = Streamed(answer.num_prompt_tokens) if request.stream else Whole(answer.spec.n)
                while answer.is_open:
                    for event in await answer.next():
                        for message in told.take(event):
                            yield message
                        if isinstance(event, PromptLogprobs):  # of a long prompt they are many, and all there at once
                            await asyncio.sleep(0)

    async def Embed(self, request: vllm.EmbedRequest, context: Context) -> vllm.EmbedResponse:  # noqa: N802
        """The vector of one text, which comes as tokens."""
        with embed_in_their_words():
            answer = await self._embed(embed_from_vllm(request), context)
        [vector] = answer.embeddings
        return vllm.EmbedResponse(
            embedding=struct.unpack(f"<{answer.dimensions}f", vector.values),
            prompt_tokens=vector.prompt_tokens,
            embedding_dim=answer.dimensions,
        )

    async def Abort(self, request: vllm.AbortRequest, context: Context) -> vllm.AbortResponse:  # noqa: N802
        """End requests of the caller's tenant. Those that are not there have ended already."""
        for request_id in request.request_ids:
            self._running.abort(current_caller().tenant, request_id)
        return vllm.AbortResponse()

    async def HealthCheck(  # noqa: N802
        self, request: vllm.HealthCheckRequest, context: Context
    ) -> vllm.HealthCheckResponse:
        """Whether requests can be answered now."""
        healthy = self._engine.can_serve
        why_not = "the scheduler stops" if self._engine.is_draining else "no executor is connected"
        return vllm.HealthCheckResponse(healthy=healthy, message="" if healthy else why_not)

    async def GetModelInfo(  # noqa: N802
        self, request: vllm.GetModelInfoRequest, context: Context
    ) -> vllm.GetModelInfoResponse:
        """What is served."""
        return self._model_info

    async def GetServerInfo(  # noqa: N802
        self, request: vllm.GetServerInfoRequest, context: Context
    ) -> vllm.GetServerInfoResponse:
        """What serves it."""
        return self._loads.server_info(current_caller().tenant)

    async def GetLoads(self, request: vllm.GetLoadsRequest, context: Context) -> vllm.GetLoadsResponse:  # noqa: N802
        """How busy it is."""
        return self._loads.loads(current_caller().tenant)

    def GetTokenizer(  # noqa: N802
        self, request: common.GetTokenizerRequest, context: Context
    ) -> AsyncGenerator[common.GetTokenizerChunk, None]:
        """The tokenizer's files."""
        return self._tokenizer.chunks()

    def SubscribeKvEvents(  # noqa: N802
        self, request: common.SubscribeKvEventsRequest, context: Context
    ) -> AsyncGenerator[common.KvEventBatch, None]:
        """What is cached of the caller's tenant."""
        return self._kv_events.stream(current_caller().tenant, after=request.start_sequence_number)

    async def FlushCache(  # noqa: N802
        self, request: common.FlushCacheRequest, context: Context
    ) -> common.FlushCacheResponse:
        """Forget what is cached of the caller's tenant. It waits for nobody, and what runs goes on."""
        num_blocks = 0
        async with self._flushing:
            for forgotten in self._engine.scheduler.prefixes.forget(current_caller().tenant):
                num_blocks += forgotten
                await asyncio.sleep(0)  # others have their turn
        return common.FlushCacheResponse(success=True, message=f"{num_blocks} blocks were forgotten")

    def methods(self) -> SimpleNamespace:
        """Every method of the service as the package has it; those that are not served say so in words.

        A later version of the package may have more of them.
        """
        all_of_it = self.file.services_by_name["VllmEngine"].methods
        off = set() if self._tells_cache else {"SubscribeKvEvents"}
        return SimpleNamespace(
            **{m.name: (m.name not in off and getattr(self, m.name, None)) or _refusal(m) for m in all_of_it}
        )

    def close(self) -> None:
        """End the streams that have no end of their own."""
        self._kv_events.close()


def _refusal(method: MethodDescriptor) -> Callable[..., Any]:
    async def refuse(_: object, context: Context) -> NoReturn:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method.name} is not served here")

    async def refuse_stream(request: object, context: Context) -> AsyncGenerator[Any, None]:
        await refuse(request, context)
        yield  # it is a generator, of nothing

    return refuse_stream if method.server_streaming else refuse
