"""The spans of an executor's steps, each with links to the requests that had a row in it, at both ends of the link.

One step computes for many requests, so it is part of no one's trace, and none of them need know of it: its span has a
trace of its own and names theirs. A step that admits a traced request has a span; of the others, few a second.
On the executor it is the time of its computing, on the scheduler that from the plan to its result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import Final

from common.step import StepPlan, StepResult
from common.types import SlotRef
from services import trace_context
from services.trace_context import TraceContext
from services.tracing import Tracer

_EVERY_NS: Final = 100_000_000
_MAX_LINKS: Final = 32
_MAX_PLANNED: Final = 64


class StepSpans:
    """Of one executor. `began` with each session, since what was traced in the last one is not known in the next.

    With `link`, the executor's name, as its scheduler sees it.
    """

    def __init__(
        self,
        tracer: Tracer,
        *,
        link: str = "",
        clock_ns: Callable[[], int] = time.monotonic_ns,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._tracer = tracer
        self._link = link
        self._clock_ns = clock_ns
        self._wall_ns = wall_ns
        self._traced: dict[SlotRef, TraceContext] = {}
        self._planned: dict[int, tuple[list[TraceContext], int, int, int]] = {}  # by step: links, rows, tokens, time
        self._last_ns = -_EVERY_NS

    def began(self) -> None:
        """A session begins, with nothing."""
        self._traced.clear()
        self._planned.clear()

    def planned(self, plan: StepPlan) -> None:
        """A plan came. It is looked at only while something is traced."""
        for ref in plan.released if self._traced else ():
            self._traced.pop(ref, None)
        admits = False
        for new in plan.new:
            context = trace_context.parse(new.trace) if new.trace else None
            if context is not None:
                self._traced[new.ref] = context
                admits = True
        now_ns = self._clock_ns()
        if not self._traced or (not admits and now_ns - self._last_ns < _EVERY_NS):
            return
        links = list(islice((self._traced[ref] for ref in plan.refs if ref in self._traced), _MAX_LINKS))
        if links and len(self._planned) < _MAX_PLANNED:
            self._last_ns = now_ns
            self._planned[plan.step] = links, len(plan.refs), plan.num_tokens, self._wall_ns()

    def answered(self, result: StepResult) -> None:
        """A step has been computed just now, or its result has come."""
        planned = self._planned.pop(result.step, None)
        if planned is None:
            return
        links, rows, tokens, planned_ns = planned
        told = {"pagewire.step": result.step, "pagewire.rows": rows, "pagewire.tokens": tokens}
        span = self._tracer.begin(
            "link" if self._link else "step",
            None,
            "client" if self._link else "internal",
            {**told, **({"pagewire.executor": self._link} if self._link else {})},
            links=links,
            started_ns=planned_ns if self._link else self._wall_ns() - result.compute_ns,
        )
        span.end({"pagewire.compute_ns": result.compute_ns})
