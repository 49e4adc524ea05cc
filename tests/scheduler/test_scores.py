"""Log-probabilities are kept with their tokens, once each, whatever happens to who computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from common.sampling import SamplingParams, StopConditions
from common.step import Logprobs, Scored
from executor.fake_runner import fake_logprobs, prefix_hash_token
from executor.runner import execute
from scheduler.results import ProtocolError
from scheduler.sequence import Begun
from scheduler.sequence import Sequence as CoreSequence
from tests.scheduler.world import GREEDY, World

SCORED = replace(GREEDY, logprobs=2, prompt_logprobs=1)
PROMPT = list(range(40, 52))


def add(world: World, name: str, prompt: Sequence[int] = PROMPT, *, max_tokens: int = 6, n: int = 1) -> CoreSequence:
    first, *_ = world.add(name, prompt, max_tokens=max_tokens, n=n, sampling=SCORED)
    return world.scheduler.sequence(first)


def scores(tokens: Sequence[int], num_top: int) -> list[Logprobs]:
    return [fake_logprobs(token, num_top) for token in tokens]


def check(sequence: CoreSequence) -> None:
    """It has one for each token of prompt and output."""
    tokens = sequence.tokens.tolist()
    assert sequence.prompt_logprobs == scores(tokens[1 : sequence.num_prompt], 1)
    assert sequence.logprobs == scores(tokens[sequence.num_prompt :], 2)


@pytest.mark.parametrize("budget", [64, 5, 1])
def test_prompt_and_output_are_scored_however_the_prompt_is_cut(budget: int) -> None:
    world = World(token_budget=budget, credit=2)
    sequence = add(world, "a")
    world.run()

    assert sequence.num_output == 6
    check(sequence)


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    world = World()
    sequence = add(world, "a", [7])
    world.run()

    assert sequence.prompt_logprobs == []
    check(sequence)


def test_a_prompt_that_is_scored_is_computed_whole_and_found_by_others() -> None:
    world = World()
    world.add("a", PROMPT, max_tokens=1)
    world.run()
    sequence = add(world, "b", max_tokens=1)
    assert world.step() == {"b": 12}
    world.run()
    world.add("c", [*PROMPT, 1, 2, 3, 4], max_tokens=1)

    assert world.step() == {"c": 4}
    assert sequence.num_cached_prompt == 0
    check(sequence)


def test_the_choices_of_a_request_share_a_prompt_that_is_scored_once() -> None:
    world = World(next_token=prefix_hash_token)
    first, second = map(world.scheduler.sequence, world.add("a", PROMPT, max_tokens=4, n=2, sampling=SCORED))

    assert world.step() == {"a0": 12}
    assert world.step() == {"a0": 1, "a1": 1}
    world.run()
    check(first)
    assert second.prompt_logprobs == []
    assert second.logprobs == scores(second.tokens.tolist()[12:], 2)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_what_is_computed_again_elsewhere_is_told_once(steps: int) -> None:
    world = World(token_budget=5, executors=2, credit=2)
    sequence = add(world, "a")
    for _ in range(steps):
        world.step(0)
    world.lose(0)
    world.run()

    assert sequence.attempt == 2
    check(sequence)


def test_scores_survive_preemption_and_the_blocks_that_are_found_again() -> None:
    world = World(num_blocks=14, credit=2, token_budget=7, next_token=prefix_hash_token)
    sequences = [add(world, f"r{n}", [n, *PROMPT], max_tokens=20) for n in range(5)]
    world.run()

    assert world.scheduler.counters.preemptions > 0
    for sequence in sequences:
        check(sequence)


def test_a_prompt_may_be_found_in_the_cache_as_far_as_it_is_scored() -> None:
    world = World(token_budget=8)
    sequence = add(world, "a")
    world.step()
    session = world.scheduler.sessions[0]
    assert len(sequence.prompt_logprobs) == 8
    session.release(sequence)

    assert session.match(sequence).num_tokens == 8
    assert sequence.told_sampling.prompt_logprobs == 1
    sequence.prompt_logprobs += scores(PROMPT[9:], 1)
    assert sequence.num_cacheable == 11
    assert sequence.told_sampling.prompt_logprobs is None


def test_the_rest_of_an_answer_that_another_scheduler_began_is_scored_from_there() -> None:
    world = World(next_token=prefix_hash_token)
    begun = {0: Begun([5, 6], ""), 1: Begun((), "")}
    first, second = world.scheduler.add(PROMPT, SCORED, StopConditions(max_tokens=6), 0, choices=2, begun=begun)
    for sequence in (first, second):
        world.names[sequence.id] = str(sequence.choice)
        world.tokens[str(sequence.choice)] = []
    world.run()

    assert first.prompt_logprobs == []
    assert first.logprobs_of(0, 6) == [None, None, *scores(first.tokens.tolist()[14:], 2)]
    assert second.prompt_logprobs == [], "its prompt is the first choice's to score"
    assert second.logprobs_of(0, 6) == scores(second.tokens.tolist()[12:], 2)


@pytest.mark.parametrize(
    ("sampling", "position", "says"),
    [
        (GREEDY, 12, "the token at 12 of row .* is scored"),
        (GREEDY, 5, "the token at 5 of row .* is scored"),
        (SCORED, 0, "the token at 0 of row"),
        (SCORED, 2, "the token at 2 of row .* is scored, not that at 1"),
        (SCORED, 13, "the token at 13 of row"),
    ],
)
def test_a_score_that_was_not_asked_for_or_leaves_a_gap_ends_the_session(
    sampling: SamplingParams, position: int, says: str
) -> None:
    world = World()
    world.add("a", PROMPT, max_tokens=3, sampling=sampling)
    plan = world.send()
    assert plan is not None
    result = execute(world.runners[0], plan)
    wrong = replace(result, scored=[Scored(plan.refs[0], position, Logprobs(-1.0))])

    with pytest.raises(ProtocolError, match=says):
        world.scheduler.update(0, wrong, 1)
    assert world.scheduler.sequence(world.id("a")).num_output == 0


def test_a_score_of_a_row_that_there_is_not_ends_the_session() -> None:
    world = World()
    world.add("a", PROMPT, max_tokens=3)
    plan = world.send()
    assert plan is not None
    result = execute(world.runners[0], plan)

    with pytest.raises(ProtocolError, match="is scored but was not asked for"):
        world.scheduler.update(0, replace(result, scored=[Scored(plan.refs[0] + 1, 3, Logprobs(-1.0))]), 1)  # type: ignore[arg-type]


def test_who_asks_for_none_has_none() -> None:
    world = World()
    (id,) = world.add("a", PROMPT, max_tokens=3)
    sequence = world.scheduler.sequence(id)
    world.run()

    assert (sequence.logprobs, sequence.prompt_logprobs) == ([], [])
