"""Streams of the Python client that somebody interrupts, leaves or closes, and what becomes of the request then."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from types import FrameType
from typing import Any

import grpc
import pytest
from grpc import aio

from common.errors import AlreadyRunning, InvalidRequest, PagewireError, Unauthenticated, Unavailable
from pagewire import AsyncClient, Client
from pagewire.aio import AsyncStream
from protos import inference_pb2 as pb
from services.handlers import Context
from tests.services.scripted import Script, delta, finish, first, played, saying
from tests.services.served import HANG_S, until

MOVING = Unavailable("moving", 2 * HANG_S)
THE_REST = saying(first(resumed=True), delta(1, 66), finish())

both = pytest.mark.parametrize("kind", [Client, AsyncClient])


def standing(*messages: pb.GenerateStreamResponse) -> tuple[Script, asyncio.Event]:
    """It says these, and then nothing; the event tells that it has come so far."""
    stands = asyncio.Event()

    async def script(request: Any, context: Context) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        for message in messages:
            yield message
        stands.set()
        await asyncio.Event().wait()

    return script, stands


async def call(method: Callable[..., Any], *args: Any) -> Any:
    """By either client: what would block has a thread."""
    if asyncio.iscoroutinefunction(method):
        return await method(*args)
    return await asyncio.to_thread(method, *args)


async def texts(stream: Any) -> list[str]:
    """Those of a stream, to its end."""
    if isinstance(stream, AsyncStream):
        return [new.text async for new in stream]
    return await asyncio.to_thread(lambda: [new.text for new in stream])


def test_a_read_that_is_cancelled_is_no_end_of_its_stream() -> None:
    async def read(address: str) -> list[str]:
        async with AsyncClient(address) as client, client.stream("hi") as stream:
            assert (await anext(stream)).text == "A"
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), 0.05)
            return await texts(stream)

    more, _ = standing(first(), delta(0, 65))
    with played(more, THE_REST) as (server, run):
        assert run(read) == ["B"]
    assert [list(point.token_ids) for point in server.asked[1].choices] == [[65]]
    assert server.cancelled == []


def test_a_read_that_a_signal_interrupts_is_no_end_of_its_stream() -> None:
    class Alarm(Exception):
        pass

    def ring(number: int, frame: FrameType | None) -> None:
        raise Alarm

    async def wait(address: str) -> None:
        told.append(address)
        is_up.set()
        await asyncio.to_thread(is_read.wait)

    told: list[str] = []
    is_up, is_read = threading.Event(), threading.Event()
    more, _ = standing(first(), delta(0, 65))
    before = signal.signal(signal.SIGUSR1, ring)
    me = threading.get_ident()
    with played(more, THE_REST) as (_, run):
        serving = threading.Thread(target=run, args=(wait,))
        serving.start()
        try:
            assert is_up.wait(HANG_S)
            with Client(told[0], timeout_s=HANG_S) as client:
                stream = client.stream("hi")
                assert next(stream).text == "A"
                alarm = threading.Timer(0.1, signal.pthread_kill, (me, signal.SIGUSR1))
                with pytest.raises(Alarm):  # noqa: PT012 - it may ring before the read is under way
                    alarm.start()
                    next(stream)
                assert [new.text for new in stream] == ["B"]
        finally:
            signal.signal(signal.SIGUSR1, before)
            is_read.set()
            serving.join()


def test_a_stream_that_is_dropped_is_left() -> None:
    async def drop(address: str) -> None:
        async with AsyncClient(address) as client:
            async for _ in client.stream("hi"):
                break
            await is_left.wait()

    is_left = asyncio.Event()

    async def more(request: Any, context: Context) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        yield first()
        yield delta(0, 65)
        try:
            await asyncio.Event().wait()
        finally:
            is_left.set()

    gc.disable()  # it would find the call at last, whenever it comes
    try:
        with played(more) as (_, run):
            run(drop)
    finally:
        gc.enable()


def test_a_stream_may_be_closed_by_aclosing() -> None:
    async def read(address: str) -> str:
        async with AsyncClient(address) as client, aclosing(client.stream("hi")) as stream:
            await anext(stream)
            return stream.request_id

    more, _ = standing(first(), delta(0, 65))
    with played(more) as (server, run):
        name = run(read)
    assert server.cancelled == [name]


@both
def test_a_stream_that_is_closed_beside_its_reader_ends_for_him(kind: type[Client | AsyncClient]) -> None:
    async def close(address: str) -> tuple[str, list[str]]:
        client = kind(address)
        stream = client.stream("hi")
        reading = asyncio.ensure_future(texts(stream))
        await stands.wait()
        await call(stream.close)
        heard = await reading
        await call(client.close)
        return stream.request_id, heard

    more, stands = standing(first(), delta(0, 65))
    with played(more) as (server, run):
        name, heard = run(close)
    assert heard in ([], ["A"])
    assert len(server.asked) == 1, "it was not taken for a lost connection"
    assert set(server.cancelled) == {name}  # twice, where its call was only just begun


@both
def test_a_stream_that_is_closed_before_its_server_said_anything_is_ended_there(
    kind: type[Client | AsyncClient],
) -> None:
    async def close(address: str) -> str:
        client = kind(address)
        stream = client.stream("hi")
        reading = asyncio.ensure_future(texts(stream))
        await stands.wait()
        await call(stream.close)
        assert await reading == []
        await call(client.close)
        return stream.request_id

    more, stands = standing()
    with played(more) as (server, run):
        name = run(close)
    assert set(server.cancelled) == {name}  # twice, where its call was only just begun


@both
def test_a_stream_that_is_closed_between_two_calls_waits_no_longer_and_is_ended(
    kind: type[Client | AsyncClient],
) -> None:
    async def close(address: str) -> tuple[str, list[str]]:
        client = kind(address, patience_s=1000)
        stream = client.stream("hi")
        reading = asyncio.ensure_future(texts(stream))
        await until(lambda: bool(client._connections._pauses))
        await call(stream.close)
        heard = await reading
        await call(client.close)
        return stream.request_id, heard

    with played(saying(first(), delta(0, 65), then=MOVING)) as (server, run):
        name, heard = run(close)
    assert heard == ["A"]
    assert server.cancelled == [name]


def test_a_stream_that_is_left_between_two_calls_is_ended() -> None:
    async def leave(address: str) -> None:
        async def read() -> None:
            async with client.stream("hi") as stream:
                await texts(stream)

        async with AsyncClient(address, patience_s=1000) as client:
            reading = asyncio.ensure_future(read())
            await until(lambda: bool(client._connections._pauses))
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading

    with played(saying(first(), delta(0, 65), then=MOVING)) as (server, run):
        run(leave)
    assert server.cancelled == [server.asked[0].request_id]


@both
@pytest.mark.parametrize("what", ["generate", "embed"])
def test_a_client_that_is_closed_between_two_calls_says_so_at_once(kind: type[Client | AsyncClient], what: str) -> None:
    async def close(address: str) -> None:
        client = kind(address, patience_s=1000)
        asking = asyncio.ensure_future(call(getattr(client, what), "hi"))
        await until(lambda: bool(client._connections._pauses))
        await call(client.close)
        with pytest.raises(PagewireError, match="the client was closed"):
            await asking

    with played(saying(then=MOVING), vectors=[MOVING]) as (server, run):
        run(close)
    assert len(server.asked) == 1


@both
def test_a_client_that_is_closed_says_so_to_whom_its_server_has_no_answer_for(
    kind: type[Client | AsyncClient],
) -> None:
    async def close(address: str) -> None:
        client = kind(address)
        asking = asyncio.ensure_future(call(client.unpin))
        await server.was_called.wait()
        await call(client.close)
        with pytest.raises(PagewireError, match="the client was closed"):
            await asking

    with played() as (server, run):
        server.is_mute = True
        run(close)


@both
def test_a_stream_is_left_well_also_where_its_client_is_closed_meanwhile(kind: type[Client | AsyncClient]) -> None:
    async def close(address: str) -> None:
        client = kind(address)
        stream = client.stream("hi")
        reading = asyncio.ensure_future(texts(stream))
        await stands.wait()
        leaving = asyncio.ensure_future(call(stream.close))
        await server.was_called.wait()
        await call(client.close)
        await leaving
        await reading

    more, stands = standing(first())
    with played(more) as (server, run):
        server.is_mute = True
        run(close)


@both
def test_what_is_no_answer_of_ours_is_told_as_that(kind: type[Client | AsyncClient]) -> None:
    async def babble(request: bytes, context: aio.ServicerContext[bytes, bytes]) -> bytes:
        return b"\xff"

    async def babble_on(request: bytes, context: aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
        yield b"\xff"

    async def ask() -> None:
        server = aio.server()
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "GenerateStream": grpc.unary_stream_rpc_method_handler(babble_on),
            **dict.fromkeys(("Embed", "Unpin", "Cancel"), grpc.unary_unary_rpc_method_handler(babble)),
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("pagewire.v1.InferenceService", handlers),)
        )
        client = kind(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", patience_s=0.1)
        await server.start()
        for method, *args in ((client.embed, "hi"), (client.unpin,), (client.generate, "hi")):
            with pytest.raises(PagewireError, match="cannot be read"):
                await call(method, *args)
        await call(client.close)
        await server.stop(None)

    asyncio.run(ask())


@both
@pytest.mark.parametrize(
    "refusal", [AlreadyRunning("another one"), InvalidRequest("n", "too many"), Unauthenticated("who is it?")], ids=str
)
def test_what_a_server_refused_is_not_ended_there_for_its_id_may_be_another_s(
    kind: type[Client | AsyncClient], refusal: PagewireError
) -> None:
    async def ask(address: str) -> None:
        client = kind(address)
        stream = client.stream("hi")
        for _ in range(2):  # who reads on hears it again
            with pytest.raises(type(refusal)):
                await texts(stream)
        await call(stream.close)
        await call(client.close)

    with played(saying(then=refusal)) as (server, run):
        run(ask)
    assert server.cancelled == []
    assert len(server.asked) == 1


@both
def test_what_runs_elsewhere_is_ended_there_where_a_server_refuses_the_rest(kind: type[Client | AsyncClient]) -> None:
    async def ask(address: str) -> str:
        client = kind(address)
        stream = client.stream("hi")
        with pytest.raises(InvalidRequest):
            await texts(stream)
        await call(stream.close)
        await call(client.close)
        return stream.request_id

    with played(saying(first(), delta(0, 65)), saying(then=InvalidRequest("n", "too many"))) as (server, run):
        name = run(ask)
    assert server.cancelled == [name]


def test_a_client_that_was_forked_waits_for_no_thread_that_is_not_there_and_has_channels_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Client("127.0.0.1:1") as client:
        connections = client._connections
        of_parent = connections._channel("127.0.0.1:1")

        def hold() -> None:
            with connections._here().lock:
                is_held.set()
                may_end.wait()

        is_held, may_end = threading.Event(), threading.Event()
        holding = threading.Thread(target=hold)
        holding.start()
        is_held.wait()
        try:
            pid = os.getpid()
            monkeypatch.setattr("pagewire.client.os.getpid", lambda: pid + 1)
            made = connections._channel("127.0.0.1:1")
            assert made is not of_parent
            assert made is connections._channel("127.0.0.1:1")
            client.close()
            monkeypatch.undo()
        finally:
            may_end.set()
            holding.join()
        assert connections._here().channels == {"127.0.0.1:1": of_parent}, "it closes its own alone"
        of_parent.close()
