"""One step's layout for the kernels."""

from __future__ import annotations

from torch import Tensor

from executor.batch import InputBatch
from executor.native.library import StepStruct


def step_struct(batch: InputBatch, token_ids: Tensor | None = None) -> StepStruct:
    """The layout of a step for the kernels. It points into `batch`, which must live as long."""
    tables = batch.block_tables
    assert tables.flags.c_contiguous, "a table is read row after row"
    return StepStruct(
        num_tokens=len(batch.positions),
        num_rows=len(batch.seq_lens),
        table_stride=tables.shape[1],
        num_sampled=len(batch.logits_indices),
        token_ids=None if token_ids is None else token_ids.data_ptr(),
        positions=batch.positions.ctypes.data,
        slot_mapping=batch.slot_mapping.ctypes.data,
        query_start_loc=batch.query_start_loc.ctypes.data,
        seq_lens=batch.seq_lens.ctypes.data,
        block_tables=tables.ctypes.data,
        logits_indices=batch.logits_indices.ctypes.data,
    )
