"""The thread that owns the device: it loads the model, then runs plans one after another.

Everything the runner does happens here and nowhere else (libgomp slows a forward by three quarters once two threads
have run parallel regions). The event loop only passes plans in and takes results out.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from common import failpoints
from common.log import without_texts
from common.step import ExecutorFacts, StepPlan, StepResult
from executor.runner import Report, Runner

log = logging.getLogger(__name__)


class ComputeThread:
    """Runs a Runner. The callbacks are called from the thread: hand them on with call_soon_threadsafe.

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
        tick_s: float = 0.25,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.tick = 0  # counted up by the thread; a heartbeat that carries it cannot lie
        self.computing = False
        self.next_step = 0
        self.session = -1  # whose plans are run; others are leftovers of a link that is gone
        self._over = -1  # sessions up to this one have ended
        self._started_ns = 0  # of the step that is computed
        self._make_runner = make_runner
        self._report = report
        self._on_loaded = on_loaded
        self._on_result = on_result
        self._on_failure = on_failure
        self._tick_s = tick_s
        self._clock_ns = clock_ns
        self._inbox: queue.SimpleQueue[tuple[int, StepPlan | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    def start(self) -> None:
        """Load the model and be ready for plans."""
        self._thread.start()

    def begin_session(self, session: int) -> None:
        """Forget everything; plans of this session follow."""
        self._inbox.put((session, None))

    def execute(self, session: int, plan: StepPlan) -> None:
        """Queue one plan."""
        self._inbox.put((session, plan))

    def end_session(self, session: int) -> None:
        """Run no more plans of it. The step that is computed now still ends."""
        self._over = session

    @property
    def step_s(self) -> float:
        """How long the thread has been in its step; 0 while it is in none."""
        started_ns = self._started_ns
        return (self._clock_ns() - started_ns) / 1e9 if self.computing else 0.0

    def stop(self, timeout_s: float = 10.0) -> bool:
        """End after the step that runs. Returns whether it has ended within the time."""
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
        finished_ns = self._clock_ns()
        while True:
            self.tick += 1
            try:
                item = self._inbox.get(timeout=self._tick_s)
            except queue.Empty:
                continue
            if item is None:
                return
            owner, plan = item
            if plan is not None and (owner != self.session or owner <= self._over):
                continue
            self._started_ns = started_ns = self._clock_ns()
            self.computing = True
            try:
                if plan is None:
                    self.next_step = 0  # before the session: whoever reads both never sees the last one's step
                    self.session = owner
                    runner.begin_session()
                    finished_ns = self._clock_ns()
                    continue
                failpoints.hit("before_forward")
                result = runner.execute(plan)
                idle_ns, finished_ns = started_ns - finished_ns, self._clock_ns()
                self.computing = False
                failpoints.hit("after_sample_before_send")
                self._on_result(owner, replace(result, compute_ns=finished_ns - started_ns, idle_ns=idle_ns))
                self.next_step = plan.step + 1
            except Exception as error:  # noqa: BLE001 - one link ends by it, and the next begins from nothing
                # whatever it is: a thread that ended would leave a process that dials, joins and computes nothing
                log.error("step %d of session %d failed\n%s", self.next_step, owner, "".join(without_texts(error)))
                self.session = -1
                self._on_failure(owner, error)
            finally:
                self.computing = False
