"""Steps as the device sees them, made of nothing but how long their rows are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from common.blocks import blocks_for
from executor.attention.protocol import AttentionStep
from executor.batch import InputBatch
from executor.gpu.inputs import DeviceTables, StepInputs
from executor.gpu.packing import Shape
from executor.kv_cache import KvCache, LayerShape, SlabFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One step: row n lives in slot n; its blocks lie scattered."""

    inputs: StepInputs
    tables: DeviceTables
    num_blocks: int  # that the rows need together


@dataclass(frozen=True, slots=True, kw_only=True)
class HowSampled:
    """Of every row."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


GREEDY = HowSampled()


def layout(
    rows: Sequence[tuple[int, int]],
    device: torch.device,
    *,
    block_size: int = 16,
    vocab_size: int = 256,
    max_model_len: int = 0,
    how: HowSampled = GREEDY,
    padding: int = 0,
) -> Layout:
    """A step of rows (tokens computed before, tokens computed now), those with one token first; all are sampled.

    `max_model_len` is what the host says of the longest sequence: 0 is the longest one there is. `padding` rows follow,
    as a captured graph has them; only where all rows have one token.
    """
    assert [now == 1 for _, now in rows] == sorted((now == 1 for _, now in rows), reverse=True), "decodes lie first"
    draw = np.random.default_rng(0)
    before = np.array([row[0] for row in rows], np.int64)
    now = np.array([row[1] for row in rows], np.int64)
    known, count = before + now, len(rows)
    longest = max(int(known.max()), max_model_len)
    positions_wide = longest + 1
    each = np.array([blocks_for(int(total) + 1, block_size) for total in known])
    num_blocks = int(each.sum())
    names = draw.permutation(num_blocks).astype(np.int32)
    tables = np.full((count + 1, blocks_for(positions_wide, block_size)), -1, np.int32)
    for row, (begin, width) in enumerate(zip(np.cumsum(each) - each, each, strict=True)):
        tables[row, :width] = names[begin : begin + width]

    row_of = np.repeat(np.arange(count), now)
    loc = np.concatenate(([0], np.cumsum(now)))
    positions = np.arange(now.sum()) - loc[:-1][row_of] + before[row_of]
    blocks = tables[row_of, positions // block_size].astype(np.int64)
    slots = blocks * block_size + positions % block_size
    pad = np.zeros(padding, np.int64)
    nobody = np.full(padding, count)

    def column(*values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate(values).astype(np.int32)).to(device)

    inputs = StepInputs(
        num_decodes=int((now == 1).sum()) + padding,
        max_query_len=int(now.max()),
        max_seq_len=longest,
        token_places=column(row_of * positions_wide + positions, nobody * positions_wide),
        positions=column(positions, pad),
        slot_mapping=column(slots, pad - 1),
        query_start_loc=column(loc, loc[-1] + 1 + np.arange(padding)),
        seq_lens=column(known, pad),
        table_rows=column(np.arange(count), nobody),
        logits_indices=column(loc[1:] - 1, loc[-1] + np.arange(padding)),
        sampled_slots=column(np.arange(count), nobody),
        sampled_places=column(np.arange(count) * positions_wide + known, nobody * positions_wide),
        sampled_indices=column(np.arange(count) % 7, pad),
    )

    def each_slot(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((count + 1,), value, dtype=dtype, device=device)

    seeds = draw.integers(-(1 << 31), 1 << 31, (count + 1, 2)).astype(np.int32)
    return Layout(
        inputs=inputs,
        tables=DeviceTables(
            token_ids=torch.randint(0, vocab_size, (count + 1, positions_wide), dtype=torch.int32, device=device),
            block_tables=torch.from_numpy(tables).to(device),
            temperature=each_slot(how.temperature, torch.float32),
            top_k=each_slot(how.top_k, torch.int32),
            top_p=each_slot(how.top_p, torch.float32),
            min_p=each_slot(how.min_p, torch.float32),
            seed=torch.from_numpy(seeds).to(device),
            choice=each_slot(0, torch.int32),
        ),
        num_blocks=num_blocks,
    )


def attention_step(step: Layout) -> AttentionStep:
    """The step as the runner of other architectures makes it, for backends that read the host's columns too."""
    inputs, tables = step.inputs, step.tables.block_tables

    def host(column: Tensor) -> np.ndarray:
        return column.cpu().numpy().astype(np.int64)

    batch = InputBatch(
        token_places=host(inputs.token_places),
        positions=host(inputs.positions),
        slot_mapping=host(inputs.slot_mapping),
        query_start_loc=host(inputs.query_start_loc),
        seq_lens=host(inputs.seq_lens),
        block_tables=tables[: len(inputs.seq_lens)].cpu().numpy(),
        num_decodes=inputs.num_decodes,
        logits_indices=host(inputs.logits_indices),
        sampled_slots=host(inputs.sampled_slots),
        sampled_places=host(inputs.sampled_places),
        sampled_indices=host(inputs.sampled_indices),
    )
    return AttentionStep.of(batch, tables.device)


def padded(step: Layout, shape: Shape) -> Layout:
    """The step as a captured graph of the shape has it: empty rows behind decode rows and others, tokens of no row."""
    inputs, line = step.inputs, len(step.tables.temperature) - 1
    place = line * step.tables.token_ids.shape[1]
    decodes, tokens = inputs.num_decodes, len(inputs.positions)

    def longer(column: Tensor, length: int, filler: int) -> Tensor:
        return torch.cat((column, column.new_full((length - len(column),), filler)))

    def rows(column: Tensor, filler: int, last: int) -> Tensor:
        return longer(
            torch.cat((longer(column[:decodes], shape.num_decodes, filler), column[decodes:])), shape.num_rows, last
        )

    sampled = shape.num_sampled
    return replace(
        step,
        inputs=replace(
            inputs,
            num_decodes=shape.num_decodes,
            max_query_len=shape.num_tokens,
            token_places=longer(inputs.token_places, shape.num_tokens, place),
            positions=longer(inputs.positions, shape.num_tokens, 0),
            slot_mapping=longer(inputs.slot_mapping, shape.num_tokens, -1),
            query_start_loc=torch.cat((inputs.query_start_loc[:1], rows(inputs.query_start_loc[1:], decodes, tokens))),
            seq_lens=rows(inputs.seq_lens, 0, 0),
            table_rows=rows(inputs.table_rows, line, line),
            logits_indices=longer(inputs.logits_indices, sampled, 0),
            sampled_slots=longer(inputs.sampled_slots, sampled, line),
            sampled_places=longer(inputs.sampled_places, sampled, place),
            sampled_indices=longer(inputs.sampled_indices, sampled, 0),
        ),
    )


def random_cache(
    layers: Sequence[LayerShape],
    *,
    num_blocks: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 16,
) -> KvCache:
    """A slab full of noise, so that nothing that is read costs less power than it would."""
    cache = KvCache(layers, num_blocks=num_blocks, block_size=block_size, format=SlabFormat(dtype=dtype), device=device)
    for layer in cache.layers:
        for slab in (layer.keys, layer.values):
            if dtype.itemsize == 1:
                slab.copy_(torch.randn(slab.shape, dtype=torch.bfloat16, device=device))
            else:
                slab.normal_()
    return cache
