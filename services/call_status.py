"""What the call that is being handled ended with: gRPC keeps that from the interceptors that stand before it."""

from __future__ import annotations

from contextvars import ContextVar

import grpc


class CallStatus:
    """Of one call: OK until something else is noted. Tasks that the call starts note it in the same place."""

    def __init__(self) -> None:
        self.code = grpc.StatusCode.OK


_current: ContextVar[CallStatus | None] = ContextVar("call status", default=None)


def begin() -> CallStatus:
    """This task is a call, whose end is noted in what this gives."""
    status = CallStatus()
    _current.set(status)
    return status


def note(code: grpc.StatusCode) -> None:
    """The call ends with this."""
    status = _current.get()
    if status is not None:
        status.code = code
