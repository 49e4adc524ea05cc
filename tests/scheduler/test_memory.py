"""Blocks: shared prefixes, copies, forks, preemption, and what an unanswered step still holds."""

from __future__ import annotations

from common.sampling import SamplingParams
from common.types import FinishReason
from executor.fake_runner import prefix_hash_token
from tests.scheduler.world import World


def test_a_full_block_of_a_shared_prefix_is_computed_once() -> None:
    world = World()
    world.add("a", prompt=list(range(10)), max_tokens=2)
    world.run()
    world.add("b", prompt=[*range(8), 77, 78, 79], max_tokens=2)

    assert world.step() == {"b": 3}
    world.run()
    assert world.tokens["b"] == [11, 12]


def test_the_partly_filled_last_block_is_shared_by_copy() -> None:
    world = World()
    world.add("a", prompt=list(range(7)), max_tokens=1)
    world.run()
    world.add("b", prompt=[*range(6), 99, 98], max_tokens=1)

    plan = world.send()
    assert plan is not None
    assert list(plan.num_scheduled) == [2], "six tokens came from the cache: four in a block, two by copy"
    assert len(plan.copies) == 1
    world.answer()


def test_requests_of_one_step_share_the_prefix_they_compute_in_it() -> None:
    world = World()
    world.add("a", prompt=list(range(12)), max_tokens=2)
    world.add("b", prompt=list(range(12)), max_tokens=2)

    assert world.step() == {"a": 12, "b": 4}
    world.run()
    assert world.tokens["a"] == world.tokens["b"]


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    world = World()
    world.add("a", prompt=list(range(8)), max_tokens=1)
    world.run()
    world.add("b", prompt=list(range(8)), max_tokens=1)
    assert world.step() == {"b": 1}
    assert world.tokens["b"] == [8]


def test_generated_tokens_are_found_by_the_next_turn_of_a_chat() -> None:
    world = World()
    prompt = list(range(6))
    world.add("first", prompt=prompt, max_tokens=7)
    world.run()
    world.add("second", prompt=[*prompt, *world.tokens["first"], 500, 501], max_tokens=1)

    assert world.step() == {"second": 3}, "only the last sampled token and the new ones"


def test_a_token_that_ended_a_sequence_is_never_taken_for_computed() -> None:
    world = World(credit=2, eos=frozenset({9}))
    prompt = list(range(100, 105))
    world.add("first", prompt=prompt, max_tokens=9)
    world.run()
    assert world.tokens["first"] == [5, 6, 7, 8, 9], "a second row was in flight for the 9, and was skipped"
    world.add("second", prompt=[*prompt, *world.tokens["first"], 500], max_tokens=1)

    assert world.step() == {"second": 2}, "the 9 and the 500"


def test_another_tenant_never_finds_a_block() -> None:
    world = World()
    world.add("a", prompt=list(range(12)), max_tokens=1, tenant="one")
    world.run()
    world.add("b", prompt=list(range(12)), max_tokens=1, tenant="two")

    assert world.step() == {"b": 12}


def test_without_prefix_caching_everything_is_computed() -> None:
    world = World(prefix_caching=False)
    world.add("a", prompt=list(range(8)), max_tokens=1)
    world.run()
    world.add("b", prompt=list(range(8)), max_tokens=1)
    assert world.step() == {"b": 8}


def test_choices_share_the_blocks_of_their_prompt() -> None:
    world = World(prefix_caching=False, num_blocks=16, block_size=4)
    world.add("c", prompt=14, n=4, max_tokens=3)
    world.step()
    assert world.num_free == 16 - 4

    world.step()
    assert world.num_free == 16 - 4 - 3, "three full blocks are shared, the fourth is copied by each"
    world.run()
    assert {tuple(world.tokens[f"c{i}"]) for i in range(4)} == {(14, 15, 16)}
    assert world.num_free == 16


def test_a_choice_writes_into_its_own_copy_of_a_full_last_block() -> None:
    world = World(prefix_caching=False, next_token=prefix_hash_token)
    seeded = SamplingParams(temperature=1.0, seed=7)
    world.add("c", prompt=list(range(8)), n=3, max_tokens=6, sampling=seeded)
    world.run()

    alone = World(prefix_caching=False, next_token=prefix_hash_token)
    alone.add("c", prompt=list(range(8)), n=1, max_tokens=6, sampling=seeded)
    alone.run()
    assert world.tokens["c0"] == alone.tokens["c"]
    assert len({tuple(world.tokens[f"c{i}"]) for i in range(3)}) == 3, "each choice draws its own numbers"


def test_the_youngest_gives_its_blocks_back_when_memory_runs_out() -> None:
    world = World(num_blocks=6, block_size=4, max_model_len=24)
    world.add("old", prompt=8, max_tokens=10)
    world.add("young", prompt=8, max_tokens=10)
    world.run()

    assert world.scheduler.counters.preemptions > 0
    assert world.tokens["old"] == list(range(8, 18))
    assert world.tokens["young"] == list(range(8, 18))


def test_preemption_never_changes_the_tokens() -> None:
    def tokens(num_blocks: int, credit: int) -> dict[str, list[int]]:
        world = World(num_blocks=num_blocks, max_model_len=48, credit=credit, next_token=prefix_hash_token)
        for i, name in enumerate("abcdefgh"):
            world.add(name, prompt=3 + 2 * i, max_tokens=12)
        world.run()
        preempted.append(world.scheduler.counters.preemptions)
        return world.tokens

    preempted: list[int] = []
    roomy = tokens(200, 1)
    assert tokens(13, 1) == roomy
    assert tokens(13, 2) == roomy
    assert preempted[0] == 0 and min(preempted[1:]) > 0


def test_a_block_is_not_reused_while_a_step_in_flight_may_write_it() -> None:
    world = World(num_blocks=8, credit=2)
    world.add("a", prompt=8, max_tokens=20)
    world.send()
    world.abort("a")
    assert world.num_free == 8 - 2, "held until the step is answered"

    world.answer()
    assert world.num_free == 8


def test_aborting_a_waiting_request_leaves_no_trace() -> None:
    world = World(max_sequences=1)
    world.add("a", prompt=4, max_tokens=3)
    world.add("b", prompt=4, max_tokens=3)
    world.step()
    world.abort("b")
    world.run()

    assert world.tokens == {"a": [4, 5, 6], "b": []}


def test_aborting_one_choice_leaves_the_others() -> None:
    world = World()
    world.add("c", prompt=9, n=3, max_tokens=4)
    world.step()
    world.abort("c0")
    world.run()

    assert world.tokens["c1"] == world.tokens["c2"] == [9, 10, 11, 12]


def test_a_row_without_finite_logits_ends_alone() -> None:
    world = World(next_token=lambda prefix: None if prefix.num_tokens == 12 else prefix.num_tokens)
    world.add("bad", prompt=10)
    world.add("good", prompt=3, max_tokens=4)
    world.run()

    assert world.reasons["bad"] is FinishReason.ERROR
    assert world.tokens == {"bad": [10, 11], "good": [3, 4, 5, 6]}
