"""An executor without a process or a socket."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from common.step import ExecutorFacts, StepPlan
from executor.fake_runner import FakeRunner
from executor.runner import execute
from services.engine import Engine


class InstantLink:
    """An executor on the same loop: it answers when `steps` allows, or at once, and says `compute_ns` of each step."""

    def __init__(
        self,
        engine: Engine,
        session: int,
        *,
        steps: int | None = None,
        num_blocks: int = 32,
        name: str = "fake",
        runner: FakeRunner | None = None,
        compute_ns: int = 0,
    ) -> None:
        self.runner = runner or FakeRunner(num_blocks=num_blocks, name=name)
        self.facts: ExecutorFacts = self.runner.load(lambda stage, done, total: None)
        self.closed = ""
        self._engine, self._session, self._steps = engine, session, steps
        self._compute_ns = compute_ns
        self.held: list[StepPlan] = []

    def send(self, plan: StepPlan) -> None:
        self.held.append(plan)
        asyncio.get_running_loop().call_soon(self.pump)

    def allow(self, steps: int) -> None:
        self._steps = (self._steps or 0) + steps
        self.pump()

    def pump(self) -> None:
        while self.held and not self.closed and self._steps != 0:
            if self._steps is not None:
                self._steps -= 1
            result = replace(execute(self.runner, self.held.pop(0)), compute_ns=self._compute_ns)
            self._engine.answered(self._session, result)

    def close(self, why: str) -> None:
        self.closed = why
