"""/metrics for Prometheus: what this gateway did, and what the scheduler beside it tells its operator.

The text is services/prometheus.py's. No label can hold a caller's words.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, Generic, TypeVar

from common.errors import PagewireError
from protos import monitoring_pb2 as pb
from services.histogram import FIRST_TOKEN_S, REQUEST_S, Histogram
from services.prometheus import histogram, metric, of_status

PATHS: Final = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"})
"""Those that are told apart; all others, which a caller may think of, are one."""

_FRESH_S: Final = 1.0  # what the scheduler said is told again for that long, however many ask

AskStatus = Callable[[], Awaitable[pb.GetStatusResponse]]

_T = TypeVar("_T")


class Metrics:
    """Counts. `ask_status` asks the scheduler, `ask_reachable` whether one is there; without them it is not told."""

    def __init__(
        self,
        ask_status: AskStatus | None = None,
        ask_reachable: Callable[[], Awaitable[bool]] | None = None,
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._status = None if ask_status is None else _Fresh(ask_status, clock_s)
        self._reachable = None if ask_reachable is None else _Fresh(ask_reachable, clock_s)
        self._clock_s = clock_s
        self._requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self._first_token = Histogram(FIRST_TOKEN_S)
        self._whole = Histogram(REQUEST_S)
        self.num_open = 0
        self.num_connections: Callable[[], int] = lambda: 0

    @contextmanager
    def request(self, path: str) -> Iterator[Callable[[int], None]]:
        """Count a request while it is open; call what this gives with the status that it got. An empty path: none.

        Of a stream that failed after it had begun that is the status of its error, not the 200 that it began with.
        """
        if not path:
            yield lambda status: None
            return
        began_s = self._clock_s()
        name = path if path in PATHS else "other"

        def ended(status: int) -> None:
            self._requests[name, status] += 1
            self._whole.add(self._clock_s() - began_s)

        self.num_open += 1
        try:
            yield ended
        finally:
            self.num_open -= 1

    def first_token(self) -> Callable[[], None]:
        """A request begins: call what this gives when its first token is there."""
        began_s = self._clock_s()
        return lambda: self._first_token.add(self._clock_s() - began_s)

    async def text(self, *, own: bool = False) -> str:
        """All of it, in Prometheus' text format; with `own` nothing of what the scheduler tells its operator."""
        asks_status = None if own else self._status
        status, reachable = await asyncio.gather(
            _nothing() if asks_status is None else asks_status.answer(),
            _nothing() if self._reachable is None else self._reachable.answer(),
        )
        lines = [
            *metric(
                "pagewire_gateway_requests_total",
                "counter",
                "requests that have ended; a stream that failed midway has the status of its error",
                {f'{{path="{path}",status="{status}"}}': count for (path, status), count in self._requests.items()},
            ),
            *metric("pagewire_gateway_open_requests", "gauge", "requests that are open", {"": self.num_open}),
            *metric("pagewire_gateway_connections", "gauge", "connections that are open", {"": self.num_connections()}),
            *_histogram(
                "pagewire_gateway_time_to_first_token_seconds",
                "from a request's body to its first token",
                self._first_token,
            ),
            *_histogram("pagewire_gateway_request_duration_seconds", "from a request's head to its end", self._whole),
        ]
        if self._reachable is not None:
            text = "whether a scheduler answers this gateway, also one that can serve nobody now"
            lines += metric("pagewire_gateway_scheduler_reachable", "gauge", text, {"": int(bool(reachable))})
        if asks_status is not None:
            lines += of_status(status)
        return "\n".join(lines) + "\n"


class _Fresh(Generic[_T]):
    """What a question is answered with: asked once at a time, and once in `_FRESH_S`, however many want to know."""

    def __init__(self, ask: Callable[[], Awaitable[_T]], clock_s: Callable[[], float]) -> None:
        self._ask = ask
        self._clock_s = clock_s
        self._asked: asyncio.Task[_T | None] | None = None
        self._asked_s = 0.0

    async def answer(self) -> _T | None:
        """None where it failed."""
        now_s = self._clock_s()
        if self._asked is None or (self._asked.done() and now_s >= self._asked_s + _FRESH_S):
            self._asked, self._asked_s = asyncio.create_task(self._told()), now_s
        return await asyncio.shield(self._asked)  # who leaves takes it from nobody else

    async def _told(self) -> _T | None:
        try:
            return await self._ask()
        except PagewireError:
            return None


async def _nothing() -> None:
    pass


def _histogram(name: str, text: str, measured: Histogram) -> Iterator[str]:
    told = pb.Histogram(bounds_s=measured.bounds, counts=measured.counts, sum_s=measured.sum_s)
    return histogram(name, text, told)
