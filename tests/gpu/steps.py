"""Steps as the runner for a GPU makes them, by hand: a few sequences, their tables, and any forward over both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor

from executor.attention.protocol import LayerNeeds
from executor.gpu.inputs import DeviceTables, StepInputs
from executor.kv_cache import KvCache, SlabFormat

DEVICE: Final = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE: Final = 16
MAX_LEN: Final = 64
NUM_BLOCKS: Final = 16

Forward = Callable[[StepInputs, DeviceTables], Tensor]


def slab_of_nan(needs: list[LayerNeeds]) -> KvCache:
    """A slab in which everything that nobody wrote shows."""
    slab = SlabFormat(dtype=needs[0].kv_dtype or needs[0].dtype)
    shapes = [layer.shape for layer in needs]
    cache = KvCache(shapes, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, format=slab, device=DEVICE)
    for layer in cache.layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    return cache


class Steps:
    """Sequences that are computed a step at a time. Blocks are scattered; behind a table's end there is -1."""

    def __init__(self, forward: Forward, prompts: list[list[int]]) -> None:
        self.tokens = [list(prompt) for prompt in prompts]
        self.forward = forward
        self._computed = [0] * len(prompts)
        lines = len(prompts) + 1
        free = iter(np.random.default_rng(5).permutation(NUM_BLOCKS).tolist())
        self._blocks = np.full((lines, MAX_LEN // BLOCK_SIZE), -1, np.int32)
        for line, prompt in enumerate(prompts):
            count = -(-(len(prompt) + 8) // BLOCK_SIZE)  # room for an answer
            self._blocks[line, :count] = [next(free) for _ in range(count)]
        self._pool = np.zeros((lines, MAX_LEN), np.int32)
        for line, prompt in enumerate(prompts):
            self._pool[line, : len(prompt)] = prompt

    def every(self, counts: dict[int, int]) -> list[tuple[int, int, Tensor]]:
        """Compute so many tokens of each row; return (row, position, logits) of every one."""
        inputs, places = self.inputs(counts, every=True)
        logits = self._run(inputs, counts)
        return [(*place, row) for place, row in zip(places, logits, strict=True)]

    def greedy(self, counts: dict[int, int]) -> None:
        """Compute so many tokens of each row, to its end, and append the likeliest next one."""
        inputs, places = self.inputs(counts, every=False)
        logits = self._run(inputs, counts)
        for (row, position), scores in zip(places, logits, strict=True):
            token = int(scores.argmax())
            self.tokens[row].append(token)
            self._pool[row, position + 1] = token

    def inputs(self, counts: dict[int, int], *, every: bool) -> tuple[StepInputs, list[tuple[int, int]]]:
        """The step, and whose logits it gives: of every token, or of the last one of each row."""
        order = sorted(counts, key=lambda row: counts[row] > 1)
        spans = [(row, self._computed[row], self._computed[row] + counts[row]) for row in order]
        each = [(row, position) for row, start, stop in spans for position in range(start, stop)]
        ends = np.cumsum([counts[row] for row in order])
        picked = list(range(len(each))) if every else [int(end) - 1 for end in ends]
        lens = [stop for _, _, stop in spans]
        slots = [int(self._blocks[row, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for row, p in each]
        lines = np.array([row for row, _ in (each[index] for index in picked)])
        after = np.array([position + 1 for _, position in (each[index] for index in picked)])

        def column(values: object) -> Tensor:
            return torch.from_numpy(np.asarray(values, np.int32)).to(DEVICE)

        inputs = StepInputs(
            num_decodes=sum(count == 1 for count in counts.values()),
            max_query_len=max(counts.values()),
            max_seq_len=max(lens),
            token_places=column([row * MAX_LEN + position for row, position in each]),
            positions=column([position for _, position in each]),
            slot_mapping=column(slots),
            query_start_loc=column([0, *ends]),
            seq_lens=column(lens),
            table_rows=column(order),
            logits_indices=column(picked),
            sampled_slots=column(lines),
            sampled_places=column(lines * MAX_LEN + after),
            sampled_indices=column(np.zeros_like(lines)),
        )
        return inputs, [each[index] for index in picked]

    def tables(self) -> DeviceTables:
        """What the device knows of the sequences."""
        lines = len(self._pool)
        floats, ints = torch.zeros(lines, device=DEVICE), torch.zeros(lines, dtype=torch.int32, device=DEVICE)
        return DeviceTables(
            token_ids=torch.from_numpy(self._pool.copy()).to(DEVICE),
            block_tables=torch.from_numpy(self._blocks.copy()).to(DEVICE),
            temperature=floats,
            top_k=ints,
            top_p=floats,
            min_p=floats,
            seed=torch.zeros(lines, 2, dtype=torch.int32, device=DEVICE),
            choice=ints,
        )

    def _run(self, inputs: StepInputs, counts: dict[int, int]) -> Tensor:
        logits = self.forward(inputs, self.tables()).float().cpu().clone()
        for row, count in counts.items():
            self._computed[row] += count
        return logits
