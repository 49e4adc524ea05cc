"""Weights in the kernels' layout, in huge pages: held once, read in the order in which they lie."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from executor.native.library import BFLOAT16, FLOAT32, INT4, INT8, KINDS, LinearStruct, Native

PANEL: Final = 32  # outputs that lie together
GROUP: Final = 32  # values of k that share a scale
_SCALE_BYTES: Final = {INT8: 2, INT4: 4}  # int4 also has the lowest value of the group
_VALUES_PER_BYTE: Final = {FLOAT32: 0.25, BFLOAT16: 0.5, INT8: 1.0, INT4: 2.0}
_STRAY_BYTES: Final = 8
_MOST_STRAYS: Final = 1 / 256  # more of them cost more than a quarter less to read saves
_CHUNK: Final = 32 << 20


class Pages:
    """Memory that is taken and never given back, in chunks of huge pages where the machine has them."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """Return (num_bytes,) uint8, zero, aligned to 64."""
        padded = -(-num_bytes // 64) * 64
        if padded > len(self._left):
            # private: the memory that Python maps by default is shared, and of that few machines make huge pages
            chunk = mmap.mmap(-1, max(padded, _CHUNK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                chunk.madvise(mmap.MADV_HUGEPAGE)
            self._left = torch.frombuffer(chunk, dtype=torch.uint8)
        taken, self._left = self._left[:num_bytes], self._left[padded:]
        return taken


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLinear:
    """A linear layer as the kernels read it. `kept` owns the memory that `struct` points into."""

    struct: LinearStruct
    kept: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that one pass over the weights reads."""
        return sum(each.numel() * each.element_size() for each in self.kept)


def why_not(in_features: int, kind: int) -> str | None:
    """Return why a linear layer with so many inputs cannot be packed as `kind`, or None when it can."""
    multiple = GROUP if kind in _SCALE_BYTES else 16
    return f"{in_features} inputs are no multiple of {multiple}" if in_features % multiple else None


def pack(
    native: Native,
    pages: Pages,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: int | None = None,
    row_of: Tensor | None = None,
    compact: bool | None = None,
) -> PackedLinear:
    """Pack `weight` (n, k), float32 or bfloat16, as `kind` (its own dtype unless said).

    `row_of` (n,) int64 says which row each output comes from: the order of the outputs may be another. bfloat16 lies in
    12 bits a weight, without loss, where they fit that and the machine gains by it: `compact` insists or forbids.
    """
    n, k = weight.shape
    kind = KINDS[weight.dtype] if kind is None else kind
    padded = -(-n // PANEL) * PANEL
    order = torch.arange(n) if row_of is None else row_of
    struct = LinearStruct(kind, n, k)
    codes: list[Tensor] = []
    if kind == BFLOAT16 and (native.isa != "baseline" if compact is None else compact):
        codes = _exponents(native, pages, weight.detach(), order, struct, most=1.0 if compact else _MOST_STRAYS)
    words = pages.take(padded * k * 3 // 2 if codes else int(padded * k / _VALUES_PER_BYTE[kind]))
    scales = pages.take(padded * (k // GROUP) * _SCALE_BYTES.get(kind, 0))
    struct.words, struct.scales = words.data_ptr(), scales.data_ptr()
    kept = [words, scales, *codes]  # words and scales first: a part of the outputs is found by them
    if bias is not None:
        padded_bias = torch.zeros(padded)
        padded_bias[:n] = bias.detach().float()[order]
        struct.bias = padded_bias.data_ptr()
        kept.append(padded_bias)
    native.pack(weight.detach(), order, struct)
    return PackedLinear(struct=struct, kept=tuple(kept))


def _exponents(
    native: Native, pages: Pages, weight: Tensor, order: Tensor, struct: LinearStruct, *, most: float
) -> list[Tensor]:
    """Make `struct` one of 12 bits a weight and return what it points to: nothing when more than `most` are strays."""
    exponents = torch.zeros(16, dtype=torch.uint8)
    starts = torch.zeros(-(-len(order) // PANEL) + 1, dtype=torch.int32)
    num_strays = native.survey(weight, order, exponents, starts)
    if num_strays > most * weight.numel():
        return []
    strays = pages.take(num_strays * _STRAY_BYTES)
    struct.exponents, struct.strays, struct.stray_starts = exponents.data_ptr(), strays.data_ptr(), starts.data_ptr()
    return [exponents, starts, strays]


def merge(parts: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Put weights (and biases, if any has one) one after the other."""
    weights = torch.cat([weight.detach() for weight, _ in parts])
    if all(bias is None for _, bias in parts):
        return weights, None
    return weights, torch.cat(
        [weight.new_zeros(len(weight)) if bias is None else bias.detach() for weight, bias in parts]
    )


def interleaved(n: int) -> Tensor:
    """Order of the rows of [gate; up], n each, for panels of 16 gates and their 16 ups; n is a multiple of 16."""
    index = torch.arange(n).view(-1, 16)
    return torch.stack([index, index + n], dim=1).view(-1)
