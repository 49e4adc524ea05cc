"""Which block holds which tokens. A block is known by everything before it, so equal keys mean equal K and V.

Keys are a chain: key = BLAKE2b(parent key ‖ token ids), keyed with a secret of this process, rooted in model, tenant
and salt. So no caller can find or make a collision, and no tenant can reach another's blocks (CVE-2025-25183 and
CVE-2025-46570 are what weaker keys led to). Full blocks are shared; a block that matches only in its first tokens is
shared by copy, as vLLM and SGLang do.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import islice
from types import MappingProxyType
from typing import Final, NamedTuple, NewType, Protocol

from common.types import BlockId

BlockKey = NewType("BlockKey", bytes)


LOOKED_AT_ONCE: Final = 512
"""Blocks, where all of them are looked at: a millisecond or less, after which others may have their turn."""

_MAX_TAILS = 32  # youngest candidates looked at for a tail; more would cost a scheduler more than they save


class _Entry(NamedTuple):
    key: BlockKey
    parent: BlockKey
    tokens: Sequence[int]  # at most a block's worth; fewer for the last block of a sequence
    step: int  # the step that wrote its last token
    root: BlockKey  # what its chain begins with: of one model, tenant and salt


class CachedBlock(NamedTuple):
    """A whole block that is remembered."""

    key: BlockKey
    parent: BlockKey  # the root, for the first of a chain
    tokens: Sequence[int]


class CacheWatcher(Protocol):
    """Hears of the whole blocks of one root as they come and go. One that two executors have comes, and goes, twice."""

    def stored(self, block: CachedBlock) -> None:
        """The block is there once the step that is being planned has run."""
        ...

    def removed(self, key: BlockKey) -> None:
        """One executor has it no more."""
        ...


CacheWatchers = Mapping[BlockKey, Sequence[CacheWatcher]]
"""By the root of whose blocks they hear."""


class Tail(NamedTuple):
    """The start of a cached block that continues a prefix: worth a copy."""

    block: BlockId
    num_tokens: int


class Match(NamedTuple):
    """What of a sequence an executor has cached."""

    blocks: list[BlockId]  # full blocks, shared as they are
    tail: Tail | None  # the start of one more, shared by copy
    num_tokens: int


class PrefixCache:
    """The remembered blocks of one executor's slab. Holds no references: the pool decides what lives."""

    def __init__(self, block_size: int, watchers: CacheWatchers = MappingProxyType({})) -> None:
        self._block_size = block_size
        self._watchers = watchers
        self._block_of: dict[BlockKey, BlockId] = {}
        self._entry_of: dict[BlockId, _Entry] = {}
        # by parent and first token, so that a popular parent does not make every search long
        self._children: dict[tuple[BlockKey, int], dict[BlockId, None]] = {}

    def __contains__(self, block: BlockId) -> bool:
        return block in self._entry_of

    def __len__(self) -> int:
        return len(self._entry_of)

    @property
    def blocks(self) -> Set[BlockId]:
        """Whose content is remembered, as it is at any time."""
        return self._entry_of.keys()

    def find(self, key: BlockKey) -> BlockId | None:
        """The block with this key, if its content is still there."""
        return self._block_of.get(key)

    def find_tail(self, parent: BlockKey, tokens: Sequence[int], before_step: int) -> Tail | None:
        """The block after `parent` that shares most first tokens with `tokens`, written before the given step.

        Copies run before the forward of their step, so a block that the same step still writes cannot be a source.
        """
        best: Tail | None = None
        siblings = self._children.get((parent, tokens[0]), {}) if tokens else {}
        for block in islice(reversed(siblings), _MAX_TAILS):
            entry = self._entry_of[block]
            if entry.step >= before_step:
                continue
            shared = _shared_length(entry.tokens, tokens)
            if shared > (best.num_tokens if best else 0):
                best = Tail(block, shared)
        return best

    def snapshot(self, root: BlockKey) -> Iterator[list[CachedBlock]]:
        """The whole blocks of a root as they are now, in no order: an item to each LOOKED_AT_ONCE blocks of any root.

        Now that costs a list of references, half a millisecond for 100,000 blocks; the rest is for whoever iterates.
        """
        entries = list(self._entry_of.values())
        return (
            [
                CachedBlock(entry.key, entry.parent, entry.tokens)
                for entry in entries[start : start + LOOKED_AT_ONCE]
                if entry.root == root and len(entry.tokens) == self._block_size
            ]
            for start in range(0, len(entries), LOOKED_AT_ONCE)
        )

    def forget_all(self, root: BlockKey) -> Iterator[list[BlockId]]:
        """Forget the blocks of a root that are remembered now: an item to each LOOKED_AT_ONCE blocks of any root."""
        entries = list(self._entry_of.items())
        for start in range(0, len(entries), LOOKED_AT_ONCE):
            part = entries[start : start + LOOKED_AT_ONCE]
            # one whose content has changed since is another block
            blocks = [b for b, entry in part if entry.root == root and self._entry_of.get(b) is entry]
            for block in blocks:
                self.forget(block)
            yield blocks

    def remember(
        self, key: BlockKey, parent: BlockKey, tokens: Sequence[int], block: BlockId, step: int, root: BlockKey
    ) -> None:
        """The block holds these tokens once the step has run. The first block with a key keeps it."""
        if key in self._block_of:
            return
        self.forget(block)
        self._block_of[key] = block
        self._entry_of[block] = _Entry(key, parent, tokens, step, root)
        self._children.setdefault((parent, tokens[0]), {})[block] = None
        if self._watchers and len(tokens) == self._block_size:
            for watcher in self._watchers.get(root, ()):
                watcher.stored(CachedBlock(key, parent, tokens))

    def forget(self, block: BlockId) -> None:
        """The block's content is about to change."""
        entry = self._entry_of.pop(block, None)
        if entry is None:
            return
        del self._block_of[entry.key]
        place = (entry.parent, entry.tokens[0])
        siblings = self._children[place]
        del siblings[block]
        if not siblings:
            del self._children[place]
        if self._watchers and len(entry.tokens) == self._block_size:
            for watcher in self._watchers.get(entry.root, ()):
                watcher.removed(entry.key)

    def lost(self) -> None:
        """The executor is gone with all of it."""
        if self._watchers:
            for block in list(self._entry_of):
                self.forget(block)


class KeyChain:
    """Makes block keys. One for a scheduler; `secret` is drawn at its start (at most 64 bytes)."""

    def __init__(self, secret: bytes) -> None:
        self._keyed = hashlib.blake2b(key=secret, digest_size=32)  # copied for each key: cheaper than keying anew

    def root(self, *parts: str) -> BlockKey:
        """The parent of all first blocks of one model, tenant and salt."""
        blake = self._keyed.copy()
        for part in parts:
            encoded = part.encode()
            blake.update(len(encoded).to_bytes(4, "little"))  # so that ("ab", "c") is not ("a", "bc")
            blake.update(encoded)
        return BlockKey(blake.digest())

    def keys(self, root: BlockKey, tokens: array[int], block_size: int) -> list[BlockKey]:
        """The keys of all whole blocks of a prefix."""
        keys: list[BlockKey] = []
        for start in range(0, len(tokens) - block_size + 1, block_size):
            keys.append(self.child(keys[-1] if keys else root, tokens[start : start + block_size]))
        return keys

    def child(self, parent: BlockKey, tokens: array[int]) -> BlockKey:
        """The key of the block that holds `tokens` after everything `parent` stands for."""
        blake = self._keyed.copy()
        blake.update(parent + tokens.tobytes())
        return BlockKey(blake.digest())


def _shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
