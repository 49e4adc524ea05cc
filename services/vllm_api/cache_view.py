"""Which blocks a prompt could find: those whose chain is whole. Pure: blocks come and go, and what changes comes out.

A prompt is matched from its beginning, so a block behind one that is gone is not found, though it is still there; it is
again when the missing one is computed again. A block that several executors have is one, and gone with the last.
"""

from __future__ import annotations

from scheduler.prefix_cache import BlockKey, CachedBlock


class CacheView:
    """The blocks of one root, and which of them can be found. Blocks may come in any order.

    Executors may have blocks of several sizes; who routes by them knows one. It is that of the first block, for as long
    as there is any of that size: others are left out.
    """

    def __init__(self, root: BlockKey) -> None:
        self._root = root
        self._blocks: dict[BlockKey, CachedBlock] = {}
        self._copies: dict[BlockKey, int] = {}  # executors that have it
        self._children: dict[BlockKey, dict[BlockKey, None]] = {}
        self._found: set[BlockKey] = set()
        self._block_size = 0

    def __len__(self) -> int:
        """Blocks that can be found."""
        return len(self._found)

    def stored(self, block: CachedBlock) -> list[CachedBlock]:
        """An executor has the block. Returns those that can be found now and could not before, parents first."""
        if not self._blocks:
            self._block_size = len(block.tokens)
        if len(block.tokens) != self._block_size:
            return []
        copies = self._copies.get(block.key, 0)
        self._copies[block.key] = copies + 1
        if copies:
            return []
        self._blocks[block.key] = block
        self._children.setdefault(block.parent, {})[block.key] = None
        if block.parent != self._root and block.parent not in self._found:
            return []
        new: list[CachedBlock] = []
        todo = [block]
        while todo:
            reached = todo.pop()
            new.append(reached)
            self._found.add(reached.key)
            todo += (self._blocks[key] for key in self._children.get(reached.key, ()))
        return new

    def removed(self, key: BlockKey) -> list[BlockKey]:
        """An executor has it no more. Returns those that could be found until now, children last."""
        copies = self._copies.get(key, 0)
        if not copies:
            return []  # of a size that is left out
        if copies > 1:
            self._copies[key] = copies - 1
            return []
        del self._copies[key]
        parent = self._blocks.pop(key).parent
        del self._children[parent][key]
        if not self._children[parent]:
            del self._children[parent]
        gone: list[BlockKey] = []
        todo = [key] if key in self._found else []
        while todo:
            lost = todo.pop()
            gone.append(lost)
            self._found.remove(lost)
            todo += self._children.get(lost, ())  # what stood behind one that was found was found, too
        return gone
