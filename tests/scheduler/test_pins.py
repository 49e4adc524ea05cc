"""Pinned prefixes: what stays, what makes way, and who never notices."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from common.errors import InvalidRequest, Overloaded
from executor.fake_runner import prefix_hash_token
from scheduler.pins import Pin, PinLimits
from tests.scheduler.world import World

S = 1_000_000_000
SYSTEM = list(range(100, 112))  # three blocks


def pin(world: World, tokens: Sequence[int] = SYSTEM, *, seconds: int = 60, tenant: str = "", salt: str = "") -> Pin:
    """As the engine does it."""
    world.scheduler.prefixes.check_pin(tokens, world.now_ns, tenant=tenant, salt=salt)
    return world.scheduler.prefixes.pin(tokens, world.now_ns + seconds * S, tenant=tenant, salt=salt)


def ask(world: World, name: str, tokens: Sequence[int] = SYSTEM, *, tenant: str = "", salt: str = "") -> int:
    """Tokens of a prompt that had to be computed; all of its answer is waited for."""
    world.add(name, prompt=[*tokens, 7], max_tokens=1, tenant=tenant, salt=salt)
    computed = world.step()[name]
    world.run()
    return computed


def crowd(world: World, name: str, num_blocks: int) -> None:
    """Others use so many blocks, at the same time, and are gone."""
    world.add(name, prompt=4 * num_blocks - 1, max_tokens=1)
    world.run()


def test_a_pinned_prefix_outlasts_whatever_others_compute() -> None:
    for pinned in (False, True):
        world = World(num_blocks=16, max_model_len=64, pins=PinLimits(max_share=1))
        if pinned:
            pin(world)
        ask(world, "first")
        for i in range(5):
            crowd(world, f"other{i}", 12)
        assert ask(world, "again") == (1 if pinned else 13)
        world.scheduler.check()


def test_only_the_first_tokens_may_be_pinned_in_whole_blocks() -> None:
    world = World(num_blocks=16, max_model_len=64, pins=PinLimits(max_share=1))
    pin(world, SYSTEM[:10])
    ask(world, "first")
    assert world.scheduler.sessions[0].pool.num_kept == 2
    for i in range(3):
        crowd(world, f"other{i}", 12)
    assert ask(world, "again") == 13 - 8


def test_what_is_cached_already_can_be_pinned_and_nothing_is_computed_for_it() -> None:
    world = World()
    ask(world, "first")
    pin(world)
    assert world.scheduler.sessions[0].pool.num_kept == 3
    assert world.send() is None
    world.scheduler.check()


def test_a_pin_keeps_nobody_waiting_and_has_nobody_preempted() -> None:
    """Sixteen blocks, twelve of them pinned: who needs all gets all, at once."""
    for pinned in (False, True):
        world = World(num_blocks=16, max_model_len=64, pins=PinLimits(max_share=1), next_token=prefix_hash_token)
        prompts = [[n] * 12 for n in range(4)]
        for n, tokens in enumerate(prompts):
            if pinned:
                pin(world, tokens)
            ask(world, f"p{n}", tokens)
        assert world.num_free == 16, "pinned blocks are free"
        world.add("large", prompt=40, max_tokens=24)
        steps = 0
        while world.send() is not None:
            world.answer()
            steps += 1
        assert steps == 24 and len(world.tokens["large"]) == 24
        assert world.scheduler.counters.preemptions == 0
        world.scheduler.check()


def test_as_memory_runs_out_the_oldest_pin_goes_first_and_its_end_before_its_beginning() -> None:
    world = World(num_blocks=12, max_model_len=48, pins=PinLimits(max_share=1))
    old, new = SYSTEM, [token + 500 for token in SYSTEM]
    pin(world, new)
    pin(world, old)
    pin(world, new)  # asked for once more: the youngest by now
    ask(world, "new", new)
    ask(world, "old", old)
    crowd(world, "other", 12 - 6 + 1)
    assert world.scheduler.sessions[0].pool.num_kept == 5
    assert ask(world, "again", old) == 5, "its last block is lost"
    crowd(world, "more", 12 - 3)
    assert ask(world, "third", old) == 13, "all of it is"
    assert ask(world, "fourth", new) == 1
    world.scheduler.check()


def test_what_was_lost_is_kept_again_once_somebody_computes_it() -> None:
    world = World(num_blocks=16, max_model_len=64, pins=PinLimits(max_share=1))
    pin(world)
    ask(world, "first")
    crowd(world, "all", 16)
    assert world.scheduler.sessions[0].pool.num_kept == 0
    assert ask(world, "second") == 13
    crowd(world, "others", 12)
    assert ask(world, "third") == 1


def test_an_executor_that_is_lost_takes_the_blocks_with_it_and_not_the_promise() -> None:
    world = World(num_blocks=16, max_model_len=64, pins=PinLimits(max_share=1))
    pin(world)
    ask(world, "first")
    world.lose(0)
    session = world.join()
    assert world.scheduler.session(session).pool.num_kept == 0
    world.add("second", prompt=[*SYSTEM, 7], max_tokens=1)
    assert world.step(session) == {"second": 13}
    assert world.scheduler.session(session).pool.num_kept == 3
    world.scheduler.check()


def test_executors_with_blocks_of_other_sizes_keep_the_same_prefix() -> None:
    world = World(executors=0)
    pin(world)
    for block_size in (4, 8, 16):
        session = world.join(block_size=block_size)
        world.add(f"on {block_size}", prompt=[*SYSTEM, *SYSTEM], max_tokens=1)
        world.step(session)
        world.scheduler.check()
        assert world.scheduler.session(session).pool.num_kept == 12 // block_size
        world.lose(session)


def test_a_pin_ends_with_its_time_and_its_blocks_are_like_all_others() -> None:
    world = World(num_blocks=16, max_model_len=64, pins=PinLimits(max_share=1))
    pin(world, seconds=5)
    ask(world, "first")
    world.now_ns += 5 * S
    for i in range(2):
        crowd(world, f"other{i}", 12)
    assert not world.scheduler.prefixes.pins and world.scheduler.sessions[0].pool.num_kept == 0
    assert ask(world, "again") == 13


def test_a_pin_is_renewed_and_never_made_shorter() -> None:
    world = World()
    first = pin(world, seconds=10)
    assert pin(world, seconds=5) is first and first.until_ns == 10 * S
    assert pin(world, seconds=20) is first and first.until_ns == 20 * S
    assert len(world.scheduler.prefixes.pins) == 1 and world.scheduler.prefixes.pins.num_tokens == 12
    world.now_ns = 15 * S
    ask(world, "first")
    assert world.scheduler.sessions[0].pool.num_kept == 3


def test_pins_end_by_name_or_all_at_once_and_nobody_ends_those_of_another_tenant() -> None:
    world = World()
    mine, other = pin(world, tenant="me"), pin(world, tenant="other")
    pin(world, SYSTEM[:8], tenant="me")
    ask(world, "a", tenant="me")
    assert world.scheduler.sessions[0].pool.num_kept == 3
    assert mine.id != other.id
    assert world.scheduler.prefixes.unpin("me", other.id) == world.scheduler.prefixes.unpin("me", "what") == 0
    assert world.scheduler.prefixes.unpin("me", mine.id) == 12
    assert world.scheduler.sessions[0].pool.num_kept == 2, "the other pin's"
    assert world.scheduler.prefixes.unpin("me", None) == 8
    assert [pin.tenant for pin in world.scheduler.prefixes.pins] == ["other"]
    world.scheduler.check()


def test_a_pin_is_for_its_tenant_and_salt_alone() -> None:
    world = World(num_blocks=16, max_model_len=64, pins=PinLimits(max_share=1))
    pin(world, tenant="me", salt="salt")
    ask(world, "a", tenant="me")
    ask(world, "b", tenant="other", salt="salt")
    assert world.scheduler.sessions[0].pool.num_kept == 0
    ask(world, "c", tenant="me", salt="salt")
    assert world.scheduler.sessions[0].pool.num_kept == 3


def test_a_tenant_may_pin_so_many_tokens_and_is_told_when_to_come_back() -> None:
    world = World(pins=PinLimits(max_tokens_per_tenant=20, max_share=1))
    with pytest.raises(InvalidRequest, match="pin_tokens: at most 20 tokens of a tenant may be pinned, got 21"):
        pin(world, range(21), tenant="me")
    pin(world, seconds=7, tenant="me")
    with pytest.raises(Overloaded, match=r"pin_tokens: 12 tokens of this tenant .* over the limit of 20") as refused:
        pin(world, range(9), tenant="me")
    assert refused.value.retry_after_s == 7
    pin(world, tenant="me")  # once more is no more
    pin(world, range(8), tenant="me")
    pin(world, range(9), tenant="other")
    world.now_ns += 61 * S
    pin(world, range(20), tenant="me")
    assert world.scheduler.prefixes.pins.tokens_by_tenant == {"me": 20}


def test_a_tenant_may_have_so_many_pins() -> None:
    world = World(pins=PinLimits(max_pins_per_tenant=2))
    for n in range(2):
        pin(world, [n], tenant="me")
    with pytest.raises(Overloaded, match="this tenant has 2 pins, which is the limit"):
        pin(world, [2], tenant="me")
    pin(world, [2], tenant="other")


def test_all_tenants_together_may_pin_a_share_of_the_smallest_executor() -> None:
    world = World(num_blocks=64, pins=PinLimits(max_share=0.25))  # of 256 tokens
    world.join(num_blocks=32)
    with pytest.raises(InvalidRequest, match="pin_tokens: at most 32, a share of the KV cache, got 33"):
        pin(world, range(33), tenant="one")
    pin(world, range(20), tenant="one")
    with pytest.raises(Overloaded, match="13 tokens are more than all tenants together may still pin") as full:
        pin(world, range(13), tenant="two")
    assert full.value.retry_after_s == 10, "when another tenant's pin ends is not told"
    pin(world, range(12), tenant="two")


def test_without_prefix_caching_nothing_can_be_pinned() -> None:
    with pytest.raises(InvalidRequest, match="pin_seconds: there is no prefix cache here"):
        pin(World(prefix_caching=False))
