"""The slab: its size, its shapes, its copies."""

from __future__ import annotations

import random

import pytest
import torch

from common.errors import ModelFolderError
from executor.kv_cache import KvCache, LayerShape, SlabFormat, block_bytes, copied_together, fit_slab, free_bytes

CPU = torch.device("cpu")
WIDE = LayerShape(num_heads=8, num_kv_heads=4, key_dim=16, value_dim=16)
NARROW = LayerShape(num_heads=8, num_kv_heads=2, key_dim=24, value_dim=8)


def cache_of(num_blocks: int, dtype: torch.dtype) -> KvCache:
    return KvCache([WIDE, NARROW], num_blocks=num_blocks, block_size=4, format=SlabFormat(dtype=dtype), device=CPU)


def test_layers_may_differ_in_shape() -> None:
    cache = KvCache([WIDE, NARROW], num_blocks=3, block_size=4, format=SlabFormat(dtype=torch.bfloat16), device=CPU)

    assert [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers] == [
        ((3, 4, 4, 16), (3, 4, 4, 16)),
        ((3, 2, 4, 24), (3, 2, 4, 8)),
    ]
    taken = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert taken == 3 * block_bytes([WIDE, NARROW], 4, SlabFormat(dtype=torch.bfloat16))


def test_copies_are_done_one_after_the_other() -> None:
    cache = KvCache([WIDE], num_blocks=4, block_size=2, format=SlabFormat(dtype=torch.float32), device=CPU)
    layer = cache.layers[0]
    for block in range(4):
        layer.keys[block] = block
        layer.values[block] = -block

    cache.copy_blocks([(3, 1), (1, 2)])

    assert [set(layer.keys[block].view(-1).tolist()) for block in range(4)] == [{0}, {3}, {3}, {3}]
    assert [set(layer.values[block].view(-1).tolist()) for block in range(4)] == [{0}, {-3}, {-3}, {-3}]


def fit(budget_bytes: int, max_model_len: int | None = None, max_sequences: int = 8) -> tuple[int, int]:
    return fit_slab(
        [WIDE],
        block_size=4,
        format=SlabFormat(dtype=torch.float32),
        budget_bytes=budget_bytes,
        max_sequences=max_sequences,
        longest=40,
        max_model_len=max_model_len,
    )


EACH = 4 * 4 * 32 * 4  # bytes: heads, tokens, K and V numbers of a head, bytes of a number


def test_the_slab_takes_what_the_budget_allows_and_no_more_than_all_slots_can_use() -> None:
    assert fit(30 * EACH + 1) == (30, 40)
    assert fit(1000 * EACH) == (80, 40)
    assert fit(1000 * EACH, max_sequences=2) == (20, 40)
    assert fit(1000 * EACH, max_model_len=9) == (24, 9)


def test_sequences_are_cut_to_what_fits_unless_a_length_is_wanted() -> None:
    assert fit(3 * EACH) == (3, 12)
    assert fit(3 * EACH, max_model_len=12) == (3, 12)
    with pytest.raises(ModelFolderError, match="hold 12 tokens, one sequence may have 13"):
        fit(3 * EACH, max_model_len=13)
    with pytest.raises(ModelFolderError, match="hold 0 tokens"):
        fit(EACH - 1)


@pytest.mark.parametrize("wanted", [1, 41])
def test_a_length_that_the_model_does_not_have_is_refused(wanted: int) -> None:
    with pytest.raises(ModelFolderError, match=r"max_model_len must be in \[2, 40\]"):
        fit(1000 * EACH, max_model_len=wanted)


def test_free_memory_is_a_plausible_number_of_bytes() -> None:
    assert 1 << 20 < free_bytes(CPU) < 1 << 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_blocks_that_are_copied_together_come_to_the_same_as_one_after_the_other(dtype: torch.dtype) -> None:
    rng = random.Random(3)
    for _ in range(50):
        copies = [(rng.randrange(6), rng.randrange(6)) for _ in range(rng.randrange(8))]
        slowly, together = (cache_of(6, dtype=dtype) for _ in range(2))
        for cache in (slowly, together):
            for layer in cache.layers:
                for slab in (layer.keys, layer.values):
                    slab.copy_((torch.arange(slab.numel()) % 251).view_as(slab))

        slowly.copy_blocks(copies)
        blocks = torch.tensor(copies, dtype=torch.int64).view(-1, 2)
        for run in copied_together(copies):
            together.copy_together(blocks[run, 0], blocks[run, 1])

        for ours, theirs in zip(together.layers, slowly.layers, strict=True):
            assert ours.keys.float().equal(theirs.keys.float()) and ours.values.float().equal(theirs.values.float())


def test_copies_that_have_nothing_to_do_with_each_other_are_one_run() -> None:
    assert copied_together([(0, 1), (2, 3), (0, 4), (3, 5)]) == [slice(0, 3), slice(3, 4)]
    assert copied_together([]) == []


def test_a_slab_is_resized_under_the_hands_of_those_who_hold_it() -> None:
    cache = cache_of(1, dtype=torch.bfloat16)
    held = cache.layers[0].keys
    shape = held.shape[1:]
    held.fill_(1)

    cache.resize(5)

    assert cache.num_blocks == 5
    assert held is cache.layers[0].keys and held.shape == (5, *shape)
    assert held.dtype is torch.bfloat16 and not held.any() and not cache.layers[1].values.any()
