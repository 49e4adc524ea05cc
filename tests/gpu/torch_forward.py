"""A forward and a sampler to test a GPU runner with on a CPU: plain torch, from `StepInputs` and nothing else.

Shapes depend on shapes alone and every address may be captured, as of the kernels whose place they take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from executor.attention.protocol import AttentionBackend, LayerOptions
from executor.batch import InputBatch
from executor.gpu.inputs import DeviceTables, StepInputs
from executor.gpu.models import embedded_rows
from executor.kv_cache import KvCache
from executor.loading import Loaded
from executor.paged_model import keeping_hidden, run
from executor.sampler import SamplingColumns, sample


class TorchForward:
    """A GpuModel: Transformers' modules, and attention over the slab of the rows that `StepInputs` names."""

    reads_host = False
    keeps_logits = False

    def __init__(self, model: Any, cache: KvCache) -> None:
        self._model = model
        self._cache = cache
        self.seen: list[StepInputs] = []  # of every forward
        self.hidden: Tensor | None = None

    def check(self, tables: DeviceTables) -> None:
        """There is nothing to doubt."""

    def forward(self, inputs: StepInputs, tables: DeviceTables, batch: InputBatch | None = None) -> Tensor:
        self.seen.append(inputs)
        token_ids = tables.token_ids.view(-1)[inputs.token_places].long()
        calls = _Attention(inputs, tables, self._cache)
        rows = embedded_rows(batch, inputs)
        if rows is None:
            return run(self._model, token_ids, inputs.positions.long(), inputs.logits_indices.long(), calls)
        with keeping_hidden(self._model) as states:
            logits = run(self._model, token_ids, inputs.positions.long(), inputs.logits_indices.long(), calls)
        self.hidden = states[0][inputs.logits_indices.long()[rows]]
        return logits


class _Attention:
    def __init__(self, inputs: StepInputs, tables: DeviceTables, cache: KvCache) -> None:
        self._cache = cache
        self._slots = inputs.slot_mapping.long()
        tokens = torch.arange(len(inputs.positions))
        rows = torch.searchsorted(inputs.query_start_loc[1:].long(), tokens, right=True)
        self._of_no_row = rows == len(inputs.seq_lens)
        rows = rows.clamp(max=len(inputs.seq_lens) - 1)
        self._blocks = tables.block_tables[inputs.table_rows.long()][rows].long()  # (T, M)
        self._positions = inputs.positions.long()[:, None]  # (T, 1)
        self._seq_lens = inputs.seq_lens.long()[rows][:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions) -> Tensor:
        cache = self._cache.layers[layer]
        self._store(cache.keys, key)
        self._store(cache.values, value)
        keys, values = self._gather(cache.keys), self._gather(cache.values)  # (T, Hkv, M * block_size, D)
        places = torch.arange(keys.shape[2])
        visible = (places <= self._positions) & (places < self._seq_lens)
        if options.window is not None:
            visible &= places > self._positions - options.window
        group = query.shape[1] // keys.shape[1]
        values = values.masked_fill(~visible[:, None, :, None], 0).repeat_interleave(group, dim=1)
        scores = torch.einsum("thd,thpd->thp", query, keys.repeat_interleave(group, dim=1)) * options.scale
        weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(dim=-1).nan_to_num()
        out = torch.einsum("thp,thpd->thd", weights, values)
        return out.masked_fill(self._of_no_row[:, None, None], torch.nan)  # no kernel writes them: they may be anything

    def _store(self, slab: Tensor, new: Tensor) -> None:
        """Slot -1 goes behind the end."""
        num_blocks, num_heads, block_size, dim = slab.shape
        lines = slab.transpose(1, 2).reshape(-1, num_heads, dim)
        lines = torch.cat((lines, lines[:1]))
        lines.index_copy_(0, torch.where(self._slots < 0, len(lines) - 1, self._slots), new)
        slab.copy_(lines[:-1].view(num_blocks, block_size, num_heads, dim).transpose(1, 2))

    def _gather(self, slab: Tensor) -> Tensor:
        return slab[self._blocks].transpose(1, 2).flatten(2, 3)


def open_torch_forward(
    loaded: Loaded,
    cache: KvCache,
    backends: Sequence[AttentionBackend],
    *,
    max_positions: int,
    max_rows: int,
    max_tokens: int,
    report: Callable[[int, int], None],
) -> TorchForward:
    return TorchForward(loaded.model, cache)


def sample_as_the_host(logits: Tensor, inputs: StepInputs, tables: DeviceTables, out: Tensor) -> None:
    """Choose with executor/sampler.py, from the columns of the device's tables."""
    slots = inputs.sampled_slots.long()
    how = SamplingColumns(
        temperature=tables.temperature[slots].double().numpy(),
        top_k=tables.top_k[slots].long().numpy(),
        top_p=tables.top_p[slots].double().numpy(),
        min_p=tables.min_p[slots].double().numpy(),
        typical_p=torch.ones(len(slots), dtype=torch.float64).numpy(),
        seed=tables.seed[slots].contiguous().numpy().view("uint64")[:, 0],
        choice=tables.choice[slots].long().numpy(),
        index=inputs.sampled_indices.long().numpy(),
    )
    chosen = sample(logits[: len(slots)].float().contiguous().numpy(), how)
    tokens = torch.tensor(chosen.tokens, dtype=torch.int32)
    tokens[list(chosen.failed)] = -1
    out.copy_(tokens)
    good = tokens >= 0
    tables.token_ids.view(-1)[inputs.sampled_places.long()[good]] = tokens[good]


def sample_greedily(logits: Tensor, inputs: StepInputs, tables: DeviceTables, out: Tensor) -> None:
    """The likeliest token, by torch alone."""
    tokens = logits[: len(out)].argmax(dim=1).int()
    out.copy_(tokens)
    tables.token_ids.view(-1).index_copy_(0, inputs.sampled_places.long(), tokens)
