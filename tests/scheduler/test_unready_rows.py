"""Rows whose grammar says nothing yet: computed, given no token, and asked again. It costs nobody else anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from common.sampling import BeamParams, Grammar
from common.step import StepResult
from executor.fake_runner import position_token
from scheduler.results import ProtocolError
from scheduler.suspicion import End
from tests.scheduler.world import GREEDY, World

GUIDED = replace(GREEDY, grammar=Grammar("regex", "a+"))


def ran(credit: int, *, max_tokens: int, **shape: Any) -> World:
    """Two requests, one of them with a grammar, to their ends."""
    world = World(executors=0, credit=credit)
    world.join(**shape)
    world.add("guided", prompt=6, max_tokens=max_tokens, sampling=GUIDED)
    world.add("free", prompt=5, max_tokens=9)
    world.run()
    return world


@pytest.mark.parametrize("credit", [1, 2, 3])
def test_a_row_is_asked_again_until_its_grammar_is_there(credit: int) -> None:
    world = ran(credit, max_tokens=5, compile_rows=4)

    assert world.tokens == {"guided": [6, 7, 8, 9, 10], "free": list(range(5, 14))}
    counters = world.scheduler.counters
    assert counters.rows_unready == 4
    assert (counters.rows_unusable, counters.preemptions, counters.rows_dropped) == (0, 0, 0)


def test_the_prompt_is_not_computed_again_and_others_are_granted_what_they_want() -> None:
    world = World(executors=0)
    world.join(compile_rows=2)
    world.add("guided", prompt=20, max_tokens=3, sampling=GUIDED)
    world.add("free", prompt=9, max_tokens=9)

    assert world.step() == {"guided": 20, "free": 9}
    assert world.step() == {"guided": 1, "free": 1}
    assert world.step() == {"guided": 1, "free": 1}
    assert world.tokens == {"guided": [20], "free": [9, 10, 11]}


def test_rows_in_flight_behind_it_are_its_next_tries() -> None:
    world = World(executors=0, credit=3)
    world.join(compile_rows=2)
    world.add("a", prompt=6, max_tokens=9, sampling=GUIDED)
    for _ in range(3):
        world.send()

    assert [list(world.answer().indices) for _ in range(3)] == [[], [], [0]]
    assert world.tokens["a"] == [6]


@pytest.mark.parametrize("credit", [1, 2, 3])
def test_a_row_may_be_put_off_in_the_middle_of_its_answer(credit: int) -> None:
    world = ran(credit, max_tokens=9, left_out_every=3)

    assert world.tokens == {"guided": list(range(6, 15)), "free": list(range(5, 14))}
    assert world.scheduler.counters.rows_unready == 3


@pytest.mark.parametrize("credit", [1, 2, 3])
def test_a_row_that_is_put_off_brings_nothing_of_its_drafts_and_they_say_nothing_of_the_next(credit: int) -> None:
    world = World(executors=0, credit=credit)
    world.join(compile_rows=2, left_out_every=5, guess=position_token, max_drafts=3)
    world.add("guided", prompt=6, max_tokens=20, sampling=replace(GUIDED, logprobs=0))
    world.add("free", prompt=5, max_tokens=9)
    (guided,) = (world.scheduler._sequences[id] for id, name in world.names.items() if name == "guided")

    assert world.step() == {"guided": 6, "free": 5}
    assert world.tokens == {"guided": [], "free": [5, 6, 7]}
    assert guided.acceptance.drafted == 0
    world.run()

    assert world.tokens == {"guided": list(range(6, 26)), "free": list(range(5, 14))}
    assert len(guided.logprobs) == 20
    assert guided.acceptance.drafted == guided.acceptance.accepted > 5
    assert world.scheduler.counters.rows_unready > 2


def test_a_row_that_was_put_off_gets_no_drafts_before_it_has_a_token() -> None:
    world = World(executors=0)
    world.join(compile_rows=2, guess=position_token, max_drafts=3)
    world.add("guided", prompt=6, max_tokens=20, sampling=GUIDED)
    allowed: list[int] = []
    for _ in range(4):
        plan = world.send()
        assert plan is not None
        allowed.append(sum(plan.max_drafts))
        world.answer()

    assert allowed[1:3] == [0, 0]
    assert allowed[0] > 0 < allowed[3]


def test_a_beam_carries_no_drafts() -> None:
    world = World(executors=0)
    world.join(guess=position_token, max_drafts=3)
    world.add("search", prompt=6, max_tokens=5, sampling=replace(GREEDY, beams=BeamParams(2)), max_drafts=3)
    plan = world.send()
    world.answer()
    later = world.send()

    assert plan is not None and not plan.max_drafts
    assert later is not None and not later.max_drafts


def test_an_answer_of_one_token_may_wait() -> None:
    world = World(executors=0, credit=2)
    world.join(compile_rows=3)
    world.add("a", prompt=4, max_tokens=1, sampling=GUIDED)
    world.run()

    assert world.tokens["a"] == [4]


def test_every_choice_waits_for_itself() -> None:
    world = World(executors=0, credit=2)
    world.join(compile_rows=2)
    world.add("a", prompt=9, n=3, max_tokens=4, sampling=GUIDED)
    world.run()

    assert [world.tokens[f"a{choice}"] for choice in range(3)] == [[9, 10, 11, 12]] * 3
    assert world.scheduler.counters.rows_unready == 6


def test_who_waits_is_preempted_and_moved_as_anybody() -> None:
    world = World(executors=0, credit=2, num_blocks=8, watermark=0.0)
    first = world.join(compile_rows=3)
    world.add("older", prompt=8, max_tokens=16)
    world.add("guided", prompt=7, max_tokens=6, sampling=GUIDED)
    for _ in range(6):
        world.send(first)
        world.answer(first)
    world.lose(first, End.LOST)
    world.join(compile_rows=3)
    world.run()

    assert world.tokens["guided"] == [7, 8, 9, 10, 11, 12]
    assert world.tokens["older"] == list(range(8, 24))


def test_the_blocks_of_who_waits_are_found_by_others() -> None:
    world = World(executors=0)
    world.join(compile_rows=50)
    world.add("a", list(range(1, 10)), max_tokens=3, sampling=GUIDED)
    world.step()
    world.add("b", list(range(1, 13)), max_tokens=1)

    assert world.step()["b"] == 4, "two blocks of four are there"


def test_an_executor_that_died_is_not_trusted_with_a_place_that_nothing_has_passed() -> None:
    world = World(executors=0, credit=3)
    first = world.join()
    world.add("a", prompt=6, max_tokens=9, sampling=GUIDED)
    world.send(first)
    world.send(first)
    world.answer(first)
    world.lose(first, End.FAILED, step=1)  # it died when it computed the seventh token
    second = world.join(compile_rows=1)
    world.tokens["a"].clear()
    assert world.scheduler.num_suspects == 1
    assert world.step(second) == {"a": 7}
    assert world.scheduler.num_suspects == 1, "nothing was chosen there yet: it may have died of that"

    assert world.step(second) == {"a": 1}
    assert world.scheduler.num_suspects == 0


def test_what_is_in_flight_behind_it_has_computed_less_far_than_it_was_planned_to() -> None:
    world = World(executors=0, credit=2)
    session = world.join(compile_rows=1)
    world.add("a", prompt=6, max_tokens=9, sampling=GUIDED)
    world.send()
    world.send()
    (sequence,) = world.scheduler.session(session).running
    world.answer()

    assert sequence.num_computed == 5
    assert [row.stop for flight in world.scheduler.session(session).outstanding for row in flight.rows.values()] == [6]


def test_a_row_without_a_grammar_cannot_wait_for_one() -> None:
    world = World()
    world.add("a", prompt=4)
    plan = world.send()
    assert plan is not None

    with pytest.raises(ProtocolError, match="waits for a grammar but has none"):
        world.scheduler.update(0, StepResult(step=plan.step, unready=plan.refs), world.now_ns)


def test_a_row_that_is_answered_and_waits_is_answered_twice() -> None:
    world = World()
    world.add("a", prompt=4, sampling=GUIDED)
    plan = world.send()
    assert plan is not None
    result = StepResult(step=plan.step, refs=plan.refs, tokens=[1], indices=[0], unready=plan.refs)

    with pytest.raises(ProtocolError, match="answered twice"):
        world.scheduler.update(0, result, world.now_ns)


def test_what_is_kept_of_a_grammar_is_kept_for_a_tenant() -> None:
    world = World(max_sequences=8)
    for name, tenant, sampling in (
        ("a", "north", GUIDED), ("b", "north", GUIDED), ("c", "south", GUIDED), ("d", "south", GREEDY),
    ):  # fmt: skip
        world.add(name, prompt=4, tenant=tenant, sampling=sampling, salt="one of a user" if name == "b" else "")
    plan = world.send()
    assert plan is not None
    domains = {world.name_at(0, new.ref): new.domain for new in plan.new}
    a, b, c, d = (domains[name] for name in "abcd")

    assert a == b != c, "a salt parts prefixes, and no grammars"
    assert len(a) == len(c) == 16
    assert d == b"", "who has no grammar needs none"
