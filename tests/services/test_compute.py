"""The compute thread: what it launches and hands out when, and its own account of its time."""

from __future__ import annotations

import logging
import queue
import threading
from typing import Any

import pytest

from common.step import ExecutorFacts, StepPlan, StepResult
from executor.fake_runner import FakeRunner
from executor.resident import PlanError
from executor.runner import DeviceLost, Done, Report, Runner
from services import compute as compute_module
from services.compute import ComputeThread
from services.watchdog import Watchdog
from tests.services.served import HANG_S

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

    def launch(self, plan: StepPlan) -> Done:
        raise ValueError(f"cannot compute {CANARY}")

    def idle(self) -> bool:
        return False


class SlowRunner:
    """A runner whose steps take 70 ns on the test's clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._facts = FakeRunner().load(lambda stage, done, total: None)

    def load(self, report: Report) -> ExecutorFacts:
        return self._facts

    def begin_session(self) -> None:
        self._clock.now_ns += 500

    def launch(self, plan: StepPlan) -> Done:
        self._clock.now_ns += 70
        return Done(StepResult(step=plan.step))

    def idle(self) -> bool:
        return False


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
    first, second = results.get(timeout=HANG_S), results.get(timeout=HANG_S)
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
        assert failures.get(timeout=HANG_S) == 7
        compute.stop()

    assert "step 0 of session 7 failed" in caplog.text and "in launch" in caplog.text and "ValueError" in caplog.text
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
    assert [told.get(timeout=HANG_S) for _ in range(2)] == ["session 1 failed in step 0", "session 2 has step 0"]
    compute.stop()


class Step:
    """A step on a scripted device: it ends when the test says so."""

    def __init__(self, runner: ScriptedRunner, plan: StepPlan) -> None:
        self.step = plan.step
        self.times: tuple[int, int] = (0, 0)  # compute and idle, where the device measures them
        self._runner = runner
        self._ended = threading.Event()
        self._error: Exception | None = None

    def end(self, error: Exception | None = None) -> None:
        """The device is done with it, or broke down in it."""
        self._error = error
        self._ended.set()

    def wait(self) -> None:
        assert self._ended.wait(HANG_S), f"step {self.step} never ended"
        if self._error:
            raise self._error

    def result(self) -> StepResult:
        self._runner.log.append(f"result {self.step}")
        compute_ns, idle_ns = self.times
        return StepResult(step=self.step, compute_ns=compute_ns, idle_ns=idle_ns)

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()


class ScriptedRunner:
    """A runner whose device works by itself, and only as far as the test lets it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.launched: queue.SimpleQueue[Step] = queue.SimpleQueue()
        self.refuses = -1  # the step that cannot be launched
        self._steps: list[Step] = []

    def load(self, report: Report) -> ExecutorFacts:
        return FakeRunner().load(report)

    def begin_session(self) -> None:
        assert all(step.has_ended for step in self._steps), "a step of the last session is in flight"
        self.log.append("begin")

    def launch(self, plan: StepPlan) -> Step:
        self.log.append(f"launch {plan.step}")
        if plan.step == self.refuses:
            raise PlanError("it does not fit")
        step = Step(self, plan)
        self._steps.append(step)
        self.launched.put(step)
        return step

    def idle(self) -> bool:
        return False


class Told:
    """A compute thread over a runner, and what it told, in order."""

    def __init__(self, runner: Runner, clock: Clock | None = None, tick_s: float = 0.25, **callbacks: Any) -> None:
        self.results: queue.SimpleQueue[tuple[int, StepResult]] = queue.SimpleQueue()
        self.failures: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()  # session and step
        self.compute = ComputeThread(
            lambda: runner,
            report=lambda stage, done, total: None,
            on_loaded=lambda facts: None,
            on_result=lambda session, result: self.results.put((session, result)),
            on_failure=lambda session, error: self.failures.put((session, self.compute.next_step)),
            clock_ns=clock or Clock(),
            tick_s=tick_s,
            **callbacks,
        )

    def queue(self, session: int, num_plans: int) -> None:
        """A session and its first plans."""
        self.compute.begin_session(session)
        for step in range(num_plans):
            self.compute.execute(session, StepPlan(step=step, refs=[], num_scheduled=[]))

    def next_result(self) -> tuple[int, int]:
        """Session and step."""
        session, result = self.results.get(timeout=HANG_S)
        return session, result.step


def test_a_step_is_launched_while_the_one_before_it_is_computed() -> None:
    runner = ScriptedRunner()
    told = Told(runner)
    told.queue(1, num_plans=2)
    told.compute.start()
    first, second = (runner.launched.get(timeout=HANG_S) for _ in range(2))

    assert told.results.empty()
    first.end()
    assert told.next_result() == (1, 0)
    second.end()
    assert told.next_result() == (1, 1)
    assert told.compute.stop(HANG_S)


