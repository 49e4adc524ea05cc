"""Reflection is a call as any other: counted while it is open, and ended where its caller says or reads nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc import aio
from grpc_reflection.v1alpha import reflection_pb2

from services import reflection
from services.admission import Admission, AdmissionLimits
from services.handlers import Context
from services.reflection import reflection_handler
from services.slow_readers import SlowReaders
from tests.services.served import HANG_S, PatientAtFirst

ASKED = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()

Method = aio.StreamStreamMultiCallable[bytes, bytes]


@asynccontextmanager
async def served(**settings: Any) -> AsyncIterator[Method]:
    """The method, on a server of its own."""
    server = aio.server()
    server.add_generic_rpc_handlers((reflection_handler(["pagewire.v1.InferenceService"], **settings),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel.stream_stream(f"/{reflection.SERVICE}/ServerReflectionInfo")
    finally:
        await server.stop(0)


def with_method(test: Callable[[Method], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(HANG_S), served(**settings) as method:
            await test(method)

    asyncio.run(main())


def test_open_calls_are_counted_and_one_too_many_is_refused() -> None:
    admission = Admission(AdmissionLimits(max_calls=2))

    async def test(method: Method) -> None:
        calls = [method(), method()]
        for call in calls:
            await call.write(ASKED)
            assert await call.read()
        refused = method(iter([ASKED]))
        assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

        await calls[0].done_writing()
        assert await calls[0].code() is grpc.StatusCode.OK
        served = method(iter([ASKED]))
        assert len([message async for message in served]) == 1

    with_method(test, open_call=admission.open_call)


def test_a_call_that_asks_nothing_is_ended_before_its_first_question_and_behind_it() -> None:
    arrivals = PatientAtFirst()

    async def test(method: Method) -> None:
        fallen_silent = method()
        await fallen_silent.write(ASKED)
        assert isinstance(await fallen_silent.read(), bytes)
        for call in (method(), fallen_silent):
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert len(arrivals) == 0

    with_method(test, arrivals=arrivals)


def test_a_call_that_takes_no_answer_is_ended() -> None:
    readers = SlowReaders(0.05)

    class Full:
        """A reader who reads nothing."""

        async def write(self, message: bytes, /) -> None:
            await asyncio.Event().wait()

    async def write(context: Context, message: bytes) -> None:
        await readers.write(Full(), message)

    async def test(method: Method) -> None:
        call = method(iter([ASKED]))
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    with_method(test, write=write)


def test_a_call_that_asks_nothing_and_says_so_ends_well() -> None:
    async def test(method: Method) -> None:
        assert await method(iter([])).code() is grpc.StatusCode.OK

    with_method(test)
