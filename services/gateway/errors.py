"""Errors as OpenAI's clients know them: a status, and a body that says what, which kind, which parameter, which code.

The status decides what a client does next: those of 429 and 5xx are tried again, by OpenAI's own client twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from starlette.exceptions import HTTPException
from starlette.responses import Response

from common.errors import (
    AlreadyRunning,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PagewireError,
    RequestFailed,
    SlowReader,
    Superseded,
    TicketRefused,
    TicketStale,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)
from pagewire.failures import NO_CONNECTION

LAST_EVENT_ID: Final = "Last-Event-ID"

_INVALID: Final = "invalid_request_error"
_SERVER: Final = "server_error"


class BodyTooLarge(PagewireError):
    """A body of more bytes than are read."""

    def __init__(self, most: int) -> None:
        super().__init__(f"the body of a request has at most {most} bytes")


class NotJson(PagewireError):
    """A body that does not say that it is JSON. A page of any site can have a browser send others, but no such one."""

    def __init__(self) -> None:
        super().__init__("send the body as JSON: Content-Type: application/json")


class BodyTooSlow(PagewireError):
    """A body that did not come in time."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"the body did not come within {limit_s:g} s")


class NotServed(PagewireError):
    """What is asked for is a part of OpenAI's API that this model, or this server, has not."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


class NotShown(PagewireError):
    """The live view, to somebody who may not look."""


class WrongHost(PagewireError):
    """A request that calls the gateway by another's name: a page's, perhaps, that had it mean this machine."""

    def __init__(self) -> None:
        super().__init__(
            "the Host of this request is no name of this gateway, which is called localhost, by an address of "
            "loopback, or as --http-hosts NAME,NAME says: if callers come through a proxy, start it with what they type"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """An error as it goes out."""

    status: int
    message: str
    kind: str
    param: str | None
    code: str | None
    retry_after_s: float | None = None
    extra_headers: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def body(self) -> bytes:
        """The JSON object."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    @property
    def headers(self) -> dict[str, str]:
        """When to come back: in seconds as HTTP has it, and in milliseconds as OpenAI's clients read first."""
        if self.retry_after_s is None:
            return {}
        return {
            "retry-after": str(max(1, math.ceil(self.retry_after_s))),
            "retry-after-ms": str(max(1, round(1000 * self.retry_after_s))),
        }

    def response(self) -> Response:
        """The whole answer."""
        headers = {**self.headers, **self.extra_headers}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (408, 413, 415):  # the rest of the body is not waited for
            headers["connection"] = "close"
        return Response(self.body, self.status, headers, "application/json")


# What each error is: status, type, code. A subclass that is not here is told as its parent.
_TABLE: Final[Mapping[type[PagewireError], tuple[int, str, str | None]]] = {
    InvalidRequest: (400, _INVALID, None),
    NotServed: (400, _INVALID, "unsupported"),
    BodyTooLarge: (413, _INVALID, "request_too_large"),
    BodyTooSlow: (408, _INVALID, "request_timeout"),
    NotJson: (415, _INVALID, "unsupported_media_type"),
    NotShown: (403, _INVALID, "not_shown"),
    WrongHost: (403, _INVALID, "host_not_allowed"),
    Unauthenticated: (401, _INVALID, "invalid_api_key"),
    UnknownModel: (404, _INVALID, "model_not_found"),
    AlreadyRunning: (409, _INVALID, "already_running"),
    Superseded: (409, _INVALID, "superseded"),
    TicketRefused: (400, _INVALID, "resume_refused"),
    TicketStale: (400, _INVALID, "resume_expired"),
    Overloaded: (429, "rate_limit_error", "rate_limit_exceeded"),
    SlowReader: (408, _INVALID, "slow_reader"),
    Unavailable: (503, _SERVER, "unavailable"),
    DeadlineExceeded: (504, _SERVER, "deadline_exceeded"),
    RequestFailed: (500, _SERVER, "request_failed"),
    PagewireError: (500, _SERVER, None),
}
_PARAMS: Final[Mapping[type[PagewireError], str]] = {
    UnknownModel: "model",
    AlreadyRunning: "request_id",
    TicketRefused: LAST_EVENT_ID,
    TicketStale: LAST_EVENT_ID,
    BodyTooLarge: "body",
    BodyTooSlow: "body",
    NotJson: "Content-Type",
    WrongHost: "Host",
}

# How the scheduler says that prompt and answer do not fit, which OpenAI has a code of its own for.
_TOO_LONG: Final = ("the context", "after a prompt of")
# Libraries (litellm) find out by how OpenAI words it, and then go on with a model of a longer context.
_AS_OPENAI_SAYS: Final = "This model's maximum context length is for"


def statuses() -> tuple[int, ...]:
    """All that an error can have."""
    return tuple(sorted({status for status, _, _ in _TABLE.values()}))


def told(error: PagewireError, names: Mapping[str, str] | None = None) -> Told:
    """What a caller is told of `error`. `names`: the scheduler's fields as he calls them, where that differs."""
    kind = next(kind for kind in type(error).__mro__ if kind in _TABLE)
    status, what, code = _TABLE[kind]
    message, param = str(error), next((_PARAMS[k] for k in type(error).__mro__ if k in _PARAMS), None)
    if isinstance(error, InvalidRequest):
        param = renamed(error.field, names or {})
        message = f"{param}: {error.problem.replace('chat.tools', 'tools')}"
        if any(words in error.problem for words in _TOO_LONG):
            code = "context_length_exceeded"
            whose = "each text by itself" if error.field.startswith("inputs") else "the prompt and the answer together"
            message = f"{message}. {_AS_OPENAI_SAYS} {whose}."
    elif isinstance(error, Unavailable) and message.startswith(NO_CONNECTION):
        message = "no scheduler is there"  # its address is no caller's business
    elif isinstance(error, NotServed):
        param = error.field
    elif isinstance(error, Unauthenticated):
        message = "an API key that is known here is needed: send it as a header, Authorization: Bearer KEY"
    after_s = error.retry_after_s if isinstance(error, Overloaded | Unavailable) else None
    return Told(status=status, message=message, kind=what, param=param, code=code, retry_after_s=after_s)


def told_of_http(error: HTTPException) -> Told:
    """What a caller is told who asked for a path or a method that there is not."""
    message = {404: "there is nothing at this path", 405: "this path is not asked in this way"}.get(
        error.status_code, error.detail
    )
    return Told(
        status=error.status_code,
        message=message,
        kind=_INVALID,
        param=None,
        code=None,
        extra_headers=error.headers or {},
    )


def told_of_bug(error_id: str) -> Told:
    """What a caller is told of a bug: an id, under which the log says more."""
    message = f"internal error {error_id}; the server's log says more under this id"
    return Told(status=500, message=message, kind=_SERVER, param=None, code="internal_error")


def renamed(field: str, names: Mapping[str, str]) -> str:
    """A field of the scheduler's API as the caller knows it: `chat.messages[3].role` is `messages[3].role` to him."""
    for ours, theirs in names.items():
        if field == ours or field.startswith((f"{ours}.", f"{ours}[")):
            return theirs + field[len(ours) :]
    return field
