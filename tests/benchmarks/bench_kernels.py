"""Every kernel by itself, against what the machine can do: `make bench-kernels`.

Weights and KV of all layers in turn, as in a real step, so that nothing is in the cache that would not be there. For
each kernel: microseconds a layer, the share of the machine's memory read rate and of its bf16 matrix rate (both
measured in this run), and torch's own way beside it, alternating; of fewer bits also how many times as fast as our own
bf16: the median of the rounds' ratios, because a tile unit may change its pace from one second to the next. int8 may
pass the matrix rate where it is multiplied as bytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Final

import numpy as np
import torch
from torch import Tensor

from common.config import DEFAULT_MODEL
from common.sampling import SamplingParams
from common.step import NewSequence, StepPlan
from common.types import BlockId, slot_ref
from executor.attention.native import NativeAttention
from executor.attention.protocol import AttentionStep, LayerOptions
from executor.attention.torch_sdpa import SdpaAttention
from executor.batch import InputBatch, build_batch
from executor.kv_cache import KvCache, LayerShape, SlabFormat
from executor.native.library import BFLOAT16, INT4, INT8, native
from executor.native.packed import Pages, pack
from executor.resident import Resident
from services.model_store import resolve
from tests.benchmarks.floors import ModelShape
from tests.benchmarks.limits import Limits, measure

ROWS: Final = (1, 4, 8, 16, 32, 64, 128, 512)
KINDS: Final = {"bf16": BFLOAT16, "int8": INT8, "int4": INT4}
DECODES: Final = ((1, 256), (1, 1024), (8, 1024), (32, 256), (32, 1024))
PREFILLS: Final = ((512, 0), (1024, 0), (512, 1024))
_BITS: Final = {"bf16": 16, "int8": 8.5, "int4": 5}
CPU: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One kernel: microseconds a layer, and what it reads and computes in them."""

    name: str
    ours_us: float
    torch_us: float | None
    read_bytes: float
    flop: float
    as_bf16: float | None = None  # times as fast as our own, where fewer bits shall be faster


def all_us(works: Sequence[Callable[[], object]], layers: int, rounds: int) -> list[list[float]]:
    """Times a layer of each, by rounds: the works take turns, and the first turn is not counted."""
    found: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):
        for times, work in zip(found, works, strict=True):
            began = time.perf_counter()
            work()
            times.append((time.perf_counter() - began) / layers * 1e6)
    return [times[1:] for times in found]


def linears(shape: ModelShape, rounds: int) -> Iterator[Measured]:
    """All four products of a layer, with the weights of every layer in turn."""
    library, pages = native(), Pages()
    weights = [
        [torch.randn(outputs, inputs, dtype=torch.bfloat16) for inputs, outputs in shape.linears]
        for _ in range(shape.layers)
    ]
    packed = {
        kind: [[pack(library, pages, w, kind=number) for w in layer] for layer in weights]
        for kind, number in KINDS.items()
    }
    numbers = shape.body_weights / shape.layers
    for rows in ROWS:
        inputs = [torch.randn(rows, width, dtype=torch.bfloat16) for width, _ in shape.linears]
        outputs = [torch.empty(rows, height, dtype=torch.bfloat16) for _, height in shape.linears]
        onednn = [[torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in layer] for layer in weights]

        def ours(kind: str, inputs: list[Tensor] = inputs, outputs: list[Tensor] = outputs) -> None:
            for layer in packed[kind]:
                for each, x, y in zip(layer, inputs, outputs, strict=True):
                    library.linear(each.struct, x, y)

        def theirs(inputs: list[Tensor] = inputs, onednn: list[list[Tensor]] = onednn) -> None:
            for layer in onednn:
                for weight, x in zip(layer, inputs, strict=True):
                    torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

        works = [lambda kind=kind, ours=ours: ours(kind) for kind in KINDS]
        *found, other = all_us([*works, theirs], shape.layers, rounds)
        for kind, times in zip(KINDS, found, strict=True):
            yield Measured(
                name=f"linears {kind}, {rows} rows",
                ours_us=min(times),
                torch_us=min(other),
                read_bytes=numbers * _BITS[kind] / 8,
                flop=2 * numbers * rows,
                as_bf16=None if kind == "bf16" else median(b / mine for b, mine in zip(found[0], times, strict=True)),
            )


