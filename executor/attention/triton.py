"""Paged attention by our own Triton kernels (executor/gpu/kernels): the default on a GPU.

Two ways in. `TritonAttention` is a backend like the others: it stores, then attends. `attend_stored` is for a forward
that stores K and V by itself, and for captured graphs: it takes memory from nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from executor.attention.protocol import AttentionStep, LayerNeeds, LayerOptions
from executor.gpu.inputs import StepInputs
from executor.gpu.triton_case import why_not
from executor.kv_cache import LayerCache, LayerShape

if TYPE_CHECKING:
    from executor.gpu.kernels.paged import PagedRows

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_DIM = 256
_FP8_FROM = (8, 9)


class TritonAttention:
    """Any group size, block size, window, soft cap and sinks, over rows of 32, 16 or 8 (e4m3) bits."""

    name = "triton"
    packed = False

    def __init__(self, *, interpreted: bool = False) -> None:
        self._interpreted = interpreted  # for tests: on the CPU, by Triton's interpreter, thousands of times slower

    def why_not(self, layer: LayerNeeds, /) -> str | None:
        """Head dimensions are padded to a power of 2, which has to fit a multiprocessor."""
        if layer.device.type != "cuda" and not self._interpreted:
            return f"Triton's kernels are for CUDA, not for {layer.device.type}"
        if layer.dtype not in _DTYPES:
            return str(layer.dtype)
        if max(layer.shape.key_dim, layer.shape.value_dim) > _MAX_DIM:
            return f"head dimension above {_MAX_DIM}"
        reason = why_not(layer.device)
        if reason is None and layer.kv_dtype is not None:
            reason = _why_not_kv(layer.kv_dtype, layer.device)
        return reason

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
        from executor.gpu.kernels.paged import PagedRows
        from executor.gpu.kernels.store import store

        num_heads = query.shape[1]
        shape = LayerShape(
            num_heads=num_heads, num_kv_heads=key.shape[1], key_dim=query.shape[2], value_dim=value.shape[2]
        )
        workspace = step.memo.get(("triton", shape))
        if workspace is None:
            workspace = Workspace([shape], max_rows=step.batch.num_decodes, device=query.device)
            step.memo["triton", shape] = workspace
        assert isinstance(workspace, Workspace)
        rows = PagedRows(
            num_decodes=step.batch.num_decodes,
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            block_tables=step.block_tables,
            table_rows=step.table_rows,
        )
        store(_dense(key), _dense(value), cache, step.slot_mapping)
        out = query.new_empty(len(query), num_heads, shape.value_dim)
        _attend(_dense(query), cache, rows, options, out, workspace)
        return out


class Workspace:
    """Where decode rows that are read in shares leave their parts. Taken once: a captured graph keeps its addresses.

    It serves all layers, one after the other, and any number of rows up to `max_rows`.
    """

    def __init__(self, layers: Iterable[LayerShape], *, max_rows: int, device: torch.device) -> None:
        from executor.gpu.kernels.decode import num_splits

        num_parts = num_numbers = 0
        for layer in set(layers):
            for rows in range(1, max_rows + 1):
                splits = num_splits(rows, layer.num_kv_heads, device)
                parts = rows * layer.num_heads * splits if splits > 1 else 0
                num_parts = max(num_parts, parts)
                num_numbers = max(num_numbers, parts * layer.value_dim)
        self.parts = torch.empty(num_numbers, dtype=torch.float32, device=device)
        self.parts_lse = torch.empty(num_parts, dtype=torch.float32, device=device)


def attend_stored(
    query: Tensor,
    cache: LayerCache,
    inputs: StepInputs,
    block_tables: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    workspace: Workspace,
) -> Tensor:
    """Attend query (T, num_heads, key_dim) to K and V that are stored already; return (T, num_heads, value_dim).

    `block_tables` (L, M) int32 are the device's, in whose line `inputs.table_rows[n]` row n's blocks are. Rows of one
    token are `inputs.num_decodes`; the others may have any number. Nothing is read back, and no memory is taken but for
    an `out` that is not given.
    """
    from executor.gpu.kernels.paged import PagedRows

    rows = PagedRows(
        num_decodes=inputs.num_decodes,
        query_start_loc=inputs.query_start_loc,
        seq_lens=inputs.seq_lens,
        block_tables=block_tables,
        table_rows=inputs.table_rows,
    )
    options = LayerOptions(scale=scale, window=window, softcap=softcap, sinks=sinks)
    if out is None:
        out = query.new_empty(*query.shape[:2], cache.values.shape[3])
    _attend(query, cache, rows, options, out, workspace)
    return out


def _attend(
    query: Tensor, cache: LayerCache, rows: PagedRows, options: LayerOptions, out: Tensor, workspace: Workspace
) -> None:
    from executor.gpu.kernels.decode import decode
    from executor.gpu.kernels.prefill import prefill

    # in this order: a padding row among the decode rows leaves zeros at a token that may be one of the rows behind them
    decode(query, cache, rows, options, out, workspace.parts, workspace.parts_lse)
    prefill(query, cache, rows, options, out)


def _why_not_kv(dtype: torch.dtype, device: torch.device) -> str | None:
    if dtype is not torch.float8_e4m3fn:
        return f"K and V in {dtype}"
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < _FP8_FROM:
        return f"K and V in fp8 need compute capability 8.9 (Ada, Hopper), the GPU's is {found[0]}.{found[1]}"
    return None


def _dense(x: Tensor) -> Tensor:
    """`x` itself if its last axis is dense, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
