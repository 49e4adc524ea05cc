"""One HTTP connection of the gateway, over a transport that takes what a test lets it take."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from services.gateway.connection import Connection, ConnectionLimits
from tests.services.served import HANG_S

GET = b"GET / HTTP/1.1\r\n\r\n"


class Transport:
    """One that is told how much waits in its buffer; the last of `waiting` stays."""

    def __init__(self, *waiting: int) -> None:
        self._waiting = list(waiting) or [0]
        self.num_asked = 0
        self.ended = asyncio.Event()
        self.was_aborted = False
        self.written = b""

    def get_extra_info(self, name: str, default: object = None) -> Any:
        return self if name == "socket" else default

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    getpeername = getsockname

    def setsockopt(self, *_: object) -> None:
        """As a socket's."""

    def get_write_buffer_size(self) -> int:
        self.num_asked += 1
        return self._waiting.pop(0) if len(self._waiting) > 1 else self._waiting[0]

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.ended.is_set()

    def close(self) -> None:
        self.ended.set()

    def abort(self) -> None:
        self.was_aborted = True
        self.ended.set()

    def pause_reading(self) -> None:
        """As a transport's."""

    resume_reading = pause_reading


class App:
    """Answers nobody; counts those whose caller has left."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.num_left = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun.append(scope["path"])
        while (await receive())["type"] != "http.disconnect":
            pass
        self.num_left += 1


class Server:
    """Makes connections that share their limits."""

    def __init__(self, app: App, *, most: int = 9, reader_s: float = 30.0) -> None:
        self._config = Config(cast("Any", app), interface="asgi3", lifespan="off", ws="none", log_config=None)
        self._config.load()
        self.state = ServerState()
        self._limits = ConnectionLimits(most=most, head_s=30, head_bytes=1000, idle_s=30, reader_s=reader_s)
        self._idle: dict[Connection, None] = {}

    def connect(self, transport: Transport) -> Connection:
        made = Connection(self._config, self.state, self._limits, self._idle)
        made.connection_made(cast("Any", transport))
        return made


async def tasks(server: Server) -> None:
    """Until each request has come to its end."""
    await asyncio.wait_for(asyncio.gather(*server.state.tasks), HANG_S)


def test_of_many_requests_in_one_read_one_runs_and_one_waits_at_most() -> None:
    async def run() -> tuple[int, bool, bytes]:
        server, transport = Server(App()), Transport()
        connection = server.connect(transport)
        connection.data_received(GET * 2)
        assert not transport.is_closing(), "two are fine"
        connection.data_received(GET * 10_000)
        waiting = len(connection.pipeline)
        connection.connection_lost(None)
        await tasks(server)
        return waiting, transport.was_aborted, transport.written

    waiting, was_aborted, written = asyncio.run(run())
    assert waiting == 1 and was_aborted
    assert not written, "nothing in the middle of the answer that runs"


def test_a_caller_who_leaves_ends_the_request_that_runs_also_where_another_one_waits_behind_it() -> None:
    app = App()

    async def run() -> None:
        server = Server(app)
        connection = server.connect(Transport())
        connection.data_received(GET.replace(b"/ ", b"/first ", 1) + GET)
        while not app.begun:
            await asyncio.sleep(0)
        connection.connection_lost(None)
        await tasks(server)

    asyncio.run(run())
    assert app.begun == ["/first"] and app.num_left == 1


class Teller(App):
    """Answers everybody in two parts, of a length that it says where it has one."""

    def __init__(self, length: int | None) -> None:
        super().__init__()
        self._headers = [] if length is None else [(b"content-length", b"%d" % length)]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        for part in (b"one ", b"two"):
            await send({"type": "http.response.body", "body": part, "more_body": part != b"two"})


@pytest.mark.parametrize("asked", [b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"])
@pytest.mark.parametrize("length", [None, 7])
def test_who_speaks_http_1_0_gets_no_chunks_but_all_there_is_until_the_connection_is_closed(
    asked: bytes, length: int | None
) -> None:
    async def run() -> bytes:
        server, transport = Server(Teller(length)), Transport()
        server.connect(transport).data_received(asked)
        await tasks(server)
        assert transport.ended.is_set() and not transport.was_aborted
        return transport.written

    head, _, body = asyncio.run(run()).partition(b"\r\n\r\n")
    assert body == b"one two"
    assert b"connection: close" in head and b"chunked" not in head
    assert (b"content-length: 7" in head) == (length == 7)


def test_who_speaks_http_1_1_still_gets_chunks_on_a_connection_that_stays() -> None:
    async def run() -> tuple[bytes, bool]:
        server, transport = Server(Teller(None)), Transport()
        connection = server.connect(transport)
        connection.data_received(GET)
        await tasks(server)
        was_closed = transport.ended.is_set()
        connection.connection_lost(None)
        return transport.written, was_closed

    written, was_closed = asyncio.run(run())
    assert written.endswith(b"\r\n\r\n4\r\none \r\n3\r\ntwo\r\n0\r\n\r\n") and not was_closed


@pytest.mark.parametrize(
    ("waiting", "num_asked"),
    [([300_000], 2), ([300_000, 200_000, 200_000, 199_999], 4)],
    ids=["nothing", "something at first"],
)
def test_a_reader_who_takes_nothing_is_cut_whatever_is_written_to_him(waiting: Sequence[int], num_asked: int) -> None:
    async def run() -> Transport:
        transport = Transport(*waiting)
        Server(App(), reader_s=0.001).connect(transport).pause_writing()
        await asyncio.wait_for(transport.ended.wait(), HANG_S)
        return transport

    transport = asyncio.run(run())
    assert transport.was_aborted and transport.num_asked == num_asked


def test_a_reader_who_took_it_is_not_waited_for_any_more() -> None:
    async def run() -> bool:
        transport = Transport(300_000)
        connection = Server(App(), reader_s=0.0).connect(transport)
        connection.pause_writing()
        connection.resume_writing()
        for _ in range(9):  # a timer of no time has come by then
            await asyncio.sleep(0)
        return transport.was_aborted

    assert not asyncio.run(run())


def test_an_idle_connection_that_makes_room_is_gone_also_where_its_answer_was_not_read() -> None:
    async def run() -> tuple[bool, int]:
        server, unread = Server(App(), most=1), Transport(70_000)
        server.connect(unread)
        server.connect(Transport())
        return unread.was_aborted, len(server.state.connections)

    assert asyncio.run(run()) == (True, 1)


@pytest.mark.parametrize("error", [OSError("closed"), ValueError("Invalid file descriptor: -1")])  # asyncio's, uvloop's
def test_a_connection_that_is_gone_when_its_time_is_over_is_no_error(error: Exception) -> None:
    class Gone(Transport):
        def setsockopt(self, *_: object) -> None:
            raise error

    async def run() -> None:
        server, transport = Server(App()), Gone()
        connection = server.connect(transport)
        connection._cut()  # as its timer does
        assert transport.was_aborted
        connection.connection_lost(None)

    asyncio.run(run())
