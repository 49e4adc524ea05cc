"""The kernels' C names for Python: structs mirrored from csrc/types.h, and one object that owns the loaded library.

Call everything from the compute thread: the kernels run on torch's own OpenMP threads, which must be one pool.
"""

from __future__ import annotations

import ctypes as c
import functools
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from executor.native.build import library_path

FLOAT32, BFLOAT16, INT8, INT4 = range(4)
KINDS: Final = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


class LinearStruct(c.Structure):
    """Mirror of Linear."""

    _fields_: ClassVar = [
        ("kind", c.c_int32), ("n", c.c_int64), ("k", c.c_int64), ("words", c.c_void_p),
        ("scales", c.c_void_p), ("bias", c.c_void_p), ("exponents", c.c_void_p), ("strays", c.c_void_p),
        ("stray_starts", c.c_void_p),
    ]  # fmt: skip


class AttentionStruct(c.Structure):
    """Mirror of AttentionLayer."""

    _fields_: ClassVar = [
        ("kv_kind", c.c_int32), ("num_heads", c.c_int32), ("num_kv_heads", c.c_int32), ("key_dim", c.c_int32),
        ("value_dim", c.c_int32), ("block_size", c.c_int32), ("window", c.c_int64), ("scale", c.c_float),
        ("softcap", c.c_float), ("sinks", c.c_void_p), ("keys", c.c_void_p), ("values", c.c_void_p),
    ]  # fmt: skip


class StepStruct(c.Structure):
    """Mirror of Step."""

    _fields_: ClassVar = [
        ("num_tokens", c.c_int64), ("num_rows", c.c_int64), ("table_stride", c.c_int64), ("num_sampled", c.c_int64),
        ("token_ids", c.c_void_p), ("positions", c.c_void_p), ("slot_mapping", c.c_void_p),
        ("query_start_loc", c.c_void_p), ("seq_lens", c.c_void_p), ("block_tables", c.c_void_p),
        ("logits_indices", c.c_void_p),
    ]  # fmt: skip


class RowsStruct(c.Structure):
    """Mirror of Rows."""

    _fields_: ClassVar = [
        ("data", c.c_void_p), ("kind", c.c_int32), ("stride0", c.c_int64), ("stride1", c.c_int64),
    ]  # fmt: skip


class LlamaLayerStruct(c.Structure):
    """Mirror of LlamaLayer."""

    _fields_: ClassVar = [
        ("qkv", LinearStruct), ("o", LinearStruct), ("gate_up", LinearStruct), ("down", LinearStruct),
        ("input_norm", c.c_void_p), ("post_norm", c.c_void_p), ("q_norm", c.c_void_p), ("k_norm", c.c_void_p),
        ("rotary", c.c_int32), ("attention", AttentionStruct),
    ]  # fmt: skip


class LlamaStruct(c.Structure):
    """Mirror of Llama."""

    _fields_: ClassVar = [
        ("num_layers", c.c_int64), ("hidden", c.c_int64), ("intermediate", c.c_int64), ("vocab", c.c_int64),
        ("rotary_dim", c.c_int64), ("epsilon", c.c_float), ("embedding_kind", c.c_int32), ("embedding", c.c_void_p),
        ("cos", c.c_void_p), ("sin", c.c_void_p), ("final_norm", c.c_void_p), ("layers", c.POINTER(LlamaLayerStruct)),
        ("head", LinearStruct),
    ]  # fmt: skip


_STRUCTS: Final = (LinearStruct, AttentionStruct, StepStruct, RowsStruct, LlamaLayerStruct, LlamaStruct)


class NativeMissing(Exception):
    """The kernels cannot be used here; the text says why, and what to type."""


