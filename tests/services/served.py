"""A server with its engine in this process, over a real socket; and tests that run beside its loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from grpc import aio

from services.engine import Engine
from services.handlers import Arrivals

HANG_S: Final = 60.0
"""Ends a test that would hang, and nothing else: a test that waits so long for what comes is right all the same."""


class PatientAtFirst(Arrivals):
    """Waits for the first message of all however long it takes, and for every other one no time at all."""

    def __init__(self) -> None:
        super().__init__(limit_s=HANG_S)

    def begin(self, limit: asyncio.Timeout) -> None:
        super().begin(limit)
        self.limit_s = 0.05


@asynccontextmanager
async def served(server: aio.Server, engine: Engine) -> AsyncIterator[aio.Channel]:
    """A channel to the server, which is started here, while the engine's loop runs."""
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    loop = asyncio.create_task(engine.run())
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)


def run(test: Awaitable[None], limit_s: float = HANG_S) -> None:
    """Run a test; it fails where it would hang."""

    async def main() -> None:
        async with asyncio.timeout(limit_s):
            await test

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    """Give the others turns until it holds."""
    while not condition():
        await asyncio.sleep(0)
