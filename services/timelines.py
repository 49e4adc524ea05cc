"""The timelines of the requests that run and of the last ones that ended: where `Explain` looks.

Memory is bounded: of those that run there are as many as the admission lets in, of those that ended `max_requests`, and
as many of those that were refused, which are kept apart, so that a flood of them makes nobody else forgotten. An event
takes some 250 bytes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from common.errors import UnknownRequest
from common.log import without_texts
from scheduler.timeline import Timeline
from services import trace_context

_log = logging.getLogger(__name__)

_MAX_REFUSED_ID: Final = 128
"""Characters. An id is not checked before its request is refused."""

OnEnd = Callable[[Timeline], None]


class Timelines:
    """All of them. `max_events` of each; 0 of either: none is kept.

    `on_end`: who else wants to hear of a request that has ended. They are called on the loop, and must be quick.
    What one of them raises, as a plug-in of OpenTelemetry may, is logged and disturbs nobody else.
    """

    def __init__(
        self,
        *,
        max_requests: int = 512,
        max_events: int = 64,
        on_end: tuple[OnEnd, ...] = (),
        records: bool = False,
    ) -> None:
        """`records`: spans are made of what happens here, so executors are told whose traces they are."""
        self._max_requests = max_requests
        self._max_events = max_events if max_requests else 0
        self._on_end = on_end
        self._records = records
        self._open: dict[Timeline, None] = {}
        self._ended: deque[Timeline] = deque(maxlen=max_requests)
        self._refused: deque[Timeline] = deque(maxlen=max_requests)

    def __len__(self) -> int:
        return len(self._open) + len(self._ended) + len(self._refused)

    def __iter__(self) -> Iterator[Timeline]:
        yield from self._refused
        yield from self._ended
        yield from self._open

    @property
    def num_open(self) -> int:
        """Those of requests that run or wait."""
        return len(self._open)

    def make(self, request_id: str, now_ns: int, *, tenant: str = "", operation: str = "text_completion") -> Timeline:
        """For a request that has come now. Nobody finds it before it is queued, and `opened`."""
        trace = trace_context.current()
        timeline = Timeline(
            request_id,
            now_ns,
            tenant=tenant,
            trace=trace.header if trace is not None else "",
            operation=operation,
            max_events=self._max_events,
        )
        timeline.is_recorded = self._records and trace is not None and trace.sampled
        return timeline

    def opened(self, timeline: Timeline) -> None:
        """Its request is queued."""
        self._open[timeline] = None

    def ended(self, timeline: Timeline) -> None:
        """Its request has ended. Twice is harmless."""
        if timeline in self._open:
            del self._open[timeline]
            self._ended.append(timeline)
            for tell in self._on_end:
                try:
                    tell(timeline)
                except Exception as error:  # noqa: BLE001  code that is not ours, in the middle of the engine's loop
                    _log.error("an ended request was not told of\n%s", "".join(without_texts(error)))

    def refused(self, request_id: str, limit: str, now_ns: int, *, tenant: str = "") -> None:
        """A request met this limit, and was not queued."""
        if 0 < len(request_id) <= _MAX_REFUSED_ID and self._max_requests:
            timeline = Timeline(request_id, now_ns, tenant=tenant, max_events=self._max_events)
            timeline.refuse(limit, now_ns)
            self._refused.append(timeline)

    def find(self, request_id: str, tenant: str | None = None) -> Timeline:
        """The last of that id, of any tenant or of this one. Raises UnknownRequest."""
        found: Timeline | None = None
        for timeline in self:
            is_it = timeline.request_id == request_id and tenant in (None, timeline.tenant)
            if is_it and (found is None or timeline.received_ns >= found.received_ns):
                found = timeline
        if found is None:
            raise UnknownRequest(
                f"no request of this id runs, or is remembered: the scheduler keeps the last {self._max_requests} that "
                f"ended, of its own life (--max-timelines)"
            )
        return found
