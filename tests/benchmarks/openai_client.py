"""The other servers' way: POST /v1/completions, answered by server-sent events.

Two dialects. vLLM sends the ids of the tokens in every event; llama.cpp's server sends an event for every token and
counts them at the end. Both take the prompt as ids and can be told to ignore the end of the sequence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, Self

import aiohttp

from tests.benchmarks.playing import Emit
from tests.benchmarks.workloads import Request

Dialect = Literal["vllm", "llama"]


class RequestFailed(Exception):
    """The server's answer is an error."""


class OpenAIClient:
    """A playing.Client. `extra` is added to the body of every request."""

    _http: aiohttp.ClientSession

    def __init__(self, base: str, dialect: Dialect, *, extra: Mapping[str, Any] | None = None) -> None:
        self._base = base
        self._dialect = dialect
        self._extra = dict(extra or {})

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            self._base,
            timeout=aiohttp.ClientTimeout(total=None, sock_read=900),
            # a connection for each request: the server may be closing an idle one just as we write to it
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def is_ready(self) -> bool:
        """Whether the server says that it is healthy."""
        try:
            async with self._http.get("/health") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    async def generate(self, request: Request, emit: Emit) -> int:
        """Stream one answer. Raises RequestFailed."""
        arrived, counted = 0, None
        async with self._http.post("/v1/completions", json=self._body(request)) as response:
            if response.status != 200:
                raise RequestFailed(f"HTTP {response.status}: {await response.text()}")
            async for line in response.content:
                if not line.startswith(b"data: {"):  # what is between events, and the [DONE] at the end
                    continue
                event = json.loads(line[5:])
                if event.get("error"):
                    raise RequestFailed(str(event["error"]))
                if usage := event.get("usage"):
                    counted = usage["completion_tokens"]
                for choice in event.get("choices", ()):
                    if count := self._count(choice):
                        arrived += count
                        emit()
        return arrived if counted is None else int(counted)

    def _count(self, choice: Mapping[str, Any]) -> int:
        if self._dialect == "vllm":
            return len(choice.get("token_ids") or ())
        return 1 if choice.get("text") else 0

    def _body(self, request: Request) -> dict[str, Any]:
        body = {
            "model": "m",
            "prompt": list(request.prompt),
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._dialect == "vllm":
            body["return_token_ids"] = True
        return body | self._extra
