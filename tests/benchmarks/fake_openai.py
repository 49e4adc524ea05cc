"""A server that talks like vLLM's or llama.cpp's and makes up its tokens, for tests: PORT DIALECT [FAIL_EVERY]."""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

from aiohttp import web


def make_app(dialect: str, fail_every: int = 0) -> web.Application:
    """Answers with as many tokens as asked; where `fail_every` is n, each n-th answer is an error instead."""
    numbers = itertools.count(1)

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    async def complete(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        assert asked["stream"] and asked["ignore_eos"] and asked["temperature"] == 0
        if fail_every and next(numbers) % fail_every == 0:
            return web.Response(status=503, text="no room")
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        for token in range(asked["max_tokens"]):
            choice: dict[str, Any] = {"index": 0, "text": f" {token}"}
            if dialect == "vllm":
                assert asked["return_token_ids"]
                choice["token_ids"] = [token]
            await _send(stream, {"choices": [choice]})
        await _send(stream, {"choices": [], "usage": {"completion_tokens": asked["max_tokens"]}})
        await stream.write(b"data: [DONE]\n\n")
        return stream

    app = web.Application()
    app.add_routes([web.get("/health", health), web.post("/v1/completions", complete)])
    return app


async def _send(stream: web.StreamResponse, event: Any) -> None:
    await stream.write(f"data: {json.dumps(event)}\n\n".encode())


if __name__ == "__main__":
    port, dialect, *rest = sys.argv[1:]
    web.run_app(
        make_app(dialect, *(int(number) for number in rest)), host="127.0.0.1", port=int(port), print=lambda *_: None
    )
