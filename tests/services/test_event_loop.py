"""The loop takes all of gRPC's wake-ups: one a turn is too few, and then nothing of gRPC is heard for a while."""

from __future__ import annotations

import asyncio
import functools
import socket

import uvloop
from grpc import aio

from services import event_loop
from services.event_loop import EventLoop


class Events:
    """gRPC's queue of events, as far as the loop sees it: a byte is written behind each."""

    def __init__(self) -> None:
        self.reading, self._writing = socket.socketpair()
        self.reading.setblocking(False)
        self._queue: list[int] = []
        self.taken: list[int] = []

    def add(self, event: int) -> None:
        """From gRPC's thread."""
        self._queue.append(event)
        self._writing.send(b"1")

    def _handle_events(self, loop: asyncio.AbstractEventLoop) -> None:
        self.reading.recv(1)
        self.taken += self._queue
        self._queue.clear()

    @property
    def wakeups_left(self) -> int:
        """Bytes that are not taken."""
        try:
            return len(self.reading.recv(1000, socket.MSG_PEEK))
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Close both ends."""
        self.reading.close()
        self._writing.close()


def taken_in_one_turn(num_events: int) -> Events:
    events = Events()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for event in range(num_events):
            events.add(event)
        loop.add_reader(events.reading, functools.partial(events._handle_events, loop))
        while not events.taken:
            await asyncio.sleep(0)
        loop.remove_reader(events.reading)

    uvloop.run(main(), loop_factory=EventLoop)
    return events


def test_no_wakeup_stays_behind_when_all_events_are_taken() -> None:
    events = taken_in_one_turn(200)
    assert events.taken == list(range(200))
    assert events.wakeups_left == 0
    events.close()


def test_a_lone_wakeup_is_left_to_grpc() -> None:
    events = taken_in_one_turn(1)
    assert events.taken == [0]
    assert events.wakeups_left == 0
    events.close()


def test_other_readers_find_every_byte() -> None:
    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        reading, writing = socket.socketpair()
        reading.setblocking(False)
        heard: asyncio.Future[bytes] = loop.create_future()
        loop.add_reader(reading, lambda: heard.set_result(reading.recv(100)))
        writing.send(b"hello")
        data = await heard
        loop.remove_reader(reading)
        reading.close()
        writing.close()
        return data

    assert uvloop.run(main(), loop_factory=EventLoop) == b"hello"


def test_the_grpc_that_is_installed_is_known() -> None:
    """Should gRPC come to wake the loop otherwise, this says so, and EventLoop is to be looked at again."""
    wrapped: list[socket.socket] = []

    class Watching(EventLoop):
        def add_reader(self, fd: object, callback: object, *args: object) -> None:
            if event_loop._takes_events(callback):  # type: ignore[arg-type]
                assert isinstance(fd, socket.socket)
                wrapped.append(fd)
            super().add_reader(fd, callback, *args)  # type: ignore[arg-type]

    async def main() -> None:
        server = aio.server()
        server.add_insecure_port("127.0.0.1:0")
        await server.start()
        await server.stop(0)

    uvloop.run(main(), loop_factory=Watching)
    (wakeups,) = wrapped
    assert not wakeups.getblocking()
