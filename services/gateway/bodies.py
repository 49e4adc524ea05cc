"""The body of a request: read within bounds of size and time, and parsed. What is wrong in it is told by its place."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Final

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from common.errors import InvalidRequest, Overloaded
from common.json_value import is_object
from services.gateway.errors import BodyTooLarge, BodyTooSlow, NotJson
from services.gateway.fields import Fields, LetPass, cut

_MOST_DIGITS: Final = 400  # no number that anybody means has more; Python itself refuses from 4300 on

# A string may lack its end, and is never looked at twice: what cannot match would be tried from each of its quotes.
_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)

_TOO_DEEP: Final = 1000  # as Python has it
_LOOKED_AT: Final = 20_000  # parts of a body that is nested too deep

_FREE_BYTES: Final = 1 << 16
"""The beginning of each body, which the bound of all together leaves out: the number of connections bounds it."""


class Bodies:
    """Reads bodies of at most `max_bytes`, each within `limit_s`; all that are being read have `max_total_bytes`.

    A small one is never refused for what strangers send beside it.
    """

    def __init__(self, *, max_bytes: int, limit_s: float, max_total_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._limit_s = limit_s
        self._max_total_bytes = max_total_bytes
        self._total_bytes = 0

    async def read(
        self, scope: Scope, receive: Receive, may_be_large: Callable[[], Awaitable[None]] | None = None
    ) -> bytes:
        """The whole body. `may_be_large` is awaited where it has more than 64 KiB, before the rest; it may raise.

        Raises NotJson, BodyTooLarge (also where that is only announced), BodyTooSlow, Overloaded where too much is
        being read at once, and ClientDisconnect.
        """
        headers = dict(scope["headers"])
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            raise NotJson
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit() or int(announced[:20]) > self._max_bytes:
            raise BodyTooLarge(self._max_bytes)
        chunks: list[bytes] = []
        size = counted = 0
        try:
            async with asyncio.timeout(self._limit_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    chunk: bytes = message.get("body", b"")
                    size += len(chunk)
                    if size > self._max_bytes:
                        raise BodyTooLarge(self._max_bytes)
                    more = max(0, size - _FREE_BYTES) - counted
                    is_first = more > 0 == counted
                    counted += more
                    self._total_bytes += more
                    if more and self._total_bytes > self._max_total_bytes:
                        raise Overloaded("too many large requests arrive at once")
                    if is_first and may_be_large is not None:
                        await may_be_large()
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise BodyTooSlow(self._limit_s) from None
        finally:
            self._total_bytes -= counted


def parse(body: bytes, let_pass: LetPass | None = None) -> Fields:
    """The JSON object in a body; with `let_pass` no member of it is too much. Raises InvalidRequest, by the member.

    NaN and Infinity, which are no JSON, and halves of surrogate pairs are let through to whoever takes the member: it
    knows its name.
    """
    try:
        document = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest("body", f"is not UTF-8 from byte {error.start} on") from None
    try:
        value = _loads(document)
    except json.JSONDecodeError as error:
        raise InvalidRequest("body", f"is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise InvalidRequest(_deepest(document), "is nested too deep") from None
    if not is_object(value):
        raise InvalidRequest("body", "must be a JSON object")
    return Fields(value, let_pass=let_pass)


def _loads(document: str) -> object:
    try:
        return json.loads(document)
    except json.JSONDecodeError:
        raise
    except ValueError:  # a number of thousands of digits: as infinity it is refused under its member's name
        return json.loads(document, parse_int=lambda digits: int(digits) if len(digits) < _MOST_DIGITS else 1e999)


def _deepest(document: str) -> str:
    """The member of the outermost object in which lists and objects lie too deep within each other.

    Where it is not among the first thousands of them it is not looked for: others wait meanwhile.
    """
    depth, most, name, deepest = 0, 0, "body", "body"
    for match in islice(_TOKEN.finditer(document), _LOOKED_AT):
        part = match[0]
        if part[0] == '"':
            if depth == 1:
                name = part[1:-1]  # a name, or the value of one: the next name comes before anything deeper
        elif part in "[{":
            depth += 1
            if depth > most:
                most, deepest = depth, name
                if depth >= _TOO_DEEP:
                    break
        else:
            depth -= 1
    return cut(deepest) if most > _TOO_DEEP // 2 else "body"
