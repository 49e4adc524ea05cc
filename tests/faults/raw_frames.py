"""HTTP/2 frames by hand, over a plain socket: what no client library lets one send."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, NamedTuple

from services.lifecycle import split_address

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
CANCEL: Final = struct.pack(">I", 8)
MAX_FRAME: Final = 16_384

_STATUS: Final = b"grpc-status"

Header = tuple[bytes, bytes]


class Frame(NamedTuple):
    """One frame as it came."""

    kind: int
    flags: int
    stream: int
    payload: bytes


class RawConnection:
    """The client's end of an HTTP/2 connection. It sends what it is told to, and answers nothing by itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """These bytes. Raises ConnectionError when the server has had enough."""
        self.writer.write(data)
        await self.writer.drain()

    async def greet(self) -> None:
        """Begin as a client must, and take the server's settings. Raises ConnectionError when it closes instead."""
        await self.send(PREFACE + frame(SETTINGS))
        async for kind, *_ in self.frames():
            if kind == SETTINGS:
                await self.send(frame(SETTINGS, flags=ACK))
                return
        raise ConnectionResetError

    async def frames(self) -> AsyncIterator[Frame]:
        """All that come, until the connection ends."""
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await self.reader.readexactly(9)
                payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
                yield Frame(head[3], head[4], int.from_bytes(head[5:], "big"), payload)

    async def endings(self, count: int) -> dict[int, str]:
        """How so many streams end, or all that do before the connection ends: by stream, a gRPC status or a reset."""
        found: dict[int, str] = {}
        async for kind, flags, stream, payload in self.frames():
            if kind == HEADERS and flags & END_STREAM:
                found.setdefault(stream, _status(payload))
            elif kind == RST_STREAM:
                found.setdefault(stream, f"reset {int.from_bytes(payload, 'big')}")
            if len(found) == count:
                break
        return found

    async def end(self) -> None:
        """Return when the server has closed the connection."""
        async for _ in self.frames():
            pass


@asynccontextmanager
async def raw_connection(address: str) -> AsyncIterator[RawConnection]:
    """A connection to HOST:PORT or unix:PATH that has said nothing yet."""
    if address.startswith("unix:"):
        reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    else:
        reader, writer = await asyncio.open_connection(*split_address(address))
    try:
        yield RawConnection(reader, writer)
    finally:
        writer.transport.abort()


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    """One frame."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def call(stream: int, path: str, *, more: Sequence[Header] = (), flags: int = END_HEADERS) -> bytes:
    """The HEADERS that begin a gRPC call, and the CONTINUATIONs that they need."""
    block = header_block([*_begin(path), *more])
    pieces = [block[at : at + MAX_FRAME] for at in range(0, len(block), MAX_FRAME)]
    last = len(pieces) - 1
    return b"".join(
        frame(CONTINUATION if n else HEADERS, piece, flags=flags if n == last else 0, stream=stream)
        for n, piece in enumerate(pieces)
    )


def message(stream: int, data: bytes, *, length: int | None = None, compressed: int = 0, end: bool = False) -> bytes:
    """A gRPC message in DATA frames, with its prefix, which may lie about its length."""
    data = struct.pack(">BI", compressed, len(data) if length is None else length) + data
    pieces = [data[at : at + MAX_FRAME] for at in range(0, len(data), MAX_FRAME)]
    last = len(pieces) - 1
    return b"".join(
        frame(DATA, piece, flags=END_STREAM if end and n == last else 0, stream=stream)
        for n, piece in enumerate(pieces)
    )


def header_block(headers: Sequence[Header]) -> bytes:
    """HPACK at its plainest: every header a literal that is not indexed."""
    return b"".join(b"\0" + _string(name) + _string(value) for name, value in headers)


def _begin(path: str) -> list[Header]:
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    ]


def _string(text: bytes) -> bytes:
    """Its length, in seven bits and as many bytes of seven more as it needs, and the text."""
    length = len(text)
    if length < 127:
        return bytes((length,)) + text
    length -= 127
    digits = bytearray((127,))
    while length >= 128:
        digits.append(length % 128 + 128)
        length //= 128
    digits.append(length)
    return bytes(digits) + text


def _status(block: bytes) -> str:
    """The status in trailers, where it stands in plain letters, as it does the first time in a connection."""
    at = block.find(_STATUS)
    if at < 0:
        return "a status"
    at += len(_STATUS)
    return f"status {block[at + 1 : at + 1 + block[at]].decode('ascii', 'replace')}"
