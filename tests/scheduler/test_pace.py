"""What is said of a step's time, and when nothing can be said."""

from __future__ import annotations

from scheduler.pace import ENOUGH, RECENT, Pace
from tests.scheduler.world import World


def test_nothing_is_said_of_the_first_steps() -> None:
    pace = Pace()
    for _ in range(ENOUGH - 1):
        pace.add(4, 100)
    assert pace.longest_ns(4) is None
    pace.add(4, 300)
    assert pace.longest_ns(4) == 300


def test_a_step_is_judged_by_larger_ones_and_never_by_smaller_ones() -> None:
    pace = Pace()
    for _ in range(ENOUGH):
        pace.add(100, 5000)
    for _ in range(ENOUGH):
        pace.add(1, 10)
    assert pace.longest_ns(1) == 5000
    assert pace.longest_ns(100) == 5000
    assert pace.longest_ns(500) is None


def test_what_is_long_ago_is_forgotten() -> None:
    pace = Pace()
    pace.add(1, 10**9)
    for _ in range(RECENT):
        pace.add(1, 10)
    assert pace.longest_ns(1) == 10


def test_a_session_knows_the_tokens_of_what_is_outstanding() -> None:
    world = World(credit=2)
    world.add("a", prompt=5)
    world.send()
    world.send()
    session = world.scheduler.session(0)
    assert [session.tokens_of(step) for step in (0, 1, 2)] == [5, 1, None]
    world.answer()
    assert session.tokens_of(0) is None
