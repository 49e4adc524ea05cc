"""One HTTP connection: uvicorn's, within bounds that uvicorn leaves to a proxy in front of it.

A connection has so long to send the head of a request, of so many bytes; one that is idle makes room for a new one
where there are too many; and one whose reader takes nothing is cut in the end, whatever is still to be written. Behind
the request that runs one more may wait, and no third: a connection costs no more than its share, however it is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import struct
from dataclasses import dataclass
from typing import Any, Final, Self

from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from services.gateway.events import ABORT

_log = logging.getLogger(__name__)

_NO_LINGERING: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What a connection may take. Times in seconds."""

    most: int  # connections at once
    head_s: float  # until the head of a request has come
    head_bytes: int
    idle_s: float  # between requests
    reader_s: float  # that what was written may not be taken


class _UntilClosed(int):
    """In place of the length of a body: as many bytes as come before the connection is closed, and none is missing."""

    def __lt__(self, more: int) -> bool:
        return False

    def __sub__(self, some: int) -> Self:
        return self


class Connection(HttpToolsProtocol):
    """Made by `factory` for each that is accepted."""

    def __init__(
        self, config: Config, state: ServerState, limits: ConnectionLimits, idle: dict[Connection, None]
    ) -> None:
        """`idle` are those between two requests, the longest first; it is shared by all."""
        super().__init__(config=config, server_state=state, app_state={})
        self._limits = limits
        self._idle = idle
        self._head_bytes = 0
        self._in_head = False  # the first bytes of one have come, and not the last
        self._head_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None  # runs while more is to be written than may wait
        self._ahead: RequestResponseCycle | None = None  # what runs, or ran, before `cycle`

    def connection_made(self, transport: Any) -> None:
        """As asyncio.Protocol's."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.most:
            for oldest in self._idle:
                oldest._leave()
                oldest.connection_lost(None)
                break
            else:
                self._refuse(503, "too many connections are open", "retry-after: 1\r\n")
                return
        self._idle[self] = None
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio.Protocol's."""
        self._idle.pop(self, None)
        self._stop_timer()
        self._stop_reader_timer()
        if self._ahead is not None and not self._ahead.response_complete:  # uvicorn tells only the last one
            self._ahead.disconnected = True
            self._ahead.message_event.set()
        if self in self.connections:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """As asyncio.Protocol's."""
        if self.parser is None or self.transport.is_closing():  # it was closed to make room, or refused
            return
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()  # the first bytes of another request
        super().data_received(data)

    def pause_writing(self) -> None:
        """As asyncio.Protocol's: whoever writes waits from now on."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """As asyncio.Protocol's."""
        self._stop_reader_timer()
        super().resume_writing()

    def on_message_begin(self) -> None:
        """As httptools calls it."""
        super().on_message_begin()
        self._head_bytes = 0
        self._in_head = True
        self.scope["extensions"] = {ABORT: {"now": self._cut}}

    def on_url(self, url: bytes) -> None:
        """As httptools calls it."""
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """As httptools calls it."""
        self._count(name, value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """As httptools calls it."""
        self._stop_timer()
        self._in_head = False
        self._idle.pop(self, None)
        if self.pipeline:  # one read holds thousands of requests
            self._cut()
            raise ValueError("a third request came while the first one runs")  # ends the parsing
        self._ahead = self.cycle
        super().on_headers_complete()
        if self.scope["http_version"] < "1.1" and self.cycle is not None:  # its reader knows no chunks
            self.cycle.chunked_encoding = False
            self.cycle.expected_content_length = _UntilClosed()
            self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        """As uvicorn calls it."""
        super().on_response_complete()
        if self.transport.is_closing():  # behind what is still to be written
            self.loop.call_later(self._limits.reader_s, self._cut)
        elif self.cycle is None or self.cycle.response_complete:
            self._idle[self] = None
            if self._in_head:  # it came together with the request before it
                self._await_head()

    def timeout_keep_alive_handler(self) -> None:
        """As uvicorn calls it, when no request followed the last one."""
        self._leave()

    def shutdown(self) -> None:
        """As uvicorn calls it: no request after the one that runs."""
        super().shutdown()
        if self.transport.is_closing():
            self.loop.call_later(self._limits.reader_s, self._cut)

    def send_400_response(self, msg: str) -> None:
        """As uvicorn calls it, for what is no HTTP."""
        if self.transport.is_closing():  # it was cut: nothing may come in the middle of an answer
            return
        self._refuse(431 if self._head_bytes > self._limits.head_bytes else 400, "this is no HTTP request")

    def _count(self, *parts: bytes) -> None:
        self._head_bytes += sum(map(len, parts)) + 4
        if self._head_bytes > self._limits.head_bytes:
            raise ValueError("the head of the request is too large")  # ends the parsing; send_400_response tells it

    def _await_head(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(self._limits.head_s, self._leave)

    def _stop_timer(self) -> None:
        timer, self._head_timer = self._head_timer, None
        if timer is not None:
            timer.cancel()

    def _await_reader(self) -> None:
        self._stop_reader_timer()
        waiting = self.transport.get_write_buffer_size()
        self._reader_timer = self.loop.call_later(self._limits.reader_s, self._judge_reader, waiting)

    def _judge_reader(self, waiting: int) -> None:
        """Of `waiting` bytes he must have taken some by now: less than a full buffer is taken for nothing."""
        if waiting - self.transport.get_write_buffer_size() >= HIGH_WATER_LIMIT:
            self._await_reader()
            return
        _log.warning("a connection was cut: its reader took nothing for %g s", self._limits.reader_s)
        self._cut()

    def _stop_reader_timer(self) -> None:
        timer, self._reader_timer = self._reader_timer, None
        if timer is not None:
            timer.cancel()

    def _leave(self) -> None:
        """Close; who has not read what was written had his time for it."""
        if self.transport.get_write_buffer_size():
            self._cut()
        else:
            self.transport.close()

    def _cut(self) -> None:
        """End it at once, also what the kernel has of it: otherwise that would wait for its reader for minutes."""
        with contextlib.suppress(OSError, ValueError):  # it is gone already; uvloop says so by the second
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGERING)
        self.transport.abort()

    def _refuse(self, status: int, message: str, headers: str = "") -> None:
        if status == 431:
            message = f"the head of a request has at most {self._limits.head_bytes} bytes"
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = json.dumps({"error": error})
        self.transport.write(
            f"HTTP/1.1 {status} {_PHRASES[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n{headers}connection: close\r\n\r\n{body}".encode()
        )
        self.transport.close()


_PHRASES: Final = {
    400: "Bad Request",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}
