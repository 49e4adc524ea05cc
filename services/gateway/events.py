"""Server-sent events as they are made: to a reader who may be slow, may leave, and whose line must not fall silent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

_log = logging.getLogger(__name__)

ABORT: Final = "pagewire.abort"
"""The extension of a connection that ends it at once, whatever is still to be written."""

_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy must pass events on as they come
]
# A browser's EventSource comes back after that many milliseconds: while what it read still runs.
_HEAD: Final = b"retry: 500\n"
# Neither is a block of its own: some clients take a block without data for an event.
_COMMENT: Final = b": the answer is being made\n"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long things may take, in seconds."""

    comment_s: float  # of silence, until a comment says that the stream is alive
    reader_s: float  # that a reader may take nothing


def event(data: str, id: str = "", name: str = "") -> bytes:
    """One event. `data` has no line breaks."""
    named = f"event: {name}\n" if name else ""
    return f"{named}id: {id}\ndata: {data}\n\n".encode() if id else f"{named}data: {data}\n\n".encode()


class EventStream:
    """An ASGI response. Until the first event, an error is raised and not told: it has a status of its own then.

    `tell` makes the last event of an error that comes later. `close` is called at the end, whoever makes it; `on_cut`
    before that where it is this server, and makes the last event. A reader who `comes_back` is told when.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        patience: Patience,
        *,
        close: Callable[[], Awaitable[None]],
        tell: Callable[[Exception], bytes],
        on_cut: Callable[[], bytes],
        comes_back: bool = True,
    ) -> None:
        self._events = events
        self._patience = patience
        self._close = close
        self._uncommented = asyncio.Event()  # no comment is being written; events wait for that
        self._uncommented.set()
        self._tell = tell
        self._on_cut = on_cut
        self._head = _HEAD if comes_back else b""
        self._has_begun = self._has_ended = False
        self._clock_s = asyncio.get_running_loop().time  # to ask which loop runs is a system call, so once
        self._told_s = 0.0
        self._writing_since_s: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the events. Raises what the first one raises."""
        self._told_s = self._clock_s()
        work = asyncio.create_task(self._work(send))
        gone = asyncio.create_task(_until_gone(receive))
        clock = asyncio.create_task(self._watch(send))
        last = b""
        try:
            await asyncio.wait({work, gone, clock}, return_when=asyncio.FIRST_COMPLETED)
            if clock.done():
                clock.result()  # a bug there must not be silent
                _log.warning("a stream ended: its reader took nothing for %g s", self._patience.reader_s)
                scope["extensions"][ABORT]["now"]()
        except asyncio.CancelledError:
            last = self._on_cut()
            raise
        finally:
            for task in (work, gone, clock):
                task.cancel()
            await asyncio.gather(work, gone, clock, return_exceptions=True)
            if last and self._has_begun and not self._has_ended:
                await self._tell_cut(send, last)
            await self._close()
        if not work.cancelled():
            work.result()

    async def _work(self, send: Send) -> None:
        async with aclosing(self._events):
            try:
                async for data in self._events:
                    await self._write(send, data)
            except Exception as error:
                if not self._has_begun:
                    raise
                await self._write(send, self._tell(error))
        await self._write(send, b"", last=True)

    async def _comment(self, send: Send) -> None:
        """Tell that the stream is alive, while no event is being written."""
        self._uncommented.clear()
        try:
            await self._write(send, _COMMENT, is_comment=True)
        finally:
            self._uncommented.set()

    async def _tell_cut(self, send: Send, last: bytes) -> None:
        """Write the last event if it is taken at once: who is slow to read keeps no process from its end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0):
                await self._write(send, last)

    async def _watch(self, send: Send) -> None:
        """Comment on silence; return when the reader has been slow for too long."""
        comment_s, reader_s = self._patience.comment_s, self._patience.reader_s
        while True:
            await asyncio.sleep(min(comment_s, reader_s / 4))
            if self._writing_since_s is not None:
                if self._clock_s() - self._writing_since_s >= reader_s:
                    return
            elif self._clock_s() - self._told_s >= comment_s:
                try:
                    async with asyncio.timeout(reader_s):  # nobody else watches meanwhile
                        await self._comment(send)
                except TimeoutError:
                    return

    async def _write(self, send: Send, data: bytes, *, last: bool = False, is_comment: bool = False) -> None:
        if not (is_comment or self._uncommented.is_set()):
            await self._uncommented.wait()
        self._writing_since_s = self._clock_s()
        if not self._has_begun:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            self._has_begun = True
            data = self._head + data
        await send({"type": "http.response.body", "body": data, "more_body": not last})
        self._has_ended = last
        self._writing_since_s = None
        self._told_s = self._clock_s()


async def while_connected(receive: Receive, work: Awaitable[_T]) -> _T:
    """What the work comes to. Raises ClientDisconnect, and ends the work, when the caller leaves before."""
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    with contextlib.suppress(ClientDisconnect):
        while (await receive())["type"] != "http.disconnect":
            pass
