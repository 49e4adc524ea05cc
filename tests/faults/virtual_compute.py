"""The compute thread of a simulated executor: the same sessions and ticks, in virtual time and on the event loop.

A step of a `LateRunner` is launched when its plan is there and brings its result when its time is over; one of any
other runner is computed when its time is over.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from common import failpoints
from common.step import ExecutorFacts, StepPlan, StepResult
from executor.runner import Launched, Report, Runner
from tests.faults.virtual_time import Process
from tests.late_runner import LateRunner


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


@dataclass(slots=True, kw_only=True, eq=False)
class _Flight:
    """A step on its way."""

    session: int
    plan: StepPlan
    begun_s: float
    launched: Launched | None = None
    error: Exception | None = None


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
        self._in_flight: deque[_Flight] = deque()
        self._refused = -1  # the session of a plan that could not be launched
        self._free_s = 0.0  # when all that is in flight will have ended
        self._finished_s = 0.0
        self.next_step = 0
        self.session = -1

    @property
    def computing(self) -> bool:
        """A step is in flight."""
        return bool(self._in_flight)

    @property
    def step_s(self) -> float:
        """How long it has been in its step."""
        return self._loop.time() - self._started_s if self.computing else 0.0

    @property
    def _started_s(self) -> float:
        """When the oldest step in flight began: behind the one before it."""
        return max(self._in_flight[0].begun_s, self._finished_s)

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
        num_plans = len(self._in_flight)
        num_plans += sum(plan is not None and number == session for number, plan in self._inbox)
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
        launches = isinstance(self._runner, LateRunner)
        while self._inbox and not self._stopped:
            number, plan = self._inbox[0]
            if self.computing and not (launches and plan is not None):
                return
            self._inbox.popleft()
            self._turn()
            if plan is None:
                self.session, self.next_step = number, 0
                self._finished_s = self._loop.time()
                self._runner.begin_session()
                self._host.session_begins(number)
            elif number == self.session and number > self._over and number != self._refused:
                flight = _Flight(session=number, plan=plan, begun_s=self._loop.time())
                self._in_flight.append(flight)
                self._free_s = max(self._free_s, self._loop.time()) + self._host.step_s(plan)
                self._loop.call_later(self._free_s - self._loop.time(), self._end, flight)
                if launches:
                    self._launch(flight)

    def _launch(self, flight: _Flight) -> None:
        assert self._runner is not None
        try:
            self._host.before_step(flight.session)
            failpoints.hit("before_forward")
            flight.launched = self._runner.launch(flight.plan)
        except Exception as error:  # noqa: BLE001 - as the thread does: one link ends by it
            flight.error = error
            self._refused = flight.session

    def _end(self, flight: _Flight) -> None:
        if self._stopped:
            return
        self._turn()
        number = flight.session
        if flight.launched is None and flight.error is None:
            self._launch(flight)
        begun_s = self._started_s
        assert self._in_flight.popleft() is flight
        idle_s, self._finished_s = max(0.0, flight.begun_s - self._finished_s), self._loop.time()
        if number == self.session:
            try:
                if flight.launched is None:
                    assert flight.error is not None
                    raise flight.error
                result = flight.launched.result()
            except Exception as error:  # noqa: BLE001 - as above
                self.session = -1
                self._host.step_failed(number, error)
                self._on_failure(number, error)
            else:
                compute_ns = round(1e9 * (self._finished_s - begun_s))
                self.next_step = flight.plan.step + 1
                failpoints.hit("after_sample_before_send")
                self._on_result(number, replace(result, compute_ns=compute_ns, idle_ns=round(1e9 * idle_s)))
        self._next()

    def _turn(self) -> None:
        idle = int((self._loop.time() - self._since_s) / self._tick_s)
        self._turns += idle + 1
        self._since_s = self._loop.time()
