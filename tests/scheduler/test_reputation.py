"""Executors that die young again and again are left without work for longer and longer, by their name."""

from __future__ import annotations

from scheduler.reputation import MAX_NAMES, Patience, Reputation, Reputations
from scheduler.suspicion import End
from tests.scheduler.world import World

SECOND_NS = 1_000_000_000
PATIENCE = Patience()


def die(world: World, session: int, *, age_s: float = 0.0, end: End = End.LOST) -> int:
    """The executor dies at that age and comes back under its name."""
    world.now_ns += int(age_s * SECOND_NS)
    world.lose(session, end)
    return world.join(name="flapping")


def hold_s(world: World) -> float:
    return world.scheduler.held_back_ns(world.now_ns) / SECOND_NS


def test_the_hold_doubles_with_each_early_death_up_to_a_limit() -> None:
    world = World(executors=0)
    session = world.join(name="flapping")
    holds = []
    for _ in range(9):
        session = die(world, session)
        holds.append(hold_s(world))

    assert holds == [0, 0.5, 1, 2, 4, 8, 10, 10, 10]


def test_an_executor_that_is_held_back_gets_nothing_until_its_time_is_over() -> None:
    world = World(executors=0)
    session = die(world, die(world, world.join(name="flapping")))
    world.add("a", prompt=4)
    assert world.send(session) is None
    world.now_ns += SECOND_NS
    assert world.send(session) is not None


def test_work_goes_to_those_that_live() -> None:
    world = World(executors=0)
    held = die(world, die(world, world.join(name="flapping")))
    steady = world.join(name="steady")
    world.add("a", prompt=4)

    assert world.send(held) is None
    assert world.send(steady) is not None


def test_a_long_life_makes_up_for_early_deaths() -> None:
    world = World(executors=0)
    session = die(world, die(world, world.join(name="flapping")))
    session = die(world, session, age_s=6)
    assert hold_s(world) == 0
    die(world, session)
    assert hold_s(world) == 0, "it is the first again"


def test_leaving_makes_up_for_early_deaths() -> None:
    world = World(executors=0)
    session = die(world, die(world, die(world, world.join(name="flapping"))))
    session = die(world, session, end=End.CLEAN)
    assert hold_s(world) == 0
    die(world, session)
    assert hold_s(world) == 0


def test_a_link_that_broke_is_no_death() -> None:
    world = World(executors=0)
    session = world.join(name="flapping")
    for _ in range(5):
        world.lose(session)
        world.scheduler.acquit(session, "flapping")
        session = world.join(name="flapping")
        assert hold_s(world) == 0


def test_an_executor_that_answers_wrongly_again_and_again_is_held_back_too() -> None:
    world = World(executors=0)
    session = world.join(name="flapping")
    for _ in range(3):
        session = die(world, session, end=End.WRONG)
    assert hold_s(world) == 1


def test_a_hold_cannot_overflow() -> None:
    assert Reputation(young_deaths=10**6).hold_ns(PATIENCE) == PATIENCE.longest_hold_ns


def test_names_that_come_and_go_are_not_remembered_for_ever() -> None:
    reputations = Reputations()
    for i in range(2 * MAX_NAMES):
        reputations.keep(str(i), Reputation(young_deaths=1))
    assert reputations.of("0").is_spotless
    assert not reputations.of(str(2 * MAX_NAMES - 1)).is_spotless
    reputations.keep("spotless", Reputation())
    assert reputations.of(str(MAX_NAMES)).young_deaths == 1, "who is spotless takes nobody's place"
