"""The product of a few rows with a large matrix, bound by reading the matrix: each weight is read once, as it lies.

Where a matrix has too few outputs to give every multiprocessor work, its inputs are cut into splits too. Each leaves a
part of the sums. The norm behind the product adds them where there is one; else whoever comes last to an output does,
always in the same order, so the result does not depend on who that was. Or a block of inputs is cut into slices, which
the warps of one program share out: then nobody waits for another program.

A small matrix is *held*: each program has its share of the weights in registers before it waits for the rows, which
the kernel before it may still be computing (executor/gpu/kernels/overlap.py). The share of a large one comes in a loop
of copies that run ahead; its first block is called to the cache before the wait. One row is multiplied in float32 by
all lanes; more of them by tensor cores, padded to 16, 32 or 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor.gpu.kernels.norm import add_rms_norm, add_rms_norm_of_parts
from executor.gpu.kernels.overlap import begin_next, overlap, prefetch, wait_for_previous
from executor.gpu.triton_case import CompileCase, is_interpreted

MAX_ROWS: Final = 64
MOST_HELD: Final = 4  # blocks of inputs
_PADDED: Final = (1, 16, 32, 64)
_PROGRAMS: Final = 528  # four for each multiprocessor of an H100


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How a product is shared out among programs: from a table, never measured while serving."""

    block_n: int  # outputs of a program
    block_k: int  # inputs that are worked at once
    splits: int = 1  # of the inputs
    slices: int = 1  # of the inputs of a block: each warp sums some of them, and the program adds the sums
    held: bool = False  # the program's weights are in registers before it waits
    turned: bool = False  # the matrix is the left factor: 64 of its rows are one operand of Hopper's tensor cores
    num_warps: int = 4
    num_stages: int = 4

    def steps(self, inputs: int) -> int:
        """Blocks of inputs that a program works, one after the other."""
        blocks = -(-inputs // self.block_k)
        return -(-blocks // self.splits)


def padded_rows(count: int) -> int:
    """The rows that are worked for `count`: 1, 16, 32 or 64."""
    return next(rows for rows in _PADDED if count <= rows)


def cut_of(outputs: int, inputs: int, rows: int) -> Cut | None:
    """The cut for up to `rows` rows, 1, 16, 32 or 64; None where torch's product was measured to be faster.

    Of a matrix that nobody measured, one row is cut by rule of thumb, and more are left to torch.
    """
    if (outputs, inputs, rows) in CUTS:
        return CUTS[outputs, inputs, rows]
    return thumb(outputs, inputs, rows) if rows == 1 else None


def thumb(outputs: int, inputs: int, rows: int) -> Cut:
    """A cut that was not measured."""
    if rows == 1:
        block_k = min(1024, triton.next_power_of_2(inputs))
        held = triton.cdiv(inputs, block_k) <= MOST_HELD and outputs * inputs <= 12 << 20
        return Cut(block_n=8, block_k=block_k, held=held, num_warps=4 if inputs <= 1024 or not held else 8)
    block_n = 32 if rows <= 32 else 64
    block_k = min(128, max(16, triton.next_power_of_2(inputs)))
    blocks, programs = triton.cdiv(inputs, block_k), triton.cdiv(outputs, block_n)
    splits = max(1, min(_PROGRAMS // 2 // programs, blocks // 2, 16))
    return Cut(block_n=block_n, block_k=block_k, splits=splits, num_warps=4)


CUTS: Final[dict[tuple[int, int, int], Cut | None]] = {
    (1024, 2048, 1): Cut(block_n=2, block_k=1024, held=True),
    (1024, 2048, 16): Cut(block_n=32, block_k=256, splits=4, held=True, num_warps=8),
    (1024, 2048, 32): Cut(block_n=64, block_k=256, splits=8, held=True, num_warps=8),
    (1024, 2048, 64): Cut(block_n=64, block_k=64, splits=8, num_stages=5),
    (1024, 3072, 1): Cut(block_n=2, block_k=1024, held=True),
    (1024, 3072, 16): Cut(block_n=64, block_k=128, splits=8, held=True, num_warps=8),
    (1024, 3072, 32): Cut(block_n=32, block_k=256, splits=6, num_stages=3),
    (1024, 3072, 64): Cut(block_n=64, block_k=64, splits=8, num_stages=5),
    (4096, 1024, 1): Cut(block_n=4, block_k=1024, held=True),
    (4096, 1024, 16): Cut(block_n=64, block_k=256, splits=4, held=True, num_warps=8),
    (4096, 1024, 32): Cut(block_n=64, block_k=128, splits=4, turned=True),
    (4096, 1024, 64): None,
    (4096, 4096, 1): Cut(block_n=2, block_k=1024, held=True),
    (4096, 4096, 16): Cut(block_n=64, block_k=128, splits=2, turned=True),
    (4096, 4096, 32): Cut(block_n=64, block_k=128, splits=4, turned=True),
    (4096, 4096, 64): Cut(block_n=64, block_k=128, splits=2, turned=True),
    (4096, 14336, 1): Cut(block_n=8, block_k=1024),
    (4096, 14336, 16): Cut(block_n=64, block_k=128, splits=4, turned=True),
    (4096, 14336, 32): Cut(block_n=64, block_k=128, splits=4, turned=True),
    (4096, 14336, 64): Cut(block_n=64, block_k=128, splits=2),
    (6144, 1024, 1): Cut(block_n=4, block_k=1024, held=True),
    (6144, 1024, 16): Cut(block_n=64, block_k=128, turned=True),
    (6144, 1024, 32): Cut(block_n=32, block_k=128, num_stages=5),
    (6144, 1024, 64): Cut(block_n=64, block_k=128),
    (6144, 4096, 1): Cut(block_n=8, block_k=512, num_stages=5),
    (6144, 4096, 16): None,
    (6144, 4096, 32): None,
    (6144, 4096, 64): None,
    (28672, 4096, 1): Cut(block_n=8, block_k=1024),
    (28672, 4096, 16): None,
    (28672, 4096, 32): Cut(block_n=64, block_k=128, turned=True),
    (28672, 4096, 64): Cut(block_n=64, block_k=64, num_stages=5),
    (128256, 4096, 1): Cut(block_n=16, block_k=512),
    (128256, 4096, 16): Cut(block_n=64, block_k=128),
    (128256, 4096, 32): Cut(block_n=64, block_k=128, turned=True),
    (128256, 4096, 64): Cut(block_n=128, block_k=64, turned=True),
    (151936, 1024, 1): Cut(block_n=16, block_k=512),
    (151936, 1024, 16): Cut(block_n=64, block_k=128, turned=True),
    (151936, 1024, 32): Cut(block_n=64, block_k=128, turned=True),
    (151936, 1024, 64): Cut(block_n=64, block_k=64, num_stages=5),
}
"""By (outputs, inputs, padded rows), as tests/gpu/check/sweep.py found them on an H200. None: torch's is faster."""


class SkinnyLinears:
    """Makes products for one device, which share the memory in which parts of sums lie: they run one after another."""

    def __init__(self, device: torch.device, *, cuts: Callable[[int, int, int], Cut | None] = cut_of) -> None:
        """`cuts` tells how a product is cut, as `cut_of` does."""
        self._cuts = cuts
        self._parts = torch.empty(0, dtype=torch.float32, device=device)
        self._counters = torch.zeros(0, dtype=torch.int32, device=device)

    def make(self, weight: Tensor, bias: Tensor | None) -> SkinnyLinear:
        """Return the product with `weight` (outputs, inputs) and `bias` (outputs,)."""
        outputs, inputs = weight.shape
        cuts: dict[int, Cut] = {}
        if weight.itemsize == 2 or is_interpreted():
            for rows in _PADDED:
                if (cut := self._cuts(outputs, inputs, rows)) is not None:
                    cuts[rows] = cut
                    self.reserve(outputs, rows, cut)
        return SkinnyLinear(self, weight, bias, cuts)

    def reserve(self, outputs: int, rows: int, cut: Cut) -> None:
        """Have room for the parts of a product. Not once a graph was captured: it keeps the old place."""
        if cut.splits > 1:
            self._parts = _at_least(self._parts, cut.splits * rows * outputs)
            self._counters = _at_least(self._counters, triton.cdiv(outputs, cut.block_n))

    def launch(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        *,
        adds: bool = False,
        leaves: bool = False,
        norm: Tensor | None = None,
        epsilon: float = 0.0,
        cut: Cut,
    ) -> None:
        """Write x @ weight.T + bias to `out`: x (T, inputs), T from 1 to MAX_ROWS, out (T, outputs), both dense.

        With a `norm` (inputs,), x is one row and its RMS norm is multiplied, rounded as `rms_norm` does. Where it
        `adds`, `out` becomes its sum with what would be written, rounded as `add_rms_norm` does. Where it `leaves` the
        parts of its sums, of several splits and without a bias, nothing is written to `out`.
        """
        outputs, inputs = weight.shape
        rows = padded_rows(len(x))
        assert norm is None or rows == 1, "each program would compute the statistics of all rows"
        assert x.shape[1] == inputs and x.is_contiguous() and out.is_contiguous()
        assert not leaves or (cut.splits > 1 and bias is None and not adds)
        constants, options = _constants(outputs, inputs, rows, cut, adds=adds, leaves=leaves), _options(cut)
        grid = (triton.cdiv(outputs, cut.block_n), cut.splits)
        _skinny[grid](
            x, weight, bias, norm, out, self._parts, self._counters, len(x), epsilon,
            UPCAST=is_interpreted(), **constants, **options, **overlap(x.device),
        )  # fmt: skip

    def launch_normed(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        norm: Tensor,
        epsilon: float,
        *,
        room: Tensor,
        out: Tensor,
        cut: Cut,
    ) -> None:
        """`add_rms_norm` of the product. room (T, outputs): what is not left in parts lies there in between."""
        outputs, rows = len(weight), padded_rows(len(x))
        if cut.splits > 1 and bias is None:
            self.launch(x, weight, None, out, leaves=True, cut=cut)
            parts = self._parts[: cut.splits * rows * outputs].view(cut.splits, rows, outputs)
            add_rms_norm_of_parts(parts, residual, norm, epsilon, out=out)
        else:
            self.launch(x, weight, bias, room, cut=cut)
            add_rms_norm(room, residual, norm, epsilon, out=out)


class SkinnyLinear:
    """The product with one matrix: ours for few rows, torch's for many. As `executor.gpu.llama.Linear`."""

    def __init__(self, linears: SkinnyLinears, weight: Tensor, bias: Tensor | None, cuts: dict[int, Cut]) -> None:
        """`cuts` says for which padded rows it is ours."""
        assert weight.is_contiguous()
        self._linears, self._cuts = linears, cuts
        self._weight, self._bias = weight, bias

    @property
    def own_rows(self) -> frozenset[int]:
        """As `executor.gpu.llama.Linear`."""
        return frozenset(self._cuts)

    def __call__(self, x: Tensor, out: Tensor) -> object:
        """Write x @ weight.T + bias to `out`."""
        cut = self._cut(len(x))
        if cut is not None:
            self._linears.launch(x, self._weight, self._bias, out, cut=cut)
        elif self._bias is None:
            torch.mm(x, self._weight.t(), out=out)
        else:
            torch.addmm(self._bias, x, self._weight.t(), out=out)
        return out

    def normed(self, x: Tensor, residual: Tensor, norm: Tensor, epsilon: float, *, room: Tensor, out: Tensor) -> object:
        """As `SkinnyLinears.launch_normed`."""
        cut = self._cut(len(x))
        if cut is not None:
            self._linears.launch_normed(
                x, self._weight, self._bias, residual, norm, epsilon, room=room, out=out, cut=cut
            )  # fmt: skip
        else:
            self(x, room)
            add_rms_norm(room, residual, norm, epsilon, out=out)
        return out

    def fused(
        self, x: Tensor, out: Tensor, *, norm: Tensor | None = None, epsilon: float = 0.0, adds: bool = False
    ) -> object:
        """The product of one row, with what lies around it. As `SkinnyLinears.launch`."""
        cut = self._cuts[1]
        self._linears.launch(x, self._weight, self._bias, out, norm=norm, epsilon=epsilon, adds=adds, cut=cut)
        return out

    def give_up(self, rows: int) -> None:
        """Leave these of `own_rows` to torch from now on. Not once a graph was captured: it keeps what it has."""
        self._cuts.pop(rows, None)

    def _cut(self, count: int) -> Cut | None:
        return self._cuts.get(padded_rows(count)) if 0 < count <= MAX_ROWS else None


def _at_least(tensor: Tensor, size: int) -> Tensor:
    return tensor if len(tensor) >= size else tensor.new_zeros(size)


def _constants(outputs: int, inputs: int, rows: int, cut: Cut, *, adds: bool, leaves: bool) -> dict[str, object]:
    steps = cut.steps(inputs)
    assert not cut.held or steps <= MOST_HELD
    return {
        "N": outputs, "K": inputs, "ROWS": rows, "BLOCK_N": cut.block_n, "BLOCK_K": cut.block_k, "STEPS": steps,
        "SPLITS": cut.splits, "SLICES": cut.slices, "HELD": cut.held, "TURNED": cut.turned,
        "STAGES": cut.num_stages, "ADDS": adds, "LEAVES": leaves, "K_PAD": triton.next_power_of_2(inputs),
    }  # fmt: skip


def _options(cut: Cut) -> dict[str, Any]:
    return {"num_warps": cut.num_warps, "num_stages": cut.num_stages}


@triton.jit(do_not_specialize=["num_rows"])
def _skinny(
    x, weight, bias, norm, out, parts, counters, num_rows, epsilon,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr, SPLITS: tl.constexpr, SLICES: tl.constexpr, HELD: tl.constexpr, TURNED: tl.constexpr,
    STAGES: tl.constexpr, ADDS: tl.constexpr, LEAVES: tl.constexpr, K_PAD: tl.constexpr, UPCAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of all rows a program, over STEPS * BLOCK_K inputs."""
    WHOLE: tl.constexpr = N % BLOCK_N == 0 and K % (STEPS * SPLITS * BLOCK_K) == 0
    begin_next(OVERLAP)
    tile, split = tl.program_id(0), tl.program_id(1)
    rows, columns = tl.arange(0, ROWS), tile * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = split * STEPS * BLOCK_K
    if SLICES > 1:
        sums = tl.zeros((SLICES, ROWS, BLOCK_N), tl.float32)
    elif ROWS == 1:
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    elif TURNED:
        sums = tl.zeros((BLOCK_N, ROWS), tl.float32)
    else:
        sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
    if HELD:
        w0 = _weights(weight, columns, begin, N, K, BLOCK_K, SLICES, WHOLE)
        if STEPS > 1:
            w1 = _weights(weight, columns, begin + BLOCK_K, N, K, BLOCK_K, SLICES, WHOLE)
        if STEPS > 2:
            w2 = _weights(weight, columns, begin + 2 * BLOCK_K, N, K, BLOCK_K, SLICES, WHOLE)
        if STEPS > 3:
            w3 = _weights(weight, columns, begin + 3 * BLOCK_K, N, K, BLOCK_K, SLICES, WHOLE)
        wait_for_previous(OVERLAP)
        scale = _scale(x, norm, epsilon, K, K_PAD)
        sums = _fold(
            sums, w0, x, norm, scale, rows, begin, num_rows, K, ROWS, BLOCK_K, SLICES, TURNED, UPCAST
        )  # fmt: skip
        if STEPS > 1:
            sums = _fold(
                sums, w1, x, norm, scale, rows, begin + BLOCK_K, num_rows,
                K, ROWS, BLOCK_K, SLICES, TURNED, UPCAST,
            )  # fmt: skip
        if STEPS > 2:
            sums = _fold(
                sums, w2, x, norm, scale, rows, begin + 2 * BLOCK_K, num_rows,
                K, ROWS, BLOCK_K, SLICES, TURNED, UPCAST,
            )  # fmt: skip
        if STEPS > 3:
            sums = _fold(
                sums, w3, x, norm, scale, rows, begin + 3 * BLOCK_K, num_rows,
                K, ROWS, BLOCK_K, SLICES, TURNED, UPCAST,
            )  # fmt: skip
    else:
        if OVERLAP:
            FIRST: tl.constexpr = 1  # more of them would take the memory from the kernel before
            for step in tl.static_range(FIRST):
                lines = begin + step * BLOCK_K + tl.arange(0, (BLOCK_K + 63) // 64) * 64
                prefetch(
                    weight + columns.to(tl.int64)[:, None] * K + tl.minimum(lines, K - 1)[None, :],
                    columns[:, None] < N,
                )
        wait_for_previous(OVERLAP)
        scale = _scale(x, norm, epsilon, K, K_PAD)
        for step in tl.range(0, STEPS, num_stages=STAGES):
            at = begin + step * BLOCK_K
            w = _weights(weight, columns, at, N, K, BLOCK_K, SLICES, WHOLE)
            sums = _fold(
                sums, w, x, norm, scale, rows, at, num_rows, K, ROWS, BLOCK_K, SLICES, TURNED, UPCAST
            )  # fmt: skip
    if SLICES > 1:
        sums = tl.sum(sums, axis=0)
    elif ROWS == 1:
        sums = tl.sum(sums, axis=1)[None, :]
    elif TURNED:
        sums = tl.trans(sums)
    asked = (rows[:, None] < num_rows) & (columns[None, :] < N)
    if SPLITS > 1:
        places = parts + rows[:, None] * N + columns[None, :]
        tl.store(places + split * ROWS * N, sums, mask=asked)
        if not LEAVES:
            tl.debug_barrier()  # all of this program's sums are written before it is counted
            before = tl.atomic_add(counters + tile, 1, sem="acq_rel")
            if before == SPLITS - 1:
                total = tl.zeros((ROWS, BLOCK_N), tl.float32)
                for part in tl.static_range(SPLITS):  # unrolled: none is waited for before the next is asked for
                    total += tl.load(places + part * ROWS * N, mask=asked, other=0.0, cache_modifier=".cg")
                _finish(total, bias, out, rows, columns, asked, N, ADDS)
                tl.store(counters + tile, 0)  # for the next product
    else:
        _finish(sums, bias, out, rows, columns, asked, N, ADDS)


@triton.jit
def _scale(x, norm, epsilon, K: tl.constexpr, K_PAD: tl.constexpr):
    """1 / rms of the row; nothing where it is not normed."""
    if norm is None:
        scale = 1.0
    else:
        lanes = tl.arange(0, K_PAD)
        row = tl.load(x + lanes, mask=lanes < K, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(row * row, axis=0) / K + epsilon)
    return scale


@triton.jit
def _places(lines, begin, BLOCK_K: tl.constexpr, SLICES: tl.constexpr):
    """Each line's number and each input's, as they are worked: (lines, BLOCK_K), or (SLICES, lines, a slice)."""
    WIDTH: tl.constexpr = BLOCK_K // SLICES
    if SLICES > 1:
        within = begin + (tl.arange(0, SLICES) * WIDTH)[:, None, None] + tl.arange(0, WIDTH)[None, None, :]
        lines = lines[None, :, None]
    else:
        within = begin + tl.arange(0, BLOCK_K)[None, :]
        lines = lines[:, None]
    return lines, within


@triton.jit
def _weights(
    weight, columns, begin,
    N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A block of the matrix, (BLOCK_N, BLOCK_K) or (SLICES, BLOCK_N, BLOCK_K // SLICES)."""
    lines, within = _places(columns, begin, BLOCK_K, SLICES)
    places = weight + lines.to(tl.int64) * K + within
    if WHOLE:
        block = tl.load(places, eviction_policy="evict_first")
    else:
        block = tl.load(places, mask=(lines < N) & (within < K), other=0.0, eviction_policy="evict_first")
    return block


@triton.jit
def _fold(
    sums, w, x, norm, scale, rows, begin, num_rows,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr, TURNED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the products with a block of the matrix. A slice has sums of its own: each warp works some slices."""
    lines, within = _places(rows, begin, BLOCK_K, SLICES)
    there = (lines < num_rows) & (within < K)
    a = tl.load(x + lines * K + within, mask=there, other=0.0)
    if norm is not None:
        gain = tl.load(norm + within, mask=within < K, other=0.0).to(tl.float32)
        a = ((a.to(tl.float32) * scale).to(x.dtype.element_ty).to(tl.float32) * gain).to(x.dtype.element_ty)
    if UPCAST:
        a, w = a.to(tl.float32), w.to(tl.float32)
    if SLICES > 1:
        sums = tl.dot(a, tl.permute(w, (0, 2, 1)), acc=sums, input_precision="ieee")
    elif ROWS == 1:
        sums += w.to(tl.float32) * a.to(tl.float32)
    elif TURNED:
        sums = tl.dot(w, tl.trans(a), acc=sums, input_precision="ieee")
    else:
        sums = tl.dot(a, tl.trans(w), acc=sums, input_precision="ieee")
    return sums


@triton.jit
def _finish(sums, bias, out, rows, columns, asked, N: tl.constexpr, ADDS: tl.constexpr):
    if bias is not None:
        sums += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    places, numbers = out + rows[:, None] * N + columns[None, :], sums.to(out.dtype.element_ty)
    if ADDS:
        before = tl.load(places, mask=asked, other=0.0).to(tl.float32)
        numbers = (before + numbers.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(places, numbers, mask=asked)


def compile_cases() -> list[CompileCase]:
    """The matrices of Qwen3-0.6B and of Llama-3-8B, for each number of rows; of those that are cut alike the first."""
    cases, seen = [], set[tuple[object, ...]]()
    for outputs, inputs, has_bias in (
        (4096, 1024, False), (1024, 2048, True), (6144, 1024, False), (1024, 3072, False), (151936, 1024, False),
        (6144, 4096, True), (4096, 4096, False), (28672, 4096, False), (4096, 14336, False), (128256, 4096, False),
    ):  # fmt: skip
        for rows in _PADDED:
            cut, closes = cut_of(outputs, inputs, rows) or thumb(outputs, inputs, rows), outputs <= inputs
            adds = rows == 1 and closes  # as the products behind attention and the gate do
            leaves = rows > 1 and closes and cut.splits > 1 and not has_bias
            normed = rows == 1 and not closes
            alike = (rows, cut, has_bias, adds, leaves, normed, cut.held and cut.steps(inputs))
            if alike in seen:
                continue
            seen.add(alike)
            cases.append(
                case_of(outputs, inputs, rows, cut, has_bias=has_bias, adds=adds, leaves=leaves, normed=normed)
            )
    return cases


def case_of(
    outputs: int,
    inputs: int,
    rows: int,
    cut: Cut,
    *,
    has_bias: bool = False,
    adds: bool = False,
    leaves: bool = False,
    normed: bool = False,
) -> CompileCase:
    """One product as it is launched on Hopper."""
    constants = _constants(outputs, inputs, rows, cut, adds=adds, leaves=leaves) | {"UPCAST": False, "OVERLAP": True}
    constants |= ({} if has_bias else {"bias": None}) | ({} if normed else {"norm": None})
    types = {
        "x": "*bf16", "weight": "*bf16", "bias": "*bf16", "norm": "*bf16", "out": "*bf16", "parts": "*fp32",
        "counters": "*i32", "num_rows": "i32", "epsilon": "fp32",
    }  # fmt: skip
    return CompileCase(
        name=f"skinny-{outputs}x{inputs}-{rows}",
        kernel=_skinny,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        instructions=("HMMA", "HGMMA") if rows > 1 else (),
    )
