"""/metrics for Prometheus: what this gateway did, and what the scheduler beside it tells its operator.

The text is services/prometheus.py's. No label can hold a caller's words.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

from common.errors import PagewireError
from protos import monitoring_pb2 as pb
from services.histogram import FIRST_TOKEN_S, REQUEST_S, Histogram
from services.prometheus import histogram, metric, of_status

PATHS: Final = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"})
"""Those that are told apart; all others, which a caller may think of, are one."""

_FRESH_S: Final = 1.0  # what the scheduler said is told again for that long, however many ask

AskStatus = Callable[[], Awaitable[pb.GetStatusResponse]]


class Metrics:
    """Counts. `ask_status` asks the scheduler; without it only this process is told of."""

    def __init__(self, ask_status: AskStatus | None = None, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._ask_status = ask_status
        self._clock_s = clock_s
        self._requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self._first_token = Histogram(FIRST_TOKEN_S)
        self._whole = Histogram(REQUEST_S)
        self._asked: asyncio.Task[pb.GetStatusResponse | None] | None = None
        self._asked_s = 0.0
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

    async def text(self) -> str:
        """All of it, in Prometheus' text format."""
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
        if self._ask_status is not None:
            lines += of_status(await self._status(self._ask_status))
        return "\n".join(lines) + "\n"

    async def _status(self, ask: AskStatus) -> pb.GetStatusResponse | None:
        """What the scheduler says of itself, None where it does not: asked once at a time, and once a second."""

        async def told() -> pb.GetStatusResponse | None:
            try:
                return await ask()
            except PagewireError:
                return None

        now_s = self._clock_s()
        if self._asked is None or (self._asked.done() and now_s >= self._asked_s + _FRESH_S):
            self._asked, self._asked_s = asyncio.create_task(told()), now_s
        return await asyncio.shield(self._asked)  # who leaves takes it from nobody else


def _histogram(name: str, text: str, measured: Histogram) -> Iterator[str]:
    told = pb.Histogram(bounds_s=measured.bounds, counts=measured.counts, sum_s=measured.sum_s)
    return histogram(name, text, told)
