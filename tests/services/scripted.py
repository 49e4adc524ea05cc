"""A server that does as a test tells it, over a real connection, for the Python client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from grpc import aio

from common.errors import InvalidRequest, PagewireError, Unavailable, UnknownModel
from protos import inference_pb2 as pb
from services.handlers import Context, service_handler
from tests.services.served import HANG_S

Script = Callable[[Any, Context], AsyncGenerator[pb.GenerateStreamResponse, None]]
GONE = Unavailable("going", 0.0)

_SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name


class Scripted:
    """It answers call by call."""

    def __init__(self, *scripts: Script, vectors: Sequence[pb.EmbedResponse | PagewireError | None] = ()) -> None:
        self.scripts = list(scripts)
        self.vectors = list(vectors)  # None: it says nothing
        self.asked: list[Any] = []
        self.cancelled: list[str] = []
        self.is_mute = False  # Cancel and Unpin have no answer
        self.was_called = asyncio.Event()  # one of these two

    async def GenerateStream(  # noqa: N802
        self, request: Any, context: Context
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        self.asked.append(request)
        async for message in self.scripts.pop(0)(request, context):
            yield message

    Resume = GenerateStream

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:  # noqa: N802
        self.asked.append(request)
        said = self.vectors.pop(0)
        if said is None:
            await asyncio.Event().wait()
        if isinstance(said, pb.EmbedResponse):
            return said
        raise said or AssertionError

    async def Cancel(self, request: Any, context: Context) -> pb.CancelResponse:  # noqa: N802
        self.cancelled.append(request.request_id)
        await self._called()
        return pb.CancelResponse(found=True)

    async def Unpin(self, request: pb.UnpinRequest, context: Context) -> pb.UnpinResponse:  # noqa: N802
        await self._called()
        if request.pin_id == "bad":
            raise InvalidRequest("which", "is bad")
        return pb.UnpinResponse(tokens=7 if request.all else 3)

    async def _called(self) -> None:
        self.was_called.set()
        if self.is_mute:
            await asyncio.Event().wait()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: N802
        self.asked.append(request)
        return pb.TokenizeResponse(token_ids=map(ord, request.text))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:  # noqa: N802
        self.asked.append(request)
        return pb.DetokenizeResponse(text="".join(map(chr, request.token_ids)))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: N802
        if request.model not in ("", "m"):
            raise UnknownModel(f"{request.model} is not served here")
        return pb.GetModelResponse(model="m", vocab_size=9, chat=True)

    Generate = Cancel


def delta(index: int, *tokens: int, choice: int = 0) -> pb.GenerateStreamResponse:
    ticket = f"{choice} after {index + len(tokens)}".encode()
    return pb.GenerateStreamResponse(
        delta=pb.Delta(choice=choice, index=index, token_ids=tokens, text="".join(map(chr, tokens)), ticket=ticket)
    )


def finish(choice: int = 0) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(finish=pb.Finish(choice=choice, reason=pb.FINISH_REASON_LENGTH, exact=True))


def first(**changes: Any) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(prompt=pb.PromptInfo(model="m", max_tokens=9, ticket=b"first", **changes))


def saying(*messages: pb.GenerateStreamResponse, then: PagewireError | None = None) -> Script:
    async def script(request: Any, context: Context) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        for message in messages:
            yield message
        if then is not None:
            raise then

    return script


@contextmanager
def played(
    *scripts: Script, vectors: Sequence[pb.EmbedResponse | PagewireError | None] = ()
) -> Iterator[tuple[Scripted, Callable[[Callable[[str], Any]], Any]]]:
    """The server, and a way to run something blocking beside it."""
    server = Scripted(*scripts, vectors=vectors)

    def run(use: Callable[[str], Any]) -> Any:
        async def main() -> Any:
            running = aio.server()
            running.add_generic_rpc_handlers((service_handler(_SERVICE, pb.DESCRIPTOR, server),))
            port = running.add_insecure_port("127.0.0.1:0")
            await running.start()
            try:
                async with asyncio.timeout(HANG_S):
                    result = use(f"127.0.0.1:{port}")
                    return await result if asyncio.iscoroutine(result) else result
            finally:
                await running.stop(None)

        return asyncio.run(main())

    with pytest.MonkeyPatch.context() as changed:
        for client in ("aio", "client"):  # as long as it takes: a test asks what the server was told
            changed.setattr(f"pagewire.{client}.CANCEL_TIMEOUT_S", HANG_S)
            changed.setattr(f"pagewire.{client}.UNPIN_TIMEOUT_S", HANG_S)
        yield server, run
