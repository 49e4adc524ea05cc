"""Paged attention from torch's own operations: gather the blocks, then scaled-dot-product attention.

Decode rows of like length go together, their query group packed into the query axis; prefill rows go one by one. A
kernel that walks the blocks itself is faster; this one needs nothing but torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from executor.attention.protocol import AttentionStep, LayerNeeds, LayerOptions, store
from executor.kv_cache import LayerCache

_PADDING = 1.5  # decode rows share a gather while the longest is at most this much longer than the shortest


@dataclass(frozen=True, slots=True, kw_only=True)
class _DecodeGroup:
    """Decode rows that are gathered together. R rows, W blocks: those that the longest of them attends to."""

    rows: Tensor | slice  # (R,) int64, which tokens of the batch; a slice when they are neighbours
    blocks: Tensor  # (R, W) int64; past a row's end its own last block once more
    visible: Tensor  # (R, 1, 1, W * block_size) bool
    tail: Tensor  # (R, 1, block_size, 1) bool, True in the last column of `blocks` where nothing may be read


class SdpaAttention:
    """Torch only. Serves any group size, head dimension and window."""

    name = "torch"
    packed = False

    def why_not(self, layer: LayerNeeds, /) -> str | None:
        """Soft caps and sinks change the scores inside the softmax, where torch offers no hook."""
        if layer.softcap is not None:
            return "soft cap"
        if layer.sinks:
            return "sinks"
        if layer.kv_dtype is not None:
            return f"K and V in {layer.kv_dtype}"
        return None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: LayerCache,
        step: AttentionStep,
        options: LayerOptions,
    ) -> Tensor:
        """Store, then attend. Shapes as in AttentionBackend."""
        store(key, value, cache, step)
        out = query.new_empty((*query.shape[:2], value.shape[2]))
        for group in _decode_groups(step, cache.block_size, options.window):
            out[group.rows] = _decode(query[group.rows], cache, group, options)
        loc = step.batch.query_start_loc.tolist()
        for row in range(step.batch.num_decodes, len(step.batch.seq_lens)):
            tokens = slice(loc[row], loc[row + 1])
            if (seq_len := int(step.batch.seq_lens[row])) == loc[row + 1] - loc[row]:
                keys, values = key[tokens].transpose(0, 1), value[tokens].transpose(0, 1)  # nothing came before
            else:
                blocks = step.block_tables[row : row + 1, : -(-seq_len // cache.block_size)]
                keys = gather(cache.keys, blocks)[0, :, :seq_len]
                values = gather(cache.values, blocks)[0, :, :seq_len]
            out[tokens] = _prefill(query[tokens], keys, values, step, options)
        return out


def gather(slab: Tensor, blocks: Tensor) -> Tensor:
    """Copy blocks (R, W) of one layer's K or V to (R, num_kv_heads, W * block_size, dim)."""
    _, num_kv_heads, block_size, dim = slab.shape
    heads = torch.arange(num_kv_heads, device=blocks.device)[:, None]
    lines = (blocks[:, None] * num_kv_heads + heads).view(-1)  # (R * num_kv_heads * W,)
    gathered = slab.view(-1, block_size * dim).index_select(0, lines)
    return gathered.view(len(blocks), num_kv_heads, -1, dim)


def _decode(query: Tensor, cache: LayerCache, group: _DecodeGroup, options: LayerOptions) -> Tensor:
    """One query token a row, (R, num_heads, key_dim) to (R, num_heads, value_dim)."""
    num_rows, num_heads, key_dim = query.shape
    num_kv_heads, block_size = cache.keys.shape[1:3]
    keys, values = gather(cache.keys, group.blocks), gather(cache.values, group.blocks)
    # what lies behind a row's last token may be NaN, and a weight of zero does not silence that
    keys[:, :, -block_size:].masked_fill_(group.tail, 0)
    values[:, :, -block_size:].masked_fill_(group.tail, 0)
    packed = query.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, key_dim)
    out = scaled_dot_product_attention(packed, keys, values, attn_mask=group.visible, scale=options.scale)
    return out.reshape(num_rows, num_heads, -1)


def _prefill(query: Tensor, keys: Tensor, values: Tensor, step: AttentionStep, options: LayerOptions) -> Tensor:
    """The last Q tokens of one sequence: query (Q, num_heads, key_dim), keys and values (num_kv_heads, K, dim)."""
    num_new, num_heads, _ = query.shape
    num_all = keys.shape[1]
    group = num_heads // keys.shape[0]
    hidden = options.window is not None and num_all > options.window
    visible = None if num_new == num_all and not hidden else _visible(step, num_new, num_all, options.window)
    out = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys.repeat_interleave(group, dim=0)[None],
        values.repeat_interleave(group, dim=0)[None],
        attn_mask=visible,
        is_causal=visible is None,
        scale=options.scale,
    )
    return out[0].transpose(0, 1)


def _visible(step: AttentionStep, num_new: int, num_all: int, window: int | None) -> Tensor:
    """(num_new, num_all) bool: which positions each of the last tokens attends to."""
    memo = ("visible", num_new, num_all, window)
    found = step.memo.get(memo)
    if found is None:
        position = torch.arange(num_all, device=step.seq_lens.device)
        of_query = position[-num_new:, None]
        found = position <= of_query
        if window is not None:
            found &= position > of_query - window
        step.memo[memo] = found
    assert isinstance(found, Tensor)
    return found


def _decode_groups(step: AttentionStep, block_size: int, window: int | None) -> list[_DecodeGroup]:
    found = step.memo.get(("decode", window))
    if found is None:
        found = _group_decodes(step, block_size, window)
        step.memo["decode", window] = found
    assert isinstance(found, list)
    return found


def _group_decodes(step: AttentionStep, block_size: int, window: int | None) -> list[_DecodeGroup]:
    seq_lens = step.batch.seq_lens[: step.batch.num_decodes]
    first = np.zeros_like(seq_lens) if window is None else np.maximum(seq_lens - window, 0)  # first visible position
    first_block = first // block_size
    last_block = (seq_lens - 1) // block_size
    widths = last_block - first_block + 1
    device = step.seq_lens.device
    groups: list[_DecodeGroup] = []
    order = np.argsort(widths, kind="stable")
    while len(order):
        count = int(np.searchsorted(widths[order], widths[order[0]] * _PADDING, side="right"))
        rows, order = np.sort(order[:count]), order[count:]
        width = int(widths[rows].max())
        # aligned at the end, so that every row's last block is in the last column; before its first block a row
        # repeats that block, which is hidden there
        columns = last_block[rows][:, None] - np.arange(width - 1, -1, -1)
        starts = columns * block_size
        entries = np.maximum(columns, first_block[rows][:, None])
        blocks = step.batch.block_tables[rows[:, None], entries].astype(np.int64)
        positions = (starts[:, :, None] + np.arange(block_size)).reshape(len(rows), -1)
        visible = (positions >= first[rows][:, None]) & (positions < seq_lens[rows][:, None])
        tail = positions[:, -block_size:] >= seq_lens[rows][:, None]
        neighbours = rows[-1] - rows[0] + 1 == len(rows)
        groups.append(
            _DecodeGroup(
                rows=slice(int(rows[0]), int(rows[-1]) + 1) if neighbours else torch.from_numpy(rows).to(device),
                blocks=torch.from_numpy(blocks).to(device),
                visible=torch.from_numpy(visible)[:, None, None].to(device),
                tail=torch.from_numpy(tail)[:, None, :, None].to(device),
            )
        )
    return groups
