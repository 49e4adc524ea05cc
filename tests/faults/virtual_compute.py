"""The compute thread of a simulated executor: the same sessions and ticks, in virtual time and on the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from common import failpoints
from common.step import ExecutorFacts, StepPlan, StepResult
from executor.runner import Report, Runner, execute
from tests.faults.virtual_time import Process


class Host(Protocol):
    """The simulated executor that this computes for."""

    def step_s(self, plan: StepPlan) -> float:
        """Seconds that a step takes."""
        ...

    def session_begins(self, number: int) -> None:
        """Called in the order of the sessions."""
        ...

    def before_step(self, number: int) -> None:
        """A step of the session is about to be computed."""
        ...

    def too_many_plans(self, number: int, num_plans: int) -> None:
        """More plans wait here than there was credit for."""
        ...

    def step_failed(self, number: int, error: Exception) -> None:
        """The runner raised: the two sides have drifted apart."""
        ...


class VirtualCompute:
    """Stands for services.compute.ComputeThread."""

    def __init__(
        self,
        make_runner: Callable[[], Runner],
        *,
        report: Report,
        on_loaded: Callable[[ExecutorFacts | BaseException], None],
        on_result: Callable[[int, StepResult], None],
        on_failure: Callable[[int, BaseException], None],
        tick_s: float = 0.25,
        **_: Any,
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Process)
        self._loop = loop
        self._host: Host = loop.host
        self._make_runner, self._report = make_runner, report
        self._on_loaded, self._on_result, self._on_failure = on_loaded, on_result, on_failure
        self._tick_s = tick_s
        self._inbox: deque[tuple[int, StepPlan | None]] = deque()
        self._over = -1  # sessions up to this one have ended
        self._turns = 0
        self._since_s = 0.0  # since when it waits
        self._runner: Runner | None = None
        self._stopped = False
        self._credit = 0
        self._started_s = 0.0  # of the step that is computed
        self._finished_s = 0.0
        self.computing = False
        self.next_step = 0
        self.session = -1

    @property
    def step_s(self) -> float:
        """How long it has been in its step."""
        return self._loop.time() - self._started_s if self.computing else 0.0

    @property
    def tick(self) -> int:
        """What the thread would have counted: a turn each quarter of a second while it waits."""
        idle = 0 if self.computing else int((self._loop.time() - self._since_s) / self._tick_s)
        return self._turns + idle

    def start(self) -> None:
        self._loop.call_soon(self._load)

    def begin_session(self, session: int) -> None:
        self._inbox.append((session, None))
        self._loop.call_soon(self._next)

    def execute(self, session: int, plan: StepPlan) -> None:
        self._inbox.append((session, plan))
        num_plans = self.computing + sum(plan is not None and number == session for number, plan in self._inbox)
        if num_plans > self._credit:
            self._host.too_many_plans(session, num_plans)
        self._loop.call_soon(self._next)

    def end_session(self, session: int) -> None:
        self._over = session

    def stop(self, timeout_s: float = 10.0) -> bool:
        self._stopped = True
        return True

    def _load(self) -> None:
        self._runner = self._make_runner()
        self._since_s = self._loop.time()
        facts = self._runner.load(self._report)
        self._credit = facts.credit
        self._on_loaded(facts)

    def _next(self) -> None:
        assert self._runner is not None
        while self._inbox and not self.computing and not self._stopped:
            number, plan = self._inbox.popleft()
            self._turn()
            if plan is None:
                self.session, self.next_step = number, 0
                self._finished_s = self._loop.time()
                self._runner.begin_session()
                self._host.session_begins(number)
            elif number == self.session and number > self._over:
                self.computing = True
                self._started_s = self._loop.time()
                self._loop.call_later(self._host.step_s(plan), self._compute, number, plan)

    def _compute(self, number: int, plan: StepPlan) -> None:
        assert self._runner is not None
        if self._stopped:
            return
        self.computing = False
        self._turn()
        try:
            self._host.before_step(number)
            failpoints.hit("before_forward")
            result = execute(self._runner, plan)
        except Exception as error:  # noqa: BLE001 - as the thread does: one link ends by it
            self.session = -1
            self._host.step_failed(number, error)
            self._on_failure(number, error)
        else:
            idle_s, self._finished_s = self._started_s - self._finished_s, self._loop.time()
            compute_ns = round(1e9 * (self._finished_s - self._started_s))
            self.next_step = plan.step + 1
            failpoints.hit("after_sample_before_send")
            self._on_result(number, replace(result, compute_ns=compute_ns, idle_ns=round(1e9 * idle_s)))
        self._next()

    def _turn(self) -> None:
        idle = int((self._loop.time() - self._since_s) / self._tick_s)
        self._turns += idle + 1
        self._since_s = self._loop.time()
