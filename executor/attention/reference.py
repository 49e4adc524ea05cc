"""The oracle: paged attention written down as plainly as it can be, row after row. Any device, any dtype, no speed."""

from __future__ import annotations

import torch
from torch import Tensor

from executor.attention.protocol import AttentionStep, LayerNeeds, LayerOptions, store
from executor.kv_cache import LayerCache


class ReferenceAttention:
    """Serves every layer whose K and V are kept as they are. In float32, or float64 where it is given that."""

    name = "reference"
    packed = False

    def why_not(self, layer: LayerNeeds, /) -> str | None:
        """Everything is served, in its own precision."""
        return None if layer.kv_dtype is None else f"K and V in {layer.kv_dtype}"

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
        loc = step.batch.query_start_loc.tolist()
        for row, seq_len in enumerate(step.batch.seq_lens.tolist()):
            keys, values = read_row(cache, step.block_tables[row], seq_len)
            first, last = loc[row], loc[row + 1]
            out[first:last] = attend_one(query[first:last], keys, values, options).to(out.dtype)
        return out


def read_row(cache: LayerCache, block_table: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """Gather K and V of positions [0, seq_len): (seq_len, num_kv_heads, dim) each."""
    positions = torch.arange(seq_len, device=block_table.device)
    blocks = block_table[positions // cache.block_size]
    offsets = positions % cache.block_size
    return cache.keys[blocks, :, offsets], cache.values[blocks, :, offsets]


def attend_one(query: Tensor, keys: Tensor, values: Tensor, options: LayerOptions) -> Tensor:
    """Attend the last Q tokens of one sequence of K tokens; return (Q, num_heads, value_dim) in the accumulating dtype.

    query (Q, num_heads, key_dim), keys (K, num_kv_heads, key_dim), values (K, num_kv_heads, value_dim).
    """
    accumulate = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // keys.shape[1]
    keys = keys.to(accumulate).repeat_interleave(group, dim=1)
    values = values.to(accumulate).repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.to(accumulate), keys) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    position = torch.arange(len(keys), device=query.device)
    of_query = position[-len(query) :, None]
    visible = position <= of_query
    if options.window is not None:
        visible &= position > of_query - options.window
    scores = scores.masked_fill(~visible, -torch.inf)
    if options.sinks is not None:
        sinks = options.sinks.to(accumulate)[:, None, None].expand(-1, len(query), 1)
        scores = torch.cat([scores, sinks], dim=2)
    weights = scores.softmax(dim=2)[:, :, : len(keys)]
    return torch.einsum("hqk,khd->qhd", weights, values)
