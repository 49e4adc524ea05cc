"""Who may have killed an executor: suspected by its last steps, tried alone, and then given up or trusted again."""

from __future__ import annotations

import pytest

from common.types import FinishReason
from scheduler.suspicion import End, runs_alone
from tests.scheduler.world import World


def rows(world: World, session: int) -> set[str]:
    """Who is in the next step, which stays unanswered; nobody when there is none."""
    plan = world.send(session)
    return set() if plan is None else {world.name_at(session, ref) for ref in plan.refs}


def deaths(world: World, name: str) -> int:
    return len(world.scheduler.sequence(world.id(name)).request.deaths)


def crowd(*names: str, credit: int = 1, token_budget: int = 64) -> World:
    world = World(credit=credit, token_budget=token_budget)
    for name in names:
        world.add(name, prompt=5)
    return world


def die_with_all(world: World, session: int) -> int:
    """The executor takes a step and dies in it. Returns the session of the one that comes."""
    assert rows(world, session)
    world.lose(session)
    return world.join()


def test_whoever_was_in_the_step_is_suspected_and_whoever_was_only_resident_is_not() -> None:
    world = crowd("a", "b", token_budget=5)
    world.step()  # the prompt of one
    world.send()  # its next token, and the other's first four
    world.answer()
    assert rows(world, 0) == {"a", "b"}
    world.add("c", prompt=5)
    world.lose(0)

    assert [deaths(world, name) for name in "abc"] == [1, 1, 0]


def test_an_executor_that_cannot_speak_may_have_been_one_step_further() -> None:
    world = crowd("a", credit=3)
    assert rows(world, 0) == {"a"}
    world.add("b", prompt=5)
    assert rows(world, 0) == {"a", "b"}
    world.add("c", prompt=5)
    assert rows(world, 0) == {"a", "b", "c"}
    world.lose(0, End.LOST)

    assert [deaths(world, name) for name in "abc"] == [1, 1, 0], "the answer that is written last dies with its link"


def test_what_an_executor_said_it_had_passed_did_not_kill_it() -> None:
    world = crowd("a", credit=2, token_budget=5)
    world.add("b", prompt=5, max_tokens=1)
    assert rows(world, 0) == {"a"}
    assert rows(world, 0) == {"a", "b"}
    world.lose(0, End.SILENT, step=2)

    assert [deaths(world, name) for name in "ab"] == [0, 0]


@pytest.mark.parametrize("end", [End.STUCK, End.FAILED])
def test_an_executor_that_names_its_step_accuses_nobody_else(end: End) -> None:
    world = crowd("a", credit=2)
    assert rows(world, 0) == {"a"}
    world.add("b", prompt=5)
    assert rows(world, 0) == {"a", "b"}
    world.lose(0, end, step=0)

    assert [deaths(world, name) for name in "ab"] == [1, 0]


@pytest.mark.parametrize("end", [End.CLEAN, End.WRONG])
def test_nobody_is_suspected_where_nobody_can_be_at_fault(end: End) -> None:
    world = crowd("a")
    world.send()
    world.lose(0, end)

    assert deaths(world, "a") == 0
    assert world.scheduler.counters.unclean_ends == (end is End.WRONG)


def test_a_request_that_gets_past_the_place_is_trusted_again() -> None:
    world = crowd("a", "b")
    session = die_with_all(world, 0)
    assert deaths(world, "a") == 1
    world.step(session)

    assert [deaths(world, name) for name in "ab"] == [0, 0]


def test_a_chunk_before_the_place_proves_nothing() -> None:
    world = World(token_budget=4)
    world.add("a", prompt=12)
    for _ in range(2):
        world.step()
    session = die_with_all(world, 0)
    for expected in (1, 1, 0):
        world.step(session)
        assert deaths(world, "a") == expected


def test_deaths_without_end_end_nobody_who_gets_on_between_them() -> None:
    world = crowd("a", "b", "c", token_budget=512)
    session = 0
    while world.scheduler.num_sequences:
        world.step(session)
        if world.scheduler.num_sequences and rows(world, session):
            world.lose(session)
            session = world.join()

    assert set(world.reasons.values()) == {FinishReason.LENGTH}
    assert world.scheduler.counters.trials == 0


def test_after_two_deaths_each_suspect_runs_alone_until_it_is_past_the_place() -> None:
    world = crowd("a", "b", "c")
    session = die_with_all(world, die_with_all(world, 0))

    assert world.step(session) == {"a": 5}
    assert world.step(session) == {"b": 5}
    assert world.step(session) == {"c": 5}
    assert world.step(session) == {"a": 1, "b": 1, "c": 1}
    assert world.scheduler.counters.trials == 3


def test_the_request_that_killed_three_executors_fails_and_nobody_else() -> None:
    """`poison` kills whatever computes its prompt."""
    world = World(credit=2)
    for name in ("a", "poison", "b"):
        world.add(name, prompt=5, max_tokens=6)
    session, killed = 0, 0
    while world.scheduler.num_sequences:
        alive = False
        for _ in range(2):
            alive = bool(world.send(session)) or alive
        sequence = next((s for s in world.scheduler if world.names[s.id] == "poison"), None)
        doomed = sequence is not None and any(
            row.sequence is sequence for row in world.scheduler.session(session).outstanding[0].rows.values()
        )
        if doomed:
            killed += 1
            world.lose(session)
            session = world.join()
        else:
            assert world.sent[session], "nothing goes on"
            world.answer(session)
        world.scheduler.check()

    assert killed == 3
    assert world.reasons == {"a": FinishReason.LENGTH, "b": FinishReason.LENGTH, "poison": FinishReason.ERROR}
    assert world.tokens["a"] == world.tokens["b"] == [5, 6, 7, 8, 9, 10]
    assert world.scheduler.counters.given_up == 1


