"""What is checked, in which order, and how long each stage may take. Names and numbers only: no tensor yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One file of parts."""

    number: int
    name: str
    module: str
    share_s: float  # what stages before it leave of the budget for this one
    fresh: bool = False  # a process of its own: it starts others that need the device's memory
    on_request: bool = False


STAGES: Final = (
    Stage(number=0, name="environment", module="tests.gpu.check.environment", share_s=20),
    Stage(number=1, name="kernels", module="tests.gpu.check.kernels", share_s=60),
    Stage(number=2, name="parity", module="tests.gpu.check.parity", share_s=40),
    Stage(number=3, name="graphs", module="tests.gpu.check.capturing", share_s=40),
    Stage(number=4, name="micro", module="tests.gpu.check.micro", share_s=70),
    Stage(number=5, name="steps", module="tests.gpu.check.steps", share_s=90),
    Stage(number=6, name="server", module="tests.gpu.check.server", share_s=110, fresh=True),
    Stage(number=7, name="peers", module="tests.gpu.check.peers", share_s=240, fresh=True, on_request=True),
)


def within(stages: Sequence[Stage], budget_s: float) -> list[Stage]:
    """The same stages with shares that are not more than the budget together."""
    scale = min(1.0, budget_s / max(1.0, sum(stage.share_s for stage in stages)))
    return [replace(stage, share_s=stage.share_s * scale) for stage in stages]


def selected(numbers: str, *, peers: bool) -> list[Stage]:
    """The stages of `0,1,4`, or all; the peers where they are asked for. Raises ValueError for one there is not."""
    if not numbers:
        return [stage for stage in STAGES if peers or not stage.on_request]
    wanted = {int(number) for number in numbers.split(",")} | ({7} if peers else set())
    if unknown := wanted - {stage.number for stage in STAGES}:
        raise ValueError(f"there is no stage {min(unknown)}: they are 0 to {STAGES[-1].number}")
    return [stage for stage in STAGES if stage.number in wanted]
