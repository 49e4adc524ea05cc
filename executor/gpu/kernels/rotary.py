"""Between the product that gives Q, K and V and the attention: head norms, rotary embedding, K and V to the slab.

One launch. Each program takes a few heads of one token, all of one kind: it norms and turns the heads of Q and K (V is
left as it is), and writes Q side by side, K and V to the token's slot. A head is worked as two halves, which turn
against each other, and the rest that does not turn (NeoX's order, that of Transformers' `rotate_half`).
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor.gpu.kernels.overlap import begin_next, overlap, wait_for_previous
from executor.gpu.kernels.store import to_slab
from executor.gpu.triton_case import CompileCase

_HEADS: Final = 8  # a program's at most: at 128 numbers a head, 8 numbers a lane of 4 warps


def rope_and_store(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    slot_mapping: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    epsilon: float = 0.0,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    out_query: Tensor | None = None,
) -> Tensor:
    """Return the query (T, num_heads, D), ready for the attention; write K and V of each token to its slot.

    qkv (T, (num_heads + 2 * num_kv_heads) * D) in that order; positions and slot_mapping (T,) int32, a slot of -1 is
    written nowhere. cos_sin (max_positions, rotary_dim) float32, [cos | sin] of half that many angles each; None turns
    nothing. q_norm and k_norm (D,) are weights of an RMS norm over each head, before it turns. keys and values
    (num_blocks, num_kv_heads, block_size, D), the layer's slab; the scales count where that is float8_e4m3fn.
    """
    count, dim = qkv.shape[0], keys.shape[3]
    assert qkv.shape[1] == (num_heads + 2 * num_kv_heads) * dim and qkv.stride(1) == 1, f"qkv {tuple(qkv.shape)}"
    assert keys.shape == values.shape and keys.stride() == values.stride() and keys.stride(3) == 1
    assert keys.shape[1] == num_kv_heads, f"{keys.shape[1]} heads in the slab, {num_kv_heads} in the model"
    assert (q_norm is None) == (k_norm is None), "a norm of Q's heads goes with one of K's"
    rotary_dim = 0 if cos_sin is None else cos_sin.shape[1]
    assert rotary_dim % 2 == 0 and rotary_dim <= dim, f"{rotary_dim} of {dim} dimensions turn"
    assert cos_sin is None or (cos_sin.is_contiguous() and cos_sin.dtype == torch.float32)
    if out_query is None:
        out_query = torch.empty((count, num_heads, dim), dtype=qkv.dtype, device=qkv.device)
    assert out_query.shape == (count, num_heads, dim) and out_query.is_contiguous()
    if count == 0:
        return out_query
    shape = _shape(num_heads, num_kv_heads, dim, rotary_dim, norms=q_norm is not None)
    grid = (count, triton.cdiv(num_heads, shape["HEADS"]) + 2 * triton.cdiv(num_kv_heads, shape["HEADS"]))
    _rope_and_store[grid](
        qkv, positions, cos_sin, slot_mapping, keys, values, q_norm, k_norm, out_query, epsilon,
        qkv.stride(0), keys.stride(0), keys.stride(1), keys.stride(2), keys.shape[2],
        1 / key_scale, 1 / value_scale, **shape, num_warps=_num_warps(shape), **overlap(qkv.device),
    )  # fmt: skip
    return out_query


def _shape(num_heads: int, num_kv_heads: int, dim: int, rotary_dim: int, *, norms: bool) -> dict[str, int]:
    half, rest = rotary_dim // 2, dim - rotary_dim
    return {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "DIM": dim,
        "HALF": half,
        "NORMS": norms,
        "HEADS": min(_HEADS, triton.next_power_of_2(max(num_heads, num_kv_heads))),
        "HALF_TILE": triton.next_power_of_2(max(half, 1)),
        "REST_TILE": triton.next_power_of_2(max(rest, 1)),
        "WHOLE_TILE": triton.next_power_of_2(dim),
    }


def _num_warps(shape: dict[str, int]) -> int:
    return min(max(shape["HEADS"] * shape["WHOLE_TILE"] // 256, 1), 8)


@triton.jit
def _rope_and_store(
    qkv, positions, cos_sin, slot_mapping, keys, values, q_norm, k_norm, query, epsilon,
    qkv_stride, block_stride, head_stride, row_stride, block_size, keys_factor, values_factor,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, NORMS: tl.constexpr,
    HEADS: tl.constexpr, HALF_TILE: tl.constexpr, REST_TILE: tl.constexpr, WHOLE_TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """A few heads of one token a program: those of Q come first, then K's, then V's."""
    Q_GROUPS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KV_GROUPS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    begin_next(OVERLAP)
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = qkv + token * qkv_stride
    lanes = tl.arange(0, HEADS)
    position = tl.load(positions + token, cache_modifier=".cg")
    slot = tl.load(slot_mapping + token, cache_modifier=".cg")
    wait_for_previous(OVERLAP)
    if group < Q_GROUPS:
        heads = group * HEADS + lanes
        _turn(
            row + heads * DIM, query + (token * NUM_HEADS + heads) * DIM, heads < NUM_HEADS,
            q_norm, epsilon, cos_sin, position, 1.0, DIM, HALF, NORMS, HALF_TILE, REST_TILE,
        )  # fmt: skip
    else:
        place = (slot // block_size).to(tl.int64) * block_stride + slot % block_size * row_stride
        if group < Q_GROUPS + KV_GROUPS:
            heads = (group - Q_GROUPS) * HEADS + lanes
            _turn(
                row + (NUM_HEADS + heads) * DIM, keys + place + heads * head_stride,
                (heads < NUM_KV_HEADS) & (slot >= 0),
                k_norm, epsilon, cos_sin, position, keys_factor, DIM, HALF, NORMS, HALF_TILE, REST_TILE,
            )  # fmt: skip
        else:
            heads = (group - Q_GROUPS - KV_GROUPS) * HEADS + lanes
            _turn(
                row + (NUM_HEADS + NUM_KV_HEADS + heads) * DIM, values + place + heads * head_stride,
                (heads < NUM_KV_HEADS) & (slot >= 0),
                None, epsilon, None, 0, values_factor, DIM, 0, False, 1, WHOLE_TILE,
            )  # fmt: skip


@triton.jit
def _turn(
    sources, places, wanted, norm, epsilon, cos_sin, position, factor,
    DIM: tl.constexpr, HALF: tl.constexpr, NORMS: tl.constexpr, HALF_TILE: tl.constexpr, REST_TILE: tl.constexpr,
):  # fmt: skip
    """Norm and turn the heads that lie at `sources` (HEADS,), and write those that are wanted to `places`."""
    DTYPE: tl.constexpr = sources.dtype.element_ty
    PLACED: tl.constexpr = places.dtype.element_ty
    REST: tl.constexpr = DIM - 2 * HALF
    turning, still = tl.arange(0, HALF_TILE)[None, :], tl.arange(0, REST_TILE)[None, :]
    turns, stays = wanted[:, None] & (turning < HALF), wanted[:, None] & (still < REST)
    sources, places = sources[:, None], places[:, None]
    if HALF > 0:
        first = tl.load(sources + turning, mask=turns, other=0.0).to(tl.float32)
        second = tl.load(sources + HALF + turning, mask=turns, other=0.0).to(tl.float32)
    if REST > 0:
        third = tl.load(sources + 2 * HALF + still, mask=stays, other=0.0).to(tl.float32)
    if NORMS:
        squares = tl.zeros([sources.shape[0]], tl.float32)
        if HALF > 0:
            squares += tl.sum(first * first + second * second, axis=1)
        if REST > 0:
            squares += tl.sum(third * third, axis=1)
        scale = tl.rsqrt(squares / DIM + epsilon)[:, None]
        if HALF > 0:
            first = _gain(first * scale, norm + turning, turning < HALF, DTYPE)
            second = _gain(second * scale, norm + HALF + turning, turning < HALF, DTYPE)
        if REST > 0:
            third = _gain(third * scale, norm + 2 * HALF + still, still < REST, DTYPE)
    if HALF > 0:
        angles = cos_sin + position.to(tl.int64) * (2 * HALF) + turning
        cos = tl.load(angles, mask=turning < HALF, other=0.0)
        sin = tl.load(angles + HALF, mask=turning < HALF, other=0.0)
        tl.store(places + turning, to_slab(first * cos - second * sin, factor, PLACED), mask=turns)
        tl.store(places + HALF + turning, to_slab(second * cos + first * sin, factor, PLACED), mask=turns)
    if REST > 0:
        tl.store(places + 2 * HALF + still, to_slab(third, factor, PLACED), mask=stays)


@triton.jit
def _gain(values, weights, inside, DTYPE: tl.constexpr):
    """Rounded to the dtype, times the weight, rounded again: as Transformers' norm does."""
    gain = tl.load(weights, mask=inside, other=0.0).to(tl.float32)
    return (values.to(DTYPE).to(tl.float32) * gain).to(DTYPE).to(tl.float32)