def attentions(shape: ModelShape, rounds: int) -> Iterator[Measured]:
    """Store and attend in every layer's slab in turn; blocks of a sequence lie scattered."""
    heads = LayerShape(
        num_heads=shape.heads, num_kv_heads=shape.kv_heads, key_dim=shape.head_dim, value_dim=shape.head_dim
    )
    cases = [(f"attention, {n} decodes at {context}", [(context - 1, 1)] * n) for n, context in DECODES]
    cases += [(f"attention, {now} tokens after {before}", [(before, now)]) for now, before in PREFILLS]
    for name, rows in cases:
        batch = layout(rows)
        num_blocks = int(batch.block_tables.max()) + 1
        works: list[Callable[[], object]] = []
        tokens = len(batch.positions)
        q = torch.randn(tokens, shape.heads, shape.head_dim, dtype=torch.bfloat16)
        k, v = torch.randn(2, tokens, shape.kv_heads, shape.head_dim, dtype=torch.bfloat16).unbind()
        for backend in (NativeAttention(), SdpaAttention()):
            slab = SlabFormat(dtype=torch.bfloat16, packed=backend.packed)
            cache = KvCache([heads] * shape.layers, num_blocks=num_blocks, block_size=16, format=slab, device=CPU)

            works.append(partial(attend_all, backend, cache, batch, q, k, v))
        ours, theirs = map(min, all_us(works, shape.layers, rounds))
        seen = sum((2 * before + now + 1) * now / 2 for before, now in rows)
        yield Measured(
            name=name,
            ours_us=ours,
            torch_us=theirs,
            read_bytes=sum(before + now for before, now in rows) * 4.0 * shape.kv_heads * shape.head_dim,
            flop=4 * seen * shape.heads * shape.head_dim,
        )


def attend_all(
    backend: NativeAttention | SdpaAttention, cache: KvCache, batch: InputBatch, q: Tensor, k: Tensor, v: Tensor
) -> None:
    """One step through the slabs of all layers."""
    step, options = AttentionStep.of(batch, CPU), LayerOptions(scale=q.shape[2] ** -0.5)
    for layer in cache.layers:
        backend.attend(q, k, v, layer, step, options)


def layout(rows: Sequence[tuple[int, int]]) -> InputBatch:
    """A step of rows (tokens computed before, tokens computed now), its blocks in random order."""
    each = [-(-(before + now) // 16) for before, now in rows]
    names = iter(np.random.default_rng(0).permutation(sum(each)).tolist())
    longest = max(before + now for before, now in rows)
    held = Resident(
        num_blocks=sum(each),
        block_size=16,
        max_sequences=len(rows),
        max_step_tokens=1 << 20,
        max_model_len=longest + 1,
        vocab_size=1,
    )
    new = [
        NewSequence(
            ref=slot_ref(row, 0),
            attempt=0,
            token_ids=[0] * (before + now),
            num_prompt=before + now,
            num_computed=before,
            block_table=[BlockId(next(names)) for _ in range(each[row])],
            sampling=SamplingParams(),
            choice=0,
            max_tokens=2,
            stop_token_ids=(),
        )
        for row, (before, now) in enumerate(rows)
    ]
    plan = StepPlan(step=0, refs=[s.ref for s in new], num_scheduled=[now for _, now in rows], new=new)
    return build_batch(held, held.apply(plan))


def table(found: Sequence[Measured], limits: Limits) -> str:
    """Markdown."""
    matrix = max(limits.matrix_gflop_s.values())
    lines = [
        f"{native().isa}, {limits.threads} threads; memory {limits.read_gb_s} GB/s, torch's bf16 {matrix} GFLOP/s.",
        "",
        "| kernel | µs a layer | of memory | of the matrix rate | torch's way, µs | times as fast | as our bf16 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in found:
        seconds = each.ours_us / 1e6
        memory = each.read_bytes / seconds / 1e9 / limits.read_gb_s
        rate = each.flop / seconds / 1e9 / matrix
        other = f"{each.torch_us:.0f} | {each.torch_us / each.ours_us:.2f}" if each.torch_us else "- | -"
        bf16 = f"{each.as_bf16:.2f}" if each.as_bf16 else "-"
        lines.append(f"| {each.name} | {each.ours_us:.0f} | {memory:.0%} | {rate:.0%} | {other} | {bf16} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a model of the Llama family")
    parser.add_argument("--rounds", type=int, default=5, help="times that each kernel is measured")
    parser.add_argument("--threads", type=int, default=0, help="0 is torch's own choice")
    parser.add_argument("--only", choices=("linears", "attention"), help="one kind of kernel")
    parsed = parser.parse_args(arguments)
    shape = ModelShape.of(resolve(parsed.model))
    if shape is None:
        parser.error(f"{parsed.model} is not of the Llama family")
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
        native().use_threads(parsed.threads)
    with torch.inference_mode():
        kernels = {"linears": linears, "attention": attentions}
        found = [
            each for name, of in kernels.items() if parsed.only in (None, name) for each in of(shape, parsed.rounds)
        ]
        limits = measure(shape, torch.get_num_threads())
    print(table(found, limits))


if __name__ == "__main__":
    main()
