"""The frame of every call, behind a real server on a loopback port."""

# ruff: noqa: N802  the methods have the names of the service

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from common.errors import DeadlineExceeded, InvalidRequest, Overloaded, PagewireError, Unavailable, UnknownModel
from protos import executor_pb2, inference_pb2
from protos.inference_pb2 import (
    Delta,
    GenerateRequest,
    GenerateResponse,
    GenerateStreamRequest,
    GenerateStreamResponse,
    GetModelResponse,
    PromptInfo,
    TokenizeResponse,
)
from scheduler.block_pool import BlockPool
from services.handlers import Arrivals, Context, service_handler
from services.status import DETAILS_KEY, PUSHBACK_KEY, from_rpc_error
from tests.services.served import HANG_S

SERVICE = "pagewire.v1.InferenceService"
METHODS = ["Generate", "GenerateStream", "Tokenize", "Detokenize", "GetModel"]
CANARY = "the caller's secret prompt"

Act = Callable[[Context], Awaitable[None]]


class Service:
    """Every method does what the test says, then answers."""

    def __init__(self, act: Act) -> None:
        self.act = act

    async def Generate(self, request: Any, context: Context) -> GenerateResponse:
        await self.act(context)
        return GenerateResponse(prompt=PromptInfo(request_id=request.request_id))

    async def GenerateStream(self, request: Any, context: Context) -> AsyncGenerator[GenerateStreamResponse, None]:
        yield GenerateStreamResponse(prompt=PromptInfo(request_id=request.request_id))
        await self.act(context)
        yield GenerateStreamResponse(delta=Delta(text="end"))

    Resume = GenerateStream
    Cancel = Unpin = Embed = Generate

    async def Tokenize(self, request: Any, context: Context) -> TokenizeResponse:
        await self.act(context)
        return TokenizeResponse(token_ids=[1, 2])

    async def Detokenize(self, request: Any, context: Context) -> Any:
        return None  # a bug: not a message

    async def GetModel(self, request: Any, context: Context) -> GetModelResponse:
        return GetModelResponse(model="m")


async def nothing(context: Context) -> None:
    pass


def raising(error: BaseException) -> Act:
    async def act(context: Context) -> None:
        raise error

    return act


@asynccontextmanager
async def served(implementation: object, arrivals: Arrivals | None = None) -> AsyncIterator[aio.Channel]:
    """A channel to a server of `implementation`."""
    server = aio.server()
    handler = service_handler(SERVICE, inference_pb2.DESCRIPTOR, implementation, arrivals=arrivals)
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)


def streaming(channel: aio.Channel, method: str) -> aio.UnaryStreamMultiCallable[bytes, bytes]:
    return channel.unary_stream(f"/{SERVICE}/{method}")


async def call(channel: aio.Channel, method: str, data: bytes = b"") -> list[bytes]:
    """The messages of the answer. A call without a status fails by its deadline, which no test here expects."""
    async with asyncio.timeout(HANG_S):
        if method == "GenerateStream":
            return [message async for message in streaming(channel, method)(data, timeout=HANG_S)]
        unary: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/{method}")
        return [await unary(data, timeout=HANG_S)]


async def failure(implementation: object, method: str, data: bytes = b"") -> aio.AioRpcError:
    async with served(implementation) as channel:
        with pytest.raises(aio.AioRpcError) as caught:
            await call(channel, method, data)
        return caught.value


def test_a_call_is_answered_with_messages() -> None:
    async def scenario() -> None:
        async with served(Service(nothing)) as channel:
            (answer,) = await call(channel, "Generate", GenerateRequest(request_id="r").SerializeToString())
            assert GenerateResponse.FromString(answer).prompt.request_id == "r"

            request = GenerateStreamRequest(request_id="s")
            first, last = await call(channel, "GenerateStream", request.SerializeToString())
            assert GenerateStreamResponse.FromString(first).prompt.request_id == "s"
            assert GenerateStreamResponse.FromString(last).delta.text == "end"

    asyncio.run(scenario())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x02\xc3\x28"], ids=["no message", "no UTF-8"])
def test_malformed_bytes_are_an_invalid_argument_that_names_the_message(method: str, data: bytes) -> None:
    error = asyncio.run(failure(Service(nothing), method, data))
    meaning = from_rpc_error(error)

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(meaning, InvalidRequest)
    assert meaning.field == f"pagewire.v1.{method}Request"


def test_a_method_that_nobody_serves_is_unimplemented() -> None:
    error = asyncio.run(failure(Service(nothing), "Train"))

    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_method_cannot_be_forgotten() -> None:
    class Forgetful:
        Generate = Service.Generate

    with pytest.raises(AttributeError, match="GenerateStream"):
        service_handler(SERVICE, inference_pb2.DESCRIPTOR, Forgetful())


