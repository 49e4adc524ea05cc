"""What counts as an executor's idle time: only a wait for its scheduler, never one for requests."""

from __future__ import annotations

import pytest

from scheduler.occupancy import RECENT_STEPS, Occupancy
from tests.scheduler.world import World


def occupancy(world: World) -> Occupancy:
    return world.scheduler.sessions[0].occupancy


def test_the_wait_between_steps_of_one_request_counts() -> None:
    world = World(credit=1)
    world.add("a", prompt=5)
    for _ in range(3):
        world.send()
        world.answer(compute_ns=97, idle_ns=3)

    assert (occupancy(world).compute_ns, occupancy(world).idle_ns) == (3 * 97, 2 * 3), (
        "nothing was there before the first"
    )
    assert occupancy(world).idle_ratio == 6 / (3 * 97 + 6)


def test_the_wait_for_a_request_does_not_count() -> None:
    world = World(credit=1)
    for name in "abc":
        world.add(name, prompt=5, max_tokens=1)
        world.send()
        world.answer(compute_ns=10, idle_ns=1_000_000)

    assert occupancy(world).idle_ns == 0


def test_a_request_that_came_while_a_step_ran_was_there() -> None:
    world = World(credit=1)
    world.add("a", prompt=5, max_tokens=1)
    world.send()
    world.add("b", prompt=5, max_tokens=1)
    world.answer(compute_ns=10, idle_ns=1_000_000)
    world.send()
    world.answer(compute_ns=10, idle_ns=30)

    assert occupancy(world).idle_ns == 30
    assert occupancy(world).idle_ratio == 0.6


def test_the_ratio_is_that_of_the_recent_steps_and_the_sums_are_of_all() -> None:
    occupancy = Occupancy()
    occupancy.add(compute_ns=1, idle_ns=99)
    for _ in range(RECENT_STEPS):
        occupancy.add(compute_ns=99, idle_ns=1)

    assert occupancy.idle_ratio == pytest.approx(0.01)
    assert occupancy.idle_ns == 99 + RECENT_STEPS


def test_an_executor_that_never_worked_was_never_idle() -> None:
    assert Occupancy().idle_ratio == 0
