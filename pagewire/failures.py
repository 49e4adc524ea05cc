"""What a failed call means: an error for the user, or a reason to try again, and when."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # pyright: ignore[reportMissingTypeStubs]

from pagewire.borrowed import borrow

if TYPE_CHECKING:
    from common import errors
else:
    errors = borrow("common.errors")

NO_CONNECTION: Final = "no connection to"
"""How an Unavailable begins that no server said."""

_DOMAIN: Final = "pagewire"
_DETAILS_KEY: Final = "grpc-status-details-bin"
# How a connection that broke is told where the server had no time to say anything. CANCELLED is not our own cancelling:
# nobody asks what became of a call that he has cancelled himself.
_LOST: Final = frozenset({
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
})  # fmt: skip

# gRPC's own word for a message that its server does not even take; one of an answer begins with CLIENT.
_TOO_LARGE: Final = re.compile(r"^(?:SERVER: )?Received message larger than max \((\d+) vs\. (\d+)\)")

Trailers = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How a call ended that did not end well."""

    error: errors.PagewireError
    may_pass: bool  # the same call may succeed later, or elsewhere
    answered: bool = False  # the server itself said no: to ask again is to add to its load
    retry_after_s: float | None = None  # when the server wants to be asked again
    in_doubt: bool = False  # nobody said what became of the call: it may run there still


def closed() -> errors.PagewireError:
    """What is told to who goes on with a client that was closed."""
    return errors.PagewireError("the client was closed")


def lost(what: str) -> Failure:
    """A stream that ended without an end."""
    return Failure(error=errors.Unavailable(what), may_pass=True, in_doubt=True)


_Message = TypeVar("_Message", bound=Message)


def parse(kind: type[_Message], data: bytes) -> _Message:
    """An answer that is one message. Raises PagewireError for one that cannot be read."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise errors.PagewireError("the answer cannot be read: what answered is no Pagewire server") from None


def judge(code: grpc.StatusCode, message: str, trailers: Trailers, address: str) -> Failure:
    """What the status of a call to `address` means."""
    told, bad_request, retry = _details(trailers)
    kind = _BY_REASON.get(told.reason) if told.domain == _DOMAIN else None
    if kind is not None:
        if issubclass(kind, errors.InvalidRequest):
            violation = next(iter(bad_request.field_violations), error_details_pb2.BadRequest.FieldViolation())
            return Failure(error=kind(violation.field, violation.description), may_pass=False)
        if issubclass(kind, errors.Overloaded | errors.Unavailable):
            after_s = retry.retry_delay.ToMilliseconds() / 1000
            return Failure(error=kind(message, after_s), may_pass=True, answered=True, retry_after_s=after_s)
        # who was slow once may go on: the program paused, and asks for the next token now
        return Failure(error=kind(message), may_pass=issubclass(kind, errors.SlowReader))
    if told.domain == _DOMAIN:  # a bug there, or an error that is newer than this client
        return Failure(error=errors.PagewireError(message), may_pass=False)
    if code in _LOST:
        # gRPC tells the whole story in one line, from general to particular; the last part is what a person can use,
        # unless that is the OK which it puts behind a certificate's fault
        reason = message.rstrip("]").removesuffix(": OK").rsplit(": ", 1)[-1] or code.name
        return lost(f"{NO_CONNECTION} {address}: {reason}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and (sizes := _TOO_LARGE.search(message)):
        problem = f"has {sizes[1]} bytes, and the server takes {sizes[2]}"
        return Failure(error=errors.InvalidRequest("request", problem), may_pass=False)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        late = errors.DeadlineExceeded("the answer took longer than timeout_s")
        return Failure(error=late, may_pass=False, in_doubt=True)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        problem = f"what answers on {address} is not a Pagewire server for clients, or an older one ({message})"
        return Failure(error=errors.PagewireError(problem), may_pass=False)
    return Failure(error=errors.PagewireError(f"{code.name}: {message}"), may_pass=False)


def _details(
    trailers: Trailers,
) -> tuple[error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo]:
    """The details that came with a status; empty where there are none, or where a proxy mangled them."""
    known = (error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo())
    for key, value in trailers:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                for detail in status_pb2.Status.FromString(value).details:
                    any(detail.Unpack(message) for message in known)
            except DecodeError:
                break
    return known


def _kinds(kind: type[errors.PagewireError]) -> Iterator[type[errors.PagewireError]]:
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from _kinds(child)


# A reason is its error's name: InvalidRequest travels as INVALID_REQUEST.
_BY_REASON: Final = {re.sub(r"(?<!^)(?=[A-Z])", "_", k.__name__).upper(): k for k in _kinds(errors.PagewireError)}
