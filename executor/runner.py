"""The seam between the link and the compute: what services/executor_service.py calls, from one dedicated thread.

One thread only: libgomp counts the OpenMP pools of all threads, and a second thread that ever ran a parallel operation
makes a small step nearly twice as slow. So load, session and step are all called from the compute thread, and an
implementation imports torch in `load` at the earliest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from common.step import ExecutorFacts, StepPlan, StepResult

Report = Callable[[str, int, int], None]
"""report(stage, done, total): how far loading is. `total` is 0 while it is unknown."""


class Runner(Protocol):
    """A model that runs plans. Not thread-safe: every call comes from the compute thread."""

    def load(self, report: Report) -> ExecutorFacts:
        """Make ready to run steps. Raises ModelFolderError when the model cannot be served."""
        ...

    def begin_session(self) -> None:
        """Forget every resident sequence; what the KV slab holds is void."""
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. Raises PlanError when the plan does not fit what is resident: the session is over then."""
        ...
