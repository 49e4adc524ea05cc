"""Listens, and ends in order: connections of connection.py, an application, a time to finish."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from typing import Final

from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.server import ServerState

from services.gateway.connection import Connection, ConnectionLimits
from services.lifecycle import StartupError, split_address

log = logging.getLogger(__name__)

_HANDSHAKE_S: Final = 5.0
_BACKLOG: Final = 2048


class HttpServer:
    """Serves one application on one address."""

    def __init__(self, app: ASGIApp, limits: ConnectionLimits, tls: ssl.SSLContext | None = None) -> None:
        self._config = Config(
            app,
            interface="asgi3",
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="critical",  # what strangers send is no event; what our own code raises is told in app.py
            access_log=False,
            proxy_headers=False,  # nobody is believed to be somebody else
            server_header=False,
            timeout_keep_alive=round(limits.idle_s),
        )
        self._config.load()
        self._state = ServerState()
        self._limits = limits
        self._idle: dict[Connection, None] = {}
        self._tls = tls
        self._server: asyncio.Server | None = None

    @property
    def num_connections(self) -> int:
        """Connections that are open."""
        return len(self._state.connections)

    async def listen(self, address: str) -> str:
        """Begin; returns the address with the port that was taken. Raises StartupError."""
        host, port = split_address(address)
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: Connection(self._config, self._state, self._limits, self._idle),
                host,
                port,
                ssl=self._tls,
                ssl_handshake_timeout=_HANDSHAKE_S if self._tls else None,
                backlog=_BACKLOG,
                reuse_port=False,
            )
        except (OSError, UnicodeError) as error:
            raise StartupError(
                f"cannot listen on {address}: the port is taken, or not allowed. Stop what listens there, or choose "
                f"another port (port 0 takes a free one)."
            ) from error
        bound: socket.socket = self._server.sockets[0]
        return f"{address.rpartition(':')[0]}:{bound.getsockname()[1]}"

    async def drain(self, grace_s: float) -> None:
        """Take nothing new; what runs has `grace_s` to end by itself, and is ended then."""
        assert self._server is not None, "it does not listen"
        self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        try:
            async with asyncio.timeout(grace_s):
                while tasks := list(self._state.tasks):
                    await asyncio.wait(tasks)
        except TimeoutError:
            log.warning("%d requests had not ended after %g s", len(self._state.tasks), grace_s)
        tasks = list(self._state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self._state.connections):
            connection.transport.close()
