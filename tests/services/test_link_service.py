"""The scheduler's end of the link: what it takes for a sign of life."""

from __future__ import annotations

import pytest

from common.errors import Unavailable
from protos import executor_pb2 as pb
from services.link_service import ComputePulse


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def beat(tick: int, *, step: int = 0, computing: bool = False) -> pb.Heartbeat:
    return pb.Heartbeat(session=1, tick=tick, step=step, computing=computing)


def test_a_loop_that_ticks_is_alive_for_ever() -> None:
    clock = Clock()
    pulse = ComputePulse(idle_s=5, step_s=60, clock=clock)
    for tick in range(100):
        clock.now_s += 4
        pulse.beat(beat(tick))


def test_heartbeats_of_a_loop_that_stands_still_prove_nothing() -> None:
    clock = Clock()
    pulse = ComputePulse(idle_s=5, step_s=60, clock=clock)
    pulse.beat(beat(7))
    clock.now_s += 4
    pulse.beat(beat(7))
    clock.now_s += 2
    with pytest.raises(Unavailable, match="its loop for over 5 s"):
        pulse.beat(beat(7))


def test_a_step_may_take_long_but_not_for_ever() -> None:
    clock = Clock()
    pulse = ComputePulse(idle_s=5, step_s=60, clock=clock)
    pulse.beat(beat(7, step=3, computing=True))
    clock.now_s += 59
    pulse.beat(beat(7, step=3, computing=True))
    clock.now_s += 2
    with pytest.raises(Unavailable, match="step 3 for over 60 s"):
        pulse.beat(beat(7, step=3, computing=True))
