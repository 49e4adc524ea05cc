"""What a lost executor had is computed again beside what is new, and neither starves the other."""

from __future__ import annotations

import pytest

from executor.fake_runner import prefix_hash_token
from scheduler.suspicion import End
from tests.scheduler.world import World


def after_a_loss(*prompts: int, token_budget: int = 16, max_sequences: int = 16) -> World:
    """The sequences `a`, `b`, … were being computed when their executor was lost."""
    world = World(token_budget=256, prefix_caching=False, num_blocks=128, max_sequences=max_sequences)
    for name, prompt in zip("abcd", prompts, strict=False):
        world.add(name, prompt=prompt, max_tokens=8)
    world.step()
    world.lose(0, End.CLEAN)
    world.join(max_step_tokens=token_budget)
    return world


def test_replays_get_half_of_the_prefill_budget_while_new_ones_wait() -> None:
    world = after_a_loss(30)
    world.add("new", prompt=20, max_tokens=8)

    assert world.step(1) == {"a": 8, "new": 8}
    assert world.step(1) == {"a": 8, "new": 8}
    assert world.step(1) == {"a": 12, "new": 4}, "what the new one does not want is not wasted"


def test_replays_get_all_of_it_when_nobody_else_wants_it() -> None:
    world = after_a_loss(30, 30)

    assert world.step(1) == {"a": 16}
    assert world.step(1) == {"a": 15, "b": 1}
    assert world.step(1) == {"a": 1, "b": 15}


def test_the_first_of_the_replays_go_first() -> None:
    world = after_a_loss(30, 30, 30)
    world.add("new", prompt=40, max_tokens=8)

    assert world.step(1) == {"a": 8, "new": 8}
    assert world.step(1) == {"a": 8, "new": 8}
    assert world.step(1) == {"a": 8, "new": 8}
    assert world.step(1) == {"a": 7, "b": 1, "new": 8}


def test_rows_of_one_token_are_no_replays_and_go_first() -> None:
    world = after_a_loss(30)
    world.add("small", prompt=1, max_tokens=8)
    world.add("new", prompt=20, max_tokens=8)
    assert world.step(1) == {"a": 8, "small": 1, "new": 7}

    assert world.step(1) == {"a": 8, "small": 1, "new": 7}, "half of the 15 that are left, rounded up"


def test_new_ones_that_find_no_room_leave_the_budget_to_the_replays() -> None:
    world = after_a_loss(30, max_sequences=1)
    world.add("new", prompt=20, max_tokens=8)

    assert world.step(1) == {"a": 16}


def test_an_executor_that_leaves_replays_at_full_speed() -> None:
    world = after_a_loss(40)
    world.add("new", prompt=20, max_tokens=8)
    assert world.step(1) == {"a": 8, "new": 8}
    world.scheduler.leave(1)
    assert world.step(1) == {"a": 8, "new": 8}
    assert world.step(1) == {"a": 12, "new": 4}


def test_a_replay_takes_no_more_blocks_than_there_are() -> None:
    world = World(token_budget=64, num_blocks=12, prefix_caching=False, next_token=prefix_hash_token)
    world.add("a", prompt=30, max_tokens=8)
    world.step()
    world.lose(0, End.CLEAN)
    world.join(max_step_tokens=16, num_blocks=12)
    world.add("new", prompt=9, max_tokens=8)
    world.run()

    assert {len(tokens) for tokens in world.tokens.values()} == {8}


@pytest.mark.parametrize("n", [1, 3])
def test_a_sequence_that_has_caught_up_is_no_replay_any_more(n: int) -> None:
    world = World(token_budget=256)
    world.add("a", prompt=10, max_tokens=3, n=n)
    world.step()
    world.lose(0, End.CLEAN)
    world.join()
    world.step(1)
    world.step(1)

    assert not world.scheduler._replays


def test_a_long_prompt_that_runs_keeps_no_replay_waiting() -> None:
    world = World(token_budget=16, executors=2, prefix_caching=False)
    world.add("long", prompt=100, max_tokens=8)
    assert world.step(0) == {"long": 16}
    world.add("moved", prompt=30, max_tokens=8)
    world.scheduler.fell_silent(0)
    world.step(1)
    world.lose(1, End.CLEAN)
    world.scheduler.spoke(0)

    assert world.step(0) == {"long": 8, "moved": 8}


def test_what_is_kept_for_replays_that_find_no_room_is_not_wasted() -> None:
    world = World(token_budget=16, executors=2, prefix_caching=False, num_blocks=20)
    world.add("long", prompt=70, max_tokens=2)
    assert world.step(0) == {"long": 16}
    world.add("moved", prompt=30, max_tokens=8)
    world.scheduler.fell_silent(0)
    world.step(1)
    world.lose(1, End.CLEAN)
    world.scheduler.spoke(0)

    assert world.step(0) == {"long": 16}, "its blocks are promised, and leave too few"
