"""`python -m tests.e2e.leaky …`: Pagewire with bugs that talk. Their exceptions hold prompts, answers and keys.

A request says by its max_tokens which bug it meets. Nothing of what they say may be seen anywhere.
"""

from __future__ import annotations

import sys
from typing import Any, Final

from common.step import StepPlan, StepResult
from executor.fake_runner import FakeRunner
from executor.runner import Launched
from scheduler.scheduler import Scheduler
from services.__main__ import main
from services.answer import Choice
from services.answering import Answerer
from services.engine import Engine

IN_THE_TOKENIZER: Final = 101
IN_THE_ENGINE: Final = 102
IN_THE_TEXT: Final = 103
IN_THE_EXECUTOR: Final = 104
IN_THE_CORE: Final = 105  # the scheduler's process ends by it


def plant() -> None:
    """Put the bugs in."""
    understand, submit, take = Answerer._understand, Engine.submit, Choice.take
    launch, update = FakeRunner.launch, Scheduler.update

    async def _understand(self: Answerer, spec: Any, tenant: str) -> Any:
        if spec.max_tokens == IN_THE_TOKENIZER:
            raise ValueError(f"{tenant} asked {spec}")
        return await understand(self, spec, tenant)

    def _submit(self: Engine, prompt: Any, sampling: Any, stop: Any, **rest: Any) -> Any:
        if stop.max_tokens == IN_THE_ENGINE:
            raise KeyError(str(prompt), stop)
        return submit(self, prompt, sampling, stop, **rest)

    def _take(self: Choice, event: Any, sequence: Any, expiry_s: int) -> Any:
        told = take(self, event, sequence, expiry_s)
        if sequence.stop.max_tokens == IN_THE_TEXT and sequence.num_output > 20:
            cause = UnicodeError(str(vars(self._text)))
            raise OSError(str(sequence.tokens), told) from cause
        return told

    def _launch(self: FakeRunner, plan: StepPlan) -> Launched:
        for new in plan.new:
            if new.max_tokens == IN_THE_EXECUTOR:
                words = "".join(chr(33 + token) for token in new.token_ids)
                raise RuntimeError(f"bad input {words}, {list(new.token_ids)}")
        return launch(self, plan)

    def _update(self: Scheduler, session_id: int, result: StepResult, now_ns: int) -> Any:
        outputs = update(self, session_id, result, now_ns)
        for sequence in self:
            if sequence.stop.max_tokens == IN_THE_CORE and sequence.num_output > 2:
                raise RuntimeError(f"{sequence} {list(sequence.tokens)}")
        return outputs

    Answerer._understand = _understand  # type: ignore[method-assign]
    Engine.submit = _submit  # type: ignore[method-assign]
    Choice.take = _take  # type: ignore[method-assign]
    FakeRunner.launch = _launch  # type: ignore[method-assign]
    Scheduler.update = _update  # type: ignore[method-assign]


if __name__ == "__main__":
    plant()
    sys.exit(main())
