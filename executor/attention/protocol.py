"""What a paged-attention backend is given and what it must do. The contract suite holds every backend to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from executor.batch import InputBatch
from executor.kv_cache import LayerCache, LayerShape


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNeeds:
    """What one layer asks of its backend."""

    shape: LayerShape
    dtype: torch.dtype
    device: torch.device
    window: int | None = None  # a token attends to itself and the window - 1 before it
    softcap: float | None = None
    sinks: bool = False
    block_size: int = 16
    kv_dtype: torch.dtype | None = None  # of rows in the slab, where it is not the layer's own


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOptions:
    """How the scores of one layer are formed."""

    scale: float
    window: int | None = None  # a token attends to itself and the window - 1 before it
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    sinks: Tensor | None = None  # (num_heads,) a score that takes part in the softmax and has no value


@dataclass(slots=True, kw_only=True)
class AttentionStep:
    """One step's layout on the device, the same for every layer. Legend as in InputBatch.

    `memo` is the backends' own: what is computed once a step and used by every layer.
    """

    batch: InputBatch  # the same columns on the host
    slot_mapping: Tensor  # (T,) int64
    query_start_loc: Tensor  # (N + 1,) int64
    seq_lens: Tensor  # (N,) int64
    block_tables: Tensor  # (N, M) int64, or (L, M) int32 with `table_rows`
    table_rows: Tensor | None = None  # (N,) int32: each row's line of `block_tables`, where it is not the row's own
    memo: dict[object, object] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: InputBatch, device: torch.device) -> AttentionStep:
        """Bring the columns of `batch` to `device`."""
        return cls(
            batch=batch,
            slot_mapping=torch.from_numpy(batch.slot_mapping).to(device),
            query_start_loc=torch.from_numpy(batch.query_start_loc).to(device),
            seq_lens=torch.from_numpy(batch.seq_lens).to(device),
            block_tables=torch.from_numpy(batch.block_tables.astype("int64")).to(device),
        )


class AttentionBackend(Protocol):
    """Stores a step's K and V in the slab and attends through the block tables. Holds nothing of a sequence."""

    name: str
    packed: bool  # whether it reads the C++ kernels' records

    def why_not(self, layer: LayerNeeds, /) -> str | None:
        """Return why this backend cannot serve the layer, or None when it can."""
        ...

    def attend(
        self,
        query: Tensor,  # (T, num_heads, key_dim)
        key: Tensor,  # (T, num_kv_heads, key_dim)
        value: Tensor,  # (T, num_kv_heads, value_dim)
        cache: LayerCache,
        step: AttentionStep,
        options: LayerOptions,
    ) -> Tensor:
        """Write all of `key` and `value` to their slots, then attend; return (T, num_heads, value_dim).

        All is stored before anything is read: a row may read blocks that another row of the same step writes. What
        lies in the slab behind a row's last token may be anything, NaN too.
        """
        ...


def store(key: Tensor, value: Tensor, cache: LayerCache, step: AttentionStep) -> None:
    """Write the step's K and V to their slots. Plain torch; shapes as in `AttentionBackend.attend`."""
    num_kv_heads, block_size = cache.keys.shape[1:3]
    places = step.memo.get(("store", num_kv_heads))
    if places is None:
        # a slot's head h lies at line (block * num_kv_heads + h) * block_size + offset of the flattened slab
        heads = torch.arange(num_kv_heads, device=key.device)
        blocks = (step.slot_mapping // block_size)[:, None]
        places = ((blocks * num_kv_heads + heads) * block_size + (step.slot_mapping % block_size)[:, None]).view(-1)
        step.memo["store", num_kv_heads] = places
    assert isinstance(places, Tensor)
    cache.keys.view(-1, cache.keys.shape[3]).index_copy_(0, places, key.reshape(-1, key.shape[2]))
    cache.values.view(-1, cache.values.shape[3]).index_copy_(0, places, value.reshape(-1, value.shape[2]))
