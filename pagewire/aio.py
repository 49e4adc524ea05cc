"""The client for asyncio: what pagewire/client.py is, awaited."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, cast

import grpc
from google.protobuf.message import Message
from grpc import aio

from pagewire.access import Metadata, access
from pagewire.answers import Answer, Delta, Finish
from pagewire.asking import Settings, request_of
from pagewire.borrowed import borrow
from pagewire.calls import (
    CANCEL,
    CANCEL_TIMEOUT_S,
    DEFAULT_PATIENCE_S,
    DEFAULT_TIMEOUT_S,
    DETOKENIZE,
    EMBED,
    GET_MODEL,
    TOKENIZE,
    UNPIN,
    UNPIN_TIMEOUT_S,
    Asked,
    AskedOnce,
    Call,
    Manner,
    Method,
    addresses_of,
    unpin_request,
    unpinned_tokens,
)
from pagewire.continuation import Continuation, OutOfStep
from pagewire.embeddings import Embedding, EmbedSettings, embed_request, embeddings_of
from pagewire.failures import Trailers, closed, judge
from pagewire.retrying import RetryBudget
from pagewire.tokens import (
    Model,
    TokenizeSettings,
    detokenize_request,
    model_of,
    model_request,
    tokenize_request,
)

if TYPE_CHECKING:
    from common import errors
    from protos import inference_pb2 as pb
else:
    errors = borrow("common.errors")

Running = aio.UnaryStreamCall[bytes, bytes]
_Told = TypeVar("_Told", bound=Message)


class _Connections:
    """A channel for each address that was ever asked, shared by the streams of one client."""

    def __init__(self, manner: Manner) -> None:
        self.first = manner.addresses[0]  # who answered last: a new request begins there
        self._manner = manner
        self._channels: dict[str, aio.Channel] = {}
        self._is_closed = False
        self._pauses: dict[object, asyncio.Event] = {}  # who waits between two calls

    def call(self, asked: Asked) -> Running:
        """Begin the next call of a request."""
        call = asked.next_call()
        method: aio.UnaryStreamMultiCallable[bytes, bytes] = self._channel(call.address).unary_stream(call.method)
        return method(call.request, timeout=call.timeout_s, metadata=asked.metadata)

    async def cancel(self, asked: Asked) -> None:
        """End a request where it may run still. Where that fails it ends a little later by itself."""
        address = asked.runs_at
        if address is None:
            return
        with contextlib.suppress(aio.AioRpcError, errors.PagewireError):  # no connection | the client was closed
            await self._ask(Call(address, CANCEL, asked.cancellation(), CANCEL_TIMEOUT_S), asked.metadata)

    async def once(self, asked: AskedOnce[_Told]) -> _Told:
        """The answer to a request that has one message. Raises PagewireErrors."""
        with asked.span:
            while True:
                call = asked.next_call()
                try:
                    answer = await self._ask(call, asked.metadata)
                except aio.AioRpcError as error:
                    await self.pause(asked, asked.failed(error.code(), error.details(), _trailers(error)))
                else:
                    self.first = call.address
                    return asked.hear(answer)

    async def unpin(self, pin_id: str | None) -> int:
        """End a pin, or all, on the server that answered last."""
        call = Call(self.first, UNPIN, unpin_request(pin_id), UNPIN_TIMEOUT_S)
        try:
            return unpinned_tokens(await self._ask(call, self._manner.access.metadata))
        except aio.AioRpcError as error:
            raise judge(error.code(), error.details() or "", _trailers(error), call.address).error from error

    async def pause(self, asked: Asked | AskedOnce[Any], after_s: float) -> None:
        """Wait before the next call, but no longer than until the client or the stream is closed."""
        waking = self._pauses[asked] = asyncio.Event()
        try:
            if not (self._is_closed or asked.is_closed):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(after_s):
                        await waking.wait()
        finally:
            self._pauses.pop(asked, None)

    def wake(self, asked: Asked) -> None:
        """End the pause of a stream that was closed."""
        if (waking := self._pauses.get(asked)) is not None:
            waking.set()

    async def close(self) -> None:
        """End all calls."""
        self._is_closed = True
        channels, self._channels = self._channels, {}
        for waking in self._pauses.values():
            waking.set()
        for channel in channels.values():
            await channel.close()

    def check_open(self) -> None:
        """Raise the error of a closed client, which gRPC tells its calls as if their task was cancelled."""
        if self._is_closed and not _is_cancelled():
            raise closed()

    async def _ask(self, call: Call, metadata: Metadata) -> bytes:
        """One message for another."""
        method: aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel(call.address).unary_unary(call.method)
        try:
            return await method(call.request, timeout=call.timeout_s, metadata=tuple(metadata))
        except asyncio.CancelledError:
            self.check_open()
            raise

    def _channel(self, address: str) -> aio.Channel:
        if self._is_closed:
            raise closed()
        channel = self._channels.get(address)
        if channel is None:
            options, credentials = self._manner.options, self._manner.access.credentials
            if credentials is None:
                channel = aio.insecure_channel(address, options=options)
            else:
                channel = aio.secure_channel(address, credentials, options=options)
            self._channels[address] = channel
        return channel


class AsyncClient:
    """As Client, for one event loop.

    >>> async with AsyncClient("127.0.0.1:50051") as client:
    ...     print((await client.generate("The sea is", max_tokens=8)).text)
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        api_key: str | None = None,
        tls_ca: str | Path | None = None,
        tls_cert: str | Path | None = None,
        tls_key: str | Path | None = None,
        insecure: bool = False,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        patience_s: float = DEFAULT_PATIENCE_S,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Metadata = (),
    ) -> None:
        """As Client's."""
        addresses = addresses_of(address)
        shown = access(
            addresses,
            api_key=api_key,
            tls_ca=tls_ca,
            tls_cert=tls_cert,
            tls_key=tls_key,
            insecure=insecure,
            credentials=credentials,
            metadata=metadata,
        )
        self._manner = Manner(addresses=addresses, timeout_s=timeout_s, patience_s=patience_s, access=shown)
        self._budget = RetryBudget()
        self._connections = _Connections(self._manner)

    async def generate(
        self, prompt: str | None = None, *, timeout_s: float | None = None, **settings: Unpack[Settings]
    ) -> Answer:
        """The whole answer. Raises PagewireErrors; see Settings for what can be set."""
        async with self.stream(prompt, timeout_s=timeout_s, **settings) as stream:
            async for _ in stream:
                pass
            return stream.answer

    def stream(
        self, prompt: str | None = None, *, timeout_s: float | None = None, **settings: Unpack[Settings]
    ) -> AsyncStream:
        """The answer as it is made. Leave it with `async with`, or `close` it, and the server stops at once."""
        return self.send(request_of(prompt, settings), timeout_s=timeout_s)

    def send(
        self,
        request: pb.GenerateStreamRequest,
        *,
        timeout_s: float | None = None,
        begin_patience_s: float | None = None,
        metadata: Metadata = (),
    ) -> AsyncStream:
        """Stream the answer to a request in the words of the API itself.

        `metadata` is this request's own. With `begin_patience_s` it is tried again only once a server has begun with
        it: before that each server is asked once, and those that are not there are looked for that long.
        """
        asked = Asked(
            request,
            self._manner,
            self._budget,
            first=self._connections.first,
            timeout_s=timeout_s,
            begin_patience_s=begin_patience_s,
            metadata=metadata,
        )
        return AsyncStream(self._connections, asked)

    async def embed(
        self,
        inputs: str | Sequence[str | Sequence[int]],
        *,
        timeout_s: float | None = None,
        **settings: Unpack[EmbedSettings],
    ) -> tuple[Embedding, ...]:
        """As Client's."""
        return embeddings_of(await self._once(EMBED, embed_request(inputs, settings), timeout_s))

    async def tokenize(
        self, text: str | None = None, *, timeout_s: float | None = None, **settings: Unpack[TokenizeSettings]
    ) -> tuple[int, ...]:
        """As Client's."""
        answer = await self._once(TOKENIZE, tokenize_request(text, settings), timeout_s)
        return tuple(answer.token_ids)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        model: str = "",
        timeout_s: float | None = None,
    ) -> str:
        """As Client's."""
        request = detokenize_request(token_ids, skip_special_tokens=skip_special_tokens, model=model)
        answer = await self._once(DETOKENIZE, request, timeout_s)
        return answer.text

    async def model(self, name: str = "", *, timeout_s: float | None = None) -> Model:
        """As Client's."""
        return model_of(await self._once(GET_MODEL, model_request(name), timeout_s))

    async def unpin(self, pin_id: str | None = None) -> int:
        """As Client's."""
        return await self._connections.unpin(pin_id)

    async def _once(self, method: Method[_Told], request: Message, timeout_s: float | None) -> _Told:
        first = self._connections.first
        asked = AskedOnce(method, request, self._manner, self._budget, first=first, timeout_s=timeout_s)
        return await self._connections.once(asked)

    async def close(self) -> None:
        """As Client's."""
        await self._connections.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()


