"""The resident tables on the device: what the forward and the sampler read of every sequence.

One tensor of int32 holds them all (floats are stored by their bits), so that whatever a plan changed, in whatever
table, is a list of (place, value) that travels in the step's packed copy and is written by one scatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.step import StepPlan
from common.types import MAX_SLOTS, SlotRef, slot_of
from executor.gpu.inputs import DeviceTables
from executor.resident import Resident, spread

_ALIGNMENT: Final = 4  # int32: a table begins where a kernel may read 16 bytes at once


class Updates(NamedTuple):
    """What a plan changed. U entries; one that is there twice has one value."""

    places: NDArray[np.int32]  # (U,) in the flattened tables
    values: NDArray[np.int32]  # (U,)


NO_UPDATES: Final = Updates(np.zeros(0, np.int32), np.zeros(0, np.int32))


class MirroredTables:
    """`DeviceTables` over one tensor, and how to keep them what the resident tables are. L slots, and a line for none.

    The line behind the last slot belongs to nobody: padding rows read it and sample into it.
    """

    def __init__(self, resident: Resident, device: torch.device) -> None:
        """Zeros on `device`: everything that is told of is admitted first."""
        self._resident = resident
        lines = len(resident.refs) + 1
        num_positions, num_blocks = resident.token_ids.shape[1], resident.block_tables.shape[1]
        size = 0

        def begin(width: int) -> int:
            nonlocal size
            first = size
            size += -(-lines * width // _ALIGNMENT) * _ALIGNMENT
            return first

        self._token_ids, self._block_tables = begin(num_positions), begin(num_blocks)
        self._temperature, self._top_k, self._top_p, self._min_p = begin(1), begin(1), begin(1), begin(1)
        self._seed, self._choice = begin(2), begin(1)
        assert size < 1 << 31, f"{lines} lines of {num_positions} tokens: places in the tables are int32"
        self._entries = entries = torch.zeros(size, dtype=torch.int32, device=device)

        def table(first: int, *shape: int) -> Tensor:
            return entries[first : first + lines * (shape[0] if shape else 1)].view(lines, *shape)

        self.tables = DeviceTables(
            token_ids=table(self._token_ids, num_positions),
            block_tables=table(self._block_tables, num_blocks),
            temperature=table(self._temperature).view(torch.float32),
            top_k=table(self._top_k),
            top_p=table(self._top_p).view(torch.float32),
            min_p=table(self._min_p).view(torch.float32),
            seed=table(self._seed, 2),
            choice=table(self._choice),
        )
        self._columns = np.array(
            [self._temperature, self._top_k, self._top_p, self._min_p, self._choice], np.int64
        )  # where those begin that have one number a slot

    def updates(self, plan: StepPlan) -> Updates:
        """What `plan` changed. The resident tables have applied it already."""
        if not plan.new and not plan.told_refs and not plan.append_refs and not plan.replace_refs:
            return NO_UPDATES
        places: list[NDArray[np.int64]] = []
        values: list[NDArray[np.int32]] = []
        for sequence in plan.new:
            self._admit(slot_of(sequence.ref), places, values)
        if plan.told_refs:
            places.append(self._token_ids + self._resident.told_places(plan))
            values.append(np.asarray(plan.told_tokens).astype(np.int32))
        if plan.append_refs:
            self._append(plan.append_refs, places, values)
        if plan.replace_refs:
            slots = np.asarray(plan.replace_refs, np.int64) & (MAX_SLOTS - 1)
            self._blocks(slots, np.asarray(plan.replace_indices, np.int64), places, values)
        return Updates(np.concatenate(places).astype(np.int32), np.concatenate(values))

    def put_tokens(self, places: Tensor, tokens: Tensor) -> None:
        """Write `tokens` (S,) int32 to `places` (S,) of the flattened token pool. Both on the device."""
        self.tables.token_ids.view(-1).index_put_((places,), tokens)

    def apply(self, places: Tensor, values: Tensor) -> None:
        """Write `values` (U,) int32 to `places` (U,) int32, both on the device, without the host's waiting."""
        self._entries.index_put_((places,), values)

    def _admit(self, slot: int, places: list[NDArray[np.int64]], values: list[NDArray[np.int32]]) -> None:
        held = self._resident
        known = int(held.num_tokens[slot])
        first = self._token_ids + slot * held.token_ids.shape[1]
        places.append(np.arange(first, first + known))
        values.append(held.token_ids[slot, :known])
        granted = np.arange(held.num_blocks[slot])
        self._blocks(np.full(len(granted), slot), granted, places, values)
        floats = np.array([held.temperature[slot], held.top_p[slot], held.min_p[slot]], np.float32).view(np.int32)
        places.append(self._columns + slot)
        values.append(
            np.array([floats[0], held.top_k[slot], floats[1], floats[2], held.choice[slot]], np.int64).astype(np.int32)
        )
        places.append(np.arange(2) + self._seed + 2 * slot)
        values.append(held.seed[slot : slot + 1].view(np.int32))  # little-endian: the low half first

    def _append(
        self, refs: Sequence[SlotRef], places: list[NDArray[np.int64]], values: list[NDArray[np.int32]]
    ) -> None:
        slots, counts = np.unique(np.asarray(refs, np.int64) & (MAX_SLOTS - 1), return_counts=True)
        slots, indices = spread(slots, self._resident.num_blocks[slots] - counts, counts)
        self._blocks(slots, indices, places, values)

    def _blocks(
        self,
        slots: NDArray[np.int64],
        indices: NDArray[np.int64],
        places: list[NDArray[np.int64]],
        values: list[NDArray[np.int32]],
    ) -> None:
        """Entries of block tables, as they are now: one that was appended and replaced is told twice the same."""
        tables = self._resident.block_tables
        places.append(self._block_tables + slots * tables.shape[1] + indices)
        values.append(tables[slots, indices])
