"""A client that costs next to nothing: many calls on a few connections, by hand, to measure the server and not itself.

It speaks as much HTTP/2 as a call of the public API needs (RFC 9113, 7541): headers and one message out, frames in. Of
an answer it notes when it came and how it ended; what the messages say is looked at on request.

It sends whatever it is told to, whether or not anything comes back.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Self

_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW, _CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_HEADER_TABLE_SIZE, _INITIAL_WINDOW = 1, 4
_CANCEL: Final = 8
_LARGE: Final = (1 << 31) - 1
_FIRST_WINDOW: Final = 65_535
_NAMES: Final = {8: b":status", 31: b"content-type"}  # of the static table, those that a server of gRPC uses

OK, RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED = 0, 8, 4


@dataclass(slots=True, eq=False)
class Call:
    """One call. Times in seconds, of the monotonic clock."""

    began_s: float
    messages: list[bytes] | None = None  # what came, where it is to be kept
    num_frames: int = 0
    first_s: float = 0.0  # when the first message came, and the second, which is the first token
    second_s: float = 0.0
    ended_s: float = 0.0
    status: int | None = None  # gRPC's; None: there was none
    trailers: dict[bytes, bytes] = field(default_factory=dict[bytes, bytes])


Ended = Callable[[Call], None]


class Connection:
    """One connection, of which `poll` reads and writes what it can without waiting."""

    def __init__(self, address: str, path: str, *, timeout_s: float | None = None, window: int = _LARGE) -> None:
        """Calls go to `path` and tell `timeout_s`. `window`: bytes of a stream that the server may send unasked."""
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._timeout_s = timeout_s
        self._headers = _request_headers(path, address, timeout_s)
        settings = struct.pack(
            ">HIHI", _HEADER_TABLE_SIZE, 0, _INITIAL_WINDOW, window
        )  # no table: less to keep in step
        self._out = bytearray(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self._out += _frame(_SETTINGS, 0, 0, settings)
        self._out += _frame(_WINDOW, 0, 0, struct.pack(">I", _LARGE - _FIRST_WINDOW))
        self._in = bytearray()
        self._next_id = 1
        self._received = 0  # bytes of messages since we gave the server room for more
        self._may_send = _FIRST_WINDOW
        self._held: list[tuple[int, bytes]] = []  # messages that the server has no room for yet
        self.calls: dict[int, Call] = {}  # open
        self._deadlines: dict[int, float] = {}  # soonest first
        self.is_open = True

    def fileno(self) -> int:
        """For epoll."""
        return self._socket.fileno()

    @property
    def has_more(self) -> bool:
        """There is something to write."""
        return bool(self._out)

    def close(self) -> None:
        """Leave, whatever is open."""
        self._socket.close()
        self.is_open = False

    def start(self, message: bytes, *, keep: bool = False) -> Call:
        """A call with that message; with `keep`, what it is answered is kept."""
        id, self._next_id = self._next_id, self._next_id + 2
        now = time.monotonic()
        call = self.calls[id] = Call(began_s=now, messages=[] if keep else None)
        if self._timeout_s is not None:
            self._deadlines[id] = now + self._timeout_s
        self._out += _frame(_HEADERS, _END_HEADERS, id, self._headers)
        framed = b"\0" + struct.pack(">I", len(message)) + message
        self._held.append((id, framed))
        self._send_held()
        return call

    def open_window(self) -> None:
        """From now on the server may send of every stream as much as it likes."""
        self._out += _frame(_SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW, _LARGE))

    def poll(self, ended: Ended, *, read: bool = True) -> None:
        """Write, read, and tell of every call that ended; those whose deadline has passed are given up."""
        if self._out:
            with contextlib.suppress(BlockingIOError):
                del self._out[: self._socket.send(self._out)]
        if read:
            try:
                while data := self._socket.recv(1 << 18):
                    self._in += data
                    if len(data) < 1 << 18:
                        break
                else:
                    self._lose(ended)
                    return
            except BlockingIOError:
                pass
            except ConnectionError:
                self._lose(ended)
                return
        self._take_frames(ended)
        now = time.monotonic()
        while self._deadlines:
            id, deadline = next(iter(self._deadlines.items()))
            if deadline > now:
                break
            self._out += _frame(_RESET, 0, id, struct.pack(">I", _CANCEL))
            self._end(id, ended, DEADLINE_EXCEEDED)

    # ---- inside

    def _take_frames(self, ended: Ended) -> None:
        data, at = self._in, 0
        while at + 9 <= len(data):
            length = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
            stop = at + 9 + length
            if stop > len(data):
                break
            kind, flags = data[at + 3], data[at + 4]
            id = struct.unpack_from(">I", data, at + 5)[0] & _LARGE
            self._take(kind, flags, id, memoryview(data)[at + 9 : stop].tobytes(), ended)
            at = stop
        del data[:at]

    def _take(self, kind: int, flags: int, id: int, payload: bytes, ended: Ended) -> None:
        call = self.calls.get(id)
        if kind == _DATA:
            self._received += len(payload)
            if self._received > _LARGE // 4:
                self._out += _frame(_WINDOW, 0, 0, struct.pack(">I", self._received))
                self._received = 0
            if call is not None:
                call.num_frames += 1
                if not call.first_s:
                    call.first_s = time.monotonic()
                elif not call.second_s:
                    call.second_s = time.monotonic()
                if call.messages is not None:
                    call.messages.append(payload)
        elif kind == _HEADERS:
            assert flags & _END_HEADERS, "headers that do not fit into a frame"
            if call is not None and flags & _END_STREAM:
                call.trailers = dict(_fields(payload))
                self._end(id, ended, int(call.trailers.get(b"grpc-status", b"2")))
        elif kind == _RESET and call is not None:
            self._end(id, ended, None)
        elif kind == _SETTINGS and not flags & _ACK:
            self._out += _frame(_SETTINGS, _ACK, 0, b"")
        elif kind == _PING and not flags & _ACK:
            self._out += _frame(_PING, _ACK, 0, payload)
        elif kind == _WINDOW and id == 0:
            self._may_send += struct.unpack(">I", payload)[0]
            self._send_held()
        elif kind == _GOAWAY:
            self.is_open = False

    def _send_held(self) -> None:
        while self._held and len(self._held[0][1]) <= self._may_send:
            id, framed = self._held.pop(0)
            if id in self.calls:
                self._may_send -= len(framed)
                self._out += _frame(_DATA, _END_STREAM, id, framed)

    def _end(self, id: int, ended: Ended, status: int | None) -> None:
        call = self.calls.pop(id)
        self._deadlines.pop(id, None)
        call.status, call.ended_s = status, time.monotonic()
        ended(call)

    def _lose(self, ended: Ended) -> None:
        self.is_open = False
        for id in list(self.calls):
            self._end(id, ended, None)


class Connections:
    """A few of them, waited for together."""

    def __init__(self, address: str, path: str, count: int, *, timeout_s: float | None = None) -> None:
        self.all = [Connection(address, path, timeout_s=timeout_s) for _ in range(count)]
        self._epoll = select.epoll()
        self._by_fd = {connection.fileno(): connection for connection in self.all}
        for connection in self.all:
            self._epoll.register(connection, select.EPOLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._epoll.close()
        for connection in self.all:
            connection.close()

    @property
    def num_open(self) -> int:
        """Calls that have not ended."""
        return sum(len(connection.calls) for connection in self.all)

    def poll(self, ended: Ended, wait_s: float) -> None:
        """Wait for something to read, at most so long, and do all there is to do."""
        for connection in self.all:
            if connection.has_more:
                connection.poll(ended, read=False)
        for fd, _ in self._epoll.poll(max(0.0, wait_s)):
            self._by_fd[fd].poll(ended)
        for connection in self.all:
            connection.poll(ended, read=False)


def messages_of(call: Call) -> Iterator[bytes]:
    """The messages of a call that kept them. Raises AssertionError for one that is cut short."""
    assert call.messages is not None, "nothing was kept of it"
    data, at = b"".join(call.messages), 0
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at + 1)
        assert data[at] == 0 and at + 5 + length <= len(data), "a message that is packed, or cut short"
        yield data[at + 5 : at + 5 + length]
        at += 5 + length


def _frame(kind: int, flags: int, id: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, id) + payload


def _request_headers(path: str, authority: str, timeout_s: float | None) -> bytes:
    """What stands in a table that both sides know goes by its number; nothing is entered into one of our own."""
    block = bytearray(b"\x83\x86")  # :method POST, :scheme http
    block += b"\x04" + _string(path) + b"\x01" + _string(authority) + b"\x0f\x10" + _string("application/grpc")
    block += b"\x00" + _string("te") + _string("trailers")
    if timeout_s is not None:
        block += b"\x00" + _string("grpc-timeout") + _string(f"{round(timeout_s * 1000)}m")
    return bytes(block)


def _string(text: str) -> bytes:
    assert len(text) < 127, "lengths of one byte are enough here"
    return bytes((len(text),)) + text.encode()


def _fields(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The fields of a header block that was made without a table. Packed values, which binary ones are, stay so."""
    at = 0
    while at < len(block):
        first = block[at]
        if first & 0x80:  # name and value stand in the static table
            _, at = _integer(block, at, 7)
            continue
        if first & 0xE0 == 0x20:  # the size of the table
            _, at = _integer(block, at, 5)
            continue
        index, at = _integer(block, at, 6 if first & 0x40 else 4)
        name = _NAMES.get(index, b"?")
        if not index:
            name, at = _text(block, at)
        value, at = _text(block, at)
        yield name, value


def _text(block: bytes, at: int) -> tuple[bytes, int]:
    length, at = _integer(block, at, 7)
    return block[at : at + length], at + length


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    most = (1 << bits) - 1
    value, at = block[at] & most, at + 1
    if value < most:
        return value, at
    shift = 0
    while True:
        byte, at = block[at], at + 1
        value += (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
