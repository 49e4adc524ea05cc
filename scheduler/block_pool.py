"""Who holds which block. Counts references, hands out free blocks in least-recently-used order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from common.types import BlockId


class BlockPool:
    """The blocks of one executor's KV slab.

    A block is *held* while its reference count is positive and *free* otherwise. A free block keeps its content until
    it is taken again, so what the prefix cache knows of it stays true until then: caching costs no memory.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        # the order is the order of reuse: the front goes first; ascending ids at the start read faster from memory
        self._free: OrderedDict[BlockId, None] = OrderedDict((BlockId(b), None) for b in range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now, remembered content or not."""
        return len(self._free)

    def ref_count(self, block: BlockId) -> int:
        """How many sequences hold the block."""
        return self._ref_counts[block]

    def take(self) -> BlockId:
        """The block that was free for longest, held once. What was cached in it is void: the caller forgets it."""
        assert self._free, f"asked for a block, 0 of {self.num_blocks} free"
        block, _ = self._free.popitem(last=False)
        self._ref_counts[block] = 1
        return block

    def hold(self, block: BlockId) -> None:
        """One more reference: a shared prefix or a fork."""
        if self._ref_counts[block] == 0:
            del self._free[block]
        self._ref_counts[block] += 1

    def give_back(self, block: BlockId, *, worth_keeping: bool) -> None:
        """One reference less. The last one frees the block; content worth keeping goes to the end of the line."""
        assert self._ref_counts[block] > 0, f"block {block} given back once too often"
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            self._free[block] = None
            if not worth_keeping:
                self._free.move_to_end(block, last=False)

    def check(self, holders: Iterable[Iterable[BlockId]]) -> None:
        """Assert that every block is either free or held exactly by `holders`. For tests: walks everything."""
        counts = [0] * self.num_blocks
        for table in holders:
            for block in table:
                counts[block] += 1
        assert counts == self._ref_counts, "reference counts differ from what is held"
        assert {b for b, count in enumerate(counts) if count == 0} == set(self._free), "free is not what nobody holds"


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
