"""The compute thread's own account of its time."""

from __future__ import annotations

import logging
import queue

import pytest

from common.step import ExecutorFacts, StepPlan, StepResult
from executor.fake_runner import FakeRunner
from executor.runner import Report
from services.compute import ComputeThread

CANARY = "the caller's secret prompt"


class Clock:
    """Nanoseconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now_ns = 1000

    def __call__(self) -> int:
        return self.now_ns


class BrokenRunner:
    """A runner whose steps fail, and say of what."""

    def load(self, report: Report) -> ExecutorFacts:
        return FakeRunner().load(report)

    def begin_session(self) -> None:
        pass

    def execute(self, plan: StepPlan) -> StepResult:
        raise ValueError(f"cannot compute {CANARY}")


class SlowRunner:
    """A runner whose steps take 70 ns on the test's clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._facts = FakeRunner().load(lambda stage, done, total: None)

    def load(self, report: Report) -> ExecutorFacts:
        return self._facts

    def begin_session(self) -> None:
        self._clock.now_ns += 500

    def execute(self, plan: StepPlan) -> StepResult:
        self._clock.now_ns += 70
        return StepResult(step=plan.step)


def test_the_time_of_a_step_and_the_wait_before_it_are_measured() -> None:
    clock = Clock()
    results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()

    def on_result(session: int, result: StepResult) -> None:
        clock.now_ns += 4  # handing the result over is part of the wait
        results.put(result)

    compute = ComputeThread(
        lambda: SlowRunner(clock),
        report=lambda stage, done, total: None,
        on_loaded=lambda facts: None,
        on_result=on_result,
        on_failure=lambda session, error: None,
        clock_ns=clock,
    )
    compute.begin_session(1)
    for step in range(2):
        compute.execute(1, StepPlan(step=step, refs=[], num_scheduled=[]))
    compute.start()
    first, second = results.get(timeout=20), results.get(timeout=20)
    compute.stop()

    assert (first.idle_ns, first.compute_ns) == (0, 70), "the session began just before"
    assert (second.idle_ns, second.compute_ns) == (4, 70)


def test_a_step_that_fails_is_logged_with_its_place_and_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    failures: queue.SimpleQueue[int] = queue.SimpleQueue()
    compute = ComputeThread(
        BrokenRunner,
        report=lambda stage, done, total: None,
        on_loaded=lambda facts: None,
        on_result=lambda session, result: None,
        on_failure=lambda session, error: failures.put(session),
    )
    with caplog.at_level(logging.DEBUG):
        compute.begin_session(7)
        compute.execute(7, StepPlan(step=0, refs=[], num_scheduled=[]))
        compute.start()
        assert failures.get(timeout=20) == 7
        compute.stop()

    assert "step 0 of session 7 failed" in caplog.text and "in execute" in caplog.text and "ValueError" in caplog.text
    assert CANARY not in caplog.text


def test_a_result_that_cannot_be_handed_on_fails_its_step_and_the_thread_goes_on() -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    refusals = [True]

    def on_result(session: int, result: StepResult) -> None:
        if refusals and refusals.pop():
            raise ValueError("it never arrives")
        told.put(f"session {session} has step {result.step}")

    compute = ComputeThread(
        lambda: SlowRunner(Clock()),
        report=lambda stage, done, total: None,
        on_loaded=lambda facts: None,
        on_result=on_result,
        on_failure=lambda session, error: told.put(f"session {session} failed in step {compute.next_step}"),
    )
    for session in (1, 2):
        compute.begin_session(session)
        compute.execute(session, StepPlan(step=0, refs=[], num_scheduled=[]))
    compute.start()
    assert [told.get(timeout=20) for _ in range(2)] == ["session 1 failed in step 0", "session 2 has step 0"]
    compute.stop()
