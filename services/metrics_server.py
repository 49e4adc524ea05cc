"""/metrics of a scheduler without a gateway: one path over HTTP/1.1, for Prometheus and nobody else.

Whoever connects has a few seconds and a small head; one answer, and the connection is closed. What it tells is about
all tenants together, so it is for this machine, unless --insecure; and there for who calls it by loopback's names: a
page of another site, whose own name can mean 127.0.0.1, does not.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Final

from common.addresses import is_loopback, name_of
from common.log import without_texts
from services.lifecycle import StartupError, is_local, split_address
from services.prometheus import CONTENT_TYPE

_log = logging.getLogger(__name__)

_HOST: Final = re.compile(rb"^host:[ \t]*([^\r\n]*?)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_MAX_HEAD: Final = 8192  # bytes
_PATIENCE_S: Final = 5.0  # for a head, and for a reader
_MAX_OPEN: Final = 16  # connections

Text = Callable[[], Awaitable[str]]


class MetricsServer:
    """Serves what `text` says."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._server: asyncio.Server | None = None
        self._is_local = True
        self._num_open = 0

    async def listen(self, address: str) -> str:
        """Begin; returns the address with the port that was taken. Raises StartupError."""
        host, port = split_address(address)
        self._is_local = is_local(address)
        try:
            self._server = await asyncio.start_server(self._answer, host, port, limit=_MAX_HEAD)
        except (OSError, UnicodeError) as error:
            raise StartupError(
                f"--metrics-listen {address}: the port is taken, or not allowed; port 0 takes a free one"
            ) from error
        return f"{address.rpartition(':')[0]}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """Take nobody more."""
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._num_open += 1
        try:
            async with asyncio.timeout(_PATIENCE_S):
                if self._num_open > _MAX_OPEN:
                    _say(writer, "503 Service Unavailable", "too many connections\n")
                else:
                    await self._say_what_is_asked(reader, writer)
                await writer.drain()
        except OSError:  # also TimeoutError: nothing came, or nobody reads
            writer.transport.abort()
        except Exception as error:  # noqa: BLE001  the edge: a bug here ends one scrape
            _log.error("/metrics failed\n%s", "".join(without_texts(error)))
        finally:
            await _close(writer)
            self._num_open -= 1

    async def _say_what_is_asked(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            _say(writer, "400 Bad Request", "this is no request\n")
            return
        first, _, headers = head.partition(b"\r\n")
        method, _, rest = first.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        called = [name_of(host.decode("latin-1")) for host in _HOST.findall(headers)]
        if self._is_local and not all(map(is_loopback, called)):
            _say(writer, "403 Forbidden", "call it localhost, or by its address\n")
        elif path != b"/metrics":
            _say(writer, "404 Not Found", "there is /metrics\n")
        elif method not in (b"GET", b"HEAD"):
            _say(writer, "405 Method Not Allowed", "GET it\n", "allow: GET, HEAD\r\n")
        else:
            _say(writer, "200 OK", await self._text(), with_body=method == b"GET", kind=CONTENT_TYPE)


async def _close(writer: asyncio.StreamWriter) -> None:
    """Close behind what is still to be written; who takes nothing of that does not keep the connection either."""
    writer.close()
    try:
        async with asyncio.timeout(_PATIENCE_S):
            await writer.wait_closed()
    except OSError:  # also TimeoutError
        writer.transport.abort()


def _say(
    writer: asyncio.StreamWriter,
    status: str,
    text: str,
    headers: str = "",
    *,
    with_body: bool = True,
    kind: str = "text/plain; charset=utf-8",
) -> None:
    body = text.encode()
    lines = f"content-type: {kind}\r\ncontent-length: {len(body)}\r\n{headers}connection: close\r\n"
    writer.write(f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + (body if with_body else b""))
