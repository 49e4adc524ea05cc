"""A gateway in a process of its own, and what a raw HTTP client sees of it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from openai import OpenAI

from tests.e2e.cluster import ROOT, Process

EVENTS = {"content-type": "application/json", "accept": "text/event-stream"}

ASK = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
"""How a request begins that a test writes byte by byte."""


class Gateway:
    """`pagewire gateway`, ready."""

    def __init__(self, scheduler: str, log: Path, *flags: str, root: Path = ROOT) -> None:
        patience = ("--http-begin-patience-s=30", "--http-patience-s=120")  # a busy machine starts a scheduler slowly
        words = ["gateway", "--address", scheduler, "--http=127.0.0.1:0", *patience, *flags]
        self.process = Process(words, log, root=root)
        self.http: str = json.loads(self.process.wait_ready())["http"]
        self._replies: list[Reply] = []  # a socket that nobody closes is a warning

    def client(self, **settings: Any) -> OpenAI:
        """OpenAI's own client, which asks once."""
        return OpenAI(**{"base_url": f"http://{self.http}/v1", "api_key": "any", "max_retries": 0, **settings})

    def post(self, path: str, body: object, headers: Mapping[str, str] | None = None) -> Reply:
        """Ask for events with ids, unless `headers` say otherwise, and hear the head; bytes are sent as they are."""
        connection = http.client.HTTPConnection(self.http, timeout=120)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {**EVENTS, **(headers or {})})
        return self._reply(connection)

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Reply:
        """Ask for what is there."""
        connection = http.client.HTTPConnection(self.http, timeout=120)
        connection.request("GET", path, headers=headers or {})
        return self._reply(connection)

    def close(self) -> None:
        """Kill it if it still runs."""
        for reply in self._replies:
            reply.close()
        self.process.close()

    def _reply(self, connection: http.client.HTTPConnection) -> Reply:
        self._replies.append(Reply(connection, connection.getresponse()))
        return self._replies[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Event(NamedTuple):
    """One event of a stream; `data` is parsed, but for what ends a stream."""

    id: str
    name: str
    data: Any


class Reply:
    """An answer that is being heard."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response
        self.status = response.status
        self.headers = response.headers

    def json(self) -> Any:
        """All of it."""
        with self:
            return json.loads(self._response.read())

    def text(self) -> str:
        """All of it."""
        with self:
            return self._response.read().decode()

    def error(self) -> Any:
        """OpenAI's object for what went wrong."""
        return self.json()["error"]

    def events(self) -> Iterator[Event]:
        """The events, as they come."""
        id, name = "", ""
        for line in self._response:
            field, _, value = line.decode().rstrip("\n").partition(": ")
            if field == "id":
                id = value
            elif field == "event":
                name = value
            elif field == "data":
                yield Event(id, name, value if value == "[DONE]" else json.loads(value))
                id, name = "", ""

    def close(self) -> None:
        """Leave, whatever is still to come."""
        self._response.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
