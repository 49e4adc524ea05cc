"""K and V of a step to their slots, and nothing anywhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from executor.gpu.kernels.store import store
from executor.kv_cache import LayerCache, SlabFormat
from tests.gpu.paged_scene import Layer, PagedScene


def empty(device: torch.device, *, key_dim: int = 64, value_dim: int = 64, dtype: torch.dtype) -> LayerCache:
    keys, values = (torch.full((5, 3, 16, dim), torch.nan, dtype=dtype, device=device) for dim in (key_dim, value_dim))
    return LayerCache(keys=keys, values=values, block_size=16, format=SlabFormat(dtype=dtype))


def check(slab: Tensor, slots: list[int], numbers: Tensor) -> None:
    wanted = torch.full_like(slab, torch.nan)
    for slot, each in zip(slots, numbers, strict=True):
        if slot >= 0:
            wanted[slot // 16, :, slot % 16] = each
    assert torch.equal(slab.nan_to_num(7.5), wanted.nan_to_num(7.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (80, 24)])
def test_each_token_is_written_to_its_slot_and_a_padding_token_nowhere(
    device: torch.device, dtype: torch.dtype, index: torch.dtype, key_dim: int, value_dim: int
) -> None:
    cache = empty(device, key_dim=key_dim, value_dim=value_dim, dtype=dtype)
    key, value = (torch.randn(4, 3, dim, device=device).to(dtype) for dim in (key_dim, value_dim))
    slots = [79, -1, 0, 33]

    store(key, value, cache, torch.tensor(slots, dtype=index, device=device))

    check(cache.keys, slots, key)
    check(cache.values, slots, value)


def test_keys_and_values_may_be_slices_of_a_product(device: torch.device) -> None:
    cache = empty(device, dtype=torch.float32)
    wide = torch.randn(2, 10, 64, device=device)
    key, value = wide[:, 4:7], wide[:, 7:]

    store(key, value, cache, torch.tensor([40, 41], device=device))

    check(cache.keys, [40, 41], key)
    check(cache.values, [40, 41], value)


@pytest.mark.gpu
def test_slabs_of_more_than_two_billion_numbers(device: torch.device) -> None:
    scene = PagedScene([(99, 1), (90, 20)], Layer(num_kv_heads=8, key_dim=128, dtype=torch.bfloat16), device)
    blocks = 2**31 // (8 * 16 * 128) + 64
    small = scene.cache
    keys, values = (torch.full((blocks, 8, 16, 128), torch.nan, dtype=torch.bfloat16, device=device) for _ in "kv")
    shift = blocks - len(small.keys)
    keys[shift:], values[shift:] = small.keys, small.values
    scene.block_tables = torch.where(scene.block_tables < 0, scene.block_tables, scene.block_tables + shift)
    scene.cache = LayerCache(keys=keys, values=values, block_size=16, format=small.format)
    slots = torch.tensor([blocks * 16 - 1], device=device)
    written = torch.ones(1, 8, 128, dtype=torch.bfloat16, device=device)
    wanted = scene.attend()

    store(written, written * 2, scene.cache, slots)

    assert keys[-1, :, -1].eq(1).all() and values[-1, :, -1].eq(2).all()
    scene.check(wanted)
