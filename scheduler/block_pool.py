"""Who holds which block. Counts references, hands out free blocks in least-recently-used order, kept ones last."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from common.types import BlockId


class Rank(NamedTuple):
    """When a kept block is reused: the least goes first."""

    order: int  # of the pin that it is kept for
    place: int  # its index in that prefix, negative: the end of one is worth less than its start


class BlockPool:
    """The blocks of one executor's KV slab.

    A block is *held* while its reference count is positive and *free* otherwise. A free block keeps its content until
    it is taken again, so what the prefix cache knows of it stays true until then: caching costs no memory.

    A block may be *kept* (scheduler/pins.py), whoever holds it: when it is free it is free like any other, and counts
    as such, but goes last.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        # the order is the order of reuse: the front goes first; ascending ids at the start read faster from memory
        self._free: OrderedDict[BlockId, None] = OrderedDict((BlockId(b), None) for b in range(num_blocks))
        self._ranks: dict[BlockId, Rank] = {}  # of the blocks that are kept
        self._kept: list[tuple[Rank, BlockId]] = []  # those of them that are free, in order of their reuse

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now, remembered content or not."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Blocks that are kept, free or not."""
        return len(self._ranks)

    def ref_count(self, block: BlockId) -> int:
        """How many sequences hold the block."""
        return self._ref_counts[block]

    def ref_counts(self, every: int = 1) -> list[int]:
        """How many sequences hold each block, or one of every so many."""
        return self._ref_counts[::every]

    def is_kept(self, block: BlockId) -> bool:
        """The block is reused last."""
        return block in self._ranks

    def take(self) -> BlockId:
        """The block that was free for longest, held once. What was cached in it is void: the caller forgets it.

        A kept one where no other is free: it is kept no longer.
        """
        if self._free:
            block, _ = self._free.popitem(last=False)
        else:
            assert self._kept, f"asked for a block, 0 of {self.num_blocks} free"
            _, block = self._kept.pop(0)
            del self._ranks[block]
        self._ref_counts[block] = 1
        return block

    def hold(self, block: BlockId) -> None:
        """One more reference: a shared prefix or a fork."""
        if self._ref_counts[block] == 0:
            self._unlist(block)
        self._ref_counts[block] += 1

    def give_back(self, block: BlockId, *, worth_keeping: bool) -> None:
        """One reference less. The last one frees the block; content worth keeping goes to the end of the line."""
        assert self._ref_counts[block] > 0, f"block {block} given back once too often"
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            self._list(block)
            if not worth_keeping and block not in self._ranks:
                self._free.move_to_end(block, last=False)

    def keep(self, block: BlockId, rank: Rank | None) -> None:
        """Reuse it after all that are not kept, and by its rank among those that are. With None, keep it no longer."""
        if self._ranks.get(block) == rank:
            return
        is_free = self._ref_counts[block] == 0
        if is_free:
            self._unlist(block)
        if rank is None:
            del self._ranks[block]
        else:
            self._ranks[block] = rank
        if is_free:
            self._list(block)

    def _list(self, block: BlockId) -> None:
        rank = self._ranks.get(block)
        if rank is None:
            self._free[block] = None
        else:
            bisect.insort(self._kept, (rank, block))

    def _unlist(self, block: BlockId) -> None:
        rank = self._ranks.get(block)
        if rank is None:
            del self._free[block]
        else:
            index = bisect.bisect_left(self._kept, (rank, block))
            assert self._kept[index] == (rank, block), f"block {block} is kept and not where it belongs"
            del self._kept[index]

    def kept(self) -> list[BlockId]:
        """Blocks that are kept; for checks."""
        return list(self._ranks)

    def check(self, holders: Iterable[Iterable[BlockId]]) -> None:
        """Assert that every block is either free or held exactly by `holders`. For tests: walks everything."""
        counts = [0] * self.num_blocks
        for table in holders:
            for block in table:
                counts[block] += 1
        assert counts == self._ref_counts, "reference counts differ from what is held"
        free = {b for b, count in enumerate(counts) if count == 0}
        kept = [block for _, block in self._kept]
        assert free == {*self._free, *kept}, "free is not what nobody holds"
        assert len(free) == self.num_free, "a block is free twice"
        assert sorted(kept) == sorted(b for b in self._ranks if b in free), "kept is not what is free and has a rank"
        assert self._kept == sorted(self._kept), "kept blocks are out of order"


class Reclaim:
    """What would come free if tables were given back, one after the other. Counts, and changes nothing."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._given: dict[BlockId, int] = {}
        self._late: set[BlockId] = set()  # a step in flight may write it: free only when that is answered

    def add(self, table: Iterable[BlockId], *, late: bool) -> tuple[int, int]:
        """One more table. Returns the blocks that nobody holds any more with it: (free at once, free later)."""
        now = later = 0
        for block in table:
            given = self._given[block] = self._given.get(block, 0) + 1
            if late:
                self._late.add(block)
            if given == self._pool.ref_count(block):
                if block in self._late:
                    later += 1
                else:
                    now += 1
        return now, later
