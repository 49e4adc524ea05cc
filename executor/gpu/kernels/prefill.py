"""Attention of rows with several tokens: prompts, chunks of prompts, and prompts behind a cached prefix are one case.

All K and V are read from the slab, those of this step too. A program takes some neighbouring tokens of one row with all
query heads of one K and V head. Which row it finds on the device: the grid has as many programs as any cut of T tokens
into N rows can need, so the host computes nothing from the rows' lengths.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from executor.attention.protocol import LayerOptions
from executor.gpu.kernels.paged import (
    HEADROOM,
    LOG2E,
    Launch,
    PagedRows,
    as_shares,
    attend_tile,
    find_blocks,
    find_places,
    is_narrow,
    padded,
    score_arguments,
    sm_major,
)
from executor.gpu.triton_case import CompileCase, is_interpreted
from executor.kv_cache import LayerCache

_WIDEST_NARROW = 128
"""Wider queries, brought to float16, do not fit into the registers of Hopper."""


@triton.jit
def _find_row(tile, query_start_loc, num_decodes, num_rows, TOKENS: tl.constexpr):
    """The row behind `num_decodes` that a tile belongs to, counted from there, and the tile's number in it.

    Row i's tiles begin at loc[i] // TOKENS + i: room for a part of a tile at each row's end. So the row is told by how
    many rows begin at or before the tile. One load of 128 is sooner here than a search whose loads wait for another.
    """
    origin = tl.load(query_start_loc + num_decodes)
    begun = 0
    for first in range(0, num_rows, 128):
        number = first + tl.arange(0, 128)
        loc = tl.load(query_start_loc + num_decodes + number, mask=number < num_rows, other=0)
        begins = (loc - origin).to(tl.int32) // TOKENS + number
        begun += tl.sum(((number < num_rows) & (begins <= tile)).to(tl.int32), 0)
    row = begun - 1
    begins = (tl.load(query_start_loc + num_decodes + row) - origin).to(tl.int32) // TOKENS + row
    return row, tile - begins


@triton.jit(do_not_specialize=["num_decodes", "num_rows", "table_stride"])
def _prefill(
    query, keys, values, block_tables, table_rows, query_start_loc, seq_lens, sinks, out,
    inner, factor, value_scale, num_decodes, num_rows, table_stride,
    query_token_stride, query_head_stride, out_token_stride, out_head_stride,
    keys_block_stride, keys_head_stride, keys_token_stride,
    values_block_stride, values_head_stride, values_token_stride,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, TABLE_ROWS: tl.constexpr,
    NARROW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: ROWS // GROUP tokens of one row, one K and V head. `num_rows` counts those behind `num_decodes`."""
    TOKENS: tl.constexpr = ROWS // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the ends of prompts first: they take longest
    kv_head = tl.program_id(1)
    row, number = _find_row(tile, query_start_loc, num_decodes, num_rows, TOKENS)
    row += num_decodes
    start_loc = tl.load(query_start_loc + row).to(tl.int32)
    num_new = tl.load(query_start_loc + row + 1).to(tl.int32) - start_loc
    first_new = number * TOKENS
    if first_new >= num_new:  # the room at the row's end that was not needed
        return
    seq_len = tl.load(seq_lens + row).to(tl.int32)

    line = row
    if TABLE_ROWS:
        line = tl.load(table_rows + row)
    table = block_tables + line.to(tl.int64) * table_stride
    keys += kv_head * keys_head_stride
    values += kv_head * values_head_stride
    member = tl.arange(0, ROWS)
    new = first_new + member // GROUP  # which of the row's tokens
    head = kv_head * GROUP + member % GROUP
    real = (member // GROUP < TOKENS) & (new < num_new)
    token = (start_loc + new).to(tl.int64)
    lanes = tl.arange(0, KEY_PAD)
    q = tl.load(
        query + (token * query_token_stride + head * query_head_stride)[:, None] + lanes[None, :],
        mask=real[:, None] & (lanes < KEY_DIM)[None, :],
        other=0.0,
    )
    q, shares = as_shares(q, NARROW, UPCAST)
    position = seq_len - num_new + new  # (ROWS,)
    first = seq_len - num_new + first_new  # the first query's position
    end = tl.minimum(first + TOKENS, seq_len)

    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SINKS:  # a key of weight 1 without a value
        top = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
        total += 1.0
    acc = tl.zeros((ROWS, VALUE_PAD), tl.float32)

    begin = 0
    if WINDOW > 0:  # blocks before the window of the first query are not read at all
        begin = tl.maximum(first - WINDOW + 1, 0) // BLOCK_SIZE * BLOCK_SIZE
    else:  # tiles that every query sees whole need no masks
        everyones = (first + 1) // TILE * TILE
        blocks = find_blocks(table, 0, end - 1, TILE, BLOCK_SIZE)
        for start in range(0, everyones, TILE):
            key_places = find_places(blocks, start, keys_block_stride, keys_token_stride, TILE, BLOCK_SIZE)
            value_places = key_places
            if KEY_DIM != VALUE_DIM:
                value_places = find_places(blocks, start, values_block_stride, values_token_stride, TILE, BLOCK_SIZE)
            # the blocks of the next tile are looked up while this one is worked
            blocks = find_blocks(table, start + TILE, end - 1, TILE, BLOCK_SIZE)
            acc, top, total = attend_tile(
                q, shares, keys, values, key_places, value_places, None, None, acc, top, total, inner, factor,
                KEY_DIM, KEY_PAD, VALUE_DIM, VALUE_PAD, SOFTCAP, NARROW, False,
            )  # fmt: skip
        begin = everyones

    blocks = find_blocks(table, begin, end - 1, TILE, BLOCK_SIZE)
    for start in range(begin, end, TILE):
        key_places = find_places(blocks, start, keys_block_stride, keys_token_stride, TILE, BLOCK_SIZE)
        value_places = key_places
        if KEY_DIM != VALUE_DIM:
            value_places = find_places(blocks, start, values_block_stride, values_token_stride, TILE, BLOCK_SIZE)
        blocks = find_blocks(table, start + TILE, end - 1, TILE, BLOCK_SIZE)
        of_key = start + tl.arange(0, TILE)
        visible = of_key[None, :] <= position[:, None]
        if WINDOW > 0:
            visible &= of_key[None, :] > position[:, None] - WINDOW
        acc, top, total = attend_tile(
            q, shares, keys, values, key_places, value_places, of_key < end, visible, acc, top, total, inner, factor,
            KEY_DIM, KEY_PAD, VALUE_DIM, VALUE_PAD, SOFTCAP, NARROW, True,
        )  # fmt: skip

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None] * value_scale
    if NARROW:
        acc /= HEADROOM
    lanes = tl.arange(0, VALUE_PAD)
    place = out + (token * out_token_stride + head * out_head_stride)[:, None] + lanes[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=real[:, None] & (lanes < VALUE_DIM)[None, :])


