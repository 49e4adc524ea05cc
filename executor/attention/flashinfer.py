"""Paged attention by FlashInfer's kernels (Ye et al., 2025, arXiv:2501.01005), for whoever asks for it by name.

FlashInfer cuts a step's rows into pieces that take equally long, on the host, before the step: `plan`. Layers that are
alike share a plan, so it is made once a step. A host that plans knows each row's length, and what it planned is in no
graph, so with this backend nothing is captured, and the forward is Transformers' own. That is why it is never chosen by
itself, whatever its kernels take: `make gpu-check` measures those beside ours.

It reads the slab as it lies: FlashInfer calls our layout HND. K and V go to their slots by our own kernel.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor.attention.protocol import AttentionStep, LayerNeeds, LayerOptions, store
from executor.batch import InputBatch
from executor.gpu.triton_case import why_not as why_not_triton
from executor.kv_cache import LayerCache, LayerShape

_SERIES: Final = "0.6."
_INSTALL: Final = "pip install flashinfer-python==0.6.9"
_DTYPES: Final = (torch.bfloat16, torch.float16)
_HEAD_DIMS: Final = (64, 128, 256)
_OLDEST: Final = (8, 0)
_GROUPS_WITHOUT_TENSOR_CORES: Final = (1, 2, 3)
"""Query heads of a K and V head whose decode rows its decode kernel takes. It can do 4 and 8 as well; from 4 on tensor
cores are ahead, that is its kernel for prompts: mini-sglang's rule."""

