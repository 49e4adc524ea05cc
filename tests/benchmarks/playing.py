"""Play a workload against a client, and note when every token came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from tests.benchmarks.workloads import Request, Workload

Emit = Callable[[], None]
"""Called when a message has arrived that brings tokens."""


class Client(Protocol):
    """One way to ask a server."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def is_ready(self) -> bool:
        """Whether the server would answer now."""
        ...

    async def generate(self, request: Request, emit: Emit) -> int:
        """Stream one answer. Returns how many tokens the server says that it made."""
        ...


@dataclass(slots=True, kw_only=True)
class Answer:
    """What became of one request. Times in seconds from the start of the run."""

    request: Request
    submitted_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list[float])  # one for every message that brought tokens
    num_tokens: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """From submission to the first token."""
        return self.arrivals_s[0] - self.submitted_s

    @property
    def tpot_s(self) -> float:
        """Mean time of a token after the first."""
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0

    @property
    def gaps_s(self) -> list[float]:
        """Between each arrival and the next."""
        return [after - before for before, after in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


async def play(workload: Workload, client: Client) -> list[Answer]:
    """The answers, in the order of the requests. A request that fails is a result too."""
    began = time.perf_counter()

    async def ask(request: Request) -> Answer:
        answer = Answer(request=request)
        wait_s = began + request.at_s - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        answer.submitted_s = time.perf_counter() - began
        try:
            answer.num_tokens = await client.generate(
                request, lambda: answer.arrivals_s.append(time.perf_counter() - began)
            )
        except Exception as error:  # noqa: BLE001 - whatever it was, it is counted and told
            answer.error = f"{type(error).__name__}: {error}"[:300]
        if not answer.error and not answer.arrivals_s:
            answer.error = "no token came"
        return answer

    if workload.one_at_a_time:
        return [await ask(request) for request in workload.requests]
    return await asyncio.gather(*(ask(request) for request in workload.requests))
