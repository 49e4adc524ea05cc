"""The product of a few rows with a large matrix, bound by reading the matrix: each weight is read once, as it lies.

Where a matrix has too few outputs to give every multiprocessor work, its inputs are cut into splits too. Each leaves a
part of the sums; whoever comes last to an output adds them, always in the same order, so the result does not depend on
who that was. Rows are worked sixteen at a time, because a tensor core has no fewer.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor.gpu.triton_case import CompileCase, is_interpreted

MAX_ROWS: Final = 16
_PROGRAMS: Final = 528  # four for each multiprocessor of an H100
_BLOCK_K: Final = 256
_LEAST_BLOCKS: Final = 2  # of inputs in a split
_MANY_OUTPUTS: Final = 8192


class SkinnyLinears:
    """Makes products for one device, which share the memory in which parts of sums lie: they run one after another."""

    def __init__(self, device: torch.device) -> None:
        self._parts = torch.empty(0, dtype=torch.float32, device=device)
        self._counters = torch.zeros(0, dtype=torch.int32, device=device)

    def make(self, weight: Tensor, bias: Tensor | None) -> SkinnyLinear:
        """Return the product with `weight` (outputs, inputs) and `bias` (outputs,)."""
        outputs, inputs = weight.shape
        shape = _shape(outputs, inputs)
        if shape["SPLITS"] > 1:
            self._parts = _at_least(self._parts, shape["SPLITS"] * MAX_ROWS * outputs)
            self._counters = _at_least(self._counters, triton.cdiv(outputs, shape["BLOCK_N"]))
        return SkinnyLinear(self, weight, bias)

    def launch(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Write x @ weight.T + bias to `out`: x (T, inputs), T at most MAX_ROWS, out (T, outputs), both dense."""
        shape = _shape(*weight.shape)
        grid = (triton.cdiv(len(weight), shape["BLOCK_N"]), shape["SPLITS"])
        _skinny[grid](
            x, weight, bias, out, self._parts, self._counters, len(x),
            UPCAST=is_interpreted(), **shape, **_launch(shape),
        )  # fmt: skip


class SkinnyLinear:
    """The product with one matrix: ours for few rows, torch's for many. As `executor.gpu.llama.Linear`."""

    def __init__(self, linears: SkinnyLinears, weight: Tensor, bias: Tensor | None) -> None:
        assert weight.is_contiguous()
        self._linears = linears
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor, out: Tensor) -> object:
        """Write x @ weight.T + bias to `out`."""
        if 0 < len(x) <= MAX_ROWS:
            self._linears.launch(x, self._weight, self._bias, out)
        elif self._bias is None:
            torch.mm(x, self._weight.t(), out=out)
        else:
            torch.addmm(self._bias, x, self._weight.t(), out=out)
        return out


def _at_least(tensor: Tensor, size: int) -> Tensor:
    return tensor if len(tensor) >= size else tensor.new_zeros(size)


def _shape(outputs: int, inputs: int) -> dict[str, int]:
    """How a matrix is cut. A split has as many blocks of inputs as any other, or the last ones have fewer."""
    block_n = 32 if outputs >= _MANY_OUTPUTS else 16
    block_k = min(_BLOCK_K, triton.next_power_of_2(inputs))
    blocks, programs = triton.cdiv(inputs, block_k), triton.cdiv(outputs, block_n)
    splits = max(1, min(_PROGRAMS // programs, blocks // _LEAST_BLOCKS))
    steps = triton.cdiv(blocks, splits)
    return {
        "N": outputs, "K": inputs, "BLOCK_N": block_n, "BLOCK_K": block_k,
        "STEPS": steps, "SPLITS": triton.cdiv(blocks, steps),
    }  # fmt: skip


def _launch(shape: dict[str, int]) -> dict[str, Any]:
    return {"num_warps": 4 if shape["BLOCK_N"] == 32 else 2, "num_stages": 4}


@triton.jit(do_not_specialize=["num_rows"])
def _skinny(
    x, weight, bias, out, parts, counters, num_rows,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr, SPLITS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of all rows a program, over STEPS * BLOCK_K inputs."""
    ROWS: tl.constexpr = 16
    tile, split = tl.program_id(0), tl.program_id(1)
    rows, columns = tl.arange(0, ROWS), tile * BLOCK_N + tl.arange(0, BLOCK_N)
    within = split * STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
    x_places = x + rows[:, None] * K + within[None, :]
    w_places = weight + columns.to(tl.int64)[:, None] * K + within[None, :]
    there, wanted = rows[:, None] < num_rows, columns[:, None] < N
    sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for step in range(STEPS):
        if K % (STEPS * SPLITS * BLOCK_K) == 0:
            inside = tl.full((1, BLOCK_K), 1, tl.int1)
        else:
            inside = (within + step * BLOCK_K)[None, :] < K
        a = tl.load(x_places + step * BLOCK_K, mask=there & inside, other=0.0)
        if N % BLOCK_N == 0 and K % (STEPS * SPLITS * BLOCK_K) == 0:
            b = tl.load(w_places + step * BLOCK_K, eviction_policy="evict_first")
        else:
            b = tl.load(w_places + step * BLOCK_K, mask=wanted & inside, other=0.0, eviction_policy="evict_first")
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(a, tl.trans(b), acc=sums, input_precision="ieee")
    asked = there & (columns[None, :] < N)
    if SPLITS > 1:
        places = parts + rows[:, None] * N + columns[None, :]
        tl.store(places + split * ROWS * N, sums, mask=asked)
        tl.debug_barrier()  # all of this program's sums are written before it is counted
        before = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if before == SPLITS - 1:
            sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
            for part in range(SPLITS):
                sums += tl.load(places + part * ROWS * N, mask=asked, other=0.0, cache_modifier=".cg")
            _finish(sums, bias, out, rows, columns, asked, N)
            tl.store(counters + tile, 0)  # for the next product
    else:
        _finish(sums, bias, out, rows, columns, asked, N)


@triton.jit
def _finish(sums, bias, out, rows, columns, asked, N: tl.constexpr):
    if bias is not None:
        sums += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + rows[:, None] * N + columns[None, :], sums.to(out.dtype.element_ty), mask=asked)


def compile_cases() -> list[CompileCase]:
    """The matrices of Qwen3-0.6B and of Llama-3-8B."""
    cases = []
    for outputs, inputs, has_bias in (
        (4096, 1024, False), (1024, 2048, True), (6144, 1024, False), (1024, 3072, False), (151936, 1024, False),
        (6144, 4096, True), (4096, 4096, False), (28672, 4096, False), (4096, 14336, False), (128256, 4096, False),
    ):  # fmt: skip
        shape = _shape(outputs, inputs)
        absent = {} if has_bias else {"bias": None}
        types = {
            "x": "*bf16", "weight": "*bf16", "bias": "*bf16", "out": "*bf16", "parts": "*fp32", "counters": "*i32",
            "num_rows": "i32",
        }  # fmt: skip
        cases.append(
            CompileCase(
                name=f"skinny-{outputs}x{inputs}",
                kernel=_skinny,
                signature=types | dict.fromkeys([*shape, *absent, "UPCAST"], "constexpr"),
                constants=shape | absent | {"UPCAST": False},
                **_launch(shape),
                instructions=("HMMA", "HGMMA"),
            )
        )
    return cases
