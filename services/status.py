"""Errors ↔ gRPC statuses: one table, read in both directions.

A status carries google.rpc details: ErrorInfo always (reason, domain "pagewire"), BadRequest with the field of an
InvalidRequest, RetryInfo where trying again helps. The retry delay also goes out as `grpc-retry-pushback-ms`, which
gRPC's own retry policies obey.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from common.errors import (
    AlreadyRunning,
    DeadlineExceeded,
    ExecutorRejected,
    InvalidRequest,
    ModelFolderError,
    NameTaken,
    Overloaded,
    PagewireError,
    RequestFailed,
    SlowReader,
    StaleEpoch,
    Superseded,
    TicketRefused,
    TicketStale,
    Unauthenticated,
    Unavailable,
    UnknownModel,
    UnknownRequest,
)

DOMAIN: Final = "pagewire"
DETAILS_KEY: Final = "grpc-status-details-bin"
PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"

MAX_TEXT: Final = 256
"""Characters of a caller's own words in a status. It travels three times, encoded, and 8 KiB of trailers is all."""

_TABLE: Final[dict[type[PagewireError], tuple[grpc.StatusCode, str]]] = {
    InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    Unauthenticated: (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    UnknownModel: (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL"),
    UnknownRequest: (grpc.StatusCode.NOT_FOUND, "UNKNOWN_REQUEST"),
    Overloaded: (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    Unavailable: (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"),
    RequestFailed: (grpc.StatusCode.INTERNAL, "REQUEST_FAILED"),
    DeadlineExceeded: (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    AlreadyRunning: (grpc.StatusCode.ALREADY_EXISTS, "ALREADY_RUNNING"),
    Superseded: (grpc.StatusCode.ABORTED, "SUPERSEDED"),
    SlowReader: (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER"),
    TicketRefused: (grpc.StatusCode.PERMISSION_DENIED, "TICKET_REFUSED"),
    TicketStale: (grpc.StatusCode.FAILED_PRECONDITION, "TICKET_STALE"),
    ExecutorRejected: (grpc.StatusCode.FAILED_PRECONDITION, "EXECUTOR_REJECTED"),
    NameTaken: (grpc.StatusCode.ALREADY_EXISTS, "NAME_TAKEN"),
    StaleEpoch: (grpc.StatusCode.ABORTED, "STALE_EPOCH"),
    ModelFolderError: (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_FOLDER_ERROR"),
    PagewireError: (grpc.StatusCode.INTERNAL, "ERROR"),
}
_BY_REASON: Final = {reason: kind for kind, (_, reason) in _TABLE.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcStatus:
    """How a call ends: what `context.abort` takes."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def to_rpc_status(error: PagewireError) -> RpcStatus:
    """The status that tells a client of `error`. A subclass that is not in the table goes out as its parent."""
    code, reason = next(_TABLE[kind] for kind in type(error).__mro__ if kind in _TABLE)
    message = _cut(str(error))
    # messages in bytes, one after the other, are one message with the fields of all
    details = status_pb2.Status(code=code.value[0], message=message).SerializeToString()
    details += _info(reason, error.error_id if isinstance(error, RequestFailed) else "")
    pushback: tuple[tuple[str, str | bytes], ...] = ()
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=_cut(error.problem))
        details += _detail(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, Overloaded | Unavailable):
        retry_after_ms = max(0, round(error.retry_after_s * 1000))
        details += _retry(retry_after_ms)
        pushback = ((PUSHBACK_KEY, str(retry_after_ms)),)
    return RpcStatus(code=code, message=message, trailing_metadata=((DETAILS_KEY, details), *pushback))


def internal_status(error_id: str) -> RpcStatus:
    """The status of a bug: a fixed text, and the id under which the log has the rest."""
    message = f"internal error {error_id}; the server's log says more under this id"
    details = status_pb2.Status(code=grpc.StatusCode.INTERNAL.value[0], message=message).SerializeToString()
    details += _info("INTERNAL", error_id)
    return RpcStatus(code=grpc.StatusCode.INTERNAL, message=message, trailing_metadata=((DETAILS_KEY, details),))


def from_rpc_error(error: grpc.RpcError) -> PagewireError | grpc.RpcError:
    """What a failed call means, for a client to raise; `error` itself when it is none of ours.

    A server that cannot be reached is Unavailable, a deadline that passed on the client's side is DeadlineExceeded.
    """
    code, message = error.code(), error.details() or ""
    info, bad_request, retry = _details_of(error)
    if info.domain == DOMAIN and info.reason in _BY_REASON:
        kind = _BY_REASON[info.reason]
        if issubclass(kind, InvalidRequest):
            violation = next(iter(bad_request.field_violations), error_details_pb2.BadRequest.FieldViolation())
            return kind(violation.field, violation.description)
        if issubclass(kind, RequestFailed):
            return kind(message, info.metadata["error_id"])
        if issubclass(kind, Overloaded | Unavailable):
            return kind(message, retry.retry_delay.ToMilliseconds() / 1000)
        return kind(message)
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(message)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(message)
    return error


def _details_of(
    error: grpc.RpcError,
) -> tuple[error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo]:
    """The details that came with `error`; empty where there are none, or where a proxy mangled them."""
    known = (error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo())
    # Pairs also where the stubs say otherwise: grpc and grpc.aio differ in their type here.
    trailers = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    for key, value in trailers:
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                for detail in status_pb2.Status.FromString(value).details:
                    any(detail.Unpack(message) for message in known)
            except DecodeError:
                break
    return known


@lru_cache(maxsize=256)
def _info(reason: str, error_id: str) -> bytes:
    metadata = {"error_id": error_id} if error_id else {}
    return _detail(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata))


@lru_cache(maxsize=4096)
def _retry(after_ms: int) -> bytes:
    delay = Duration()
    delay.FromMilliseconds(after_ms)
    return _detail(error_details_pb2.RetryInfo(retry_delay=delay))


def _detail(detail: Message) -> bytes:
    """A Status in bytes that has the detail and nothing else."""
    status = status_pb2.Status()
    status.details.add().Pack(detail)
    data: bytes = status.SerializeToString()
    return data


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def declared_codes() -> frozenset[grpc.StatusCode]:
    """Every status that a PagewireError can become."""
    return frozenset(code for code, _ in _TABLE.values())
