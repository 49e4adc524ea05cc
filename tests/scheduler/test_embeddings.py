"""A sequence that embeds ends with its prompt, in one vector, whatever happens to who computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from common.step import Embedded, StepResult
from common.types import FinishReason, SlotRef
from executor.fake_runner import digests_of, fake_vector
from executor.runner import execute
from scheduler.results import ProtocolError
from tests.scheduler.world import World

PROMPT = list(range(40, 52))
VECTOR = fake_vector(digests_of(PROMPT)[-1], 8)
NAN = b"\0\0\xc0\x7f"


def add(world: World, name: str = "a", prompt: list[int] = PROMPT) -> None:
    world.add(name, prompt, dimensions=8)


def check(world: World, name: str = "a", vector: bytes = VECTOR) -> None:
    sequence = world.embedded[name]
    assert (world.reasons[name], world.tokens[name], sequence.num_output) == (FinishReason.EMBEDDED, [], 0)
    assert sequence.vector == vector


@pytest.mark.parametrize("budget", [64, 5, 1])
def test_its_vector_is_that_of_the_whole_prompt_however_that_is_cut(budget: int) -> None:
    world = World(token_budget=budget, credit=2)
    add(world)
    world.run()

    check(world)
    assert world.scheduler.counters.output_tokens == 0
    assert world.num_free == 64


def test_it_runs_beside_rows_that_generate() -> None:
    world = World(credit=2)
    world.add("talks", 5, max_tokens=6)
    world.step()
    add(world)

    assert world.step() == {"talks": 1, "a": 12}
    world.run()
    check(world)
    assert world.tokens["talks"] == [5, 6, 7, 8, 9, 10]


def test_it_finds_a_prefix_and_leaves_one() -> None:
    world = World()
    world.add("before", PROMPT[:8], max_tokens=1)
    world.run()
    add(world)
    assert world.step() == {"a": 4}
    world.add("after", [*PROMPT, 1, 2], max_tokens=1)

    assert world.step() == {"after": 2}
    world.run()
    check(world)


def test_it_is_computed_anew_where_its_executor_is_lost_and_answered_once() -> None:
    world = World(token_budget=5, executors=2, credit=2)
    add(world)
    world.send(0)
    world.answer(0)
    world.send(0)
    world.lose(0)
    world.run()

    check(world)


def test_it_is_computed_anew_after_a_preemption() -> None:
    world = World(num_blocks=8, token_budget=8)
    world.add("first", 16, max_tokens=12)
    world.step()
    add(world)
    world.run()

    check(world)
    assert len(world.tokens["first"]) == 12


def test_one_that_is_aborted_in_flight_takes_no_vector() -> None:
    world = World()
    add(world)
    world.send()
    world.abort("a")
    world.answer()
    world.run()

    assert world.embedded["a"].vector == b""


def test_it_ends_alone_where_no_finite_numbers_can_be_had() -> None:
    world = World(next_token=lambda prefix: None if prefix.num_tokens == 12 else 1)
    add(world)
    world.add("talks", 5, max_tokens=3)
    world.run()

    assert (world.reasons["a"], world.reasons["talks"]) == (FinishReason.ERROR, FinishReason.LENGTH)


def test_an_executor_that_knows_of_no_vectors_gets_none_to_make() -> None:
    world = World(executors=0)
    old = world.join()
    session = world.scheduler.session(old)
    session.facts = replace(session.facts, capabilities=())
    add(world)

    assert world.step(old) == {}
    assert not world.scheduler.fits_somewhere(world.embedded["a"])
    world.join()
    world.run()
    check(world)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (lambda ref: StepResult(step=0), "no token for row"),
        (lambda ref: StepResult(step=0, embedded=[Embedded(SlotRef(ref + 1), VECTOR)]), "was not asked for a vector"),
        (lambda ref: StepResult(step=0, embedded=[Embedded(ref, VECTOR[:-4])]), "not 8 finite numbers"),
        (lambda ref: StepResult(step=0, embedded=[Embedded(ref, VECTOR[:-4] + NAN)]), "not 8 finite numbers"),
        (lambda ref: StepResult(step=0, embedded=[Embedded(ref, VECTOR)] * 2), "answered twice"),
        (lambda ref: StepResult(step=0, embedded=[Embedded(ref, VECTOR)], failed=[ref]), "answered twice"),
        (lambda ref: StepResult(step=0, refs=[ref], tokens=[1], indices=[0]), "was not asked for a token"),
    ],
    ids=["none", "of nobody", "too short", "NaN", "twice", "and failed", "a token"],
)
def test_a_vector_that_is_not_as_it_must_be_ends_the_session(
    wrong: Callable[[SlotRef], StepResult], problem: str
) -> None:
    world = World()
    add(world)
    plan = world.send()
    assert plan is not None

    with pytest.raises(ProtocolError, match=problem):
        world.scheduler.update(0, wrong(plan.refs[0]), 1)


def test_a_vector_that_nobody_asked_for_ends_the_session() -> None:
    world = World()
    world.add("talks", 5)
    plan = world.send()
    assert plan is not None
    result = execute(world.runners[0], plan)

    wrong = replace(result, refs=(), tokens=(), indices=(), embedded=[Embedded(plan.refs[0], VECTOR)])
    with pytest.raises(ProtocolError, match="was not asked for a vector"):
        world.scheduler.update(0, wrong, 1)
