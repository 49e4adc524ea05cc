"""Which blocks a prompt could find: those whose chain is whole. Pure: blocks come and go, and what changes comes out.

What comes out is found as it is iterated over, so that whoever does may pause: a block may have any number behind it.
Iterate to the end before the next change.

A prompt is matched from its beginning, so a block behind one that is gone is not found, though it is still there; it is
again when the missing one is computed again. A block that several executors have is one, and gone with the last.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.prefix_cache import BlockKey, CachedBlock


class CacheView:
    """The blocks of one root, and which of them can be found. Blocks may come in any order.

    Executors may have blocks of several sizes; who routes by them knows one. It is that of the first block, for as long
    as there is any of that size: others are left out, so behind the last of it this view knows too little of them
    (`is_outdated`).
    """

    def __init__(self, root: BlockKey) -> None:
        self._root = root
        self._blocks: dict[BlockKey, CachedBlock] = {}
        self._copies: dict[BlockKey, int] = {}  # executors that have it
        self._children: dict[BlockKey, dict[BlockKey, None]] = {}
        self._found: set[BlockKey] = set()
        self._block_size = 0
        self._left_out = False  # a block, because of its size
        self.is_outdated = False

    def __len__(self) -> int:
        """Blocks that can be found."""
        return len(self._found)

    def stored(self, block: CachedBlock) -> Iterator[CachedBlock]:
        """An executor has the block. Yields those that can be found now and could not before, parents first."""
        if not self._blocks:
            self._block_size = len(block.tokens)
        if len(block.tokens) != self._block_size:
            self._left_out = True
            return
        copies = self._copies.get(block.key, 0)
        self._copies[block.key] = copies + 1
        if copies:
            return
        self._blocks[block.key] = block
        self._children.setdefault(block.parent, {})[block.key] = None
        if block.parent != self._root and block.parent not in self._found:
            return
        for key in self._from(block.key):
            self._found.add(key)
            yield self._blocks[key]

    def removed(self, key: BlockKey) -> Iterator[BlockKey]:
        """An executor has it no more. Yields those that could be found until now, children last."""
        copies = self._copies.get(key, 0)
        if not copies:
            return  # of a size that is left out
        if copies > 1:
            self._copies[key] = copies - 1
            return
        del self._copies[key]
        parent = self._blocks.pop(key).parent
        del self._children[parent][key]
        if not self._children[parent]:
            del self._children[parent]
        self.is_outdated = not self._blocks and self._left_out
        if key in self._found:
            for lost in self._from(key):  # what stood behind one that was found was found, too
                self._found.remove(lost)
                yield lost

    def _from(self, key: BlockKey) -> Iterator[BlockKey]:
        """The block and all behind it, parents first."""
        todo = [key]
        while todo:
            reached = todo.pop()
            yield reached
            todo += self._children.get(reached, ())
