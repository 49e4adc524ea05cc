"""The seam between the link and the compute: what services/executor_service.py calls, from one dedicated thread.

One thread only: libgomp counts the OpenMP pools of all threads, and a second thread that ever ran a parallel operation
makes a small step nearly twice as slow. So load, session and step are all called from the compute thread, and an
implementation imports torch in `load` at the earliest.

A step is launched, and its result is asked for later: a device works through what was launched in order, and the next
step is launched while it does. Who computes on the host itself is done when `launch` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from common.step import ExecutorFacts, StepPlan, StepResult

Report = Callable[[str, int, int], None]
"""report(stage, done, total): how far loading is. `total` is 0 while it is unknown."""


class DeviceLost(Exception):
    """The device answers nothing any more, whoever asks in this process: it must end, and be started anew."""


class Launched(Protocol):
    """A step on its way through the device. Those of one runner end in the order in which they were launched."""

    def wait(self) -> None:
        """Return when the device is done with the step. Blocks; any one thread may call it, beside the compute thread.

        Raises what went wrong on the device; DeviceLost when nothing can go right on it any more.
        """
        ...

    def result(self) -> StepResult:
        """What came out. On the compute thread, once, after `wait`, and in the order of the launches.

        Its `compute_ns` and `idle_ns` are the device's own, or `compute_ns` is 0: then who asks measures both.
        """
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A step that was computed when it was launched: nobody need wait for it."""

    outcome: StepResult

    def wait(self) -> None:
        """Return at once."""

    def result(self) -> StepResult:
        """What came out."""
        return self.outcome


class Runner(Protocol):
    """A model that runs plans. Not thread-safe: every call comes from the compute thread."""

    def load(self, report: Report) -> ExecutorFacts:
        """Make ready to run steps. Raises ModelFolderError when the model cannot be served."""
        ...

    def begin_session(self) -> None:
        """Forget every resident sequence; what the KV slab holds is void. Nothing is in flight."""
        ...

    def launch(self, plan: StepPlan) -> Launched:
        """Start one step, behind those that were launched before.

        Raises PlanError when the plan does not fit what is resident: the session is over then.
        """
        ...

    def idle(self) -> bool:
        """Do one small piece of work that can wait for idle moments; whether there is more. Nothing is in flight.

        A plan that comes meanwhile waits for it.
        """
        ...


def execute(runner: Runner, plan: StepPlan) -> StepResult:
    """One step by itself, from its launch to its result."""
    launched = runner.launch(plan)
    launched.wait()
    return launched.result()
