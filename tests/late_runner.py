"""A fake runner whose steps stay in flight, as on a device of its own: the host learns a step's tokens later."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from common.step import StepPlan, StepResult
from executor.fake_runner import Computed, FakeRunner, result_of
from executor.resident import Reserved
from executor.runner import Launched


class LateRunner(FakeRunner):
    """What the device does is done at the launch; what the host makes of its tokens, when the result is asked for."""

    _free_s = 0.0  # when the device has worked off what was launched

    def launch(self, plan: StepPlan) -> Launched:
        computed = self._compute(plan)
        reserved = self._resident.reserve(computed.rows, computed.unready)
        self._free_s = max(self._free_s, time.monotonic()) + self._step_time_s
        return _Late(lambda: self._settle(plan, computed, reserved), self._free_s)

    def _settle(self, plan: StepPlan, computed: Computed, reserved: Reserved) -> StepResult:
        sampled = self._resident.settle(reserved, computed.tokens, computed.failed)
        return result_of(plan, sampled, computed)


class _Late:
    """A step that ends at `ends_s`."""

    def __init__(self, settle: Callable[[], StepResult], ends_s: float) -> None:
        self._settle = settle
        self._ends_s = ends_s

    def wait(self) -> None:
        while (left_s := self._ends_s - time.monotonic()) > 0:
            threading.Event().wait(left_s)

    def result(self) -> StepResult:
        return self._settle()