def test_all_choices_of_a_request_share_its_count_and_its_end() -> None:
    world = World()
    world.add("a", prompt=5, n=3)
    session = die_with_all(world, die_with_all(world, 0))
    assert deaths(world, "a1") == 2
    world.send(session)
    losses = world.lose(session)

    assert [request.num_choices for request in losses.given_up] == [3]
    assert set(world.reasons.values()) == {FinishReason.ERROR}
    assert world.scheduler.num_sequences == 0


def a_suspect_beside(world: World, *busy: int) -> None:
    """A request that two other executors died with, and none of these: it is to be tried on the busy ones."""
    for session in busy:
        world.scheduler.fell_silent(session)
    world.add("suspect", prompt=17, max_tokens=8)
    session = die_with_all(world, die_with_all(world, world.join()))
    world.lose(session, End.CLEAN)
    for session in busy:
        world.scheduler.spoke(session)


def test_others_pause_while_a_request_is_tried_on_their_executor() -> None:
    world = crowd("x", "y")
    world.step(0)
    a_suspect_beside(world, 0)
    world.add("late", prompt=5)

    assert world.step(0) == {"suspect": 17}
    assert world.step(0) == {"x": 1, "y": 1, "suspect": 1, "late": 5}
    assert world.scheduler.counters.preemptions == 0


def test_a_trial_waits_for_what_others_have_in_flight_and_for_nothing_else() -> None:
    world = World(credit=2, executors=1)
    world.add("resident", prompt=5)
    world.step(0)
    doomed = world.join()
    world.add("suspect", prompt=5)
    assert rows(world, doomed) == {"suspect"}
    world.lose(doomed)
    doomed = world.join()
    assert rows(world, doomed) == {"suspect"}
    assert rows(world, 0) == {"resident"}
    world.lose(doomed)

    assert rows(world, 0) == set(), "not beside the other's row"
    world.answer(0)
    assert rows(world, 0) == {"suspect"}
    assert world.scheduler.sequence(world.id("resident")).session is not None
    world.answer(0)
    assert rows(world, 0) == {"resident", "suspect"}


@pytest.mark.parametrize("shape", [{"num_blocks": 8}, {"max_sequences": 2}], ids=["blocks", "slots"])
def test_a_trial_takes_what_it_lacks_from_the_youngest_of_those_that_pause(shape: dict[str, int]) -> None:
    world = World(executors=0, max_model_len=32)
    world.join(**shape)  # type: ignore[arg-type]
    world.add("x", prompt=9, max_tokens=8)
    world.add("y", prompt=9, max_tokens=8)
    world.step(0)
    a_suspect_beside(world, 0)

    assert world.step(0) == {"suspect": 17}
    assert world.scheduler.sequence(world.id("x")).session is not None
    assert world.scheduler.sequence(world.id("y")).session is None
    world.run()
    assert set(world.reasons.values()) == {FinishReason.LENGTH}


def test_a_request_is_tried_where_the_fewest_pause_for_it() -> None:
    world = crowd("x")
    world.step(0)
    idle = world.join()
    a_suspect_beside(world, 0, idle)

    assert rows(world, 0) == {"x"}
    assert rows(world, idle) == {"suspect"}


def test_a_trial_goes_elsewhere_when_its_executor_leaves() -> None:
    world = World(executors=0)
    world.add("suspect", prompt=5, max_tokens=4)
    session = die_with_all(world, die_with_all(world, world.join()))
    world.scheduler.leave(session)
    assert rows(world, session) == set()
    other = world.join()
    assert rows(world, other) == {"suspect"}


def test_a_choice_that_runs_elsewhere_is_taken_out_of_its_crowd() -> None:
    world = World(executors=0, prefix_caching=False)
    small, large = world.join(max_sequences=1), world.join()
    world.add("suspect", prompt=5, n=2)
    world.add("other", prompt=5)
    assert rows(world, small) == {"suspect0"}
    assert rows(world, large) == {"suspect1", "other"}
    world.answer(large)
    world.lose(small)
    small = world.join(max_sequences=1)
    assert rows(world, small) == {"suspect0"}
    assert rows(world, large) == {"suspect1", "other"}
    world.lose(small)

    assert world.scheduler.sequence(world.id("suspect1")).session is None
    assert rows(world, large) == set(), "what is in flight is answered first"
    world.answer(large)
    assert rows(world, large) == {"suspect0"}
    world.answer(large)
    assert rows(world, large) == {"other", "suspect0", "suspect1"}


def test_an_executor_that_proves_to_be_alive_takes_its_accusation_back() -> None:
    world = crowd("a")
    assert rows(world, 0) == {"a"}
    world.lose(0)
    world.scheduler.acquit(0, "fake-0")
    session = world.join(name="fake-0")

    assert deaths(world, "a") == 0
    assert rows(world, session) == {"a"}


def test_a_link_that_is_cut_without_end_ends_no_request() -> None:
    world = crowd("a", "b")
    session = 0
    for _ in range(10):
        assert rows(world, session) == {"a", "b"}
        world.lose(session)
        world.scheduler.acquit(session, "cut")
        session = world.join(name="cut")
    world.run()

    assert set(world.reasons.values()) == {FinishReason.LENGTH}
    assert world.scheduler.counters.trials == 0


def test_a_death_in_company_never_gives_a_request_up() -> None:
    """It had been in a crowd elsewhere when it became one that must run alone."""
    world = crowd("a", "b")
    assert rows(world, 0) == {"a", "b"}
    request = world.scheduler.sequence(world.id("a")).request
    request.deaths.update({100, 101})
    losses = world.lose(0)

    assert losses.given_up == []
    assert runs_alone(request)
