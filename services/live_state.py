"""What a scheduler does now, as those see it who look on (WatchState). One picture for all, and only while one looks.

A picture costs at most so many blocks, rows and queues, however large a pool is or how many wait, because it is taken
between two steps. It holds numbers and the names of tenants and executors, and no word of a prompt or an answer.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from itertools import islice
from typing import Final, NamedTuple

from common.errors import InvalidRequest, Overloaded
from protos import monitoring_pb2 as pb
from scheduler.block_map import block_map
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence
from scheduler.session import Session

LEAST_INTERVAL_MS: Final = 100
MOST_INTERVAL_MS: Final = 10_000
INTERVAL_MS: Final = 500
MAX_WATCHERS: Final = 16

MAX_CELLS: Final = 4096
"""Of one executor's map."""
_MAX_ALL_CELLS: Final = 4 * MAX_CELLS  # of all maps together
_MAX_EXECUTORS: Final = 64
_MAX_ROWS: Final = 256  # of one executor
_MAX_ALL_ROWS: Final = 8 * _MAX_ROWS
_MAX_QUEUES: Final = 64
_RATE_NS: Final = 1_000_000_000  # a rate is over that time, or over one interval where that is longer
_RECENT_NS: Final = 60_000_000_000  # first tokens older than that say nothing of now


class _Counted(NamedTuple):
    """Counters at one moment; what they grow by is a rate."""

    now_ns: int
    output_tokens: int
    prompt_tokens: int
    drafted_tokens: int
    accepted_tokens: int


