"""The gateway as an ASGI application before a scheduler that says what a test wants, and one call of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, cast

from pagewire.answers import Answer, Delta, Finish
from pagewire.continuation import Continuation
from protos import inference_pb2 as pb
from services.gateway.app import Gateway
from services.gateway.bodies import Bodies
from services.gateway.events import Patience
from services.gateway.metrics import Metrics
from services.gateway.upstream import Upstream

HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


def delta(index: int, token: int, text: str, choice: int = 0) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(
        delta=pb.Delta(choice=choice, index=index, token_ids=[token], text=text, ticket=b"t")
    )


def finish(reason: pb.FinishReason.ValueType = pb.FINISH_REASON_EOS) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(finish=pb.Finish(reason=reason, usage=pb.Usage(prompt_tokens=3)))


class Stream:
    """What a scheduler says to one request; in the end it fails, if it is to."""

    def __init__(
        self, request: pb.GenerateStreamRequest, messages: Sequence[pb.GenerateStreamResponse], then: Exception | None
    ) -> None:
        self.continuation = Continuation(request)
        self._messages = list(messages)
        self._then = then
        self.closed: list[bool] = []

    async def next(self) -> Delta | Finish | None:
        if self._messages:
            return self.continuation.hear(self._messages.pop(0)) or await self.next()
        if self._then is not None:
            raise self._then
        if not self.continuation.is_done:
            await asyncio.Event().wait()
        return None

    @property
    def answer(self) -> Answer:
        return self.continuation.answer()

    async def close(self, *, linger: bool = False) -> None:
        self.closed.append(linger)


class Scheduler:
    """In place of an Upstream."""

    def __init__(self, *messages: pb.GenerateStreamResponse, then: Exception | None = None) -> None:
        self._messages = messages
        self._then = then
        self.streams: list[Stream] = []
        self.keys: list[str] = []  # that were shown

    def ask(self, request: pb.GenerateStreamRequest, key: str) -> Stream:
        self.keys.append(key)
        self.streams.append(Stream(request, self._messages, self._then))
        return self.streams[-1]


def gateway(
    scheduler: object,
    *,
    comment_s: float = 30,
    reader_s: float = 30,
    max_body_bytes: int = 10_000,
    metrics: Metrics | None = None,
    **settings: Any,
) -> Gateway:
    return Gateway(
        cast("Upstream", scheduler),
        Bodies(max_bytes=max_body_bytes, limit_s=30, max_total_bytes=max_body_bytes),
        Patience(comment_s=comment_s, reader_s=reader_s),
        metrics or Metrics(),
        **{"max_requests": 4, "max_prompts": 4, **settings},
    )


class Call:
    """One call of the application."""

    def __init__(
        self,
        body: object,
        path: str = CHAT,
        headers: Sequence[tuple[bytes, bytes]] = (),
        method: str = "POST",
        accept: bytes = b"text/event-stream",
    ) -> None:
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"accept", accept), *headers],
        }
        self._body = json.dumps(body).encode()
        self._asked = False
        self.left = asyncio.Event()
        self.parts: list[bytes] = []
        self.status = 0
        self.headers: dict[str, str] = {}

    async def receive(self) -> Any:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.parts.append(message.get("body", b""))

    @property
    def ids(self) -> list[bytes]:
        lines = b"".join(self.parts).splitlines()
        return [line.removeprefix(b"id: ") for line in lines if line.startswith(b"id: ")]

    @property
    def json(self) -> Any:
        return json.loads(b"".join(self.parts))

    @property
    def events(self) -> list[Any]:
        lines = b"".join(self.parts).decode().splitlines()
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [each if each == "[DONE]" else json.loads(each) for each in data]


def ask(app: Gateway, body: object, **settings: Any) -> Call:
    async def run() -> Call:
        call = Call(body, **settings)
        await app(call.scope, call.receive, call.send)
        return call

    return asyncio.run(run())