_LAYOUT: Final = "HND"  # (num_blocks, num_kv_heads, block_size, dim)
_MOST_PROGRAMS: Final = 2  # a multiprocessor that work on rows in shares
_MOST_QUERIES: Final = 128  # of such a program: tokens times the heads of a group


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPages:
    """What FlashInfer is told of R neighbouring rows, which read G blocks ("pages") together."""

    query_start_loc: NDArray[np.int32]  # (R + 1,) of the tokens of these rows alone
    page_start_loc: NDArray[np.int32]  # (R + 1,) row r reads pages [loc[r], loc[r + 1])
    pages: NDArray[np.int32]  # (G,)
    last_page_len: NDArray[np.int32]  # (R,) tokens in a row's last page, from 1 to block_size
    seq_lens: NDArray[np.int32]  # (R,)

    @classmethod
    def of(cls, batch: InputBatch, rows: slice, block_size: int) -> RowPages:
        """Cut them out of the step's columns."""
        seq_lens = batch.seq_lens[rows]
        counts = -(-seq_lens // block_size)
        tables = batch.block_tables[rows]
        page_start_loc = np.zeros(len(seq_lens) + 1, np.int32)
        np.cumsum(counts, out=page_start_loc[1:])
        query_start_loc = batch.query_start_loc[rows.start : rows.stop + 1]
        return cls(
            query_start_loc=(query_start_loc - query_start_loc[0]).astype(np.int32),
            page_start_loc=page_start_loc,
            pages=tables[np.arange(tables.shape[1]) < counts[:, None]].astype(np.int32),
            last_page_len=(seq_lens - (counts - 1) * block_size).astype(np.int32),
            seq_lens=seq_lens.astype(np.int32),
        )


class Wrapper(Protocol):
    """FlashInfer's word for a kernel with its plan."""

    def plan(self, *args: Any, **kwargs: Any) -> None:
        """Cut the rows of a step."""

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> object:
        """Attend q (T, num_heads, dim) to the pages of K and V, to `out`."""


class Library(Protocol):
    """What is used of FlashInfer. Tests have a stand-in for it, in torch."""

    def BatchDecodeWithPagedKVCacheWrapper(self, parts: Tensor, layout: str, /) -> Wrapper:  # noqa: N802 - its names
        """For rows of one token, without tensor cores. `parts` is room for those of rows in shares."""
        ...

    def BatchPrefillWithPagedKVCacheWrapper(self, parts: Tensor, layout: str, /, *, backend: str) -> Wrapper:  # noqa: N802
        """For rows of any number of tokens, on tensor cores."""
        ...


class FlashInferAttention:
    """Any block size, group size, window and soft cap, over rows of 16 bits of a few head dimensions.

    It holds, for each device, where FlashInfer leaves its parts, and the last plan of each kind of layer.
    """

    name = "flashinfer"
    packed = False

    def __init__(self, library: Library | None = None, *, prompts: str = "fa2") -> None:
        """`library` stands in for FlashInfer, on any device: for tests. `prompts` names its kernels for longer rows.

        FlashInfer would take fa3, for Hopper alone: minutes to compile, and slower over pages for mini-sglang.
        """
        self._library = library
        self._prompts = prompts
        self._rooms: dict[torch.device, _Room] = {}

    def why_not(self, layer: LayerNeeds, /) -> str | None:
        """Its kernels are made for few head dimensions, and know no sinks."""
        reason = None if self._library is not None else _why_not_here(layer.device)
        if reason is not None:
            return reason
        if layer.dtype not in _DTYPES:
            return str(layer.dtype)
        if layer.kv_dtype is not None:
            return f"K and V in {layer.kv_dtype}"
        if layer.shape.value_dim != layer.shape.key_dim:
            return f"values of another width than keys ({layer.shape.value_dim}, {layer.shape.key_dim})"
        if layer.shape.key_dim not in _HEAD_DIMS:
            return f"head dimension {layer.shape.key_dim} is none of {', '.join(map(str, _HEAD_DIMS))}"
        return "sinks" if layer.sinks else None

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
        _store(key, value, cache, step)
        out = query.new_empty(*query.shape[:2], value.shape[2])
        self.attend_stored(query, cache, step, options, out)
        return out

    def attend_stored(
        self, query: Tensor, cache: LayerCache, step: AttentionStep, options: LayerOptions, out: Tensor
    ) -> None:
        """Attend to K and V that are stored already: query (T, num_heads, key_dim), out (T, num_heads, value_dim).

        The first layer of a kind plans. It may wait for the step before the last one: until that was computed, its plan
        lies where this one goes.
        """
        query = _dense(query)
        num_rows, decodes = len(step.batch.seq_lens), step.batch.num_decodes
        shape = LayerShape(
            num_heads=query.shape[1],
            num_kv_heads=cache.keys.shape[1],
            key_dim=query.shape[2],
            value_dim=cache.values.shape[3],
        )
        room = self._room(query.device)
        for rows, tokens, decoding in (
            (slice(0, decodes), slice(0, decodes), True),
            (slice(decodes, num_rows), slice(decodes, len(query)), False),
        ):
            if rows.start == rows.stop:
                continue
            kind = _Kind(
                shape=shape,
                dtype=query.dtype,
                block_size=cache.block_size,
                scale=options.scale,
                window=options.window,
                softcap=options.softcap,
                decoding=decoding,
            )
            room.planned(kind, step, rows).run(query[tokens], (cache.keys, cache.values), out=out[tokens])

    def _room(self, device: torch.device) -> _Room:
        room = self._rooms.get(device)
        if room is None:
            library = self._library or cast("Library", importlib.import_module("flashinfer"))
            room = self._rooms[device] = _Room(library, device, self._prompts)
        return room


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """What a plan depends on beside the step's rows: layers that are alike in it share one."""

    shape: LayerShape
    dtype: torch.dtype
    block_size: int
    scale: float
    window: int | None
    softcap: float | None
    decoding: bool  # rows of one token

    @property
    def on_tensor_cores(self) -> bool:
        return not self.decoding or self.shape.group_size not in _GROUPS_WITHOUT_TENSOR_CORES


class _Room:
    """One device's wrappers, each with memory for its plan, and the memory for parts that they share."""

    def __init__(self, library: Library, device: torch.device, prompts: str) -> None:
        self._library = library
        self._device = device
        self._prompts = prompts
        self._parts = torch.empty(0, dtype=torch.uint8, device=device)
        self._plans: dict[_Kind, _Plan] = {}

    def planned(self, kind: _Kind, step: AttentionStep, rows: slice) -> Wrapper:
        """The wrapper of this kind of layer, with the plan of this step's rows."""
        plan = self._plans.get(kind)
        if plan is None:
            plan = self._plans[kind] = _Plan(kind, self._wrapper(kind), self._device)
        return plan.of(step, rows)

    def _wrapper(self, kind: _Kind) -> Wrapper:
        with torch.inference_mode(mode=False):  # it writes into some of its tensors, in whatever mode it is called
            needed = _parts_bytes(kind.shape, self._device)
            if len(self._parts) < needed:  # those before keep theirs
                self._parts = torch.zeros(needed, dtype=torch.uint8, device=self._device)
            if kind.on_tensor_cores:
                backend = "fa2" if kind.decoding else self._prompts
                return self._library.BatchPrefillWithPagedKVCacheWrapper(self._parts, _LAYOUT, backend=backend)
            return self._library.BatchDecodeWithPagedKVCacheWrapper(self._parts, _LAYOUT)


class _Plan:
    """One wrapper, and whose plan it has."""

    def __init__(self, kind: _Kind, wrapper: Wrapper, device: torch.device) -> None:
        self._kind = kind
        self._wrapper = wrapper
        self._on_gpu = device.type == "cuda"
        # FlashInfer copies a plan to the device from memory of its own, behind what was launched before
        self._copied: Any = torch.cuda.Event() if self._on_gpu else None  # type: ignore[no-untyped-call]
        self._step: AttentionStep | None = None

    def of(self, step: AttentionStep, rows: slice) -> Wrapper:
        """The wrapper with the plan of `rows` of this step."""
        if self._step is not step:
            self._step = None
            if self._on_gpu:
                self._copied.synchronize()
            self._make(RowPages.of(step.batch, rows, self._kind.block_size))
            if self._on_gpu:
                self._copied.record()
            self._step = step
        return self._wrapper

    def _make(self, rows: RowPages) -> None:
        kind, shape = self._kind, self._kind.shape
        query_start_loc, page_start_loc, pages, last_page_len, seq_lens = self._columns(rows)
        common: dict[str, Any] = {
            "page_size": kind.block_size,
            "window_left": -1 if kind.window is None else kind.window - 1,  # tokens before the one that attends
            "logits_soft_cap": kind.softcap,
            "q_data_type": kind.dtype,
            "kv_data_type": kind.dtype,
            "sm_scale": kind.scale,
            "seq_lens": seq_lens,
        }
        if kind.on_tensor_cores:
            self._wrapper.plan(
                query_start_loc,
                page_start_loc,
                pages,
                last_page_len,
                shape.num_heads,
                shape.num_kv_heads,
                shape.key_dim,
                causal=True,
                max_token_per_sequence=int(np.diff(rows.query_start_loc).max()),
                **common,
            )
        else:
            self._wrapper.plan(
                page_start_loc, pages, last_page_len, shape.num_heads, shape.num_kv_heads, shape.key_dim, **common
            )

    def _columns(self, rows: RowPages) -> list[Tensor]:
        """The columns as tensors of the host, page-locked: else each copy to the GPU may wait for what was launched."""
        columns = (rows.query_start_loc, rows.page_start_loc, rows.pages, rows.last_page_len, rows.seq_lens)
        numbers = torch.from_numpy(np.concatenate(columns))
        if self._on_gpu:
            numbers = numbers.pin_memory()
        return list(torch.split(numbers, [len(column) for column in columns]))


def _why_not_here(device: torch.device) -> str | None:
    """Return why FlashInfer cannot run on `device`, or None when it can."""
    if device.type != "cuda":
        return f"FlashInfer's kernels are for CUDA, not for {device.type}"
    if importlib.util.find_spec("flashinfer") is None:
        return f"flashinfer is not installed: {_INSTALL}"
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        version = "of no known version"
    if not version.startswith(_SERIES):
        return f"flashinfer {version} is installed, {_SERIES}x is needed: {_INSTALL}"
    try:
        importlib.import_module("flashinfer")
    except (ImportError, OSError, RuntimeError) as error:
        return f"flashinfer cannot be imported: {error}"
    if not _has_kernels():
        return (
            "flashinfer is to compile its kernels and finds no nvcc or no ninja: install CUDA's compiler and ninja, or "
            "flashinfer-jit-cache of the same version, which brings them compiled"
        )
    if (found := torch.cuda.get_device_capability(device)) < _OLDEST:
        return f"FlashInfer needs compute capability 8.0 (Ampere), the GPU's is {found[0]}.{found[1]}"
    return why_not_triton(device)  # K and V are stored by our kernel


def _has_kernels() -> bool:
    """Whether FlashInfer has kernels, or what it makes them with: its wheel brings none."""
    if importlib.util.find_spec("flashinfer_jit_cache") is not None:
        return True
    spec = importlib.util.find_spec("flashinfer")
    if spec is not None and spec.origin is not None and any((Path(spec.origin).parent / "data" / "aot").glob("*/*.so")):
        return True
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    has_nvcc = shutil.which("nvcc") is not None or (Path(home) / "bin" / "nvcc").exists()
    return has_nvcc and (shutil.which("ninja") is not None or importlib.util.find_spec("ninja") is not None)


def _parts_bytes(shape: LayerShape, device: torch.device) -> int:
    """Bytes that rows in shares leave their parts in: FlashInfer's PrefillPlan never cuts finer than this.

    Float32 of a value and a sum for each query of a program; its decode kernel takes far less.
    """
    cuda: Any = torch.cuda
    count = cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    queries = shape.group_size * _MOST_PROGRAMS * count * _MOST_QUERIES
    return 4 * queries * (shape.value_dim + 1) + 1024  # what alignment takes


def _store(key: Tensor, value: Tensor, cache: LayerCache, step: AttentionStep) -> None:
    """Write the step's K and V to their slots; in torch's words where a stand-in serves on the CPU."""
    if key.device.type != "cuda":
        store(key, value, cache, step)
        return
    from executor.gpu.kernels.store import store as store_on_gpu

    store_on_gpu(_dense(key), _dense(value), cache, step.slot_mapping)


def _dense(x: Tensor) -> Tensor:
    """`x` itself if its last axis is dense, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