class AsyncStream:
    """The deltas of one answer. When they have come to an end, `answer` is the whole of it."""

    def __init__(self, connections: _Connections, asked: Asked) -> None:
        self._connections = connections
        self._asked = asked
        self._call: Running | None = None

    @property
    def request_id(self) -> str:
        """What the server's log calls it."""
        return self._asked.continuation.request_id

    @property
    def continuation(self) -> Continuation:
        """What was heard of the answer so far."""
        return self._asked.continuation

    @property
    def finishes(self) -> dict[int, Finish]:
        """The ends that are known, by choice."""
        return dict(self._asked.continuation.finishes)

    @property
    def finish(self) -> Finish | None:
        """The end of the first choice; None before it has come."""
        return self._asked.continuation.finishes.get(0)

    @property
    def answer(self) -> Answer:
        """The whole answer, once the stream has ended."""
        return self._asked.continuation.answer()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        """The next delta of any choice. Raises PagewireErrors."""
        while (new := await self.next()) is not None:
            if isinstance(new, Delta):
                return new
        raise StopAsyncIteration

    async def next(self) -> Delta | Finish | None:
        """The next delta or end of any choice; None when all have ended. Raises PagewireErrors."""
        try:
            while not self._asked.is_closed and not self._asked.is_done:
                if (new := await self._read()) is not None:
                    return new
        except BaseException as error:  # also of who reads under a timeout: gRPC cancels the call, not the read alone
            self._asked.stopped(error)
            self._drop()
            raise
        return None

    async def close(self, *, linger: bool = False) -> None:
        """Read no more. What still runs on the server is stopped; with `linger` it waits a while for a Resume."""
        if self._asked.is_closed:
            return
        self._asked.leave()  # first: no reader takes what follows for a lost connection
        self._connections.wake(self._asked)
        self._drop()
        if not linger:
            await self._connections.cancel(self._asked)

    async def aclose(self) -> None:
        """`close`, as contextlib.aclosing calls it."""
        await self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        """Who dropped it reads no more; its server is left to find that out, for nothing can be awaited here."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the call with it
            self._drop()

    async def _read(self) -> Delta | Finish | None:
        """One message, or one way in which a call ends and another begins."""
        try:
            if self._call is None:
                self._call = self._connections.call(self._asked)
            data: Any = await self._call.read()
            if isinstance(data, bytes):
                new = self._asked.hear(data)
                self._connections.first = self._asked.address
                return new
            after_s = self._asked.broke()
        except OutOfStep as why:
            after_s = self._asked.broke(why)
        except asyncio.CancelledError:
            if self._asked.is_closed and not _is_cancelled():
                return None
            self._connections.check_open()
            raise
        except aio.AioRpcError as error:
            if self._asked.is_closed:
                return None
            after_s = self._asked.failed(error.code(), error.details(), _trailers(error))
        self._drop()
        await self._connections.pause(self._asked, after_s)
        return None

    def _drop(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.cancel()


def _is_cancelled() -> bool:
    """Whether a CancelledError is meant for this task, and is not gRPC's word for a call that was ended."""
    task = asyncio.current_task()
    return bool(task and task.cancelling())


def _trailers(error: aio.AioRpcError) -> Trailers:
    """They are pairs, also where the stubs say otherwise."""
    return cast("Trailers", error.trailing_metadata())