def test_results_are_asked_for_in_the_order_of_the_launches() -> None:
    runner = ScriptedRunner()
    told = Told(runner)
    told.queue(1, num_plans=3)
    told.compute.start()
    for step in reversed([runner.launched.get(timeout=HANG_S) for _ in range(3)]):
        step.end()

    assert [told.next_result() for _ in range(3)] == [(1, 0), (1, 1), (1, 2)]
    assert told.compute.stop(HANG_S)
    assert runner.log == ["begin", *(f"launch {n}" for n in range(3)), *(f"result {n}" for n in range(3))]


def test_a_step_that_breaks_on_the_device_ends_its_session_and_what_was_launched_behind_it_is_dropped() -> None:
    runner = ScriptedRunner()
    told = Told(runner)
    told.queue(1, num_plans=3)
    told.queue(2, num_plans=1)
    told.compute.start()
    first, second, third = (runner.launched.get(timeout=HANG_S) for _ in range(3))

    first.end()
    second.end(RuntimeError("the device broke down"))
    assert told.next_result() == (1, 0)
    assert told.failures.get(timeout=HANG_S) == (1, 1)
    assert told.compute.computing, "the third is still there"
    third.end()
    runner.launched.get(timeout=HANG_S).end()

    assert told.next_result() == (2, 0)
    assert told.compute.stop(HANG_S)
    assert "result 2" not in runner.log


def test_a_plan_that_is_refused_ends_the_session_after_the_steps_before_it() -> None:
    runner = ScriptedRunner()
    runner.refuses = 1
    told = Told(runner)
    told.queue(1, num_plans=3)
    told.compute.start()
    first = runner.launched.get(timeout=HANG_S)

    assert told.failures.empty()
    first.end()
    assert told.next_result() == (1, 0)
    assert told.failures.get(timeout=HANG_S) == (1, 1)
    assert told.compute.stop(HANG_S)
    assert runner.log == ["begin", "launch 0", "launch 1", "result 0"]


def test_a_session_begins_when_nothing_of_the_last_one_is_in_flight() -> None:
    runner = ScriptedRunner()
    told = Told(runner)
    told.queue(1, num_plans=2)
    told.queue(2, num_plans=1)
    told.compute.start()
    for _ in range(2):
        runner.launched.get(timeout=HANG_S).end()
    runner.launched.get(timeout=HANG_S).end()

    assert [told.next_result() for _ in range(3)] == [(1, 0), (1, 1), (2, 0)]
    assert told.failures.empty()
    assert told.compute.stop(HANG_S)


def test_the_thread_ends_after_the_steps_that_are_in_flight() -> None:
    runner = ScriptedRunner()
    told = Told(runner)
    told.queue(1, num_plans=2)
    told.compute.start()
    steps = [runner.launched.get(timeout=HANG_S) for _ in range(2)]

    assert not told.compute.stop(0)
    for step in steps:
        step.end()
    assert told.compute.stop(HANG_S)
    assert [told.next_result() for _ in range(2)] == [(1, 0), (1, 1)]


def test_a_device_that_hangs_looks_like_a_thread_that_hangs() -> None:
    runner, clock, stuck = ScriptedRunner(), Clock(), threading.Event()
    told = Told(runner, clock, tick_s=0.0001)
    compute = told.compute
    told.queue(1, num_plans=2)
    compute.start()
    steps = [runner.launched.get(timeout=HANG_S) for _ in range(2)]
    Watchdog(lambda: (compute.tick, compute.next_step), patience_s=0.1, on_stuck=stuck.set).start()

    assert stuck.wait(HANG_S), "its ticks go on"
    clock.now_ns += 3_000_000_000
    assert (compute.computing, compute.next_step, compute.step_s) == (True, 0, 3.0)
    for step in steps:
        step.end()
    assert compute.stop(HANG_S)
    assert (compute.computing, compute.step_s) == (False, 0.0)


def test_a_step_behind_another_begins_when_that_one_ends() -> None:
    runner, clock = ScriptedRunner(), Clock()
    told = Told(runner, clock)
    told.queue(1, num_plans=2)
    told.compute.start()
    first, second = (runner.launched.get(timeout=HANG_S) for _ in range(2))

    clock.now_ns += 70
    first.end()
    _, one = told.results.get(timeout=HANG_S)
    clock.now_ns += 30
    assert told.compute.step_s == 30e-9
    second.end()
    _, two = told.results.get(timeout=HANG_S)

    assert [(result.compute_ns, result.idle_ns) for result in (one, two)] == [(70, 0), (30, 0)]
    assert told.compute.stop(HANG_S)


