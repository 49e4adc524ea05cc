"""What gets into a step, and in which order."""

from __future__ import annotations

import pytest

from common.errors import InvalidRequest
from common.types import FinishReason
from tests.scheduler.world import World


def test_a_long_prompt_is_prefilled_in_budget_sized_chunks() -> None:
    world = World(token_budget=4)
    world.add("a", prompt=10)

    assert world.step() == {"a": 4}
    assert world.step() == {"a": 4}
    assert world.step() == {"a": 2}
    assert world.step() == {"a": 1}
    assert world.tokens["a"] == [10, 11]


def test_decoding_sequences_go_before_a_new_prompt() -> None:
    world = World(token_budget=4)
    world.add("a", prompt=3)
    world.step()
    world.add("b", prompt=9)

    assert world.step() == {"a": 1, "b": 3}
    assert world.step() == {"a": 1, "b": 3}
    assert world.step() == {"a": 1, "b": 3}
    assert world.step() == {"a": 1, "b": 1}


def test_prompts_share_a_step_while_the_budget_lasts() -> None:
    world = World(token_budget=10)
    for name in "abc":
        world.add(name, prompt=4)

    assert world.step() == {"a": 4, "b": 4, "c": 2}


def test_a_request_ends_with_its_last_token_and_gives_everything_back() -> None:
    world = World(num_blocks=8)
    world.add("a", prompt=5, max_tokens=3)
    world.run()

    assert world.tokens["a"] == [5, 6, 7]
    assert world.reasons["a"] is FinishReason.LENGTH
    assert world.num_free == 8


def test_eos_ends_a_sequence_unless_it_is_ignored() -> None:
    world = World(eos=frozenset({7}))
    world.add("a", prompt=5)
    world.run()

    assert world.tokens["a"] == [5, 6, 7]
    assert world.reasons["a"] is FinishReason.EOS


def test_a_stop_token_of_the_request_ends_it() -> None:
    world = World()
    world.add("a", prompt=5, stop_token_ids=(6,))
    world.run()

    assert world.tokens["a"] == [5, 6]
    assert world.reasons["a"] is FinishReason.STOP_TOKEN


@pytest.mark.parametrize("credit", [1, 2, 3])
def test_steps_in_flight_do_not_change_the_tokens(credit: int) -> None:
    world = World(token_budget=7, credit=credit)
    for i, name in enumerate("abcdef"):
        world.add(name, prompt=3 + 4 * i, max_tokens=9)
    world.run()

    assert world.tokens == {name: list(range(3 + 4 * i, 12 + 4 * i)) for i, name in enumerate("abcdef")}


def test_a_second_step_is_planned_before_the_first_is_answered() -> None:
    world = World(credit=2)
    world.add("a", prompt=6)

    assert world.send() is not None
    second = world.send()
    assert second is not None and list(second.num_scheduled) == [1]
    assert world.send() is None, "the credit is used up"


def test_no_step_is_planned_past_the_last_token() -> None:
    world = World(credit=3)
    world.add("a", prompt=4, max_tokens=2)

    assert world.send() is not None
    assert world.send() is not None
    assert world.send() is None


def test_a_large_request_at_the_head_is_not_overtaken() -> None:
    world = World(num_blocks=8, max_model_len=32)
    world.add("running", prompt=8, max_tokens=20)
    world.step()
    world.add("large", prompt=27, max_tokens=2)
    world.add("small", prompt=2, max_tokens=2)

    assert world.step() == {"running": 1}
    world.run()
    assert world.reasons["large"] is FinishReason.LENGTH


def test_a_prompt_longer_than_any_executor_can_hold_is_refused_by_name() -> None:
    world = World(num_blocks=4, block_size=4, max_model_len=128)
    with pytest.raises(InvalidRequest, match=r"prompt: 16 tokens leave no room in the context of 16"):
        world.add("a", prompt=16)
    with pytest.raises(InvalidRequest, match=r"max_tokens: at most 6 after a prompt of 10 tokens, got 7"):
        world.add("a", prompt=10, max_tokens=7)


def test_a_full_executor_has_no_slot_for_one_more() -> None:
    world = World(max_sequences=2)
    for name in "abc":
        world.add(name, prompt=2, max_tokens=4)

    assert set(world.step()) == {"a", "b"}
    world.run()
    assert set(world.reasons) == {"a", "b", "c"}


def test_times_of_a_request_are_those_of_the_calls() -> None:
    world = World(token_budget=4)
    (id,) = world.add("a", prompt=6, max_tokens=3)
    sequence = world.scheduler.sequence(id)
    world.run()

    assert (sequence.arrived_ns, sequence.admitted_ns) == (0, 1)
    assert sequence.admitted_ns < sequence.first_token_ns < sequence.last_token_ns
