"""The gate of an MLP: silu(gate) * up, of one product that gave both."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor.gpu.kernels.overlap import begin_next, overlap, wait_for_previous
from executor.gpu.triton_case import CompileCase

_BLOCK: Final = 1024  # columns a program: 8 a lane of 4 warps


def silu_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up, (T, I), of rows [gate | up] (T, 2 * I). silu is rounded to the dtype, as torch does."""
    count, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.shape[1] == 2 * width and gate_up.stride(1) == 1, f"rows [gate | up], got {tuple(gate_up.shape)}"
    out = torch.empty((count, width), dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    assert out.shape == (count, width) and out.is_contiguous()
    if count:
        grid = (count, triton.cdiv(width, _BLOCK))
        _silu_mul[grid](
            gate_up, out, gate_up.stride(0), WIDTH=width, BLOCK=_BLOCK, num_warps=4, **overlap(gate_up.device)
        )
    return out


@triton.jit
def _silu_mul(gate_up, out, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """BLOCK columns of one row a program."""
    begin_next(OVERLAP)
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate = tl.load(gate_up + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + columns, (gate * up).to(out.dtype.element_ty), mask=inside)


def compile_cases() -> list[CompileCase]:
    """Intermediate sizes of a small and of a large model."""
    return [
        CompileCase(
            name=f"silu_mul-{width}",
            kernel=_silu_mul,
            signature={
                "gate_up": "*bf16", "out": "*bf16", "stride": "i32", "WIDTH": "constexpr", "BLOCK": "constexpr",
                "OVERLAP": "constexpr",
            },
            constants={"WIDTH": width, "BLOCK": _BLOCK, "OVERLAP": True},
            num_warps=4,
        )
        for width in (1536, 3072, 14336)
    ]  # fmt: skip