def compile_cases() -> list[CompileCase]:
    """Heads as in Qwen3-0.6B, Llama-3-8B, SmolLM2-135M (64 wide), Phi-2 (80 wide, 32 turn) and GPT-2 (none turn)."""
    cases = []
    for name, num_heads, num_kv_heads, dim, rotary_dim, norms, slab in (
        ("qwen3", 16, 8, 128, 128, True, "*bf16"),
        ("qwen3, fp8", 16, 8, 128, 128, True, "*fp8e4nv"),
        ("llama", 32, 8, 128, 128, False, "*bf16"),
        ("smollm", 9, 3, 64, 64, False, "*bf16"),
        ("phi", 32, 32, 80, 32, False, "*bf16"),
        ("gpt2", 12, 12, 64, 0, False, "*bf16"),
    ):
        shape = _shape(num_heads, num_kv_heads, dim, rotary_dim, norms=norms)
        absent: dict[str, object] = {"OVERLAP": True} | ({} if rotary_dim else {"cos_sin": None})
        absent |= {} if norms else {"q_norm": None, "k_norm": None}
        types = {
            "qkv": "*bf16", "positions": "*i32", "cos_sin": "*fp32", "slot_mapping": "*i32", "keys": slab,
            "values": slab, "q_norm": "*bf16", "k_norm": "*bf16", "query": "*bf16", "epsilon": "fp32",
            "qkv_stride": "i32", "block_stride": "i32", "head_stride": "i32", "row_stride": "i32", "block_size": "i32",
            "keys_factor": "fp32", "values_factor": "fp32",
        }  # fmt: skip
        cases.append(
            CompileCase(
                name=f"rope_and_store-{name}",
                kernel=_rope_and_store,
                signature=types | dict.fromkeys([*shape, *absent], "constexpr"),
                constants={**shape, **absent},
                num_warps=_num_warps(shape),
            )
        )
    return cases
