"""Modules over the kernels, to stand where a Transformers model has its own: the same calls, shapes and dtypes.

A call goes straight to the C function, with structs that were made once: of a step's two hundred calls, each would
otherwise cost as much as a small product. So a module is for one thread, like the kernels themselves.
"""

from __future__ import annotations

import ctypes as c
from typing import Final

import torch
from torch import Tensor, nn

from executor.native.library import KINDS, LinearStruct, Native, RowsStruct
from executor.native.packed import PANEL, PackedLinear
from executor.shared_product import SharedProduct


class Product:
    """The product with one packed matrix, or with some neighbouring outputs of it. Keeps the matrix alive."""

    def __init__(self, native: Native, packed: PackedLinear, first: int = 0, n: int | None = None) -> None:
        """Take outputs [first, first + n); `first` is a multiple of PANEL."""
        assert first % PANEL == 0, "a panel is not cut"
        struct = LinearStruct.from_buffer_copy(packed.struct)
        panels = -(-struct.n // PANEL)
        words, scales = packed.kept[:2]
        self.inputs: Final = int(struct.k)
        self.outputs: Final = int(struct.n) if n is None else n
        struct.n = self.outputs
        struct.words += first // PANEL * (words.numel() // panels)
        struct.scales = (struct.scales or 0) + first // PANEL * (scales.numel() // panels)
        if struct.bias is not None:
            struct.bias += first * 4
        if struct.stray_starts is not None:
            struct.stray_starts += first // PANEL * 4
        self._kept = (packed, struct)
        self._x, self._y = RowsStruct(), RowsStruct()
        self._pointers = c.byref(struct), c.byref(self._x), c.byref(self._y)
        self._call = native.functions.pagewire_linear

    def __call__(self, x: Tensor) -> Tensor:
        """Return x @ w.T + bias for x (..., inputs)."""
        dense = x if x.is_contiguous() else x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.outputs)
        _point(self._x, dense, self.inputs)
        _point(self._y, y, self.outputs)
        self._call(*self._pointers, dense.numel() // self.inputs)
        return y


class NativeLinear(nn.Module):
    """A linear layer."""

    def __init__(self, product: Product, dtype: torch.dtype) -> None:
        super().__init__()
        self.product = product
        self.in_features, self.out_features = product.inputs, product.outputs
        self.weight = torch.empty(0, dtype=dtype)  # a model may ask a layer for its dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ w.T + bias."""
        return self.product(x)


class SharedLinear(NativeLinear):
    """A linear layer whose product may have been computed with another's."""

    def __init__(self, product: Product, dtype: torch.dtype, shared: SharedProduct, whole: Product, first: int) -> None:
        """Take outputs [first, first + product.outputs) of `shared`, which computes `whole`."""
        super().__init__(product, dtype)
        self.shared: Final = shared
        self.whole: Final = whole
        self.first: Final = first

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ w.T + bias: a view, where others need their part too."""
        mine = self.shared.part(x, self.first, self.out_features)
        return self.product(x) if mine is None else mine


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, native: Native, both: Product, down: Product, *, gate: int, up: int) -> None:
        """`gate` and `up` say where their outputs begin in `both`."""
        super().__init__()
        self.in_features = both.inputs
        self._both, self._down, self._starts = both, down, (gate, up)
        self._rows = RowsStruct(), RowsStruct(), RowsStruct()
        self._pointers = [c.byref(each) for each in self._rows]
        self._call = native.functions.pagewire_silu_mul

    def forward(self, x: Tensor) -> Tensor:
        """Return down(silu(gate(x)) * up(x))."""
        wide = self._both(x)
        middle = x.new_empty(*x.shape[:-1], self._down.inputs)
        gate, up, out = self._rows
        for rows, start in zip((gate, up), self._starts, strict=True):
            _point(rows, wide, self._both.outputs)
            rows.data += start * wide.element_size()
        _point(out, middle, self._down.inputs)
        to_gate, to_up, to_out = self._pointers
        self._call(to_gate, to_up, middle.numel() // self._down.inputs, self._down.inputs, to_out)
        return self._down(middle)


class NativeRmsNorm(nn.Module):
    """gain * x / rms(x) over the last axis."""

    def __init__(self, native: Native, gain: Tensor, epsilon: float, dtype: torch.dtype) -> None:
        """`gain` (n,), n a multiple of 16."""
        super().__init__()
        self.in_features = len(gain)
        self._gain = gain.detach().float().contiguous()
        self._x, self._y = RowsStruct(), RowsStruct()
        self._pointers = c.byref(self._x), c.byref(self._y)
        self._weight = self._gain.data_ptr()
        self._epsilon = epsilon
        self._call = native.functions.pagewire_norm
        self.weight = torch.empty(0, dtype=dtype)  # a model may ask a layer for its dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` normed."""
        n = self.in_features
        dense = x if x.is_contiguous() else x.contiguous()
        y = torch.empty_like(dense)
        _point(self._x, dense, n)
        _point(self._y, y, n)
        from_x, to_y = self._pointers
        self._call(from_x, None, self._weight, self._epsilon, dense.numel() // n, n, to_y)
        return y


def _point(rows: RowsStruct, x: Tensor, stride: int) -> None:
    """Let `rows` be those of `x`, dense, of `stride` numbers each."""
    rows.data, rows.kind, rows.stride0 = x.data_ptr(), KINDS[x.dtype], stride
