"""Readers that take nothing: their calls end after a while, so that nothing is kept and computed for nobody.

gRPC takes messages for a reader who does not read until its buffers and those of the connection are full, some hundred
kilobytes; from then on a write waits. Tokens that are made meanwhile stay with their sequence and share the next
message, so nobody else notices. A call whose write has waited for too long gets SlowReader, behind what gRPC holds: who
reads on after all has a good ticket in the last message, and a resumable request waits for it as for anybody who is
lost.
"""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context
from typing import Any, Protocol

from common.errors import SlowReader

_log = logging.getLogger(__name__)


class Writable(Protocol):
    """Where messages go: the context of a call."""

    async def write(self, message: bytes, /) -> None:
        """Return when the message is on its way."""
        ...


class SlowReaders:
    """Ends the calls whose write has waited for `timeout_s`, or at most a quarter longer. 0: none.

    One timer for all calls, which runs while a write waits; a write costs an entry in a dictionary.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._waiting: dict[asyncio.Task[Any], float] = {}  # since when, on the loop's clock; longest first
        self._timer: asyncio.TimerHandle | None = None

    async def write(self, context: Writable, message: bytes) -> None:
        """Write to the call that this task handles. Cancelled with a SlowReader when its reader takes too long."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        if task is None or not self._timeout_s:
            await context.write(message)
            return
        self._waiting[task] = loop.time()
        if self._timer is None:
            # in a context of its own: what it logs is about no one request
            self._timer = loop.call_later(self._timeout_s / 4, self._sweep, context=Context())
        try:
            await context.write(message)
        finally:
            self._waiting.pop(task, None)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        latest = loop.time() - self._timeout_s
        late: list[asyncio.Task[Any]] = []
        for task, since in self._waiting.items():
            if since > latest:
                break
            late.append(task)
        for task in late:
            del self._waiting[task]  # told once
            task.cancel(SlowReader(f"no message was taken for {self._timeout_s:g} s; the last ticket is good"))
        if late:
            _log.warning("%d calls ended: their readers took nothing for %g s", len(late), self._timeout_s)
        self._timer = loop.call_later(self._timeout_s / 4, self._sweep) if self._waiting else None