def test_a_device_that_measures_its_time_itself_is_believed() -> None:
    runner = ScriptedRunner()
    told = Told(runner)
    told.queue(1, num_plans=1)
    told.compute.start()
    step = runner.launched.get(timeout=HANG_S)
    step.times = (55, 5)
    step.end()

    _, result = told.results.get(timeout=HANG_S)
    assert (result.compute_ns, result.idle_ns) == (55, 5)
    assert told.compute.stop(HANG_S)


def test_nobody_waits_for_a_step_that_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(self: Done) -> None:
        raise AssertionError("it was waited for")

    monkeypatch.setattr(Done, "wait", wait)
    told = Told(SlowRunner(Clock()))
    told.queue(1, num_plans=2)
    told.compute.start()

    assert [told.next_result() for _ in range(2)] == [(1, 0), (1, 1)]
    assert told.compute.stop(HANG_S)


class SparedRunner(ScriptedRunner):
    """A runner with something to do in idle moments."""

    def __init__(self, num_pieces: int) -> None:
        super().__init__()
        self.asked: queue.SimpleQueue[threading.Event] = queue.SimpleQueue()  # an idle moment, and when it may end
        self._num_pieces = num_pieces

    def idle(self) -> bool:
        self.log.append("idle")
        goes_on = threading.Event()
        self.asked.put(goes_on)
        assert goes_on.wait(HANG_S)
        self._num_pieces -= 1
        return self._num_pieces > 0


def test_idle_moments_are_offered_until_there_is_nothing_to_do_in_them() -> None:
    runner = SparedRunner(num_pieces=3)
    told = Told(runner)
    told.compute.start()
    for _ in range(2):
        runner.asked.get(timeout=HANG_S).set()
    last = runner.asked.get(timeout=HANG_S)

    told.queue(1, num_plans=1)
    last.set()
    runner.launched.get(timeout=HANG_S).end()
    assert told.next_result() == (1, 0)
    runner.asked.get(timeout=HANG_S).set()  # a step may have left something
    assert told.compute.stop(HANG_S)
    assert runner.log == ["idle"] * 3 + ["begin", "launch 0", "result 0", "idle"]


def test_a_plan_waits_for_no_more_than_one_idle_moment() -> None:
    runner = SparedRunner(num_pieces=1000)
    told = Told(runner)
    told.compute.start()
    moment = runner.asked.get(timeout=HANG_S)

    told.queue(1, num_plans=2)
    moment.set()
    for _ in range(2):
        runner.launched.get(timeout=HANG_S).end()
    assert [told.next_result() for _ in range(2)] == [(1, 0), (1, 1)]
    moment = runner.asked.get(timeout=HANG_S)
    assert not told.compute.stop(0)
    moment.set()
    assert told.compute.stop(HANG_S)
    assert runner.log == ["idle", "begin", "launch 0", "launch 1", "result 0", "result 1", "idle"]


def test_idle_work_begins_when_no_plan_came_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = SparedRunner(num_pieces=2)

    class Watched(queue.Queue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            runner.log.append(f"wait {timeout}")
            return super().get(block, timeout)

    monkeypatch.setattr(queue, "SimpleQueue", Watched)
    told = Told(runner)
    monkeypatch.undo()
    told.compute.start()
    for _ in range(2):
        runner.asked.get(timeout=HANG_S).set()
    assert told.compute.stop(HANG_S)
    assert runner.log[:3] == [f"wait {compute_module._CALM_S}", "idle", "idle"]
    assert set(runner.log[3:]) <= {"wait 0.25"}


def test_idle_work_that_fails_ends_no_session_and_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    tried = threading.Event()

    class Failing(ScriptedRunner):
        def idle(self) -> bool:
            self.log.append("idle")
            tried.set()
            raise ValueError(CANARY)

    runner = Failing()
    told = Told(runner)
    told.compute.start()
    assert tried.wait(HANG_S)
    told.queue(1, num_plans=1)
    runner.launched.get(timeout=HANG_S).end()
    assert told.next_result() == (1, 0)
    told.queue(2, num_plans=1)
    runner.launched.get(timeout=HANG_S).end()
    assert told.next_result() == (2, 0)
    assert told.compute.stop(HANG_S)
    assert runner.log.count("idle") == 1
    assert "idle work failed" in caplog.text and CANARY not in caplog.text


def test_a_device_that_is_lost_ends_the_process() -> None:
    class Lost(ScriptedRunner):
        def launch(self, plan: StepPlan) -> Step:
            raise DeviceLost("cuda:0 answers nothing any more in this process")

    ended = threading.Event()
    told = Told(Lost(), on_lost=ended.set)
    told.queue(1, num_plans=1)
    told.compute.start()

    assert ended.wait(HANG_S)
    assert told.compute.stop(HANG_S)
