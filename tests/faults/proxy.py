"""A TCP proxy that harms what passes through it: a bad network for tests that may not touch the real one.

As TCP has it, the bytes of a connection arrive whole and in order, or not at all: what a dark network swallows arrives
when it has healed, if the connection still lives by then. Up is from whoever dials, down is to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Callable
from typing import Final, Self

_CHUNK: Final = 1 << 16  # bytes read at once
_MAX_CHUNKS: Final = 16  # of one direction of a connection that are on their way
_PIECES_PER_S: Final = 20  # of a throttled direction
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST and forgets what was not sent

_Parcel = tuple[float, bytes | OSError]
"""When it may arrive, and what; b"" is the end, an error a reset."""


class _Way:
    """How one direction of every connection fares."""

    def __init__(self) -> None:
        self.lit = asyncio.Event()
        self.delay_s = 0.0
        self.jitter_s = 0.0
        self.bytes_per_s = 0
        self.num_bytes = 0  # that came through
        self.num_left = 0  # before `then` is called, if there is one
        self.then: Callable[[], None] | None = None
        self.lit.set()

    def passed(self, num_bytes: int) -> None:
        """So many have come through."""
        self.num_bytes += num_bytes
        self.num_left -= num_bytes
        if self.then is not None and self.num_left <= 0:
            then, self.then = self.then, None
            then()


class Proxy:
    """Listens on a loopback port, and forwards to `target` (HOST:PORT or unix:PATH) as long as nothing is broken.

    >>> async with Proxy("127.0.0.1:50052") as proxy:
    ...     proxy.blackhole()  # whoever dialled proxy.address hears and says nothing more
    ...     proxy.heal()
    """

    def __init__(self, target: str, *, seed: int = 0) -> None:
        self.address = ""
        self.num_accepted = 0
        self._target = target
        self._draw = random.Random(seed)
        self._up = _Way()
        self._down = _Way()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._dialled = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.reset()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- what can be done to the network

    def blackhole(self, *, up: bool = True, down: bool = True) -> None:
        """Nothing passes in these directions, and nobody is told."""
        for way, dark in ((self._up, up), (self._down, down)):
            if dark:
                way.lit.clear()

    def delay(self, delay_s: float, jitter_s: float = 0.0) -> None:
        """Each chunk arrives so much later, plus up to `jitter_s` by chance; never before the one that it follows."""
        for way in (self._up, self._down):
            way.delay_s, way.jitter_s = delay_s, jitter_s

    def throttle(self, bytes_per_s: int) -> None:
        """No more than that passes, in each direction of each connection; 0 is no limit."""
        self._up.bytes_per_s = self._down.bytes_per_s = bytes_per_s

    def reset(self) -> None:
        """Both ends of every connection get an RST. New ones may be made."""
        for writer in self._writers:
            _reset(writer)

    def after(self, num_bytes: int, then: Callable[[], None]) -> None:
        """Call it once so many more bytes have come down, and before another one does."""
        self._down.num_left, self._down.then = num_bytes, then

    def heal(self) -> None:
        """Everything passes again, at once, what was held back first."""
        for way in (self._up, self._down):
            way.delay_s = way.jitter_s = 0.0
            way.bytes_per_s = 0
            way.lit.set()

    # ---- what can be seen of it

    @property
    def bytes_up(self) -> int:
        """Bytes that came through, from those who dial."""
        return self._up.num_bytes

    @property
    def bytes_down(self) -> int:
        """Bytes that came through, to those who dial."""
        return self._down.num_bytes

    async def accepted(self, count: int) -> None:
        """Return once that many connections have been made since the beginning."""
        while self.num_accepted < count:
            self._dialled.clear()
            await self._dialled.wait()

    # ---- forwarding

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.num_accepted += 1
        self._dialled.set()
        writers = [writer]
        try:
            other_reader, other_writer = await _dial(self._target)
            writers.append(other_writer)
            self._writers.add(other_writer)
            if writer.is_closing():  # reset meanwhile
                raise ConnectionResetError
            async with asyncio.TaskGroup() as both:
                both.create_task(self._forward(reader, other_writer, self._up))
                both.create_task(self._forward(other_reader, writer, self._down))
        except* OSError:  # one end is gone, or nobody listens there
            for end in writers:
                _reset(end)
        except* asyncio.CancelledError:  # the proxy is closed
            pass
        finally:
            self._tasks.discard(task)
            self._writers.difference_update(writers)
            for end in writers:
                end.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: _Way) -> None:
        """One direction of one connection, until it ends. Raises OSError when it breaks."""
        on_its_way: asyncio.Queue[_Parcel] = asyncio.Queue(_MAX_CHUNKS)
        async with asyncio.TaskGroup() as both:
            both.create_task(self._take(reader, on_its_way, way))
            both.create_task(_give(on_its_way, writer, way))

    async def _take(self, reader: asyncio.StreamReader, on_its_way: asyncio.Queue[_Parcel], way: _Way) -> None:
        """Read on while what was read is on its way."""
        loop = asyncio.get_running_loop()
        due_s = 0.0
        chunk: bytes | OSError = b"?"
        while isinstance(chunk, bytes) and chunk:
            try:
                chunk = await reader.read(_CHUNK)
            except OSError as error:  # a reset is under way like everything else: it does not pass where it is dark
                chunk = error
            due_s = max(due_s, loop.time() + way.delay_s + self._draw.uniform(0.0, way.jitter_s))
            await on_its_way.put((due_s, chunk))


async def _give(on_its_way: asyncio.Queue[_Parcel], writer: asyncio.StreamWriter, way: _Way) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due_s, chunk = await on_its_way.get()
        while (left_s := due_s - loop.time()) > 0 and (way.delay_s or way.jitter_s):
            await asyncio.sleep(min(left_s, 0.05))
        await way.lit.wait()
        if isinstance(chunk, OSError):
            raise chunk
        with contextlib.suppress(OSError):  # the receiver is gone: that is told in the other direction
            if not chunk:
                writer.write_eof()
                return
            await _write(writer, chunk, way)


async def _write(writer: asyncio.StreamWriter, chunk: bytes, way: _Way) -> None:
    while chunk:
        await way.lit.wait()
        rate = way.bytes_per_s
        size = max(1, rate // _PIECES_PER_S) if rate else len(chunk)
        if way.then is not None:
            size = min(size, way.num_left)
        piece, chunk = chunk[:size], chunk[size:]
        writer.write(piece)
        await writer.drain()
        way.passed(len(piece))
        if rate:
            await asyncio.sleep(len(piece) / rate)


async def _dial(target: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if target.startswith("unix:"):
        return await asyncio.open_unix_connection(target.removeprefix("unix:"))
    host, _, port = target.rpartition(":")
    return await asyncio.open_connection(host, int(port))


def _reset(writer: asyncio.StreamWriter) -> None:
    end = writer.get_extra_info("socket")
    if end.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):  # it is closed already
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
