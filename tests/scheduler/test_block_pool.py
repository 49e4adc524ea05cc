"""References and the order of reuse."""

from __future__ import annotations

import pytest

from scheduler.block_pool import BlockPool, Reclaim


def test_the_block_that_was_free_for_longest_is_taken_first() -> None:
    pool = BlockPool(3)
    first, second = pool.take(), pool.take()
    pool.give_back(second, worth_keeping=True)
    pool.give_back(first, worth_keeping=True)

    assert [pool.take() for _ in range(3)] == [2, second, first]


def test_a_block_with_nothing_worth_keeping_is_taken_before_all_others() -> None:
    pool = BlockPool(3)
    block = pool.take()
    pool.give_back(block, worth_keeping=False)
    assert pool.take() == block


def test_a_free_block_that_is_held_again_is_no_longer_free() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.give_back(block, worth_keeping=True)
    pool.hold(block)

    assert pool.num_free == 1
    assert pool.take() != block


def test_giving_back_what_nobody_holds_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="once too often"):
        BlockPool(1).give_back(BlockPool(1).take(), worth_keeping=True)


def test_a_shared_block_comes_free_with_its_last_holder() -> None:
    pool = BlockPool(3)
    shared, own = pool.take(), pool.take()
    pool.hold(shared)
    reclaim = Reclaim(pool)

    assert reclaim.add([shared], late=False) == (0, 0)
    assert reclaim.add([shared, own], late=False) == (2, 0)
    assert pool.num_free == 1, "nothing was changed"


def test_a_shared_block_comes_free_late_when_any_holder_may_still_write_it() -> None:
    pool = BlockPool(3)
    shared, own = pool.take(), pool.take()
    pool.hold(shared)
    reclaim = Reclaim(pool)

    assert reclaim.add([shared], late=True) == (0, 0)
    assert reclaim.add([shared, own], late=False) == (1, 1)
