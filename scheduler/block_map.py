"""What is in each KV block of an executor, one byte a block: for a person who looks on. Pure, and changes nothing."""

from __future__ import annotations

import enum
from typing import NamedTuple

from common.types import BlockId
from scheduler.block_pool import BlockPool
from scheduler.prefix_cache import PrefixCache


class BlockState(enum.IntEnum):
    """The numbers are those of the wire."""

    FREE = 0  # with nothing in it that could be found
    HELD = 1  # by one sequence
    SHARED = 2  # held by several
    CACHED = 3  # free, and what it holds may be found until it is reused
    PINNED = 4  # the same, and it is reused last


class BlockMap(NamedTuple):
    """The blocks in order. Of a large pool, one of every `blocks_per_cell`, from the first on."""

    cells: bytes  # a BlockState each
    blocks_per_cell: int


def block_map(pool: BlockPool, cache: PrefixCache, max_cells: int) -> BlockMap:
    """At most `max_cells` cells, and as much work, however many blocks there are.

    What a large pool has between two cells is not looked at: a step must not wait for a picture of it.
    """
    every = -(-pool.num_blocks // max_cells) or 1
    shared = BlockState.SHARED.value
    cells = bytearray([shared if count > 1 else count for count in pool.ref_counts(every)])
    remembered = cache.blocks  # not asked by a method: there are thousands of cells
    for i, cell in enumerate(cells):
        if not cell and i * every in remembered:
            cells[i] = BlockState.PINNED if pool.is_kept(BlockId(i * every)) else BlockState.CACHED
    return BlockMap(bytes(cells), every)