def test_a_method_that_streams_requests_is_not_for_this_frame() -> None:
    class Executors:
        async def Link(self) -> None:
            pass

    with pytest.raises(AssertionError, match=r"ExecutorLink\.Link streams requests"):
        service_handler("pagewire.executor.v1.ExecutorLink", executor_pb2.DESCRIPTOR, Executors())


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("top_p", "must be in (0, 1], got 0.0"),
        UnknownModel("no model ünknown here"),
        Overloaded("the queue is full", retry_after_s=2.5),
        Unavailable("no executor is connected"),
        DeadlineExceeded("waited too long"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_refusal_reaches_the_client_with_its_details(method: str, error: PagewireError) -> None:
    received = asyncio.run(failure(Service(raising(error)), method))
    trailers: dict[str, Any] = dict(received.trailing_metadata())
    status = status_pb2.Status.FromString(trailers[DETAILS_KEY])
    meaning = from_rpc_error(received)

    assert type(meaning) is type(error)
    assert str(meaning) == str(error)
    assert (status.code, status.message) == (received.code().value[0], received.details())
    if isinstance(error, InvalidRequest):
        bad_request = error_details_pb2.BadRequest()
        assert status.details[1].Unpack(bad_request)
        assert bad_request.field_violations[0].field == "top_p"
    if isinstance(error, Overloaded | Unavailable):
        retry = error_details_pb2.RetryInfo()
        assert status.details[1].Unpack(retry)
        assert retry.retry_delay.ToMilliseconds() == int(trailers[PUSHBACK_KEY]) == round(error.retry_after_s * 1000)


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_what_a_refused_call_held_is_free_at_once_and_waits_for_no_collector(method: str) -> None:
    class Held:
        pass

    async def scenario() -> None:
        left: list[weakref.ref[Held]] = []

        async def act(context: Context) -> None:
            held = Held()
            left.append(weakref.ref(held))
            raise Overloaded("the queue is full", retry_after_s=2.5)

        async with served(Service(act)) as channel:
            with pytest.raises(aio.AioRpcError):
                await call(channel, method)
            async with asyncio.timeout(HANG_S):
                while left[0]() is not None:
                    await asyncio.sleep(0)

    gc.disable()
    try:
        asyncio.run(scenario())
    finally:
        gc.enable()


def test_a_long_text_of_the_callers_still_arrives_as_its_status() -> None:
    error = asyncio.run(failure(Service(raising(UnknownModel("😀" * 100_000))), "Generate"))

    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_trailing_metadata_that_a_method_set_survives_its_error() -> None:
    async def act(context: Context) -> None:
        context.set_trailing_metadata((("x-request-id", "r"),))
        raise Overloaded("the queue is full")

    error = asyncio.run(failure(Service(act), "Generate"))
    trailers = dict(error.trailing_metadata())

    assert trailers["x-request-id"] == "r"
    assert PUSHBACK_KEY in trailers


def logged(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "services.handlers"]


def chained() -> Exception:
    """A canary in an exception, in its cause, in its context, in a group and in a note."""
    try:
        try:
            raise ValueError(CANARY)  # raised here so that there is a chain
        except ValueError:
            raise KeyError(CANARY)  # noqa: B904  the context is what is tested
    except KeyError as context:
        error = RuntimeError(CANARY)
        error.__cause__ = ExceptionGroup(CANARY, [context, OSError(CANARY)])
        error.add_note(CANARY)
        return error


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_an_exceptions_text_reaches_neither_the_client_nor_the_log(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        error = asyncio.run(failure(Service(raising(chained())), method))

    assert error.code() is grpc.StatusCode.INTERNAL
    assert CANARY not in f"{error} {error.trailing_metadata()}"
    assert CANARY not in caplog.text


def test_a_bug_is_found_in_the_log_under_the_id_that_the_client_got(caplog: pytest.LogCaptureFixture) -> None:
    error = asyncio.run(failure(Service(raising(chained())), "Generate"))
    (record,) = logged(caplog)
    error_id = vars(record)["fields"]["error_id"]

    assert error_id in (error.details() or "")
    assert error_id in record.getMessage()
    for name in ("RuntimeError", "ExceptionGroup", "KeyError", "ValueError", "OSError", "in act", "in chained"):
        assert name in record.getMessage()


def test_each_bug_has_its_own_id() -> None:
    first, second = (asyncio.run(failure(Service(raising(RuntimeError())), "Generate")) for _ in range(2))

    assert first.details() != second.details()


def test_the_numbers_of_a_broken_invariant_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def act(context: Context) -> None:
        BlockPool(0).take()

    asyncio.run(failure(Service(act), "Generate"))

    assert "AssertionError: asked for a block, 0 of 0 free" in caplog.text


def test_an_assertion_of_anybody_elses_keeps_its_text_to_itself(caplog: pytest.LogCaptureFixture) -> None:
    asyncio.run(failure(Service(raising(AssertionError(CANARY))), "Generate"))

    assert "AssertionError" in caplog.text and CANARY not in caplog.text


def test_an_answer_that_is_no_message_is_a_bug_like_any_other() -> None:
    error = asyncio.run(failure(Service(nothing), "Detokenize"))

    assert error.code() is grpc.StatusCode.INTERNAL
    assert "NoneType" not in (error.details() or "")


def test_a_status_that_a_method_sent_itself_stays(caplog: pytest.LogCaptureFixture) -> None:
    async def act(context: Context) -> None:
        await context.abort(grpc.StatusCode.DATA_LOSS, "as the method says")

    error = asyncio.run(failure(Service(act), "Generate"))

    assert (error.code(), error.details()) == (grpc.StatusCode.DATA_LOSS, "as the method says")
    assert logged(caplog) == []


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_a_call_that_is_cancelled_by_its_client_sees_the_cancellation_at_once(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> list[str]:
        events: list[str] = []
        started, over = asyncio.Event(), asyncio.Event()

        async def act(context: Context) -> None:
            started.set()
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                events.append("cancelled")
                raise
            finally:
                events.append("cleaned up")
                over.set()

        async with served(Service(act)) as channel:
            running = asyncio.create_task(call(channel, method))
            async with asyncio.timeout(HANG_S):
                await started.wait()
                running.cancel()
                await over.wait()
        return events

    assert asyncio.run(scenario()) == ["cancelled", "cleaned up"]
    assert logged(caplog) == []


def test_a_stream_whose_client_leaves_while_it_writes_is_closed_at_once() -> None:
    async def scenario() -> None:
        closed = asyncio.Event()

        class Endless(Service):
            def GenerateStream(self, request: Any, context: Context) -> AsyncGenerator[GenerateStreamResponse, None]:
                self.kept = self.endless()  # so that the garbage collector is not who closes it
                return self.kept

            async def endless(self) -> AsyncGenerator[GenerateStreamResponse, None]:
                try:
                    while True:
                        yield GenerateStreamResponse(delta=Delta(text="x" * 100_000))
                finally:
                    closed.set()

        async with served(Endless(nothing)) as channel, asyncio.timeout(HANG_S):
            stream = streaming(channel, "GenerateStream")(b"")
            await stream.read()
            stream.cancel()
            await closed.wait()

    asyncio.run(scenario())


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_a_call_whose_inner_work_was_cancelled_ends_unavailable(method: str) -> None:
    async def act(context: Context) -> None:
        inner = asyncio.get_running_loop().create_future()
        inner.cancel()
        await inner

    error = asyncio.run(failure(Service(act), method))

    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert isinstance(from_rpc_error(error), Unavailable)


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_a_call_that_the_server_cancels_with_a_message_ends_unavailable(method: str) -> None:
    async def act(context: Context) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel("draining")
        await asyncio.get_running_loop().create_future()

    error = asyncio.run(failure(Service(act), method))

    assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_a_timeout_inside_a_method_is_not_taken_for_the_clients_leaving() -> None:
    async def act(context: Context) -> None:
        async with asyncio.timeout(0):
            await asyncio.get_running_loop().create_future()

    error = asyncio.run(failure(Service(act), "Generate"))

    assert error.code() is grpc.StatusCode.INTERNAL


def begin(channel: aio.Channel, method: str = "Generate") -> aio.StreamStreamCall[bytes, bytes]:
    """A call of which nothing is sent but its beginning."""
    streaming: aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{SERVICE}/{method}")
    return streaming(timeout=HANG_S)


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_a_call_that_ends_without_its_message_is_an_invalid_argument(method: str) -> None:
    async def scenario() -> tuple[grpc.StatusCode, str]:
        async with served(Service(nothing)) as channel:
            call = begin(channel, method)
            await call.done_writing()
            return await call.code(), await call.details()

    assert asyncio.run(scenario()) == (grpc.StatusCode.INVALID_ARGUMENT, "message: the call ended without one")


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_a_call_whose_message_does_not_come_is_ended(method: str) -> None:
    async def scenario() -> tuple[grpc.StatusCode, str]:
        arrivals = Arrivals(limit_s=0.05)
        async with served(Service(nothing), arrivals) as channel:
            waiting = begin(channel, method)
            told = await waiting.code(), await waiting.details()
            assert len(arrivals) == 0
            arrivals.limit_s = HANG_S
            assert await call(channel, "GetModel"), "others are served"
            return told

    assert asyncio.run(scenario()) == (grpc.StatusCode.UNAVAILABLE, "no message came within 0.05 s")


def test_of_too_many_calls_without_their_message_the_oldest_is_ended_and_the_newest_is_served() -> None:
    async def scenario() -> None:
        arrivals = Arrivals(at_once=2)
        async with served(Service(nothing), arrivals) as channel:
            calls = []
            for n in range(1, 3):
                calls.append(begin(channel))
                await calls[-1].wait_for_connection()
                while len(arrivals) < n:
                    await asyncio.sleep(0)
            assert await call(channel, "GetModel")
            assert await calls[0].code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert not calls[1].done()
            await calls[1].write(b"")
            await calls[1].read()
            assert await calls[1].code() is grpc.StatusCode.OK

    asyncio.run(scenario())
