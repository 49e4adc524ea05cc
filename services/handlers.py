"""The frame that every call runs in: bytes are parsed here, and every ending becomes a status here.

gRPC's own frame would send an exception's text to the client, answer a malformed message with UNKNOWN, and leave a
client without any status when a CancelledError that the client did not cause escapes.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, aclosing, nullcontext
from types import MappingProxyType
from typing import Any, Final, Never, TypeVar

import grpc
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc import aio

from common.errors import InvalidRequest, Overloaded, PagewireError, Unavailable
from common.log import without_texts
from services import call_status
from services.open_call import open_call as this_call
from services.status import RpcStatus, internal_status, to_rpc_status

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_M = TypeVar("_M", bound=Message)

Context = aio.ServicerContext[bytes, bytes]
"""What gRPC knows of one call. Messages that pass through it are bytes."""

UnaryMethod = Callable[[Any, Context], Awaitable[Message]]
StreamMethod = Callable[[Any, Context], AsyncGenerator[Message, None]]
Frame = Callable[[], AbstractContextManager[None]]
Write = Callable[[Context, bytes], Awaitable[None]]

_STOPPED: Final = Unavailable("the server stopped this call")


class Arrivals:
    """Calls that have begun and whose message has not come: each has `limit_s`, and only `at_once` may be so at a time.

    Where there is one too many, the one that has waited longest makes room: who sends a call and its message together,
    as every client does, is not kept out by those that send calls and nothing else.
    """

    def __init__(self, *, limit_s: float = 30.0, at_once: int = 4096) -> None:
        self.limit_s = limit_s
        self._at_once = at_once
        self._waiting: dict[asyncio.Timeout, None] = {}  # longest first

    def __len__(self) -> int:
        return len(self._waiting)

    async def message(self, context: Context) -> bytes:
        """The one message of a call. Raises InvalidRequest when the caller ends without one, and as `next_message`."""
        data = await self.next_message(context)
        if data is None:
            raise InvalidRequest("message", "the call ended without one")
        return data

    async def next_message(self, context: Context) -> bytes | None:
        """The next message of a call, None where its caller has said all.

        Raises Unavailable when it does not come in time, and Overloaded when too many are waited for.
        """
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self.begin(limit)
                data = await context.read()
        except TimeoutError:
            raise self.refusal(limit) from None
        finally:
            self.end(limit)
        return data if isinstance(data, bytes) else None

    def begin(self, limit: asyncio.Timeout) -> None:
        """From now on what is done under this limit waits for a message."""
        now = asyncio.get_running_loop().time()
        self._waiting[limit] = None
        limit.reschedule(now + self.limit_s)
        if len(self._waiting) > self._at_once:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.reschedule(now)

    def end(self, limit: asyncio.Timeout) -> None:
        """It waits no more. One that never did is none of ours, and one that made room has ended."""
        self._waiting.pop(limit, None)

    def refusal(self, limit: asyncio.Timeout) -> PagewireError:
        """Why its time is over; asked before `end`."""
        if limit in self._waiting:
            return Unavailable(f"no message came within {self.limit_s:g} s")
        return Overloaded("too many calls wait for their message")


def service_handler(
    service: str,
    file: FileDescriptor,
    implementation: object,
    *,
    open_call: Frame = nullcontext,
    arrivals: Arrivals | None = None,
    write: Write | None = None,
    others: Mapping[str, grpc.RpcMethodHandler[bytes, bytes]] = MappingProxyType({}),
) -> grpc.GenericRpcHandler:
    """All methods of `service`, which `file` describes, served by the methods of `implementation` with their names.

    A unary method is `async def Name(self, request, context) -> response`, a streaming one an async generator of
    responses. Either may raise a PagewireError; services/status.py says what the client sees. A method that streams
    requests is not for this frame: build its handler with `answer`, and give it among `others`, by its name. Raises
    AttributeError for a method that `implementation` lacks. `open_call` is entered for as long as a call is open,
    before its message is parsed: a call that it refuses costs no more than that. `write` sends a message of a stream,
    and waits while its reader is slow.
    """
    package, _, name = service.rpartition(".")
    assert file.package == package, f"{service} is not in package {file.package}"
    methods = file.services_by_name[name].methods
    frame = _Frame(open_call, Arrivals() if arrivals is None else arrivals, write or plain_write)
    return grpc.method_handlers_generic_handler(
        service,
        {
            method.name: others.get(method.name) or frame.handler(method, getattr(implementation, method.name))
            for method in methods
        },
    )


async def answer(call: str, context: Context, work: Awaitable[_T]) -> _T | None:
    """Await `work`, the whole of one call, and end the call with a status whatever it raises; None where that is done.

    `call` names the method in the log. Who cancels a call's task on the server's side says why: by a PagewireError,
    which the client gets, or any message (`task.cancel("draining")`). gRPC, which speaks for the client, gives none.
    """
    try:
        return await _until_told(call, context, work)
    except aio.AbortError as over:
        # gRPC keeps it with the call, and raises it again when the handler returns. Its frames hold the call in turn: a
        # circle that only the collector could undo, and it comes for hundreds of refused calls at once, in one pause.
        over.__traceback__ = over.__context__ = None
        return None


async def send_headers(context: Context) -> None:
    """Begin the answer of a stream.

    They go alone. gRPC has no status for a call that is cancelled while they are on their way; and a first message that
    they went with would wait for its reader as long as he likes.
    """
    headers = context.send_initial_metadata(())
    this = this_call()
    await (headers if this is None else this.undisturbed(headers))


async def _until_told(call: str, context: Context, work: Awaitable[_T]) -> _T:
    """As `answer`. Raises AbortError where the call was ended with a status."""
    try:
        return await work
    except (aio.AbortError, aio.InternalError):
        raise  # the call has its status already | the client is gone, and gRPC knows
    except asyncio.CancelledError as error:
        if _client_left(error):
            raise  # gRPC leaks memory for every call where this is swallowed
        why = error.args[0] if error.args else None
        if isinstance(why, PagewireError):
            await _abort(context, to_rpc_status(why))
        _log.warning("%s was cancelled on the server's side", call)
        await _abort(context, to_rpc_status(_STOPPED))
    except PagewireError as error:
        await _abort(context, to_rpc_status(error))
    except Exception as error:  # noqa: BLE001  the edge: whatever it is, the client gets a status and no more
        await _abort(context, status_of_bug(call, error))


def status_of_bug(call: str, error: Exception) -> RpcStatus:
    """The status of a call that failed by a bug. The log says more, but no word of the caller's."""
    error_id = secrets.token_hex(8)
    _log.error(
        "%s failed with internal error %s\n%s",
        call,
        error_id,
        "".join(without_texts(error)),
        extra={"fields": {"error_id": error_id, "call": call}},
    )
    return internal_status(error_id)


