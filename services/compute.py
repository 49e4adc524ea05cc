"""The thread that owns the device: it loads the model, then launches plans as they come and hands out their results.

Everything the runner does happens here and nowhere else (libgomp slows a forward by three quarters once two threads
have run parallel regions). The event loop only passes plans in and takes results out. Where a device works by itself,
a second thread waits for it, and does nothing but wait, so that this one is free to launch the next step meanwhile.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, NoReturn

from common import failpoints
from common.log import without_texts
from common.step import ExecutorFacts, StepPlan, StepResult
from executor.runner import DeviceLost, Done, Launched, Report, Runner
from services import watchdog

log = logging.getLogger(__name__)

_CALM_S: Final = 0.05
"""Idle work begins when no plan came for so long: one that is a moment late must not wait for it to end."""

_Order = tuple[int, StepPlan | None]
"""A session and one of its plans; without a plan, the session begins."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Flight:
    """A step from its launch until its result is handed out."""

    session: int
    step: int
    launched_ns: int  # when its launch began
    launched: Launched | None = None
    error: Exception | None = None  # of its launch, or of the device
    ended_ns: int = 0


class ComputeThread:
    """Runs a Runner. The callbacks are called from the thread: hand them on with call_soon_threadsafe.

    `on_lost`, when the device is; without it the process ends, so that whoever supervises it starts it anew.

    A session's number must never be used twice: what is left of the one before is told apart by it.
    """

    def __init__(
        self,
        make_runner: Callable[[], Runner],
        *,
        report: Report,
        on_loaded: Callable[[ExecutorFacts | BaseException], None],
        on_result: Callable[[int, StepResult], None],
        on_failure: Callable[[int, BaseException], None],
        on_lost: Callable[[], None] | None = None,
        tick_s: float = 0.25,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        # Counted up by the thread, as long as it moves and the device does; a heartbeat that carries it cannot lie.
        self.tick = 0
        self.computing = False  # also while a step is in flight
        self.next_step = 0  # the oldest that has brought no result
        self.session = -1  # whose plans are run; others are leftovers of a link that is gone
        self._over = -1  # sessions up to this one have ended
        self._refused = -1  # a plan of this session could not be launched: what follows makes no sense
        self._started_ns = 0  # of the step that is computed
        self._ended_ns = 0  # when the last step had been computed, or the session had begun
        self._make_runner = make_runner
        self._report = report
        self._on_loaded = on_loaded
        self._on_result = on_result
        self._on_failure = on_failure
        self._on_lost = on_lost or _end_process
        self._tick_s = tick_s
        self._clock_ns = clock_ns
        self._inbox: queue.SimpleQueue[_Order | _Flight | None] = queue.SimpleQueue()
        self._in_flight: deque[_Flight] = deque()
        self._idle_failed = False
        self._waiter: _Waiter | None = None  # made for the first step that must be waited for
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    def start(self) -> None:
        """Load the model and be ready for plans."""
        self._thread.start()

    def begin_session(self, session: int) -> None:
        """Forget everything, once nothing is in flight; plans of this session follow."""
        self._inbox.put((session, None))

    def execute(self, session: int, plan: StepPlan) -> None:
        """Queue one plan."""
        self._inbox.put((session, plan))

    def end_session(self, session: int) -> None:
        """Launch no more plans of it. The steps that are in flight now still end."""
        self._over = session

    @property
    def step_s(self) -> float:
        """How long the oldest step in flight has been computed; 0 while there is none."""
        started_ns = self._started_ns
        return (self._clock_ns() - started_ns) / 1e9 if self.computing else 0.0

    def stop(self, timeout_s: float = 10.0) -> bool:
        """End after the steps that are in flight. Returns whether it has ended within the time."""
        self._inbox.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            runner = self._make_runner()
            facts = runner.load(self._report)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the event loop must hear of it and end
            self._on_loaded(error)
            return
        self._on_loaded(facts)
        self._ended_ns = self._clock_ns()
        self._serve(runner)
        if self._waiter is not None:
            self._waiter.stop()

    def _serve(self, runner: Runner) -> None:
        """Do what the inbox says until it says stop. Plans are launched at once, all else when nothing is in flight."""
        orders: deque[_Order | None] = deque()
        has_spare_work = True
        while True:
            wants_idle = has_spare_work and not self._in_flight
            try:
                item = self._inbox.get(timeout=min(_CALM_S, self._tick_s) if wants_idle else self._tick_s)
            except queue.Empty:
                self.tick += not self._in_flight  # a device that stands still is no better than a thread that does
                while wants_idle and has_spare_work and self._inbox.empty():
                    has_spare_work = self._idle(runner)
                    self.tick += 1
                continue
            self.tick += 1
            has_spare_work = not self._idle_failed
            if isinstance(item, _Flight):
                self._hand_out(item)
            else:
                orders.append(item)
            while orders and (not self._in_flight or _is_plan(orders[0])):
                order = orders.popleft()
                if order is None:
                    return
                session, plan = order
                if plan is None:
                    self._begin(runner, session)
                elif session == self.session and session > self._over and session != self._refused:
                    self._launch(runner, session, plan)

    def _idle(self, runner: Runner) -> bool:
        """Let the runner use an idle moment. Returns whether it wants another one."""
        try:
            return runner.idle()
        except Exception as error:  # noqa: BLE001 - no request has to do with it; a device that is broken fails its steps
            log.error("idle work failed\n%s", "".join(without_texts(error)))
            if isinstance(error, DeviceLost):
                self._on_lost()
            self._idle_failed = True
            return False

    def _begin(self, runner: Runner, session: int) -> None:
        self._started_ns = self._clock_ns()
        self.computing = True
        self.next_step = 0  # before the session: whoever reads both never sees the last one's step
        self.session = session
        try:
            runner.begin_session()
            self._ended_ns = self._clock_ns()
        except Exception as error:  # noqa: BLE001 - as for a step
            self._fail(session, error)
        finally:
            self.computing = False

    def _launch(self, runner: Runner, session: int, plan: StepPlan) -> None:
        flight = _Flight(session=session, step=plan.step, launched_ns=self._clock_ns())
        if not self._in_flight:
            self._started_ns = flight.launched_ns
        self.computing = True
        try:
            failpoints.hit("before_forward")
            flight.launched = runner.launch(plan)
        except Exception as error:  # noqa: BLE001 - its turn comes when the steps before it have brought their results
            flight.error = error
            self._refused = session
        has_ended = flight.error is not None or isinstance(flight.launched, Done)
        if has_ended and not self._in_flight:
            flight.ended_ns = self._clock_ns()
            self._in_flight.append(flight)
            self._hand_out(flight)
            return
        self._in_flight.append(flight)
        if self._waiter is None:
            self._waiter = _Waiter(self._inbox.put, self._clock_ns)
        self._waiter.wait_for(flight)

    def _hand_out(self, flight: _Flight) -> None:
        """The oldest step in flight has been computed. What was launched behind one that failed is dropped."""
        oldest = self._in_flight.popleft()
        assert oldest is flight, f"step {flight.step} has ended before step {oldest.step}"
        # a step that was launched behind another one begins when that one ends
        started_ns = max(flight.launched_ns, self._ended_ns)
        idle_ns = max(0, flight.launched_ns - self._ended_ns)
        self._ended_ns = flight.ended_ns
        if self._in_flight:
            self._started_ns = max(self._in_flight[0].launched_ns, flight.ended_ns)
        try:
            if flight.session != self.session:
                return
            if flight.error is not None or flight.launched is None:
                raise flight.error or AssertionError(f"step {flight.step} was never launched")
            result = flight.launched.result()
            if isinstance(flight.launched, Done) or not result.compute_ns:  # the device did not measure them
                result = replace(result, compute_ns=flight.ended_ns - started_ns, idle_ns=idle_ns)
            self.computing = bool(self._in_flight)
            failpoints.hit("after_sample_before_send")
            self._on_result(flight.session, result)
            self.next_step = flight.step + 1
        except Exception as error:  # noqa: BLE001 - one link ends by it, and the next begins from nothing
            # whatever it is: a thread that ended would leave a process that dials, joins and computes nothing
            self._fail(flight.session, error)
        finally:
            self.computing = bool(self._in_flight)

    def _fail(self, session: int, error: Exception) -> None:
        log.error("step %d of session %d failed\n%s", self.next_step, session, "".join(without_texts(error)))
        self.session = -1
        self._on_failure(session, error)
        if isinstance(error, DeviceLost):
            self._on_lost()


class _Waiter:
    """The thread that waits for launched steps, in order, and tells of each that has ended. It computes nothing."""

    def __init__(self, tell: Callable[[_Flight], None], clock_ns: Callable[[], int]) -> None:
        self._tell = tell
        self._clock_ns = clock_ns
        self._flights: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="results", daemon=True).start()

    def wait_for(self, flight: _Flight) -> None:
        """Tell when this one has ended, after all before it."""
        self._flights.put(flight)

    def stop(self) -> None:
        """End the thread. Nothing is in flight."""
        self._flights.put(None)

    def _run(self) -> None:
        while (flight := self._flights.get()) is not None:
            if flight.launched is not None:
                try:
                    flight.launched.wait()
                except Exception as error:  # noqa: BLE001 - raised again where its step is handed out
                    flight.error = error
            flight.ended_ns = self._clock_ns()
            self._tell(flight)


def _end_process() -> NoReturn:
    watchdog.end_process("the device is lost")


def _is_plan(order: _Order | None) -> bool:
    return order is not None and order[1] is not None