class Camera:
    """Takes pictures of a scheduler. `ask_status` is what GetStatus answers; `clock_ns` is the engine's."""

    def __init__(
        self,
        scheduler: Scheduler,
        ask_status: Callable[[], pb.GetStatusResponse],
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._scheduler = scheduler
        self._ask_status = ask_status
        self._clock_ns = clock_ns
        self._counted: deque[_Counted] = deque()  # oldest first

    def take(self) -> pb.WatchStateResponse:
        """The scheduler as it is now."""
        now_ns = self._clock_ns()
        status = self._ask_status()
        status.scheduler.pins.tokens_by_tenant.clear()  # as many as there are tenants
        sessions = self._scheduler.sessions
        shown = sessions[:_MAX_EXECUTORS]
        max_cells = min(MAX_CELLS, _MAX_ALL_CELLS // max(1, len(shown)))
        max_rows = min(_MAX_ROWS, _MAX_ALL_ROWS // max(1, len(shown)))
        queues = list(self._scheduler.waiting.queues())
        before = self._count(now_ns)
        after = self._counted[-1]
        seconds = (now_ns - before.now_ns) / 1e9 or 1.0
        drafted = after.drafted_tokens - before.drafted_tokens
        return pb.WatchStateResponse(
            scheduler=status.scheduler,
            executors=[
                _executor(session, told, now_ns, max_cells, max_rows)
                for session, told in zip(shown, status.executors, strict=False)
            ],
            num_executors=len(sessions),
            waiting=[
                pb.WaitingState(
                    tenant=queue.tenant,
                    priority=queue.priority,
                    num_sequences=queue.num_sequences,
                    tokens=queue.num_tokens,
                    begun=queue.begun,
                    age_ns=max(0, now_ns - queue.arrived_ns),
                )
                for queue in heapq.nlargest(_MAX_QUEUES, queues, key=lambda queue: queue.num_tokens)
            ],
            num_queues=len(queues),
            output_tokens_per_s=(after.output_tokens - before.output_tokens) / seconds,
            prompt_tokens_per_s=(after.prompt_tokens - before.prompt_tokens) / seconds,
            first_tokens=self._first_tokens(now_ns),
            accepted_ratio=(after.accepted_tokens - before.accepted_tokens) / drafted if drafted else 0.0,
        )

    def forget(self) -> None:
        """Nobody looks any more: a rate over the time until somebody does again would say nothing of now."""
        self._counted.clear()

    def _count(self, now_ns: int) -> _Counted:
        """Count, and return what was counted as long ago as rates are over."""
        c = self._scheduler.counters
        self._counted.append(
            _Counted(now_ns, c.output_tokens, c.prompt_tokens, c.drafted_tokens, c.accepted_tokens),
        )
        while len(self._counted) > 2 and now_ns - self._counted[1].now_ns >= _RATE_NS:
            self._counted.popleft()
        return self._counted[0]

    def _first_tokens(self, now_ns: int) -> pb.FirstTokenTimes:
        times = sorted(took for at_ns, took in self._scheduler.first_tokens if now_ns - at_ns <= _RECENT_NS)
        if not times:
            return pb.FirstTokenTimes()
        return pb.FirstTokenTimes(
            count=len(times), p50_ns=times[(len(times) - 1) // 2], p95_ns=times[int(0.95 * (len(times) - 1))]
        )


class Watchers:
    """Those who look on, `most` at a time. All see the same pictures, and none is taken while nobody looks."""

    def __init__(
        self,
        camera: Camera,
        *,
        most: int = MAX_WATCHERS,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._camera = camera
        self._most = most
        self._clock_s = clock_s
        self._intervals_s: dict[object, float] = {}  # of each who looks on
        self._taken: tuple[float, int] | None = None  # (shortest interval, which one of these) of the last picture
        self._picture = pb.WatchStateResponse()

    def __len__(self) -> int:
        return len(self._intervals_s)

    async def watch(self, interval_ms: int) -> AsyncGenerator[pb.WatchStateResponse, None]:
        """A picture now, and one in each interval, until it is closed. Raises InvalidRequest and Overloaded."""
        interval_s = checked_ms(interval_ms) / 1e3
        if len(self) >= self._most:
            raise Overloaded(f"{self._most} watch already, which is all that may")
        me = object()
        self._intervals_s[me] = interval_s
        try:
            while True:
                yield self.look()
                await asyncio.sleep(self.due_in_s(interval_s))
        finally:
            del self._intervals_s[me]
            if not self:
                self._taken = None
                self._camera.forget()

    def look(self) -> pb.WatchStateResponse:
        """The picture of the current interval: taken for the first who asks, and shown to all others."""
        shortest_s = min(self._intervals_s.values(), default=LEAST_INTERVAL_MS / 1e3)
        taken = (shortest_s, round(self._clock_s() / shortest_s))
        if taken != self._taken:
            self._picture = self._camera.take()
            self._taken = taken
        return self._picture

    def due_in_s(self, interval_s: float) -> float:
        """Time until the next one. All who have the same interval look at the same moments.

        Rounded, because a timer may be early: the moment that it was for is over then, too.
        """
        now_s = self._clock_s()
        return (round(now_s / interval_s) + 1) * interval_s - now_s


def checked_ms(interval_ms: int) -> int:
    """The interval that a caller asks for. Raises InvalidRequest."""
    if not interval_ms:
        return INTERVAL_MS
    if not LEAST_INTERVAL_MS <= interval_ms <= MOST_INTERVAL_MS:
        problem = f"must be in [{LEAST_INTERVAL_MS}, {MOST_INTERVAL_MS}], or 0 for {INTERVAL_MS}, got {interval_ms}"
        raise InvalidRequest("interval_ms", problem)
    return interval_ms


def _executor(
    session: Session, status: pb.ExecutorStatus, now_ns: int, max_cells: int, max_rows: int
) -> pb.ExecutorState:
    cells, blocks_per_cell = block_map(session.pool, session.cache, max_cells)
    return pb.ExecutorState(
        status=status,
        block_size=session.block_size,
        cells=cells,
        blocks_per_cell=blocks_per_cell,
        num_cached_blocks=len(session.cache),
        credit=session.facts.credit,
        rows=[_row(sequence, now_ns) for sequence in islice(session.running, max_rows)],
    )


def _row(sequence: Sequence, now_ns: int) -> pb.RowState:
    return pb.RowState(
        request=sequence.request.id,
        choice=sequence.choice,
        tenant=sequence.tenant,
        prompt_tokens=sequence.num_prompt,
        cached_prompt_tokens=sequence.num_cached_prompt,
        output_tokens=sequence.num_output,
        computed_tokens=sequence.num_computed,
        max_tokens=sequence.stop.max_tokens,
        num_blocks=len(sequence.block_table),
        preemptions=sequence.preemptions,
        age_ns=max(0, now_ns - sequence.arrived_ns),
    )