def launch_of(key_dim: int, value_dim: int, group: int, itemsize: int, sm: int) -> Launch:
    """Two warp groups with 64 rows each on Hopper. Shared memory holds the queries, and a few tiles of K and V."""
    dim = max(padded(key_dim), padded(value_dim))
    least = padded(group)
    if sm == 0:
        return Launch(tile=64, rows=max(64, least))
    if itemsize == 4:  # without tensor cores: for checks, not for serving
        return Launch(tile=16, rows=least, num_warps=4, num_stages=1)
    if dim > 128:
        return Launch(tile=32, rows=max(64, least), num_warps=8, num_stages=2)
    if sm < 9:
        return Launch(tile=32, rows=max(128, least), num_warps=8, num_stages=3)
    return Launch(tile=128 if dim <= 64 else 64, rows=max(128, least), num_warps=8, num_stages=3)


def prefill(
    query: Tensor,
    cache: LayerCache,
    rows: PagedRows,
    options: LayerOptions,
    out: Tensor,
    *,
    launch: Launch | None = None,
) -> None:
    """Attend the tokens of the rows behind `rows.num_decodes`: query (T, num_heads, key_dim), out (.., value_dim).

    Their K and V are in the slab already. The other rows have one token each, and their outputs are not touched; where
    some of those are padding and have none, the rows behind them begin sooner.
    """
    num_rows, num_tokens = len(rows.seq_lens) - rows.num_decodes, query.shape[0]
    if num_rows == 0:
        return
    num_heads, key_dim = query.shape[1:]
    num_kv_heads, value_dim = cache.keys.shape[1], out.shape[2]
    group = num_heads // num_kv_heads
    launch = launch or launch_of(key_dim, value_dim, group, query.itemsize, sm_major(query.device))
    lines, has_lines = rows.lines()
    inner, factor = score_arguments(options, cache.key_scale)
    _prefill[(num_tokens // (launch.rows // group) + num_rows, num_kv_heads)](
        query,
        cache.keys,
        cache.values,
        rows.block_tables,
        lines,
        rows.query_start_loc,
        rows.seq_lens,
        query if options.sinks is None else options.sinks,
        out,
        inner,
        factor,
        cache.value_scale,
        rows.num_decodes,
        num_rows,
        rows.block_tables.stride(0),
        *query.stride()[:2],
        *out.stride()[:2],
        *cache.keys.stride()[:3],
        *cache.values.stride()[:3],
        GROUP=group,
        ROWS=launch.rows,
        BLOCK_SIZE=cache.block_size,
        TILE=launch.tile,
        KEY_DIM=key_dim,
        KEY_PAD=padded(key_dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=padded(value_dim),
        WINDOW=options.window or 0,
        SOFTCAP=options.softcap is not None,
        SINKS=options.sinks is not None,
        TABLE_ROWS=has_lines,
        NARROW=is_narrow(query, cache) and key_dim <= _WIDEST_NARROW,
        UPCAST=is_interpreted(),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def compile_cases() -> list[CompileCase]:
    """As Qwen3-0.6B (groups of 2) and Llama 3 8B (groups of 4) launch it, and what differs from them most."""
    return [
        _case("group of 2", group=2),
        _case("group of 4", group=4),
        _case("group of 4 on Ampere", group=4, sm=80),
        _case("group of 7, dim 64, window", group=7, key_dim=64, value_dim=64, WINDOW=128, SINKS=True),
        _case("dim 80", group=1, key_dim=80, value_dim=80),
        _case("dim 256, soft cap", group=2, key_dim=256, value_dim=256, SOFTCAP=True),
        _case("values narrower", group=1, key_dim=192, value_dim=128),
        _case("group of 4, fp8", group=4, slab="fp8e4nv"),
        _case("dim 256, fp8", group=2, key_dim=256, value_dim=256, slab="fp8e4nv"),
        _case("dim 256, fp8, soft cap", group=2, key_dim=256, value_dim=256, slab="fp8e4nv", SOFTCAP=True),
        _case("float32", group=2, dtype="fp32", itemsize=4, instructions=()),
    ]


def _case(
    name: str,
    *,
    group: int,
    key_dim: int = 128,
    value_dim: int = 128,
    dtype: str = "bf16",
    slab: str = "",
    itemsize: int = 2,
    instructions: tuple[str, ...] | None = None,
    sm: int = 90,
    **flags: object,
) -> CompileCase:
    launch = launch_of(key_dim, value_dim, group, itemsize, sm // 10)
    constants: dict[str, object] = {
        "GROUP": group,
        "ROWS": launch.rows,
        "BLOCK_SIZE": 16,
        "TILE": launch.tile,
        "KEY_DIM": key_dim,
        "KEY_PAD": padded(key_dim),
        "VALUE_DIM": value_dim,
        "VALUE_PAD": padded(value_dim),
        "WINDOW": 0,
        "SOFTCAP": False,
        "SINKS": False,
        "TABLE_ROWS": True,
        "NARROW": bool(slab) and key_dim <= _WIDEST_NARROW,
        "UPCAST": False,
    } | flags
    types = dict.fromkeys(("query", "sinks", "out"), f"*{dtype}") | dict.fromkeys(
        ("keys", "values"), f"*{slab or dtype}"
    )
    types |= dict.fromkeys(("block_tables", "table_rows", "query_start_loc", "seq_lens"), "*i32")
    types |= dict.fromkeys(("inner", "factor", "value_scale"), "fp32")
    return CompileCase(
        name=f"prefill, {name}",
        kernel=_prefill,
        signature={each: types.get(each, "i32") for each in _prefill.arg_names if each not in constants},
        constants=constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        instructions=("HGMMA" if sm == 90 else "HMMA",) if instructions is None else instructions,
        targets=(sm,),
    )
