"""Readers who take nothing: when they are given up, and what that costs the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import grpc
import pytest
from grpc import aio

from common.errors import SlowReader
from protos import inference_pb2 as pb
from services.handlers import Context, service_handler
from services.slow_readers import SlowReaders
from services.status import from_rpc_error
from tests.faults.raw_client import RESOURCE_EXHAUSTED, Call, Connection, messages_of
from tests.services.served import HANG_S

FIRST = pb.GenerateStreamResponse(prompt=pb.PromptInfo(request_id="r", ticket=b"good"))
SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name


class Pipe:
    """A reader who takes a message when the test says."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self._room = asyncio.Semaphore(0)

    async def write(self, message: bytes, /) -> None:
        await self._room.acquire()
        self.taken.append(message)

    def take(self) -> None:
        self._room.release()


class Clock:
    """The time of the running loop, which stands still until the test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time()
        self._timers: list[tuple[float, Any]] = []
        monkeypatch.setattr(self._loop, "time", lambda: self._now)
        monkeypatch.setattr(self._loop, "call_later", self._call_later)

    def _call_later(self, delay_s: float, callback: Any, *args: object, context: Any = None) -> object:
        if context is not None:
            args, callback = (callback, *args), context.run
        self._timers.append((self._now + delay_s, lambda: callback(*args)))
        return object()

    @property
    def num_timers(self) -> int:
        return len(self._timers)

    async def move(self, seconds: float) -> None:
        """Let time pass, and run what is due and what follows from it."""
        until = self._now + seconds
        while self._timers and self._timers[0][0] <= until:
            self._now, callback = self._timers.pop(0)
            callback()
            await asyncio.sleep(0)
        self._now = until
        for _ in range(3):
            await asyncio.sleep(0)


async def stream(readers: SlowReaders, pipe: Pipe, messages: int) -> None:
    for i in range(messages):
        await readers.write(pipe, b"%d" % i)


def test_a_reader_who_takes_something_now_and_then_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        clock, readers, pipe = Clock(monkeypatch), SlowReaders(8.0), Pipe()
        task = asyncio.create_task(stream(readers, pipe, 10))
        for _ in range(10):
            await clock.move(7.9)
            pipe.take()
            await clock.move(0.0)
        await task
        assert len(pipe.taken) == 10

    asyncio.run(scenario())


def test_one_who_takes_nothing_for_as_long_is_given_up_and_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        clock, readers, pipe = Clock(monkeypatch), SlowReaders(8.0), Pipe()
        task = asyncio.create_task(stream(readers, pipe, 10))
        await clock.move(1.0)
        pipe.take()
        await clock.move(7.9)
        assert not task.done()
        await clock.move(2.1)  # the timer runs each two seconds
        with pytest.raises(asyncio.CancelledError) as ended:
            await task
        assert isinstance(ended.value.args[0], SlowReader)
        assert pipe.taken == [b"0"]

    asyncio.run(scenario())


def test_there_is_one_timer_for_all_and_none_while_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        clock, readers, pipe = Clock(monkeypatch), SlowReaders(8.0), Pipe()
        tasks = [asyncio.create_task(stream(readers, pipe, 1)) for _ in range(1000)]
        await clock.move(0.0)
        assert clock.num_timers == 1
        for _ in tasks:
            pipe.take()
        await clock.move(0.0)
        await clock.move(2.0)
        await asyncio.gather(*tasks)
        assert clock.num_timers == 0

    asyncio.run(scenario())


def test_what_is_said_of_a_reader_is_about_no_other_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        clock, readers, asked = Clock(monkeypatch), SlowReaders(8.0), ContextVar("asked", default="")
        seen: list[str] = []
        monkeypatch.setattr("services.slow_readers._log.warning", lambda *_: seen.append(asked.get()))

        async def one(name: str) -> None:
            asked.set(name)
            with suppress(asyncio.CancelledError):
                await stream(readers, Pipe(), 1)

        tasks = [asyncio.create_task(one(name)) for name in ("first", "second")]
        await clock.move(0.0)
        await clock.move(10.0)
        await asyncio.gather(*tasks)
        assert seen == [""]

    asyncio.run(scenario())


def test_without_a_limit_nobody_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        clock, readers, pipe = Clock(monkeypatch), SlowReaders(0), Pipe()
        task = asyncio.create_task(stream(readers, pipe, 1))
        await clock.move(1e6)
        assert not task.done() and clock.num_timers == 0
        pipe.take()
        await task

    asyncio.run(scenario())


class Flood:
    """Every stream sends large messages as long as somebody takes them; the test hears when one ends."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.sent = 0

    async def GenerateStream(self, request: Any, context: Context) -> AsyncGenerator[pb.GenerateStreamResponse, None]:  # noqa: N802
        try:
            while True:
                self.sent += 1
                yield pb.GenerateStreamResponse(delta=pb.Delta(text="x" * 65_536))
        finally:
            self.ended.set()

    Generate = Resume = Cancel = Unpin = Tokenize = Detokenize = GetModel = Embed = GenerateStream


class Patient(Flood):
    """Every stream has one small message, and then waits."""

    async def GenerateStream(self, request: Any, context: Context) -> AsyncGenerator[pb.GenerateStreamResponse, None]:  # noqa: N802
        try:
            yield FIRST
            await asyncio.get_running_loop().create_future()
        finally:
            self.ended.set()


async def read_all(call: Any, into: list[bytes]) -> None:
    while (message := await call.read()) is not aio.EOF:
        into.append(message)


def test_one_who_does_not_take_the_first_message_finds_it_and_why_there_is_no_other() -> None:
    async def scenario() -> None:
        patient = Patient()
        server = aio.server()
        write = SlowReaders(0.05).write
        server.add_generic_rpc_handlers((service_handler(SERVICE, pb.DESCRIPTOR, patient, write=write),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        reader = Connection(f"127.0.0.1:{port}", f"/{SERVICE}/GenerateStream", window=0)
        ends: list[Call] = []
        try:
            async with asyncio.timeout(HANG_S):
                call = reader.start(b"", keep=True)
                while not patient.ended.is_set():
                    reader.poll(ends.append)
                    await asyncio.sleep(0.001)
                assert not ends and not call.messages
                reader.open_window()
                while not ends:
                    reader.poll(ends.append)
                    await asyncio.sleep(0.001)
        finally:
            reader.close()
            await server.stop(0)
        assert call.status == RESOURCE_EXHAUSTED
        assert list(messages_of(call)) == [FIRST.SerializeToString()]

    asyncio.run(scenario())


def test_over_a_socket_a_stream_that_nobody_reads_ends_and_its_reader_hears_why_when_it_reads() -> None:
    async def scenario() -> None:
        flood = Flood()
        server = aio.server()
        server.add_generic_rpc_handlers((service_handler(SERVICE, pb.DESCRIPTOR, flood, write=SlowReaders(0.2).write),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with asyncio.timeout(HANG_S), aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stream: Any = channel.unary_stream(f"/{SERVICE}/GenerateStream")
            call = stream(b"")
            await flood.ended.wait()
            assert flood.sent < 1000, "what is kept for it is bounded by what gRPC buffers"
            taken: list[bytes] = []
            with pytest.raises(aio.AioRpcError) as ended:
                await read_all(call, taken)
            assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert isinstance(from_rpc_error(ended.value), SlowReader)
            assert 0 < len(taken) <= flood.sent
        await server.stop(0)

    asyncio.run(scenario())
