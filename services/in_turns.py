"""What is to be said of a request that has ended, said a few requests at a time: many may end in one step.

A span takes up to a millisecond, so 256 of them in a row would keep the next step, and everybody's tokens, waiting.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Final

from common.log import without_texts
from scheduler.timeline import Timeline

_log = logging.getLogger(__name__)

_AT_ONCE: Final = 2
_MAX_WAITING: Final = 8192
"""With one more, the oldest is told at once: more end than can be told, and memory is bounded."""


class InTurns:
    """Hears of ended requests, as a Timelines tells them, and tells each of `tell` in later turns of the loop."""

    def __init__(self, *tell: Callable[[Timeline], None]) -> None:
        self._tell = tell
        self._waiting = deque[Timeline]()
        self._turn: asyncio.Handle | None = None

    def __len__(self) -> int:
        """Those that are still to be told."""
        return len(self._waiting)

    def __call__(self, timeline: Timeline) -> None:
        """A request has ended. Costs an entry in a queue."""
        self._waiting.append(timeline)
        if len(self._waiting) > _MAX_WAITING:
            self._tell_one()
        if self._turn is None:
            self._next_turn()

    def finish(self) -> None:
        """Tell all that wait, now."""
        while self._waiting:
            self._tell_one()

    def _next_turn(self) -> None:
        # in a context of its own: the one at hand is of whichever request ended first
        self._turn = asyncio.get_running_loop().call_soon(self._take, context=Context())

    def _take(self) -> None:
        self._turn = None
        for _ in range(min(_AT_ONCE, len(self._waiting))):
            self._tell_one()
        if self._waiting:
            self._next_turn()

    def _tell_one(self) -> None:
        timeline = self._waiting.popleft()
        for tell in self._tell:
            try:
                tell(timeline)
            except Exception as error:  # noqa: BLE001  nobody's request may fail of what is said of another
                _log.error("the end of a request could not be told\n%s", "".join(without_texts(error)))
