"""RMS norm, by itself or behind the residual's addition: a row is read once, worked in registers, written once.

Rounded as Transformers rounds. Llama's way: normalise in float32, round to the dtype, times the weight. Gemma's, which
has an offset: times (weight + offset) in float32, and only then round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor.gpu.kernels.overlap import begin_next, overlap, wait_for_previous
from executor.gpu.triton_case import CompileCase


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, offset: float = 0.0, out: Tensor | None = None) -> Tensor:
    """Return x / rms(x) * (weight + offset) over the last dimension, in x's dtype. x (..., hidden), weight (hidden,).

    `out` is contiguous, of x's shape; it may be x itself.
    """
    rows = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _launch(rows, rows, weight, epsilon, offset, out, adds=False)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, *, offset: float = 0.0, out: Tensor | None = None
) -> Tensor:
    """Add x to `residual` in place, rounded to its dtype, and return the norm of that sum in x's dtype.

    x and residual (..., hidden), weight (hidden,). `out` is contiguous, of x's shape; it may be x itself.
    """
    assert residual.shape == x.shape, f"x {tuple(x.shape)}, residual {tuple(residual.shape)}"
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _launch(_rows(x), residual.view(-1, residual.shape[-1]), weight, epsilon, offset, out, adds=True)
    return out


def add_rms_norm_of_parts(
    parts: Tensor, residual: Tensor, weight: Tensor, epsilon: float, *, offset: float = 0.0, out: Tensor
) -> None:
    """`add_rms_norm` of a product whose sums lie in parts: it is their sum, rounded to `out`'s dtype.

    parts (P, R, hidden) float32 and dense, residual and out (T, hidden) with T <= R, weight (hidden,).
    """
    assert parts.is_contiguous() and parts.shape[1] >= len(residual) and residual.shape == out.shape
    _launch(parts[0, : len(residual)], residual, weight, epsilon, offset, out, adds=True, parts=parts)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()


def _launch(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    epsilon: float,
    offset: float,
    out: Tensor,
    *,
    adds: bool,
    parts: Tensor | None = None,
) -> None:
    count, hidden = x.shape
    assert weight.shape == (hidden,) and weight.is_contiguous(), f"weight {tuple(weight.shape)} of {hidden}"
    assert out.is_contiguous() and out.numel() == x.numel() and residual.stride(1) == 1
    if count == 0:
        return
    block, num_warps = _shape(hidden)
    _rms_norm[(count,)](
        x, residual, weight, out, x.stride(0), residual.stride(0), 0 if parts is None else parts.stride(0), epsilon,
        OFFSET=offset, ADDS=adds, PARTS=1 if parts is None else len(parts), HIDDEN=hidden, BLOCK=block,
        num_warps=num_warps, **overlap(x.device),
    )  # fmt: skip


def _shape(hidden: int) -> tuple[int, int]:
    """Width of the tile that holds a row, and warps: 8 numbers a lane are one 16-byte load of a 16-bit dtype."""
    block = triton.next_power_of_2(hidden)
    return block, min(max(block // 256, 1), 16)


@triton.jit
def _rms_norm(
    x, residual, weight, out, x_stride, residual_stride, part_stride, epsilon,
    OFFSET: tl.constexpr, ADDS: tl.constexpr, PARTS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    begin_next(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 1:
        for part in tl.static_range(1, PARTS):  # in the order in which a product would add them
            values += tl.load(x + part * part_stride + row * x_stride + columns, mask=inside, other=0.0)
        values = values.to(out.dtype.element_ty).to(tl.float32)
    if ADDS:
        place = residual + row * residual_stride + columns
        added = (values + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(place, added, mask=inside)
        values = added.to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, axis=0) / HIDDEN + epsilon)
    if OFFSET == 0:
        values = values.to(out.dtype.element_ty).to(tl.float32) * gain
    else:
        values *= gain + OFFSET
    tl.store(out + row * HIDDEN + columns, values.to(out.dtype.element_ty), mask=inside)


def compile_cases() -> list[CompileCase]:
    """The widths of small and of large models."""
    types = dict.fromkeys(("x", "residual", "weight", "out"), "*bf16")
    types |= {"x_stride": "i32", "residual_stride": "i32", "part_stride": "i32", "epsilon": "fp32"}
    cases = []
    for hidden in (576, 1024, 2560, 4096, 8192):
        for adds, parts in ((False, 1), (True, 1), (True, 8)):
            block, num_warps = _shape(hidden)
            constants = {"OFFSET": 0.0, "ADDS": adds, "PARTS": parts, "HIDDEN": hidden, "BLOCK": block, "OVERLAP": True}
            cases.append(
                CompileCase(
                    name=f"{'add_' if adds else ''}rms_norm-{hidden}{' of parts' if parts > 1 else ''}",
                    kernel=_rms_norm,
                    signature=types | ({"x": "*fp32"} if parts > 1 else {}) | dict.fromkeys(constants, "constexpr"),
                    constants=constants,
                    num_warps=num_warps,
                )
            )
    return cases
