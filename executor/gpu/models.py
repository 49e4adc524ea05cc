"""The forwards that a GPU can run: the fused one of the Llama family, and Transformers' own for every other model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch import Tensor

from executor.attention.protocol import AttentionBackend, AttentionStep
from executor.batch import InputBatch
from executor.gpu.inputs import DeviceTables, StepInputs
from executor.gpu.packing import NO_ROWS
from executor.kv_cache import KvCache
from executor.loading import Loaded

if TYPE_CHECKING:
    from executor.paged_model import PagedModel

_log = logging.getLogger(__name__)

_READS_TABLES_BY_LINE: Final = frozenset({"triton"})


class GpuModel(Protocol):
    """A model over a KV slab on the device."""

    reads_host: bool  # whether it needs the columns of the host beside those of the device: then it is never captured
    keeps_logits: bool  # whether logits lie at one place, whatever the step
    hidden: Tensor | None  # (E, H) behind the last norm, of the rows of a `batch` that embed; void at the next call

    def forward(self, inputs: StepInputs, tables: DeviceTables, batch: InputBatch | None = None) -> Tensor:
        """Compute every token of the step; return logits (S + P, V), void at the next call. Waits for nothing."""
        ...

    def check(self, tables: DeviceTables) -> None:
        """See whether what was made for this device computes what it should; called once, before any step."""
        ...


class OpenModel(Protocol):
    """Makes the forward of a model that was loaded."""

    def __call__(
        self,
        loaded: Loaded,
        cache: KvCache,
        backends: Sequence[AttentionBackend],
        *,
        max_positions: int,
        max_rows: int,
        max_tokens: int,
        report: Callable[[int, int], None],
    ) -> GpuModel:
        """A step has at most `max_tokens` tokens of `max_rows` rows at positions below `max_positions`.

        `report` may be told how many of the layers are there.
        """
        ...


def open_gpu_model(
    loaded: Loaded,
    cache: KvCache,
    backends: Sequence[AttentionBackend],
    *,
    max_positions: int,
    max_rows: int,
    max_tokens: int,
    report: Callable[[int, int], None],
) -> GpuModel:
    """The fastest forward that serves this model. Takes the weights of `loaded`."""
    from executor.gpu.llama import GpuLlama, why_not

    reason = why_not(loaded.model)
    if reason is None and any(backend.name not in _READS_TABLES_BY_LINE for backend in backends):
        reason = "its attention is not Triton's"
    if reason is None:
        _log.info("forward: fused")
        return FusedForward(
            GpuLlama(
                loaded.model,
                cache,
                loaded.needs,
                max_positions=max_positions,
                max_rows=max_rows,
                max_tokens=max_tokens,
                report=report,
            )
        )
    _log.info("forward: Transformers' own (not fused: %s)", reason)
    return PagedForward.of(loaded, cache, backends)


class _Fused(Protocol):
    hidden: Tensor | None

    def forward(self, inputs: StepInputs, tables: DeviceTables, embedded_rows: Tensor | None = None, /) -> Tensor: ...

    def check_products(self, tables: DeviceTables, /) -> None: ...


def embedded_rows(batch: InputBatch | None, inputs: StepInputs) -> Tensor | None:
    """Those of the sampled rows that embed, on the device (E,) int64; None where there is none."""
    if batch is None or not len(batch.embedded_rows):
        return None
    return torch.from_numpy(batch.embedded_rows).to(inputs.positions.device)


class FusedForward:
    """A forward that is made for the device, and knows nothing of the host."""

    reads_host = False
    keeps_logits = True

    def __init__(self, model: _Fused) -> None:
        self._model = model
        self.hidden: Tensor | None = None

    def forward(self, inputs: StepInputs, tables: DeviceTables, batch: InputBatch | None = None) -> Tensor:
        """As in GpuModel."""
        logits = self._model.forward(inputs, tables, embedded_rows(batch, inputs))
        self.hidden = self._model.hidden
        return logits

    def check(self, tables: DeviceTables) -> None:
        """As in GpuModel."""
        self._model.check_products(tables)


class PagedForward:
    """Transformers' own forward, with whatever attention serves its layers."""

    keeps_logits = False

    def __init__(self, model: PagedModel, backends: Sequence[AttentionBackend]) -> None:
        self._model = model
        self.hidden: Tensor | None = None
        self.reads_host = any(backend.name not in _READS_TABLES_BY_LINE for backend in backends)

    @classmethod
    def of(cls, loaded: Loaded, cache: KvCache, backends: Sequence[AttentionBackend]) -> PagedForward:
        """Swap the modules that can be, and take the model."""
        from executor.loading import transformers_forward
        from executor.paged_model import PagedModel

        model = transformers_forward(loaded, cache, backends, None)
        assert isinstance(model, PagedModel)
        return cls(model, backends)

    def forward(self, inputs: StepInputs, tables: DeviceTables, batch: InputBatch | None = None) -> Tensor:
        """As in GpuModel."""
        token_ids = tables.token_ids.view(-1)[inputs.token_places].long()
        logits = self._model.forward_on_device(
            token_ids,
            inputs.positions.long(),
            inputs.logits_indices.long(),
            self._step(inputs, tables, batch),
            embedded_rows(batch, inputs),
        )
        self.hidden = self._model.hidden
        return logits

    def check(self, tables: DeviceTables) -> None:
        """What was swapped was held against the model's own modules when it was."""

    def _step(self, inputs: StepInputs, tables: DeviceTables, batch: InputBatch | None) -> AttentionStep:
        if not self.reads_host:
            return AttentionStep(
                batch=replace(NO_ROWS, num_decodes=inputs.num_decodes),
                slot_mapping=inputs.slot_mapping,
                query_start_loc=inputs.query_start_loc,
                seq_lens=inputs.seq_lens,
                block_tables=tables.block_tables,
                table_rows=inputs.table_rows,
            )
        assert batch is not None
        return AttentionStep(
            batch=batch,
            slot_mapping=inputs.slot_mapping.long(),
            query_start_loc=inputs.query_start_loc.long(),
            seq_lens=inputs.seq_lens.long(),
            block_tables=tables.block_tables[inputs.table_rows][:, : batch.block_tables.shape[1]].long(),
        )
