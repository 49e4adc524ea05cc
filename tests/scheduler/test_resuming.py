"""Sequences that another scheduler began: they go on at their next output index, and count nothing twice."""

from __future__ import annotations

import pytest

from common.sampling import SamplingParams, StopConditions
from common.types import FinishReason, Priority
from executor.fake_runner import prefix_hash_token
from scheduler.sequence import Begun
from tests.scheduler.world import GREEDY, World

PROMPT = [5, 6, 7, 8, 9]
SAMPLED = SamplingParams(temperature=1.0, seed=3)


def begin(world: World, begun: dict[int, list[int]], *, max_tokens: int = 20, determinism: str = "") -> None:
    """Queue the rest of a request; its sequences are called by their choices."""
    stop = StopConditions(max_tokens=max_tokens)
    told = {choice: Begun(tokens, determinism) for choice, tokens in begun.items()}
    for sequence in world.scheduler.add(PROMPT, SAMPLED, stop, 0, choices=8, begun=told):
        world.names[sequence.id] = str(sequence.choice)
        world.tokens[str(sequence.choice)] = []


@pytest.mark.parametrize("at", [0, 1, 3, 4, 11, 19])
def test_the_rest_is_what_it_would_have_been(at: int) -> None:
    whole = World(next_token=prefix_hash_token)
    whole.add("w", PROMPT, max_tokens=20, n=3, sampling=SAMPLED)
    whole.run()

    world = World(next_token=prefix_hash_token)
    begin(world, {2: whole.tokens["w2"][:at], 0: whole.tokens["w0"][: at // 2]})
    world.run()

    assert world.tokens["2"] == whole.tokens["w2"][at:]
    assert world.tokens["0"] == whole.tokens["w0"][at // 2 :]
    assert set(world.reasons.values()) == {FinishReason.LENGTH}
    assert world.scheduler.counters.output_tokens == (20 - at) + (20 - at // 2)


def test_what_was_begun_is_computed_once_for_all_choices_that_share_it() -> None:
    world = World(token_budget=64)
    begin(world, {0: [10, 11, 12, 13], 1: [10, 11, 12, 13]})

    assert world.step() == {"0": 9, "1": 1}


def test_only_cached_tokens_of_the_prompt_count_as_the_prompts() -> None:
    world = World()
    world.add("a", [*PROMPT, *range(10, 20)], max_tokens=1)
    world.run()
    begin(world, {0: list(range(10, 18))})
    world.step()
    (sequence,) = world.scheduler

    assert sequence.num_cached_prompt == len(PROMPT)
    assert world.scheduler.counters.cached_prompt_tokens == len(PROMPT)


def test_one_class_of_executors_keeps_a_sequence_exact_also_through_a_move() -> None:
    world = World(executors=2)
    world.add("a", 5, max_tokens=20)
    (sequence,) = world.scheduler
    assert sequence.determinism is None
    for session in (0, 1):
        world.step(session)
        if sequence.session is not None:
            world.lose(sequence.session.id)
            break
    world.run()

    assert sequence.attempt == 2
    assert sequence.determinism == world.scheduler.sessions[0].facts.determinism != ""


@pytest.mark.parametrize("began_as", ["", "0123456789abcdef"])
def test_a_sequence_that_others_began_is_exact_no_more(began_as: str) -> None:
    world = World()
    begin(world, {0: [10, 11]}, determinism=began_as)
    (sequence,) = world.scheduler
    world.run()

    assert sequence.determinism == ""


def test_a_sequence_that_the_same_class_began_stays_exact() -> None:
    world = World()
    mine = world.scheduler.sessions[0].facts.determinism
    begin(world, {0: [10, 11]}, determinism=mine)
    (sequence,) = world.scheduler
    world.run()

    assert sequence.determinism == mine


def test_a_sequence_of_which_there_is_no_token_yet_was_begun_by_nobody() -> None:
    world = World()
    begin(world, {0: []}, determinism="")
    (sequence,) = world.scheduler
    world.run()

    assert sequence.determinism != ""


def test_what_has_ended_is_not_to_be_begun_again() -> None:
    world = World()
    with pytest.raises(AssertionError, match="has ended with 2 tokens"):
        begin(world, {0: [10, 11]}, max_tokens=2)


def test_a_request_that_begins_has_no_such_thing() -> None:
    world = World()
    made = world.scheduler.add(PROMPT, GREEDY, StopConditions(max_tokens=2), 0, choices=2)

    assert [s.num_output for s in made] == [0, 0]
    assert made[1].fork_of is made[0]


def test_what_was_begun_goes_before_what_its_tenant_asks_anew() -> None:
    world = World(max_sequences=1)
    world.add("running", 4, max_tokens=2)
    world.step()
    for name in ("new", "newer"):
        world.add(name, 4, max_tokens=1)
    begin(world, {0: [10, 11]}, max_tokens=3)
    begin(world, {1: [10, 11]}, max_tokens=3)
    seen: list[str] = []
    while world.scheduler.num_sequences:
        seen += [name for name in world.step() if name not in seen]

    assert seen == ["running", "0", "1", "new", "newer"]


def test_what_was_begun_passes_no_other_tenant_that_was_served_less() -> None:
    world = World(max_sequences=1, prefix_caching=False)
    world.add("running", 7, max_tokens=1, tenant="other")
    for i in range(3):
        world.add(f"other{i}", 7, max_tokens=1, tenant="other")
    world.step()
    for choice in range(3):
        begin(world, {choice: [10, 11]}, max_tokens=3)
    seen: list[str] = []
    while world.scheduler.num_sequences:
        seen += [name for name in world.step() if name not in seen]

    assert seen == ["0", "other0", "1", "other1", "2", "other2"]


def test_what_was_begun_takes_nobodys_room_in_the_line() -> None:
    world = World(executors=0)
    world.add("new", 4, max_tokens=6)
    begin(world, {0: [10, 11], 1: []})
    standing = world.scheduler.waiting.standing("", Priority.NORMAL)

    assert (standing.num_waiting, standing.num_tokens, standing.own_waiting, standing.own_tokens) == (1, 10, 1, 10)
    assert standing.own_resumed == 2
    assert standing.tokens_before == 10 + len(PROMPT) + 20 + 20
    for sequence in list(world.scheduler):
        world.scheduler.finish(sequence.id)
    world.scheduler.check()
    assert world.scheduler.waiting.standing("", Priority.NORMAL).own_resumed == 0


def test_what_was_begun_without_a_token_is_new() -> None:
    world = World(executors=0)
    begin(world, {0: [], 1: []})

    assert world.scheduler.waiting.standing("", Priority.NORMAL).own_waiting == 2
