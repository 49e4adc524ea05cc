"""A step's K and V to their slots in the slab."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from executor.gpu.triton_case import CompileCase, is_interpreted
from executor.kv_cache import LayerCache

INTERPRETED = tl.constexpr(is_interpreted())


@triton.jit
def to_slab(numbers, factor, DTYPE: tl.constexpr):
    """Numbers as a slab of DTYPE holds them: in 8 bits times `factor`, which undoes the layer's scale.

    float8_e4m3fn has no infinity: whatever is beyond its largest number becomes that one, and only NaN becomes NaN.
    """
    if DTYPE == tl.float8e4nv:  # noqa: SIM300 (the constant is no constant to ruff, and DTYPE is)
        numbers = numbers.to(tl.float32) * factor
        numbers = tl.clamp(numbers, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        if INTERPRETED:  # its cast loses the carry from the last bits to the exponent: so round to 4 bits before it
            exponent = tl.maximum(tl.floor(tl.log2(tl.maximum(tl.abs(numbers), 1e-9))), -6.0)
            steps = tl.exp2(exponent - 3.0) * 12582912.0  # 1.5 * 2 ** 23: here float32 has the steps of 8 bits there
            numbers = numbers + steps - steps
    return numbers.to(DTYPE)


@triton.jit
def _store(
    key, value, keys, values, slot_mapping,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    keys_block_stride, keys_head_stride, keys_token_stride,
    values_block_stride, values_head_stride, values_token_stride, keys_factor, values_factor,
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
    tl.store(place + heads * keys_head_stride + lanes, to_slab(numbers, keys_factor, keys.dtype.element_ty), mask=real)

    lanes = tl.arange(0, VALUE_PAD)[None, :]
    real = (heads < HEADS) & (lanes < VALUE_DIM)
    numbers = tl.load(value + token * value_token_stride + heads * value_head_stride + lanes, mask=real)
    place = values + block * values_block_stride + inside * values_token_stride
    tl.store(
        place + heads * values_head_stride + lanes, to_slab(numbers, values_factor, values.dtype.element_ty), mask=real
    )


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
        1 / cache.key_scale,
        1 / cache.value_scale,
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
    types = dict.fromkeys(("key", "value", "keys", "values"), "*bf16") | {"slot_mapping": "*i32"}
    types |= dict.fromkeys([name for name in _store.arg_names if name.endswith("_stride")], "i32")
    types |= dict.fromkeys(("keys_factor", "values_factor"), "fp32")
    constants = {"HEADS": 8, "HEADS_PAD": 8, "BLOCK_SIZE": 16}
    constants |= dict.fromkeys(("KEY_DIM", "KEY_PAD", "VALUE_DIM", "VALUE_PAD"), 128)
    fp8 = types | dict.fromkeys(("keys", "values"), "*fp8e4nv")
    return [
        CompileCase(name="store", kernel=_store, signature=types, constants=constants),
        CompileCase(name="store, fp8", kernel=_store, signature=fp8, constants=constants),
    ]