def parse(message_class: type[_M], data: bytes) -> _M:
    """The message in `data`. Raises InvalidRequest naming the message's type when it is malformed."""
    try:
        return message_class.FromString(data)
    except DecodeError:
        raise InvalidRequest(message_class.DESCRIPTOR.full_name, "the message is malformed") from None


class _Frame:
    """What all methods of a service have around them.

    To gRPC all of them stream their requests; on the wire that is no difference. It would wait for the one message of a
    unary call by itself, for ever, and leave a call that ends without one unanswered.
    """

    def __init__(self, open_call: Frame, arrivals: Arrivals, write: Write) -> None:
        self._open_call = open_call
        self._arrivals = arrivals
        self._write = write

    def handler(self, method: MethodDescriptor, function: Callable[..., Any]) -> grpc.RpcMethodHandler[bytes, bytes]:
        """The handler of one method."""
        assert not method.client_streaming, f"{method.full_name} streams requests"
        request_class = GetMessageClass(method.input_type)
        if method.server_streaming:
            return grpc.stream_stream_rpc_method_handler(self._streaming(method.full_name, request_class, function))
        return grpc.stream_unary_rpc_method_handler(self._unary(method.full_name, request_class, function))

    def _unary(self, call: str, request_class: type[Message], function: UnaryMethod) -> Callable[..., Awaitable[bytes]]:
        async def respond(context: Context) -> bytes:
            if (this := this_call()) is not None:
                this.begin()
            data = await self._arrivals.message(context)
            with self._open_call():
                response = await function(parse(request_class, data), context)
            return response.SerializeToString()

        async def handle(_: object, context: Context) -> bytes:
            return await answer(call, context, respond(context)) or b""

        return handle

    def _streaming(
        self, call: str, request_class: type[Message], function: StreamMethod
    ) -> Callable[..., Awaitable[None]]:
        async def respond(context: Context) -> None:
            if (this := this_call()) is not None:
                this.begin()
            data = await self._arrivals.message(context)
            has_begun = False
            with self._open_call():
                # Closed here, so that a method's `finally` runs at once and not when the garbage collector finds it.
                async with aclosing(function(parse(request_class, data), context)) as responses:
                    async for response in responses:
                        if not has_begun:
                            await send_headers(context)
                            has_begun = True
                        await self._write(context, response.SerializeToString())

        async def handle(_: object, context: Context) -> None:
            await answer(call, context, respond(context))

        return handle


async def plain_write(context: Context, message: bytes) -> None:
    """Write, however long the reader takes."""
    await context.write(message)


def _client_left(error: asyncio.CancelledError) -> bool:
    """True when gRPC cancelled the call's task, not we, and not something that the call waited for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0 and not error.args


async def _abort(context: Context, status: RpcStatus) -> Never:
    """End the call. Trailing metadata that the method has set goes out too. Always raises."""
    set_before = tuple(context.trailing_metadata() or ())
    call_status.note(status.code)
    await context.abort(status.code, status.message, (*set_before, *status.trailing_metadata))
