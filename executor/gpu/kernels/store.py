"""A step's K and V to their slots in the slab."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from executor.gpu.triton_case import CompileCase
from executor.kv_cache import LayerCache


@triton.jit
def _store(
    key, value, keys, values, slot_mapping,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    keys_block_stride, keys_head_stride, keys_token_stride,
    values_block_stride, values_head_stride, values_token_stride,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """One program a token: all its heads."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot < 0:  # padding
        return
    block, inside = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    heads = tl.arange(0, HEADS_PAD)[:, None]

    lanes = tl.arange(0, KEY_PAD)[None, :]
    real = (heads < HEADS) & (lanes < KEY_DIM)
    numbers = tl.load(key + token * key_token_stride + heads * key_head_stride + lanes, mask=real)
    place = keys + block * keys_block_stride + inside * keys_token_stride
    tl.store(place + heads * keys_head_stride + lanes, numbers.to(keys.dtype.element_ty), mask=real)

    lanes = tl.arange(0, VALUE_PAD)[None, :]
    real = (heads < HEADS) & (lanes < VALUE_DIM)
    numbers = tl.load(value + token * value_token_stride + heads * value_head_stride + lanes, mask=real)
    place = values + block * values_block_stride + inside * values_token_stride
    tl.store(place + heads * values_head_stride + lanes, numbers.to(values.dtype.element_ty), mask=real)


def store(key: Tensor, value: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """Write key (T, num_kv_heads, key_dim) and value to their slots (T,); -1 writes nothing. Last axes are dense."""
    num_tokens, num_heads, key_dim = key.shape
    value_dim = value.shape[2]
    assert key.stride(2) == value.stride(2) == cache.keys.stride(3) == cache.values.stride(3) == 1
    if num_tokens == 0:
        return
    _store[(num_tokens,)](
        key,
        value,
        cache.keys,
        cache.values,
        slot_mapping,
        *key.stride()[:2],
        *value.stride()[:2],
        *cache.keys.stride()[:3],
        *cache.values.stride()[:3],
        HEADS=num_heads,
        HEADS_PAD=triton.next_power_of_2(num_heads),
        BLOCK_SIZE=cache.block_size,
        KEY_DIM=key_dim,
        KEY_PAD=triton.next_power_of_2(key_dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=triton.next_power_of_2(value_dim),
        num_warps=4,
    )


def compile_cases() -> list[CompileCase]:
    """Eight heads of 128 numbers, as in Qwen3 and Llama 3."""
    pointers = dict.fromkeys(("key", "value", "keys", "values"), "*bf16") | {"slot_mapping": "*i32"}
    strides = dict.fromkeys([name for name in _store.arg_names if name.endswith("_stride")], "i32")
    constants = {"HEADS": 8, "HEADS_PAD": 8, "BLOCK_SIZE": 16}
    constants |= dict.fromkeys(("KEY_DIM", "KEY_PAD", "VALUE_DIM", "VALUE_PAD"), 128)
    return [CompileCase(name="store", kernel=_store, signature=pointers | strides, constants=constants)]
