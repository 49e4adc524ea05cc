"""Attention of rows with one token: each row's keys are shared out among programs, whose parts are then combined.

A step waits for memory here, not for arithmetic: the query heads of a group read each key once, together. The number of
shares depends on how many rows and heads there are, never on how long the rows are: so a captured graph serves any
lengths, and the host reads nothing. Each program finds its own share from the length that lies on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor.attention.protocol import LayerOptions
from executor.gpu.kernels.overlap import begin_next, overlap, wait_for_previous
from executor.gpu.kernels.paged import (
    HEADROOM,
    LOG2E,
    Launch,
    PagedRows,
    as_shares,
    attend_pairs,
    attend_tile,
    find_blocks,
    find_places,
    is_narrow,
    num_multiprocessors,
    padded,
    score_arguments,
    sm_major,
)
from executor.gpu.triton_case import CompileCase, is_interpreted
from executor.kv_cache import LayerCache

MAX_SPLITS = 32
_PROGRAMS = 4  # for each multiprocessor: what fits at once, and more than it takes to keep the memory busy


@triton.jit
def _share(seq_len, splits, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr):
    """The first position that is read, and the tiles that each split of a row gets. The last split may get fewer."""
    begin = 0
    if WINDOW > 0:  # blocks before the window are not read at all
        begin = tl.maximum(seq_len - WINDOW, 0) // BLOCK_SIZE * BLOCK_SIZE
    tiles = tl.cdiv(seq_len - begin, TILE)
    return begin, tiles, tl.cdiv(tiles, splits)


@triton.jit(do_not_specialize=["splits", "table_stride"])
def _decode(
    query, keys, values, block_tables, table_rows, seq_lens, sinks, out, parts, parts_lse,
    inner, factor, value_scale, splits, table_stride,
    query_token_stride, query_head_stride, out_token_stride, out_head_stride,
    keys_block_stride, keys_head_stride, keys_token_stride,
    values_block_stride, values_head_stride, values_token_stride,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, TABLE_ROWS: tl.constexpr,
    SPLIT: tl.constexpr, NARROW: tl.constexpr, UPCAST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: one row, one K and V head with its group of query heads, one share of the row's tiles."""
    begin_next(OVERLAP)
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    seq_len = tl.load(seq_lens + row, cache_modifier=".cg").to(tl.int32)
    begin, _, per_split = _share(seq_len, splits, TILE, BLOCK_SIZE, WINDOW)
    begin += split * per_split * TILE
    end = tl.minimum(begin + per_split * TILE, seq_len)
    if SPLIT:  # noqa: SIM102 (the compiler knows SPLIT, the device knows the rest)
        if begin >= end:  # `_combine` does not look for this part
            wait_for_previous(OVERLAP)
            return

    line = row
    if TABLE_ROWS:
        line = tl.load(table_rows + row, cache_modifier=".cg")
    table = block_tables + line.to(tl.int64) * table_stride
    keys += kv_head * keys_head_stride
    values += kv_head * values_head_stride
    members = tl.arange(0, GROUP_PAD)
    heads = kv_head * GROUP + members
    lanes = tl.arange(0, KEY_PAD)
    last = seq_len - 1
    blocks = find_blocks(table, begin, tl.maximum(last, 0), TILE, BLOCK_SIZE)
    wait_for_previous(OVERLAP)
    q = tl.load(
        query + row.to(tl.int64) * query_token_stride + heads[:, None] * query_head_stride + lanes[None, :],
        mask=(members < GROUP)[:, None] & (lanes < KEY_DIM)[None, :],
        other=0.0,
    )
    q, shares = as_shares(q, NARROW, UPCAST)

    top = tl.full((GROUP_PAD,), -float("inf"), tl.float32)
    total = tl.zeros((GROUP_PAD,), tl.float32)
    if SINKS:  # a key of weight 1 without a value, for one of the splits
        sink = tl.load(sinks + heads, mask=members < GROUP, other=0.0).to(tl.float32) * LOG2E
        top = tl.where(split == 0, sink, top)
        total = tl.where(split == 0, 1.0, total)
    if NARROW:
        even = tl.zeros((GROUP_PAD, VALUE_PAD // 2), tl.float32)
        odd = even
    else:
        acc = tl.zeros((GROUP_PAD, VALUE_PAD), tl.float32)

    # the blocks of the next tile are looked up while this one is worked
    for start in range(begin, end, TILE):
        key_places = find_places(blocks, start, keys_block_stride, keys_token_stride, TILE, BLOCK_SIZE)
        value_places = key_places
        if KEY_DIM != VALUE_DIM:
            value_places = find_places(blocks, start, values_block_stride, values_token_stride, TILE, BLOCK_SIZE)
        blocks = find_blocks(table, start + TILE, last, TILE, BLOCK_SIZE)
        position = start + tl.arange(0, TILE)
        readable = position < seq_len
        if WINDOW > 0:
            readable &= position >= seq_len - WINDOW
        if NARROW:
            even, odd, top, total = attend_pairs(
                q, shares, keys, values, key_places, value_places, readable, even, odd, top, total, inner, factor,
                KEY_DIM, KEY_PAD, VALUE_DIM, VALUE_PAD, SOFTCAP, UPCAST,
            )  # fmt: skip
        else:
            acc, top, total = attend_tile(
                q, shares, keys, values, key_places, value_places, readable, readable[None, :], acc, top, total,
                inner, factor, KEY_DIM, KEY_PAD, VALUE_DIM, VALUE_PAD, SOFTCAP, False, True,
            )  # fmt: skip

    if NARROW:
        acc = tl.interleave(even, odd) / HEADROOM
    share = tl.where(total == 0.0, 1.0, total)  # no key at all: zeros
    acc = acc / share[:, None] * value_scale
    lanes = tl.arange(0, VALUE_PAD)
    real = (members < GROUP)[:, None] & (lanes < VALUE_DIM)[None, :]
    if SPLIT:
        part = (row.to(tl.int64) * tl.num_programs(1) * GROUP + heads) * splits + split
        tl.store(parts + part[:, None] * VALUE_DIM + lanes[None, :], acc, mask=real)
        tl.store(parts_lse + part, top + tl.log2(share), mask=members < GROUP)
    else:
        place = out + row.to(tl.int64) * out_token_stride + heads[:, None] * out_head_stride + lanes[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["splits"])
def _combine(
    parts, parts_lse, seq_lens, out, splits, out_token_stride, out_head_stride,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    WINDOW: tl.constexpr, MOST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: one row, one query head. Parts are weighted by the sums of their softmax."""
    begin_next(OVERLAP)
    row = tl.program_id(0)
    head = tl.program_id(1)
    seq_len = tl.load(seq_lens + row, cache_modifier=".cg").to(tl.int32)
    _, tiles, per_split = _share(seq_len, splits, TILE, BLOCK_SIZE, WINDOW)
    used = tl.cdiv(tiles, tl.maximum(per_split, 1))
    number = tl.arange(0, MOST)
    wait_for_previous(OVERLAP)
    part = (row.to(tl.int64) * tl.num_programs(1) + head) * splits + number
    lse = tl.load(parts_lse + part, mask=number < used, other=-float("inf"))
    top = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(used > 0, top, 0.0))
    lanes = tl.arange(0, VALUE_PAD)
    real = (number < used)[:, None] & (lanes < VALUE_DIM)[None, :]
    each = tl.load(parts + part[:, None] * VALUE_DIM + lanes[None, :], mask=real, other=0.0)
    total = tl.sum(weights, 0)
    acc = tl.sum(each * weights[:, None], 0) / tl.where(used > 0, total, 1.0)
    place = out + row.to(tl.int64) * out_token_stride + head * out_head_stride + lanes
    tl.store(place, acc.to(out.dtype.element_ty), mask=lanes < VALUE_DIM)


def num_splits(num_rows: int, num_kv_heads: int, device: torch.device) -> int:
    """In how many shares each row's keys are read: enough to keep the memory busy, one where the rows do that."""
    wanted = _PROGRAMS * num_multiprocessors(device) // max(1, num_rows * num_kv_heads)
    return max(1, min(MAX_SPLITS, wanted))


def launch_of(
    key_dim: int, value_dim: int, group: int, itemsize: int, sm: int, *, slab_itemsize: int = 2, few: bool = False
) -> Launch:
    """How many keys at once, in how many warps. `few`: there are not two programs for each multiprocessor.

    As many programs should fit a multiprocessor as there are for it at 64 rows, four: else the last of them are alone
    at the end, and memory waits. So small ones, unless they are so few that each has to read fast by itself. Measured
    on an H200 at dimension 128: 64 rows of 512 and of 2,048 tokens in 38 and 137 us, where four warps with tiles of 64
    keys took 42 and 156 (three of those fit); over 8 bits in 21 and 67. GPUs with less shared memory were not measured.
    """
    dim = max(padded(key_dim), padded(value_dim))
    num_warps = 8 if padded(group) >= 64 else 4
    if sm == 0:
        return Launch(tile=64)
    if itemsize == 4:  # without tensor cores, in more registers: for checks, not for serving
        return Launch(tile=max(16, 2048 // dim), num_warps=num_warps, num_stages=2)
    tile, large = max(32, min(128, 8192 // dim)), padded(group) > 16 or dim > 128
    if slab_itemsize == 1:
        return Launch(tile=tile, num_warps=num_warps if large else 2, num_stages=3)
    if few or large or sm < 9:
        return Launch(tile=tile, num_warps=num_warps, num_stages=2)
    return Launch(tile=max(32, tile // 2), num_warps=2, num_stages=4)


def decode(
    query: Tensor,
    cache: LayerCache,
    rows: PagedRows,
    options: LayerOptions,
    out: Tensor,
    parts: Tensor,
    parts_lse: Tensor,
    *,
    splits: int | None = None,
    launch: Launch | None = None,
) -> None:
    """Attend the first `rows.num_decodes` tokens: query (T, num_heads, key_dim), out (T, num_heads, value_dim).

    `parts` and `parts_lse` are float32 of at least R * num_heads * splits (* value_dim) numbers for R rows; they are
    not touched where one split does.
    """
    num_rows, num_heads, key_dim = rows.num_decodes, query.shape[1], query.shape[2]
    if num_rows == 0:
        return
    num_kv_heads, value_dim = cache.keys.shape[1], out.shape[2]
    group = num_heads // num_kv_heads
    splits = num_splits(num_rows, num_kv_heads, query.device) if splits is None else splits
    assert splits <= MAX_SPLITS and (splits == 1 or parts.numel() >= num_rows * num_heads * splits * value_dim)
    launch = launch or launch_of(
        key_dim,
        value_dim,
        group,
        query.itemsize,
        sm_major(query.device),
        slab_itemsize=cache.keys.itemsize,
        few=num_rows * num_kv_heads * splits <= 2 * num_multiprocessors(query.device),
    )
    lines, has_lines = rows.lines()
    inner, factor = score_arguments(options, cache.key_scale)
    constants = {
        "BLOCK_SIZE": cache.block_size,
        "TILE": launch.tile,
        "VALUE_DIM": value_dim,
        "VALUE_PAD": padded(value_dim),
        "WINDOW": options.window or 0,
    }
    _decode[(num_rows, num_kv_heads, splits)](
        query,
        cache.keys,
        cache.values,
        rows.block_tables,
        lines,
        rows.seq_lens,
        parts_lse if options.sinks is None else options.sinks,
        out,
        parts,
        parts_lse,
        inner,
        factor,
        cache.value_scale,
        splits,
        rows.block_tables.stride(0),
        *query.stride()[:2],
        *out.stride()[:2],
        *cache.keys.stride()[:3],
        *cache.values.stride()[:3],
        GROUP=group,
        GROUP_PAD=padded(group),
        KEY_DIM=key_dim,
        KEY_PAD=padded(key_dim),
        SOFTCAP=options.softcap is not None,
        SINKS=options.sinks is not None,
        TABLE_ROWS=has_lines,
        SPLIT=splits > 1,
        NARROW=is_narrow(query, cache) and value_dim % 2 == 0,  # values are read in pairs
        UPCAST=is_interpreted(),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **constants,
        **overlap(query.device),
    )
    if splits > 1:
        _combine[(num_rows, num_heads)](
            parts,
            parts_lse,
            rows.seq_lens,
            out,
            splits,
            *out.stride()[:2],
            MOST=MAX_SPLITS,
            num_warps=4,
            **constants,
            **overlap(query.device),
        )


def compile_cases() -> list[CompileCase]:
    """As Qwen3-0.6B (groups of 2) and Llama 3 8B (groups of 4) launch it, and what differs from them most."""
    return [
        *_cases("group of 2", group=2),
        *_cases("group of 4", group=4),
        *_cases("group of 4, before Hopper", group=4, targets=(80,)),
        *_cases("group of 4, few", group=4, few=True),
        *_cases("group of 7, dim 64, window", group=7, key_dim=64, value_dim=64, WINDOW=128, SINKS=True),
        *_cases("dim 256, soft cap", group=2, key_dim=256, value_dim=256, SOFTCAP=True),
        *_cases("values narrower", group=1, key_dim=192, value_dim=128),
        *_cases("group of 2, fp8", group=2, slab="fp8e4nv"),
        *_cases("group of 4, fp8", group=4, slab="fp8e4nv"),
        *_cases("dim 256, fp8", group=2, key_dim=256, value_dim=256, slab="fp8e4nv"),
        *_cases("float32", group=2, dtype="fp32", itemsize=4, instructions=()),
    ]


def _cases(
    name: str,
    *,
    group: int,
    key_dim: int = 128,
    value_dim: int = 128,
    dtype: str = "bf16",
    slab: str = "",
    itemsize: int = 2,
    few: bool = False,
    instructions: tuple[str, ...] = ("HMMA",),
    targets: tuple[int, ...] = (90,),
    **flags: object,
) -> list[CompileCase]:
    """Of one kind of layer: rows in one piece, rows in shares, and their combination."""
    launch = launch_of(
        key_dim, value_dim, group, itemsize, min(targets) // 10, slab_itemsize=1 if slab else itemsize, few=few
    )
    values: dict[str, object] = {
        "BLOCK_SIZE": 16,
        "TILE": launch.tile,
        "VALUE_DIM": value_dim,
        "VALUE_PAD": padded(value_dim),
        "WINDOW": 0,
    }
    constants: dict[str, object] = values | {
        "GROUP": group,
        "GROUP_PAD": padded(group),
        "KEY_DIM": key_dim,
        "KEY_PAD": padded(key_dim),
    }
    constants |= {
        "NARROW": bool(slab),
        "SOFTCAP": False,
        "SINKS": False,
        "TABLE_ROWS": True,
        "UPCAST": False,
        "OVERLAP": True,
    } | flags
    types = dict.fromkeys(("query", "sinks", "out"), f"*{dtype}") | dict.fromkeys(
        ("keys", "values"), f"*{slab or dtype}"
    )
    types |= dict.fromkeys(("block_tables", "table_rows", "seq_lens"), "*i32")
    types |= dict.fromkeys(("parts", "parts_lse"), "*fp32") | dict.fromkeys(("inner", "factor", "value_scale"), "fp32")

    def case(
        what: str, kernel: triton.JITFunction, constants: dict[str, object], wanted: tuple[str, ...]
    ) -> CompileCase:
        signature = {each: types.get(each, "i32") for each in kernel.arg_names if each not in constants}
        return CompileCase(
            name=f"{what}, {name}",
            kernel=kernel,
            signature=signature,
            constants=constants,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            instructions=wanted,
            targets=targets,
        )

    attending = [
        case("decode", _decode, constants | {"SPLIT": False}, instructions),
        case("decode in shares", _decode, constants | {"SPLIT": True}, instructions),
    ]
    if slab:  # parts are combined as with any other slab
        return attending
    return [
        *attending,
        case(
            "combine",
            _combine,
            {each: values[each] for each in values}
            | {"WINDOW": constants["WINDOW"], "MOST": MAX_SPLITS, "OVERLAP": True},
            (),
        ),
    ]
