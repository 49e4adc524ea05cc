"""What the machine can do at best: read memory, and multiply matrices of a model's shapes in bf16.

Run it with `python -m tests.benchmarks.limits MODEL_FOLDER`; it prints JSON. A process of its own, so that a benchmark
that starts servers holds neither torch nor the gigabyte that is read here. Best of all repetitions: a ceiling is what
was reached once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from tests.benchmarks.floors import ModelShape

ROWS: Final = (512, 1024, 2048)
_NUMBERS: Final = 1 << 27  # 512 MiB of float32, far more than any cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """With so many threads."""

    threads: int
    read_gb_s: float
    matrix_gflop_s: dict[str, float]  # by rows: all matrices of all layers, one after the other


def measure(shape: ModelShape, threads: int) -> Limits:
    """Takes about ten seconds."""
    torch.set_num_threads(threads)
    return Limits(
        threads=threads,
        read_gb_s=round(_read_gb_s(), 2),
        matrix_gflop_s={str(rows): round(_matrix_gflop_s(shape, rows), 1) for rows in ROWS},
    )


def _read_gb_s() -> float:
    a, b = torch.ones(_NUMBERS), torch.ones(_NUMBERS)
    return max(a.nbytes / _best_s(a.sum), (a.nbytes + b.nbytes) / _best_s(partial(torch.dot, a, b))) / 1e9


def _matrix_gflop_s(shape: ModelShape, rows: int) -> float:
    """Weights packed for oneDNN, as a server that is made for this packs them; different ones in every layer."""
    packed = [
        torch.ops.mkldnn._reorder_linear_weight(torch.randn(outputs, inputs, dtype=torch.bfloat16), rows)
        for _ in range(shape.layers)
        for inputs, outputs in shape.linears
    ]
    inputs = [torch.randn(rows, width, dtype=torch.bfloat16) for width, _ in shape.linears] * shape.layers

    def forward() -> None:
        for x, weight in zip(inputs, packed, strict=True):
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    return 2 * shape.body_weights * rows / _best_s(forward) / 1e9


def _best_s(work: Callable[[], object], least: int = 3, seconds: float = 1.0) -> float:
    work()
    best, repetitions, end = float("inf"), 0, time.perf_counter() + seconds
    while repetitions < least or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        best, repetitions = min(best, time.perf_counter() - began), repetitions + 1
    return best


def main() -> int:
    """Print the limits with one thread and with one for each core. Fails for a model of an unknown kind."""
    shape = ModelShape.of(Path(sys.argv[1]))
    if shape is None:
        return 1
    with torch.inference_mode():
        found = [measure(shape, threads) for threads in sorted({1, os.cpu_count() or 1})]
    print(json.dumps([asdict(limits) for limits in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
