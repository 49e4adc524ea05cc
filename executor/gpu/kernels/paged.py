"""What the attention kernels share: where a position's K and V lie, and how one tile of keys is folded in.

Scores are kept in the base of 2, because that is the exponential that a GPU has: the weight of a raw score x is
2 ** (x * factor), `factor` being scale * log2(e). With a soft cap x is a tanh, and the cap takes the scale's place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor.attention.protocol import LayerOptions
from executor.kv_cache import LayerCache

_LOG2E = math.log2(math.e)
LOG2E = tl.constexpr(_LOG2E)
HEADROOM = tl.constexpr(16384.0)
"""What softmax weights are multiplied by where they become float16: the largest is 1, and 65,504 fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedRows:
    """Which sequences a step computes. N rows, those with one token first. Any integer dtype, on the device."""

    num_decodes: int
    query_start_loc: Tensor  # (N + 1,)
    seq_lens: Tensor  # (N,) this step's tokens included; 0 is a padding row, whose output is zeros
    block_tables: Tensor  # (L, M) what lies behind a row's last block is never read
    table_rows: Tensor | None = None  # (N,) each row's line of `block_tables`, where it is not the row's own

    def lines(self) -> tuple[Tensor, bool]:
        """The kernels' `table_rows`, and whether it counts: some pointer is always passed."""
        return (self.seq_lens, False) if self.table_rows is None else (self.table_rows, True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How a kernel is cut: from a table, never measured while serving."""

    tile: int  # keys that are worked at once
    rows: int = 0  # of a tile of queries: tokens times the heads of a group
    num_warps: int = 4
    num_stages: int = 2


@triton.jit
def find_blocks(table, start, last, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Block of each of TILE positions from `start`, (TILE,). Those behind `last` get the block of `last`."""
    positions = tl.minimum(start + tl.arange(0, TILE), last).to(tl.uint32)  # a shift, where a sign would need care
    return tl.load(table + positions // BLOCK_SIZE, cache_modifier=".cg")


@triton.jit
def find_places(blocks, start, block_stride, token_stride, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Where in the slab those positions lie, (TILE,) int64: a block times its stride does not fit into 32 bits."""
    inside = tl.arange(0, TILE)
    if TILE % BLOCK_SIZE != 0:  # else `start` begins a block, and this is the same in every turn of the loop
        inside += start
    inside %= BLOCK_SIZE
    return blocks.to(tl.int64) * block_stride + inside * token_stride


@triton.jit
def load_tile(slab, places, readable, DIM: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr):
    """K or V of TILE positions, (TILE, PAD). Zero where not `readable`: what lies there may be NaN."""
    lanes = tl.arange(0, PAD)[None, :]
    pointers = slab + places[:, None] + lanes
    if MASKED and PAD != DIM:
        tile = tl.load(pointers, mask=readable[:, None] & (lanes < DIM), other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=readable[:, None], other=0.0)
    elif PAD != DIM:
        tile = tl.load(pointers, mask=lanes < DIM, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def as_shares(q, NARROW: tl.constexpr, UPCAST: tl.constexpr):
    """The queries as they are multiplied, and what each was divided by for that, (ROWS,), or 1.

    Where K and V of 8 bits are multiplied in float16 (NARROW): a GPU makes two float16 of them in one instruction,
    where each bfloat16 takes a slow one more. They fit exactly, and so that a query does, it is divided by its largest
    number.
    """
    shares = 1.0
    if NARROW:
        q = q.to(tl.float32)
        largest = tl.max(tl.abs(q), 1)
        shares = tl.where(largest > 0.0, largest, 1.0)
        q = (q / shares[:, None]).to(tl.float16)
    if UPCAST:
        q = q.to(tl.float32)
    return q, shares


@triton.jit
def tanh(x):
    """Not from libdevice, which the interpreter lacks. Right at both ends, because 2 ** 1000 is inf."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def attend_tile(
    q, shares, keys, values, key_places, value_places, readable, visible, acc, top, total, inner, factor,
    KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    SOFTCAP: tl.constexpr, NARROW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold one tile of keys into the running softmax: `acc` (ROWS, VALUE_PAD), `top` and `total` (ROWS,).

    `readable` (TILE,) says which keys may be loaded, `visible` (ROWS or 1, TILE) who sees them; both only if MASKED.
    `shares` is what the queries were divided by (`as_shares`). Where NARROW, `acc` is to be divided by HEADROOM.
    """
    weights, top, total, fade = _weights(
        q, shares, keys, key_places, readable, visible, top, total, inner, factor,
        KEY_DIM, KEY_PAD, SOFTCAP, NARROW, MASKED,
    )  # fmt: skip
    v = load_tile(values, value_places, readable, VALUE_DIM, VALUE_PAD, MASKED).to(q.dtype)
    acc = tl.dot(weights.to(q.dtype), v, acc=acc * fade[:, None], input_precision="ieee")
    return acc, top, total


@triton.jit
def attend_pairs(
    q, shares, keys, values, key_places, value_places, readable, even, odd, top, total, inner, factor,
    KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`attend_tile` over 8 bits, masked, whose values are brought to tensor cores in pairs of lanes: `even` and `odd`.

    What the cores multiply lies transposed for them, and no instruction transposes bytes: each would be loaded by
    itself. So two neighbours in a row are loaded as one number of 16 bits, and taken apart in registers.
    """
    weights, top, total, fade = _weights(
        q, shares, keys, key_places, readable, readable[None, :], top, total, inner, factor,
        KEY_DIM, KEY_PAD, SOFTCAP, True, True,
    )  # fmt: skip
    pairs = load_tile(
        values.to(tl.pointer_type(tl.int16)), value_places >> 1, readable, VALUE_DIM // 2, VALUE_PAD // 2, True
    )
    if UPCAST:  # the interpreter knows no assembler
        first = pairs.to(tl.int8).to(values.dtype.element_ty, bitcast=True).to(tl.float32)
        second = (pairs >> 8).to(tl.int8).to(values.dtype.element_ty, bitcast=True).to(tl.float32)
    else:
        first, second = tl.inline_asm_elementwise(
            """{
                .reg .b32 first, second;
                .reg .b16 low, high, none;
                prmt.b32 first, $2, 0, 0x4420;
                prmt.b32 second, $2, 0, 0x4431;
                mov.b32 {low, none}, first;
                mov.b32 {high, none}, second;
                cvt.rn.f16x2.e4m3x2 $0, low;
                cvt.rn.f16x2.e4m3x2 $1, high;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    weights = weights.to(first.dtype)
    even = tl.dot(weights, first, acc=even * fade[:, None], input_precision="ieee")
    odd = tl.dot(weights, second, acc=odd * fade[:, None], input_precision="ieee")
    return even, odd, top, total


@triton.jit
def _weights(
    q, shares, keys, key_places, readable, visible, top, total, inner, factor,
    KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, SOFTCAP: tl.constexpr, NARROW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What the keys of a tile weigh, (ROWS, TILE), `top` and `total` with them, and what weighed before is to fade by.

    Where NARROW, the weights are HEADROOM times as large: float16 holds no less than 2 ** -24, and many small weights
    beside a large one, as of the first token of a long row, are much together.
    """
    # float32 is never rounded to TF32: whoever asks for float32 wants it
    k = load_tile(keys, key_places, readable, KEY_DIM, KEY_PAD, MASKED).to(q.dtype)
    raw = tl.dot(q, tl.trans(k), input_precision="ieee")
    if NARROW:
        raw *= shares[:, None]
    if SOFTCAP:
        raw = tanh(raw * inner)
    if MASKED:
        raw = tl.where(visible, raw, -float("inf"))
    higher = tl.maximum(top, tl.max(raw, 1) * factor)
    shift = higher
    if MASKED:  # a query that has seen no key yet: inf - inf would be NaN
        shift = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(raw * factor - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(weights, 1)
    if NARROW:
        weights = (weights * HEADROOM).to(tl.float16)
    return weights, higher, total, fade


def padded(dim: int) -> int:
    """The power of 2 that a dimension is worked in; a product needs at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def is_narrow(query: Tensor, cache: LayerCache) -> bool:
    """Whether K and V of 8 bits are multiplied in float16 (`as_shares`)."""
    return cache.keys.itemsize == 1 and query.itemsize == 2


def score_arguments(options: LayerOptions, key_scale: float) -> tuple[float, float]:
    """`inner` and `factor` of `attend_tile`: what keys are shares of is undone where scores are scaled anyway."""
    scale = options.scale * key_scale
    if options.softcap is None:
        return 1.0, scale * _LOG2E
    return scale / options.softcap, options.softcap * _LOG2E


@lru_cache
def sm_major(device: torch.device) -> int:
    """Generation of the GPU: 8 is Ampere, 9 Hopper. 0 is the interpreter."""
    return 0 if device.type == "cpu" else torch.cuda.get_device_capability(device)[0]


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """How many programs run at once, but for a small factor. In the interpreter one does, but tests want shares."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
