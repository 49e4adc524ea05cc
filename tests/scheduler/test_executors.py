"""Several executors: where a sequence is placed, and what happens when one is lost or answers nonsense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from common.sampling import SamplingParams
from common.step import StepResult
from executor.fake_runner import prefix_hash_token
from executor.runner import execute
from scheduler.results import ProtocolError
from tests.scheduler.world import World


def test_sequences_spread_over_executors_by_load() -> None:
    world = World(executors=2, credit=2)
    for name in "abcd":
        world.add(name, prompt=5, max_tokens=3)
    for session in (0, 1, 0):
        world.send(session)

    assert [len(s.running) for s in world.scheduler.sessions] == [2, 2]


def test_a_prompt_goes_where_its_prefix_is_cached() -> None:
    world = World(executors=2)
    world.add("warm", prompt=list(range(16)), max_tokens=1)
    world.send(1)
    world.answer(1)
    world.add("again", prompt=list(range(16)), max_tokens=1)

    assert world.send(0) is None
    assert world.send(1) is not None


def test_a_popular_prefix_does_not_pull_everything_to_one_executor() -> None:
    world = World(executors=2, max_sequences=64, num_blocks=256)
    world.add("warm", prompt=list(range(16)), max_tokens=1)
    world.send(0)
    world.answer(0)
    for i in range(24):
        world.add(f"r{i}", prompt=[*range(16), 200 + i], max_tokens=9)
    for session in (0, 1, 0, 1):
        world.send(session)

    assert all(len(s.running) > 0 for s in world.scheduler.sessions)


def test_a_request_does_not_wait_for_the_best_executor_while_that_has_no_room() -> None:
    world = World(executors=0)
    large, small = world.join(num_blocks=16), world.join(num_blocks=4)
    world.add("warm", prompt=list(range(8)), max_tokens=1)
    world.send(large)
    world.answer(large)
    world.add("running", prompt=30, max_tokens=20)
    world.send(large)
    world.answer(large)
    world.add("too large for the small one", prompt=40, max_tokens=5)
    world.add("next", prompt=[*range(8), 99], max_tokens=3)

    world.send(large)
    assert world.send(small) is not None


def test_a_request_does_not_wait_for_the_best_executor_while_that_is_silent() -> None:
    world = World(executors=2, credit=1)
    world.add("warm", prompt=list(range(8)), max_tokens=2)
    world.send(1)
    world.answer(1)
    world.send(1)
    world.add("next", prompt=[*range(8), 99], max_tokens=3)

    assert world.send(0) is None, "the other one has its prefix"
    world.now_ns += 2_000_000_000
    assert world.send(0) is not None


def test_the_sequences_of_a_lost_executor_go_on_elsewhere_with_the_same_tokens() -> None:
    undisturbed = World(next_token=prefix_hash_token)
    undisturbed.add("a", prompt=list(range(9)), max_tokens=10, sampling=SamplingParams(seed=3))
    undisturbed.run()

    world = World(executors=1, credit=2, next_token=prefix_hash_token)
    world.add("a", prompt=list(range(9)), max_tokens=10, sampling=SamplingParams(seed=3))
    for _ in range(4):
        world.send(0)
        world.answer(0)
    world.send(0)
    world.lose(0)
    assert world.scheduler.num_sequences == 1
    world.join()
    world.run()

    assert world.tokens["a"] == undisturbed.tokens["a"]
    assert world.scheduler.counters.moved == 1


def test_a_sequence_that_lost_its_executor_keeps_its_place_in_the_line() -> None:
    world = World(executors=1, max_sequences=1)
    world.add("first", prompt=4, max_tokens=4)
    world.step(0)
    world.add("second", prompt=4, max_tokens=4)
    world.lose(0)
    session = world.join()

    plan = world.send(session)
    assert plan is not None and list(plan.new[0].token_ids)[-1] == 4, "the first one's token is part of what is known"


def test_an_executor_that_leaves_finishes_what_it_has_and_gets_nothing_new() -> None:
    world = World(executors=2)
    world.add("a", prompt=4, max_tokens=3)
    world.send(0)
    world.scheduler.leave(0)
    world.add("b", prompt=4, max_tokens=3)
    world.run()

    assert world.tokens == {"a": [4, 5, 6], "b": [4, 5, 6]}


def test_executors_of_different_block_sizes_serve_together() -> None:
    world = World(executors=1, next_token=prefix_hash_token)
    world.join(block_size=8)
    for name in "abcd":
        world.add(name, prompt=list(range(20)), max_tokens=5)
    world.run()

    assert len({tuple(tokens) for tokens in world.tokens.values()}) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda r: replace(r, step=r.step + 1),
        lambda r: replace(r, indices=[5]),
        lambda r: replace(r, tokens=[10**6]),
        lambda r: replace(r, refs=[r.refs[0] + 1]),
        lambda r: replace(r, failed=[r.refs[0] + 1]),
        lambda r: replace(r, failed=r.refs),
        lambda r: replace(r, refs=[], tokens=[], indices=[]),
        lambda r: replace(r, refs=[*r.refs, *r.refs], tokens=[*r.tokens] * 2, indices=[*r.indices] * 2),
    ],
    ids=[
        "another step",
        "a gap",
        "no such token",
        "a foreign row",
        "a foreign failure",
        "token and failure",
        "a row left out",
        "a row twice",
    ],
)
def test_an_answer_to_another_question_is_refused_and_commits_nothing(
    wrong: Callable[[StepResult], StepResult],
) -> None:
    world = World()
    (id,) = world.add("a", prompt=4)
    plan = world.send()
    assert plan is not None
    good = execute(world.runners[0], plan)
    bad = wrong(good)

    with pytest.raises(ProtocolError) as refused:
        world.scheduler.update(0, bad, 1)
    assert str(10**6) not in str(refused.value), "a token is what a tenant is told, and goes into no log"
    assert world.scheduler.sequence(id).num_output == 0


def test_a_token_for_a_row_that_has_not_reached_its_end_is_refused() -> None:
    world = World(token_budget=4)
    (id,) = world.add("a", prompt=9)
    plan = world.send()
    assert plan is not None

    with pytest.raises(ProtocolError, match="was not asked for a token"):
        world.scheduler.update(0, StepResult(step=0, refs=plan.refs, tokens=[1], indices=[0]), 1)
    assert world.scheduler.sequence(id).num_output == 0


def test_a_result_of_a_session_that_is_over_is_dropped_and_counted() -> None:
    world = World()
    world.add("a", prompt=4)
    plan = world.send()
    assert plan is not None
    result = execute(world.runners[0], plan)
    world.lose(0)

    assert world.scheduler.update(0, result, 1) == []
    assert world.scheduler.counters.rows_dropped == 1


def test_two_plans_cannot_be_made_from_one_credit() -> None:
    world = World(credit=1)
    world.add("a", prompt=4)
    assert world.send() is not None
    assert world.send() is None
