"""What a person who looks on sees of an executor's blocks and of the line."""

from __future__ import annotations

from collections import Counter

from common.types import Priority
from scheduler.block_map import BlockState, block_map
from scheduler.block_pool import BlockPool
from scheduler.line import Waiting
from scheduler.prefix_cache import PrefixCache
from tests.scheduler.world import World

FREE, HELD, SHARED, CACHED, PINNED = BlockState


def cells(world: World, max_cells: int = 4096) -> list[BlockState]:
    session = world.scheduler.sessions[0]
    return [BlockState(cell) for cell in block_map(session.pool, session.cache, max_cells).cells]


def test_a_block_is_shown_as_what_it_is() -> None:
    world = World()
    assert cells(world) == [FREE] * 64

    world.scheduler.prefixes.pin(range(4), 10**18, tenant="")
    world.add("gone", prompt=list(range(12)), max_tokens=1)
    world.run()
    assert Counter(cells(world)) == {FREE: 61, CACHED: 2, PINNED: 1}

    world.add(
        "two", prompt=list(range(500, 509)), n=2
    )  # two blocks of a prompt that are shared; each has its own third
    world.step()
    world.step()
    assert Counter(cells(world)) == {FREE: 57, CACHED: 2, PINNED: 1, SHARED: 2, HELD: 2}


def test_of_a_large_pool_no_more_blocks_are_looked_at_than_are_shown() -> None:
    pool, cache = BlockPool(100_003), PrefixCache(16)
    for _ in range(600):
        pool.take()

    shown = block_map(pool, cache, 4096)

    assert shown.blocks_per_cell == 25
    assert len(shown.cells) == 4001
    assert shown.cells.count(HELD) == 24  # blocks 0, 25, …, 575


def test_a_pool_that_fits_is_shown_block_by_block() -> None:
    assert block_map(BlockPool(4096), PrefixCache(16), 4096).blocks_per_cell == 1
    assert block_map(BlockPool(1), PrefixCache(16), 4096).cells == bytes([FREE])


def test_who_waits_is_told_by_tenant_and_priority_and_what_has_begun_apart() -> None:
    world = World(num_blocks=4, max_sequences=2)
    world.add("a", prompt=8, tenant="one", max_tokens=4)
    world.add("b", prompt=8, tenant="one", max_tokens=4)
    world.step()
    world.step()  # a and b fill the pool, and one of them is preempted
    for name in ("c", "d"):
        world.add(name, prompt=5, tenant="two", priority=Priority.LOW, max_tokens=7)

    begun, queued = world.scheduler.waiting.queues()

    assert begun == Waiting("one", Priority.NORMAL, 1, 12, begun=True, arrived_ns=0)
    assert queued == Waiting("two", Priority.LOW, 2, 24, begun=False, arrived_ns=world.now_ns)
