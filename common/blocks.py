"""Where a token's K and V live. Both sides of the split use these formulas, so they cannot drift."""

from __future__ import annotations

from collections.abc import Sequence

from common.types import BlockId


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


def slot_mapping(block_table: Sequence[BlockId], start: int, stop: int, block_size: int) -> list[int]:
    """Slots of the tokens at positions [start, stop): slot = block * block_size + offset in block."""
    assert stop <= len(block_table) * block_size, f"position {stop} in {len(block_table)} blocks of {block_size}"
    return [block_table[p // block_size] * block_size + p % block_size for p in range(start, stop)]
