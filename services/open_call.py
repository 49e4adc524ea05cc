"""A call that is open and can be ended from outside, where its client is sure to hear of it.

gRPC has no status for a call whose task is cancelled before its handler runs, or while its headers are written: the
client would wait until its own deadline. So whoever ends a call then is patient until that is over.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable
from contextvars import ContextVar
from typing import Any

from common.errors import PagewireError
from services.caller import Caller


class OpenCall:
    """The call that `task` is, made by `caller`."""

    def __init__(self, caller: Caller, task: asyncio.Task[Any]) -> None:
        self.caller = caller
        self._task = weakref.ref(task)  # whose context holds this: a circle would outlive the call
        self._error: PagewireError | None = None
        self._may_be_cancelled = False

    def end(self, error: PagewireError) -> None:
        """Its client gets this error as soon as it can be told."""
        self._error = error
        task = self._task()
        if self._may_be_cancelled and task is not None:
            task.cancel(error)

    def begin(self) -> None:
        """The handler runs. Raises the error that the call was ended with by now."""
        self._may_be_cancelled = True
        if self._error is not None:
            raise self._error

    async def undisturbed(self, work: Awaitable[None]) -> None:
        """Await what must not be cancelled from outside. Raises the error that the call was ended with meanwhile."""
        self._may_be_cancelled = False
        await work
        self.begin()


_current: ContextVar[OpenCall | None] = ContextVar("open call", default=None)


def open_call() -> OpenCall | None:
    """This task's call; None where nobody could end it."""
    return _current.get()


def opened(call: OpenCall) -> None:
    """This task is that call, from now on."""
    _current.set(call)
