"""A server that behaves as vLLM does when it is struck: `python -m tests.faults.fake_peer --port PORT`.

Its engine is a process of its own, which calls itself EngineCore and makes one token for every stream at each tick.
Where it stands still, so do the streams; where it dies they break, and the server ends itself. This is what
tests/faults/peer_kill.py is tried on. Several streams at once stand still for a while in their midst, so that whoever
strikes them has the time to do so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from typing import Any, Final

from aiohttp import web

_TICK_S: Final = 0.002
_VOCAB: Final = 1000
_PAUSE_AT: Final = 120  # tokens: peer_kill.py strikes before that
_PAUSE_TICKS: Final = 1500


class _Clock:
    """The engine's ticks, as the server hears them."""

    def __init__(self) -> None:
        self._ticked = asyncio.Condition()
        self.num_streams = 0
        self.has_begun = asyncio.Event()

    async def run(self) -> None:
        engine = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.faults.fake_peer", "--engine", "EngineCore"), stdout=asyncio.subprocess.PIPE
        )
        assert engine.stdout is not None
        while await engine.stdout.read(1):
            self.has_begun.set()
            async with self._ticked:
                self._ticked.notify_all()
        os._exit(1)

    async def tick(self) -> None:
        async with self._ticked:
            await self._ticked.wait()


async def _complete(clock: _Clock, request: web.Request) -> web.StreamResponse:
    asked: dict[str, Any] = await request.json()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    first, count = sum(asked["prompt"]), asked["max_tokens"]
    clock.num_streams += 1
    try:
        for n in range(count):
            await clock.tick()
            if n == _PAUSE_AT and clock.num_streams > 1:
                for _ in range(_PAUSE_TICKS):
                    await clock.tick()
            token = (first + 7 * n) % _VOCAB
            choice = {"text": f" {token}", "token_ids": [token], "finish_reason": "length" if n == count - 1 else None}
            await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
    finally:
        clock.num_streams -= 1
    await response.write(b"data: [DONE]\n\n")
    return response


async def _serve(port: int) -> None:
    clock = _Clock()

    async def health(_: web.Request) -> web.Response:
        return web.Response(status=200 if clock.has_begun.is_set() else 503)

    async def complete(request: web.Request) -> web.StreamResponse:
        return await _complete(clock, request)

    app = web.Application()
    app.add_routes([web.get("/health", health), web.post("/v1/completions", complete)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await clock.run()


def _compute() -> None:
    """Until nobody listens."""
    while True:
        time.sleep(_TICK_S)
        os.write(sys.stdout.fileno(), b".")


if __name__ == "__main__":
    _parser = argparse.ArgumentParser()
    _parser.add_argument("--port", type=int)
    _parser.add_argument("--engine")
    _options = _parser.parse_args()
    if _options.engine:
        _compute()
    else:
        asyncio.run(_serve(_options.port))
