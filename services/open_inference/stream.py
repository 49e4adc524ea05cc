"""ModelStreamInfer: any number of requests over one call, answered side by side.

A call has three parts. One task reads requests, and starts a task for each; these put their responses out; the call's
own task writes them, one after another. So a reader that takes nothing is noticed as in every other stream, and tokens
that are made meanwhile share the next response of their request.

A request that fails says so in a response, and the others go on, as Triton does it. A caller that sends the metadata
`triton_grpc_error: true` gets a status instead, with all its details, and the call is over.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, nullcontext
from typing import Final, NamedTuple

import grpc

from common.errors import PagewireError, Unavailable
from protos import open_inference_pb2 as pb
from services.handlers import Arrivals, Context, Frame, Write, answer, parse, plain_write, send_headers, status_of_bug
from services.open_call import open_call as this_call
from services.open_inference.answers import failure_of
from services.open_inference.service import SERVICE, OpenInferenceService
from services.open_inference.words import AT_ONCE
from services.status import to_rpc_status

_CALL: Final = f"{SERVICE}.ModelStreamInfer"


class _Message(NamedTuple):
    data: bytes
    taken: asyncio.Future[None]  # done when it is on its way


class Streams:
    """All calls of ModelStreamInfer.

    `open_call` is entered for each request, not for its call. `idle` bounds the calls that wait for a request while
    none of theirs is answered: for so long, and so many of them.
    """

    def __init__(
        self,
        service: OpenInferenceService,
        *,
        open_call: Frame = nullcontext,
        idle: Arrivals | None = None,
        write: Write = plain_write,
    ) -> None:
        self.service = service
        self.open_call = open_call
        self.idle = Arrivals() if idle is None else idle
        self.write = write
        self._calls: set[_Stream] = set()

    def handler(self) -> grpc.RpcMethodHandler[bytes, bytes]:
        """The handler of the method."""

        async def handle(_: object, context: Context) -> None:
            await answer(_CALL, context, self._respond(context))

        return grpc.stream_stream_rpc_method_handler(handle)

    def close(self) -> None:
        """End all calls."""
        for call in self._calls:
            call.end(Unavailable("the scheduler is shutting down"))

    async def _respond(self, context: Context) -> None:
        if (this := this_call()) is not None:
            this.begin()
        call = _Stream(self, context)
        self._calls.add(call)
        try:
            await call.run()
        finally:
            self._calls.discard(call)


class _Stream:
    """One call."""

    def __init__(self, streams: Streams, context: Context) -> None:
        self._streams = streams
        self._context = context
        self._ends_with_status = ("triton_grpc_error", "true") in (context.invocation_metadata() or ())
        self._running: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(AT_ONCE)
        self._limit: asyncio.Timeout | None = None  # while a request is waited for
        self._outbox: asyncio.Queue[_Message | BaseException | None] = asyncio.Queue()  # None: all is said

    async def run(self) -> None:
        """Return when the caller has said all and heard all. Raises what ended the call otherwise."""
        reading = asyncio.create_task(self._read())
        reading.add_done_callback(self._has_ended)
        try:
            await self._write()
        finally:
            tasks = (reading, *self._running)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def end(self, why: BaseException) -> None:
        """Raise this, behind what is on its way."""
        self._outbox.put_nowait(why)

    async def _write(self) -> None:
        has_begun = False
        while (message := await self._outbox.get()) is not None:
            if isinstance(message, BaseException):
                raise message
            if not has_begun:
                await send_headers(self._context)
                has_begun = True
            await self._streams.write(self._context, message.data)
            if not message.taken.done():
                message.taken.set_result(None)

    async def _read(self) -> None:
        while (data := await self._next_request()) is not None:
            request = parse(pb.ModelInferRequest, data)
            await self._room.acquire()
            task = asyncio.create_task(self._serve(request))
            self._running.add(task)
            task.add_done_callback(self._served)
        if self._running:
            await asyncio.wait(self._running)

    async def _next_request(self) -> bytes | None:
        """What is asked next; None where that was all. Nobody waits for it too long while nothing is answered."""
        self._limit = limit = asyncio.timeout(None)
        idle = self._streams.idle
        try:
            async with limit:
                if not self._running:
                    idle.begin(limit)
                data = await self._context.read()
        except TimeoutError:
            raise idle.refusal(limit) from None
        finally:
            idle.end(limit)
            self._limit = None
        return data if isinstance(data, bytes) else None

    async def _serve(self, request: pb.ModelInferRequest) -> None:
        """Answer one request. Raises its error where that ends the call."""
        service = self._streams.service
        try:
            with self._streams.open_call():
                time_left_s = self._context.time_remaining()
                async with aclosing(service.responses(request, time_left_s)) as responses:
                    async for response in responses:
                        await self._tell(pb.ModelStreamInferResponse(infer_response=response))
        except Exception as error:
            if self._ends_with_status:
                raise
            status = to_rpc_status(error) if isinstance(error, PagewireError) else status_of_bug(_CALL, error)
            await self._tell(failure_of(request, service.model, status, error))

    async def _tell(self, response: pb.ModelStreamInferResponse) -> None:
        """Return when it is on its way."""
        taken = asyncio.get_running_loop().create_future()
        self._outbox.put_nowait(_Message(response.SerializeToString(), taken))
        await taken

    def _served(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._room.release()
        if not self._running and self._limit is not None:
            self._streams.idle.begin(self._limit)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.end(error)

    def _has_ended(self, reading: asyncio.Task[None]) -> None:
        """All is read and answered, or something else has ended it."""
        error = None if reading.cancelled() else reading.exception()
        self._outbox.put_nowait(error)
