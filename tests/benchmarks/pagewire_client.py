"""Pagewire's own API over gRPC, as a benchmark asks it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from common.errors import Unavailable
from protos import inference_pb2 as pb
from services.client import Client, Server, connect
from tests.benchmarks.playing import Emit
from tests.benchmarks.workloads import Request


class PagewireClient:
    """A playing.Client over one channel."""

    _client: Client

    def __init__(self, address: str, *, temperature: float = 0.0) -> None:
        self._address = address
        self._temperature = temperature
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._client = await self._stack.enter_async_context(connect(Server(address=self._address)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def is_ready(self) -> bool:
        """Whether an executor is connected."""
        try:
            return await self._client.is_serving()
        except Unavailable:
            return False

    async def generate(self, request: Request, emit: Emit) -> int:
        """Stream one answer."""
        message = pb.GenerateStreamRequest(
            token_ids=pb.TokenIds(ids=request.prompt),
            sampling=pb.SamplingParams(temperature=self._temperature),
            stopping=pb.StopConditions(max_tokens=request.max_tokens, ignore_eos=True),
        )
        async with self._client.ask(message) as stream:
            async for _ in stream:
                emit()
            return stream.answer.usage.completion_tokens