class Native:
    """The loaded library. Every call may release the interpreter lock and runs on `num_threads` threads."""

    def __init__(self, path: Path) -> None:
        """Load. Raises NativeMissing."""
        try:
            self._library = c.CDLL(str(path))
        except OSError as error:
            raise NativeMissing(f"{path.name} cannot be loaded: {error}") from error
        sizes = (c.c_int64 * len(_STRUCTS))()
        self._library.pagewire_sizes(sizes)
        if list(sizes) != [c.sizeof(each) for each in _STRUCTS]:
            raise NativeMissing(f"{path.name} was built for other structs: {list(sizes)}")
        self._library.pagewire_isa.restype = c.c_char_p
        self._library.pagewire_norm.argtypes = [
            c.c_void_p, c.c_void_p, c.c_void_p, c.c_float, c.c_int64, c.c_int64, c.c_void_p,
        ]  # fmt: skip
        self._library.pagewire_silu_mul.argtypes = [c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_void_p]
        self._library.pagewire_linear.argtypes = [c.c_void_p, c.c_void_p, c.c_void_p, c.c_int64]
        self._library.pagewire_survey.argtypes = [
            c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_void_p, c.c_void_p,
        ]  # fmt: skip
        self._library.pagewire_survey.restype = c.c_int64
        self._library.pagewire_use_threads.argtypes = [c.c_int, c.c_void_p, c.c_void_p]
        self.path = path
        self.use_threads(torch.get_num_threads())

    @property
    def isa(self) -> str:
        """The instruction set in use: amx, avx512, avx2 or baseline."""
        name: bytes = self._library.pagewire_isa()
        return name.decode()

    @property
    def functions(self) -> c.CDLL:
        """The C functions, for callers who keep their structs from call to call."""
        return self._library

    def use_isa(self, name: str) -> None:
        """Use another instruction set of this machine. Raises ValueError when it has no such."""
        if self._library.pagewire_use_isa(name.encode()):
            raise ValueError(f"this machine has no {name}")

    def use_threads(self, count: int) -> None:
        """Run on `count` of torch's threads; on one where torch's OpenMP is not libgomp."""
        gomp = _gomp()
        functions = ("GOMP_parallel", "omp_get_num_threads")
        parallel, size = (c.cast(getattr(gomp, name), c.c_void_p) if gomp else None for name in functions)
        self.num_threads = count if gomp else 1
        self._library.pagewire_use_threads(self.num_threads, parallel, size)

    def rehearse(self, *, on: bool) -> None:
        """Do all work that may be done twice twice, the second time late: for tests."""
        self._library.pagewire_rehearse(int(on))

    def llama_forward(self, model: LlamaStruct, step: StepStruct, logits: Tensor, normed: Tensor | None = None) -> None:
        """Run the whole forward; `logits` (S, vocab) float32, dense, and with `normed` (S, hidden) what they are of."""
        hidden = None if normed is None else c.c_void_p(normed.data_ptr())
        self._library.pagewire_llama_forward(c.byref(model), c.byref(step), c.c_void_p(logits.data_ptr()), hidden)

    def linear(self, linear: LinearStruct, x: Tensor, y: Tensor) -> None:
        """Y = x @ w.T + bias: x (rows, k), y (rows, n), in float32 or bfloat16."""
        self._library.pagewire_linear(c.byref(linear), c.byref(rows(x)), c.byref(rows(y)), len(x))

    def attention(
        self, layer: AttentionStruct, step: StepStruct, query: Tensor, key: Tensor, value: Tensor, out: Tensor
    ) -> None:
        """Store and attend: query, key, value (T, heads, dim), out (T, num_heads * value_dim)."""
        pointers = [c.byref(rows(each)) for each in (query, key, value, out)]
        self._library.pagewire_attention(c.byref(layer), c.byref(step), *pointers)

    def norm(self, x: Tensor, weight: Tensor, epsilon: float, y: Tensor, residual: Tensor | None = None) -> None:
        """Y = weight * x / rms(x), x and y (rows, n); with `residual`, x + residual is kept there and then normed."""
        self._library.pagewire_norm(
            c.byref(rows(x)), None if residual is None else c.byref(rows(residual)), weight.data_ptr(), epsilon,
            len(x), x.shape[1], c.byref(rows(y)),
        )  # fmt: skip

    def silu_mul(self, gate: Tensor, up: Tensor, y: Tensor) -> None:
        """Y = silu(gate) * up, all (rows, n)."""
        self._library.pagewire_silu_mul(c.byref(rows(gate)), c.byref(rows(up)), len(y), y.shape[1], c.byref(rows(y)))

    def pack(self, weight: Tensor, row_of: Tensor, to: LinearStruct) -> None:
        """Put rows `row_of` (n,) int64 of `weight` (any, k) into the panels of `to`."""
        self._library.pagewire_pack(c.byref(rows(weight)), c.c_void_p(row_of.data_ptr()), c.byref(to))

    def survey(self, weight: Tensor, row_of: Tensor, exponents: Tensor, stray_starts: Tensor) -> int:
        """Choose the `exponents` (16,) uint8 that get a code and count, by panel, the weights that have another one.

        `stray_starts` (panels + 1,) int32 becomes their running sum. Returns their number.
        """
        strays: int = self._library.pagewire_survey(
            c.byref(rows(weight)), row_of.data_ptr(), len(row_of), weight.shape[1], exponents.data_ptr(),
            stray_starts.data_ptr(),
        )  # fmt: skip
        return strays


@functools.cache
def native() -> Native:
    """The library. Raises NativeMissing when it was not built, or not for these sources."""
    path = library_path()
    if not path.exists():
        raise NativeMissing("the C++ kernels are not built. Type: python -m executor.native.build")
    return Native(path)


def rows(x: Tensor) -> RowsStruct:
    """A tensor as the kernels see it: (rows, n) or (rows, heads, n), the last axis dense."""
    assert x.stride(-1) == 1 or x.shape[-1] == 1, "the last axis must be dense"
    return RowsStruct(x.data_ptr(), KINDS[x.dtype], x.stride(0), x.stride(1) if x.dim() > 2 else 0)


def _gomp() -> Any:
    """The libgomp that torch has loaded, or None."""
    with Path("/proc/self/maps").open(encoding="utf-8") as lines:
        paths = {line.split()[-1] for line in lines if "libgomp" in line}
    return c.CDLL(min(paths)) if len(paths) == 1 else None
