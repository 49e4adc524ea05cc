"""JSON that is long, a piece at a time: its text is not held as a whole, and others have their turns meanwhile."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Final

from starlette.types import Receive, Scope, Send

from services.gateway.answers import Answers
from services.gateway.events import while_connected

_AT_ONCE: Final = 32  # values: with the twenty likeliest beside each token that is a few milliseconds
_PART_BYTES: Final = 1 << 16  # of an answer; a smaller one goes out whole, with its length
_STAND_IN: Final = f"long-{secrets.token_hex(16)}"
"""A string that nobody can think of, in place of each long list while what is around them is encoded."""


class Long:
    """A list in JSON, whose values are made when they are written, each time anew."""

    def __init__(self, values: Callable[[], Iterable[Any]]) -> None:
        self._values = values

    def pieces(self) -> Iterator[str]:
        """Its text."""
        values, between = iter(self._values()), "["
        while some := list(islice(values, _AT_ONCE)):
            yield between + json.dumps(some)[1:-1]
            between = ", "
        yield "[]" if between == "[" else "]"


def pieces(value: Any) -> Iterator[str]:
    """What json.dumps makes of it, where that could encode Longs; in one piece where there is none."""
    found: list[Long] = []

    def stand_in(each: object) -> str:
        assert isinstance(each, Long), f"a {type(each).__name__} in JSON"
        found.append(each)
        return _STAND_IN

    around = json.dumps(value, default=stand_in).split(f'"{_STAND_IN}"')
    for text, each in zip(around, found, strict=False):  # and one text behind the last
        yield text
        yield from each.pieces()
    yield around[-1]


async def in_turns(value: Any) -> str:
    """All of it at once, made with a turn for others between any two pieces."""
    made: list[str] = []
    for piece in pieces(value):
        if made:
            await asyncio.sleep(0)
        made.append(piece)
    return "".join(made)


class WholeAnswer:
    """An ASGI response: an answer that is told when all of it is there. Its reader may leave at any time."""

    def __init__(self, answers: Answers, tell: Callable[[Answers], Any]) -> None:
        """`tell` awaits the answer, and returns it as JSON."""
        self._answers = answers
        self._tell = tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write it. Raises what `tell` raises, before anything is written, and ClientDisconnect."""
        async with self._answers:
            await while_connected(receive, self._work(send))

    async def _work(self, send: Send) -> None:
        waiting: list[str] = []
        size, has_begun = 0, False
        for piece in pieces(await self._tell(self._answers)):
            if waiting or has_begun:
                await asyncio.sleep(0)
            waiting.append(piece)
            size += len(piece)
            if size >= _PART_BYTES and len(waiting) > 1:
                part, waiting = "".join(waiting[:-1]).encode(), waiting[-1:]
                size = len(piece)
                if not has_begun:
                    await send(_start())
                    has_begun = True
                await send({"type": "http.response.body", "body": part, "more_body": True})
        part = "".join(waiting).encode()
        if not has_begun:
            await send(_start(len(part)))
        await send({"type": "http.response.body", "body": part, "more_body": False})


def _start(length: int | None = None) -> dict[str, Any]:
    """The head of an answer, with its length where that is known."""
    headers = [(b"content-type", b"application/json")]
    if length is not None:
        headers.append((b"content-length", b"%d" % length))
    return {"type": "http.response.start", "status": 200, "headers": headers}
