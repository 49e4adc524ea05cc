"""Guessed tokens are more tokens to compute: they change how soon an answer comes, and never which."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.sampling import SamplingParams
from common.types import FinishReason
from executor.fake_runner import NextToken, Prefix, fake_logprobs, position_token, prefix_hash_token
from executor.runner import execute
from scheduler.results import ProtocolError
from scheduler.speculation import TRY_EVERY, WORTH, Acceptance, Candidate, share
from scheduler.suspicion import End
from tests.scheduler.world import GREEDY, World


def wrong(prefix: Prefix) -> int:
    return position_token(prefix) + 1


def nothing(_: Prefix) -> None:
    return None


def now_and_then(prefix: Prefix) -> int | None:
    """Right, wrong or nothing, as the prefix has it."""
    fate = prefix.digest % 8
    return None if fate == 0 else prefix_hash_token(prefix) + (fate < 3)


def world_of(guess: NextToken, **shape: Any) -> World:
    """One executor that guesses so."""
    world = World(executors=0, credit=2)
    world.join(guess=guess, **shape)
    return world


def test_a_right_guess_is_a_step_less() -> None:
    world = world_of(position_token, max_drafts=3)
    world.add("a", prompt=5, max_tokens=8)

    assert world.step() == {"a": 5}
    assert world.tokens["a"] == [5, 6, 7]  # two drafts: a third was not worth while yet
    world.step()
    assert world.tokens["a"] == [5, 6, 7, 8, 9, 10, 11]
    world.run()
    assert world.tokens["a"] == list(range(5, 13))
    assert world.scheduler.counters.accepted_tokens == 5


def test_a_wrong_guess_tells_the_right_token_and_is_computed_again() -> None:
    world = world_of(wrong)
    world.add("a", prompt=5, max_tokens=4)
    for length in (6, 7, 8):
        world.step()
        assert world.tokens["a"] == list(range(5, length))
    world.run()

    assert world.tokens["a"] == [5, 6, 7, 8]
    assert world.scheduler.counters.accepted_tokens == 0


def test_nothing_is_planned_behind_a_row_whose_tokens_are_not_known_yet() -> None:
    world = world_of(position_token)
    world.add("a", prompt=5)
    plan = world.send()
    assert plan is not None and plan.max_drafts == [2]

    assert world.send() is None
    world.answer()
    assert world.send() is not None


def test_who_asks_for_no_drafts_gets_none_and_keeps_two_steps_in_flight() -> None:
    world = world_of(position_token)
    world.add("a", prompt=5, max_drafts=0)

    plan = world.send()
    assert plan is not None and not plan.max_drafts
    assert world.send() is not None


def test_a_request_may_limit_its_drafts() -> None:
    world = world_of(position_token)
    world.add("a", prompt=5, max_drafts=1)

    plan = world.send()
    assert plan is not None and plan.max_drafts == [1]


def test_drafts_end_where_the_answer_may() -> None:
    world = world_of(position_token, max_drafts=8)
    world.add("a", prompt=5, max_tokens=2)

    plan = world.send()
    assert plan is not None and plan.max_drafts == [1]
    world.answer()
    assert (world.tokens["a"], world.reasons["a"]) == ([5, 6], FinishReason.LENGTH)


def test_a_stop_token_among_right_guesses_is_the_last_token() -> None:
    world = world_of(position_token, max_drafts=8)
    world.add("a", prompt=5, stop_token_ids=(8,))
    world.run()

    assert (world.tokens["a"], world.reasons["a"]) == ([5, 6, 7, 8], FinishReason.STOP_TOKEN)


def test_a_step_that_is_full_of_rows_has_no_guesses() -> None:
    world = world_of(position_token, step_overhead_tokens=1)
    for name in "abc":
        world.add(name, prompt=1)

    plan = world.send()
    assert plan is not None and not plan.max_drafts


def test_drafts_take_no_block_that_a_token_may_need() -> None:
    world = world_of(position_token, num_blocks=3, max_drafts=8)
    world.add("a", prompt=4, max_tokens=8)
    plan = world.send()

    assert plan is not None
    assert plan.max_drafts == [2]
    assert len(plan.new[0].block_table) == 2, "one more is kept for the next token"
    world.run()
    assert world.tokens["a"] == list(range(4, 12))


@pytest.mark.parametrize("guess", [prefix_hash_token, now_and_then, nothing])
@pytest.mark.parametrize("num_blocks", [64, 14])
def test_tokens_are_those_of_a_world_without_guesses(guess: NextToken, num_blocks: int) -> None:
    def run(guess: NextToken | None) -> tuple[dict[str, list[int]], World]:
        world = World(executors=0, credit=2, next_token=prefix_hash_token, num_blocks=num_blocks)
        for _ in range(2):
            world.join(guess=guess, max_drafts=4)
        world.add("a", [7, 8, 9, 7, 8], max_tokens=30)
        world.add("b", [7, 8, 9, 7, 8, 1], max_tokens=20, n=3, sampling=SamplingParams(seed=5))
        world.add("c", 17, max_tokens=25, stop_token_ids=tuple(range(0, 1000, 40)))
        for _ in range(6):
            for session in list(world.runners):
                world.send(session)
                if world.sent[session]:
                    world.answer(session)
        world.lose(0)
        world.run()
        return world.tokens, world

    expected, _ = run(None)
    found, world = run(guess)
    assert found == expected
    assert bool(world.scheduler.counters.accepted_tokens) == (guess is not nothing)


def test_every_token_of_a_run_is_scored() -> None:
    world = world_of(position_token)
    ids = world.add("a", prompt=5, max_tokens=12, sampling=replace(GREEDY, logprobs=1))
    sequence = world.scheduler.sequence(ids[0])
    world.run()

    assert sequence.logprobs == [fake_logprobs(token, 1) for token in world.tokens["a"]]


def test_what_was_preempted_while_it_guessed_takes_all_its_tokens_with_it() -> None:
    world = world_of(position_token)
    world.add("a", prompt=5, max_tokens=20)
    world.send()
    sequence = world.scheduler.sequence(world.id("a"))
    world.scheduler._moves.preempt(world.scheduler.sessions[0], sequence)

    world.answer()
    assert world.tokens["a"] == [5, 6, 7]
    world.run()
    assert world.tokens["a"] == list(range(5, 25))


def test_a_prefix_hit_never_finds_a_guess_that_was_wrong() -> None:
    world = world_of(wrong)
    world.add("a", prompt=[7] * 6, max_tokens=14)
    world.run()
    world.add("b", prompt=[7] * 6 + world.tokens["a"], max_tokens=6)  # the slab says so if a block has other tokens
    world.run()

    assert world.tokens["b"] == list(range(20, 26))


def answered(world: World, **changes: object) -> None:
    """Fold a result back in that is not what the executor found."""
    result = execute(world.runners[0], world.sent[0].popleft())
    world.scheduler.update(0, replace(result, **changes), 0)  # type: ignore[arg-type]


def test_an_executor_may_not_bring_more_tokens_than_it_was_asked_for() -> None:
    world = world_of(position_token, max_drafts=1)
    world.add("a", prompt=5)
    plan = world.send()
    assert plan is not None
    with pytest.raises(ProtocolError, match="answered twice"):
        answered(world, refs=[plan.refs[0]] * 3, tokens=[5, 6, 7], indices=[0, 1, 2])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"drafted": []}, "more than it had drafts for"),
        ({"indices": [0, 2, 3]}, "output 2 of row"),
        ({"indices": [1, 0, 2]}, "output 1 of row"),
    ],
)
def test_a_run_is_checked_token_by_token(change: dict[str, list[int]], problem: str) -> None:
    world = world_of(position_token)
    world.add("a", prompt=5)
    world.send()
    with pytest.raises(ProtocolError, match=problem):
        answered(world, **change)
    assert world.tokens["a"] == []


def test_drafts_of_a_row_that_had_none_are_refused() -> None:
    world = world_of(position_token)
    world.add("a", prompt=5, max_drafts=0)
    plan = world.send()
    assert plan is not None
    with pytest.raises(ProtocolError, match="answered twice"):
        answered(world, refs=[plan.refs[0]] * 2, tokens=[5, 6], indices=[0, 1], drafted=[(plan.refs[0], 1)])


def test_tokens_behind_an_end_that_the_executor_did_not_see_are_dropped() -> None:
    world = World(executors=0, eos=frozenset({6}))
    world.join(guess=position_token)
    world.add("a", prompt=5)
    world.send()
    plan = world.sent[0].popleft()
    plan = replace(plan, new=[replace(plan.new[0], stop_token_ids=())])
    outputs = world.scheduler.update(0, execute(world.runners[0], plan), 0)

    assert [(output.token, output.reason) for output in outputs] == [
        (5, FinishReason.NONE),
        (6, FinishReason.EOS),
    ]
    assert world.scheduler.counters.rows_dropped == 1


# ---- how many


def drafts(*candidates: Candidate, num_tokens: int = 2, overhead: int = 1000, room: int = 100) -> list[int]:
    return share(candidates, num_tokens=num_tokens, overhead=overhead, room=room)


def test_the_likeliest_drafts_are_carried_first() -> None:
    sure, unsure = Candidate(0.9, 8), Candidate(0.5, 8)

    assert drafts(unsure, sure) == [1, 8]  # 0.5 ** 2 is not worth while
    assert drafts(unsure, sure, room=4) == [0, 4]
    assert drafts(unsure, sure, room=8) == [1, 7]  # 0.9 ** 7 is less than 0.5
    assert drafts(sure, sure, room=3) == [2, 1]


def test_nobody_carries_more_than_it_may_nor_what_is_not_worth_it() -> None:
    assert drafts(Candidate(1.0, 2), Candidate(WORTH - 0.01, 8), Candidate(0.9, 0)) == [2, 0, 0]
    assert drafts() == []
    assert drafts(Candidate(1.0, 8), room=0) == [0]


def test_a_draft_must_bring_more_for_its_time_than_the_step_does_without_it() -> None:
    sure = Candidate(0.8, 8)

    assert drafts(sure, num_tokens=1, overhead=12) == [5]
    assert drafts(*[sure] * 8, num_tokens=8, overhead=12) == [2] * 8
    assert drafts(*[sure] * 32, num_tokens=32, overhead=12) == [1] * 32
    assert drafts(*[sure] * 64, num_tokens=64, overhead=12) == [0] * 64
    assert drafts(sure, num_tokens=256, overhead=12) == [0], "beside a long prompt"
    assert drafts(sure, num_tokens=1, overhead=0) == [0]


@given(
    st.lists(st.builds(Candidate, st.floats(0, 1), st.integers(0, 8)), max_size=20),
    st.integers(1, 300),
    st.integers(0, 200),
    st.integers(0, 100),
)
def test_no_draft_makes_a_step_bring_less(candidates: list[Candidate], more: int, overhead: int, room: int) -> None:
    num_tokens = len(candidates) + more
    found = share(candidates, num_tokens=num_tokens, overhead=overhead, room=room)

    assert sum(found) <= room
    assert all(count <= each.most for count, each in zip(found, candidates, strict=True))
    chances = [each.chance**j for count, each in zip(found, candidates, strict=True) for j in range(1, count + 1)]
    rates, kept, computed = [num_tokens / (overhead + num_tokens)], float(num_tokens), overhead + num_tokens
    for chance in sorted(chances, reverse=True):
        kept, computed = kept + chance, computed + 1
        rates.append(kept / computed)
    assert all(later >= rate - 1e-12 for rate, later in pairwise(rates))


def test_drafts_that_are_not_kept_are_fewer_and_then_tried_now_and_then() -> None:
    acceptance = Acceptance()
    chances = [acceptance.chance(1)]
    while chances[-1]:
        acceptance.learn(2, 0)
        chances.append(acceptance.chance(1))

    assert chances == sorted(chances, reverse=True)
    assert [acceptance.chance(step) for step in range(TRY_EVERY + 1)] == [WORTH, *[0.0] * (TRY_EVERY - 1), WORTH]
    acceptance.learn(1, 1)
    assert acceptance.chance(1) > WORTH, "one that is kept brings it back"


def test_drafts_that_are_kept_become_more() -> None:
    acceptance = Acceptance()
    before = drafts(Candidate(acceptance.chance(1), 8))
    for _ in range(4):
        acceptance.learn(4, 4)

    assert before == [2]
    assert drafts(Candidate(acceptance.chance(1), 8)) == [8]


def test_no_guess_counts_as_a_wrong_one() -> None:
    acceptance = Acceptance()
    acceptance.learn(0, 0)

    assert acceptance.rate < Acceptance().rate


def test_who_died_with_guesses_is_trusted_when_it_is_past_them() -> None:
    world = world_of(position_token, max_drafts=2)
    world.join()
    world.add("a", prompt=5, max_tokens=9)
    world.send(0)
    world.lose(0, End.FAILED)
    assert world.scheduler.num_suspects == 1

    for computed in (5, 6):
        world.step(1)
        assert world.scheduler.num_suspects == 1, f"{computed} tokens are computed, and it died of up to 7"
    world.step(1)
    assert world.scheduler.num_suspects == 0
    world.run()
    assert world.tokens["a"] == list(range(5, 14))


def test_who_takes_long_to_guess_guesses_less() -> None:
    sure = Candidate(0.8, 8)

    assert share([sure], num_tokens=1, overhead=12, room=100, draft_cost=1.0) == [5]
    assert share([sure], num_tokens=1, overhead=12, room=100, draft_cost=5.0) == [2]
    assert share([sure] * 8, num_tokens=8, overhead=12, room=100, draft_cost=5.0) == [0] * 8
