"""The slab: its size, its shapes, its copies."""

from __future__ import annotations

import pytest
import torch

from common.errors import ModelFolderError
from executor.kv_cache import KvCache, LayerShape, block_bytes, free_bytes, num_blocks_for

CPU = torch.device("cpu")
WIDE = LayerShape(num_heads=8, num_kv_heads=4, key_dim=16, value_dim=16)
NARROW = LayerShape(num_heads=8, num_kv_heads=2, key_dim=24, value_dim=8)


def test_layers_may_differ_in_shape() -> None:
    cache = KvCache([WIDE, NARROW], num_blocks=3, block_size=4, dtype=torch.bfloat16, device=CPU)

    assert [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers] == [
        ((3, 4, 4, 16), (3, 4, 4, 16)),
        ((3, 2, 4, 24), (3, 2, 4, 8)),
    ]
    taken = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert taken == 3 * block_bytes([WIDE, NARROW], 4, torch.bfloat16)


def test_copies_are_done_one_after_the_other() -> None:
    cache = KvCache([WIDE], num_blocks=4, block_size=2, dtype=torch.float32, device=CPU)
    layer = cache.layers[0]
    for block in range(4):
        layer.keys[block] = block
        layer.values[block] = -block

    cache.copy_blocks([(3, 1), (1, 2)])

    assert [set(layer.keys[block].view(-1).tolist()) for block in range(4)] == [{0}, {3}, {3}, {3}]
    assert [set(layer.values[block].view(-1).tolist()) for block in range(4)] == [{0}, {-3}, {-3}, {-3}]


def test_a_budget_becomes_blocks_and_too_small_a_one_is_refused() -> None:
    each = block_bytes([WIDE], 4, torch.float32)
    assert each == 4 * 4 * 32 * 4

    def blocks(budget: int) -> int:
        return num_blocks_for(budget, [WIDE], block_size=4, dtype=torch.float32, max_model_len=9)

    assert blocks(10 * each + 1) == 10
    with pytest.raises(ModelFolderError, match="hold 8 tokens, one sequence may have 9"):
        blocks(3 * each - 1)


def test_free_memory_is_a_plausible_number_of_bytes() -> None:
    assert 1 << 20 < free_bytes(CPU) < 1 << 50
