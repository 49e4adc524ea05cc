"""Logits to tokens on the device: the token that executor/sampler.py chooses, without a sort and without the host.

The meaning and the order are that sampler's: temperature, top-k, top-p, min-p, each a threshold on the value; then one
uniform number by (seed, choice, output index) inverts the running sum in the order of the vocabulary. Gumbel noise
would need no sum, but a random number and two logarithms for every token of the vocabulary, and would choose other
tokens than the CPU does. What differs from that sampler is only how sums round. typical_p is not known here.

Two launches, whatever the rows ask for, so that one captured graph serves all:

  1. `_survey` reads every logit once, a chunk a program: the highest of each *run* of 128 neighbours and, for a row
     that draws, the sum of their weights.
  2. `_choose`, a program a row, needs little more than these numbers. A greedy row's token lies in the first chunk
     that holds the maximum; a row with a temperature and nothing else finds its chunk by the chunks' sums: one chunk
     is read again. Top-k, top-p and min-p first find, over the runs, a bound below which no token can be kept. The
     runs that reach it are listed, few as a rule, and only those are read again: for the exact thresholds, by
     bisection over the numbers that occur, and for the draw.

A row's sums are taken over the same parts in the same order wherever it lies, so no other row changes its token.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor.gpu.inputs import DeviceTables, StepInputs
from executor.gpu.kernels.overlap import begin_next, overlap, wait_for_previous
from executor.gpu.triton_case import CompileCase

_RUN: Final = 128  # neighbours of which the maximum and the sum are kept
_CHUNK_RUNS: Final = 32  # runs of a chunk, the part of a row that a program surveys
_TILE_RUNS: Final = 64  # listed runs that are read at a time
_SURVEY_WARPS: Final = 4
_CHOOSE_WARPS: Final = 16

_LOG2_E = tl.constexpr(math.log2(math.e))
_COLDEST = tl.constexpr(1e-30)  # temperatures below this are this: the quotient stays defined
_INFINITY = tl.constexpr(float("inf"))
_LOWEST, _HIGHEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)
_ONE = tl.constexpr(0x3F800000)  # the bits of 1.0, the likeliest token's weight
_COARSE = tl.constexpr(1 << 19)  # a bound may be loose: 4 bits of a float's fraction are enough
_SLACK = tl.constexpr(1 + 1e-5)  # more than sums over runs can be off


def sample(logits: Tensor, inputs: StepInputs, tables: DeviceTables, out: Tensor) -> None:
    """Choose a token for each of the first S rows of logits (S + P, V), of any float dtype.

    It is written to `out` (S,) int32: -1 where the logits hold NaN or +inf, or nothing but -inf. Any other is written
    to its place in the token pool, too.
    """
    count, vocab_size = inputs.sampled_slots.shape[0], logits.shape[1]
    assert logits.shape[0] >= count and logits.stride(1) == 1, f"logits {tuple(logits.shape)} for {count} rows"
    assert out.shape == (count,) and out.dtype == torch.int32 and out.is_contiguous()
    if count == 0:
        return
    shape = _shape(vocab_size)
    numbers = torch.empty(
        (2, count, shape["NUM_CHUNKS"] + shape["NUM_RUNS"]), dtype=torch.float32, device=logits.device
    )
    highs, sums = numbers
    listed = torch.empty((count, shape["NUM_RUNS"]), dtype=torch.int32, device=logits.device)
    _survey[(shape["NUM_CHUNKS"], count)](
        logits, logits.stride(0), inputs.sampled_slots, tables.temperature, highs, sums,
        **shape, CHUNK_RUNS=_CHUNK_RUNS, RUN=_RUN, num_warps=_SURVEY_WARPS, **overlap(logits.device),
    )  # fmt: skip
    _choose[(count,)](
        logits, logits.stride(0), inputs.sampled_slots, inputs.sampled_places, inputs.sampled_indices,
        tables.temperature, tables.top_k, tables.top_p, tables.min_p, tables.seed, tables.choice,
        highs, sums, listed, out, tables.token_ids,
        **shape, **_tiles(shape), CHUNK_RUNS=_CHUNK_RUNS, RUN=_RUN, num_warps=_CHOOSE_WARPS,
        **overlap(logits.device),
    )  # fmt: skip


def uniforms(seeds: Tensor, choices: Tensor, indices: Tensor) -> Tensor:
    """Return what executor/philox.py gives, (N,) float64. seeds (N, 2) int32, two halves; the others (N,) int32."""
    out = torch.empty(choices.shape, dtype=torch.float64, device=choices.device)
    count = choices.numel()
    assert seeds.is_contiguous() and seeds.shape == (count, 2)
    if count:
        _uniforms[(triton.cdiv(count, 128),)](seeds, choices, indices, out, count, BLOCK=128)
    return out


def _shape(vocab_size: int) -> dict[str, int]:
    return {
        "VOCAB": vocab_size,
        "NUM_RUNS": triton.cdiv(vocab_size, _RUN),
        "NUM_CHUNKS": triton.cdiv(vocab_size, _RUN * _CHUNK_RUNS),
    }


def _tiles(shape: dict[str, int]) -> dict[str, int]:
    return {
        "RUNS_TILE": triton.next_power_of_2(shape["NUM_RUNS"]),
        "CHUNKS_TILE": triton.next_power_of_2(shape["NUM_CHUNKS"]),
        "LISTED_TILE": min(_TILE_RUNS, triton.next_power_of_2(shape["NUM_RUNS"])),
    }


@triton.jit
def _survey(
    logits, stride, slots, temperatures, highs, sums,
    VOCAB: tl.constexpr, NUM_RUNS: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK_RUNS: tl.constexpr, RUN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One chunk of one row a program. Of each row, `highs` and `sums` hold the chunks' numbers, then the runs'.

    A sum is one of weights exp((logit - the chunk's highest) / temperature). NaN counts as +inf: both fail the row.
    """
    begin_next(OVERLAP)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperatures + tl.load(slots + row, cache_modifier=".cg"), cache_modifier=".cg")
    wait_for_previous(OVERLAP)
    runs = chunk * CHUNK_RUNS + tl.arange(0, CHUNK_RUNS)
    tokens = runs[:, None] * RUN + tl.arange(0, RUN)[None, :]
    values = tl.load(logits + row * stride + tokens, mask=tokens < VOCAB, other=-_INFINITY).to(tl.float32)
    values = tl.where(values == values, values, _INFINITY)  # noqa: PLR0124 - only NaN is not itself
    run_highs = tl.max(values, axis=1)
    high = tl.max(run_highs, axis=0)
    highs += row * (NUM_CHUNKS + NUM_RUNS)
    tl.store(highs + chunk, high)
    if temperature > 0:
        sums += row * (NUM_CHUNKS + NUM_RUNS)
        weights = _weights(values, tl.where(tl.abs(high) < _INFINITY, high, 0.0), _scale(temperature))
        run_sums = tl.sum(weights, axis=1)
        tl.store(highs + NUM_CHUNKS + runs, run_highs, mask=runs < NUM_RUNS)
        tl.store(sums + NUM_CHUNKS + runs, run_sums, mask=runs < NUM_RUNS)
        tl.store(sums + chunk, tl.sum(run_sums, axis=0))


@triton.jit
def _choose(
    logits, stride, slots, places, indices, temperatures, top_ks, top_ps, min_ps, seeds, choices,
    highs, sums, listed, out, token_pool,
    VOCAB: tl.constexpr, NUM_RUNS: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK_RUNS: tl.constexpr, RUN: tl.constexpr,
    RUNS_TILE: tl.constexpr, CHUNKS_TILE: tl.constexpr, LISTED_TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    begin_next(OVERLAP)
    CHUNK: tl.constexpr = CHUNK_RUNS * RUN
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row, cache_modifier=".cg")
    temperature = tl.load(temperatures + slot, cache_modifier=".cg")
    wait_for_previous(OVERLAP)
    logits += row * stride
    highs += row * (NUM_CHUNKS + NUM_RUNS)
    sums += row * (NUM_CHUNKS + NUM_RUNS)
    chunks = tl.arange(0, CHUNKS_TILE)
    chunk_highs = tl.load(highs + chunks, mask=chunks < NUM_CHUNKS, other=-_INFINITY)
    high = tl.max(chunk_highs, axis=0)
    token = tl.full([], -1, tl.int32)
    if tl.abs(high) < _INFINITY:
        if temperature > 0:
            scale = _scale(temperature)
            top_k, top_p, min_p = tl.load(top_ks + slot), tl.load(top_ps + slot), tl.load(min_ps + slot)
            draw = _uniform(seeds + 2 * slot, tl.load(choices + slot), tl.load(indices + row))
            few = (top_k > 0) & (top_k < VOCAB)
            if few | (top_p < 1) | (min_p > 0):
                token = _draw_among_few(
                    logits, high, scale, draw, tl.where(few, top_k, 0), top_p, min_p,
                    highs, sums, listed + row * NUM_RUNS,
                    VOCAB, NUM_RUNS, NUM_CHUNKS, CHUNK_RUNS, RUN, RUNS_TILE, LISTED_TILE,
                )  # fmt: skip
            else:
                masses = tl.load(sums + chunks, mask=chunks < NUM_CHUNKS, other=0.0)
                masses *= _weights(chunk_highs, high, scale)
                target = draw * tl.sum(masses.to(tl.float64), axis=0)
                chunk = _invert(masses, chunks, target)
                target -= tl.sum(tl.where(chunks < chunk, masses, 0.0).to(tl.float64), axis=0)
                tokens = chunk * CHUNK + tl.arange(0, CHUNK)
                values = tl.load(logits + tokens, mask=tokens < VOCAB, other=-_INFINITY).to(tl.float32)
                token = _invert(_weights(values, high, scale), tokens, target)
        else:
            chunk = tl.min(tl.where(chunk_highs == high, chunks, CHUNKS_TILE), axis=0)
            tokens = chunk * CHUNK + tl.arange(0, CHUNK)
            values = tl.load(logits + tokens, mask=tokens < VOCAB, other=-_INFINITY).to(tl.float32)
            token = tl.min(tl.where(values == high, tokens, VOCAB), axis=0)
        tl.store(token_pool + tl.load(places + row).to(tl.int64), token)
    tl.store(out + row, token)


@triton.jit
def _draw_among_few(
    logits, high, scale, draw, top_k, top_p, min_p, highs, sums, listed,
    VOCAB: tl.constexpr, NUM_RUNS: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK_RUNS: tl.constexpr, RUN: tl.constexpr,
    RUNS_TILE: tl.constexpr, LISTED_TILE: tl.constexpr,
):  # fmt: skip
    """Draw among the tokens that top-k (0: all), top-p and min-p leave."""
    runs = tl.arange(0, RUNS_TILE)
    inside = runs < NUM_RUNS
    run_highs = tl.load(highs + NUM_CHUNKS + runs, mask=inside, other=-_INFINITY)
    run_ranks, run_weights = _ranks(run_highs), _weights(run_highs, high, scale)

    # Weights are not negative, so their bits are ordered as they are. A threshold below min-p need not be found.
    least_weight = tl.minimum(min_p, 1.0).to(tl.int32, bitcast=True)
    least_rank = tl.full([], _LOWEST, tl.int32)
    total = tl.full([], 0.0, tl.float64)
    if top_k > 0:
        if top_k <= NUM_RUNS:
            least_rank = _bound_of_top_k(run_ranks, top_k, _ranks(high))
    elif top_p < 1:
        chunk_highs = tl.load(highs + runs // CHUNK_RUNS, mask=inside, other=-_INFINITY)
        masses = tl.load(sums + NUM_CHUNKS + runs, mask=inside, other=0.0) * _weights(chunk_highs, high, scale)
        total = tl.sum(masses.to(tl.float64), axis=0)
        bound = _bound_of_top_p(run_weights, masses, (top_p * total * _SLACK).to(tl.float32), RUN)
        least_weight = tl.maximum(least_weight, bound)

    needed = inside & (run_ranks >= least_rank)
    if (top_k == 0) | (top_p >= 1):  # the nucleus of the k likeliest is a share of all their weight
        needed &= run_weights.to(tl.int32, bitcast=True) >= least_weight
    behind = tl.cumsum(needed.to(tl.int32), axis=0)
    tl.store(listed + behind - 1, runs, mask=needed)
    count = tl.max(behind, axis=0)
    tl.debug_barrier()  # other lanes read what was written

    if top_k > 0:
        least_rank = _threshold(
            logits, listed, count, high, scale, top_k.to(tl.float64), least_rank, _ranks(high), least_rank,
            False, VOCAB, NUM_RUNS, RUN, LISTED_TILE,
        )  # fmt: skip
    if top_p < 1:
        if top_k > 0:
            total = _total(logits, listed, count, high, scale, least_rank, 0, VOCAB, NUM_RUNS, RUN, LISTED_TILE)
        least_weight = _threshold(
            logits, listed, count, high, scale, top_p * total, least_weight, tl.full([], _ONE, tl.int32), least_rank,
            True, VOCAB, NUM_RUNS, RUN, LISTED_TILE,
        )  # fmt: skip

    target = draw * _total(
        logits, listed, count, high, scale, least_rank, least_weight, VOCAB, NUM_RUNS, RUN, LISTED_TILE
    )
    running = tl.full([], 0.0, tl.float64)
    before, tile = running, tl.full([], 0, tl.int32)  # what lies before the tile that the target lies in
    for start in range(0, count, LISTED_TILE):
        tokens, weights = _listed(
            logits, listed, start, count, high, scale, least_rank, least_weight, VOCAB, NUM_RUNS, RUN, LISTED_TILE
        )
        mass = tl.sum(weights, axis=0)
        here = (mass > 0) & (running <= target)
        before, tile = tl.where(here, running, before), tl.where(here, start, tile)
        running += mass.to(tl.float64)
    tokens, weights = _listed(
        logits, listed, tile, count, high, scale, least_rank, least_weight, VOCAB, NUM_RUNS, RUN, LISTED_TILE
    )
    return _invert(weights, tokens, target - before)


@triton.jit
def _bound_of_top_k(run_ranks, top_k, highest):
    """A rank that at least top_k runs, and so as many tokens, reach."""
    lo, hi, reached = tl.full([], _LOWEST, tl.int32), highest + 1, tl.full([], _HIGHEST, tl.int32)
    while (lo < hi - 1) & (reached > top_k + 16):  # a few runs too many cost less than to find the rank itself
        middle = (lo & hi) + ((lo ^ hi) >> 1)
        number = tl.sum((run_ranks >= middle).to(tl.int32), axis=0)
        enough = number >= top_k
        lo, hi = tl.where(enough, middle, lo), tl.where(enough, hi, middle)
        reached = tl.where(enough, number, reached)
    return lo


@triton.jit
def _bound_of_top_p(run_weights, masses, wanted, RUN: tl.constexpr):
    """Bits of a weight such that the tokens that reach it hold the wanted mass.

    A run whose highest reaches it holds at least that one there, and at most RUN - 1 tokens below.
    """
    lo, hi = tl.full([], 0, tl.int32), tl.full([], _ONE + 1, tl.int32)
    while lo < hi - _COARSE:
        middle = (lo + hi) >> 1
        weight = middle.to(tl.float32, bitcast=True)
        reaching = tl.maximum(masses - (RUN - 1) * weight, run_weights)
        enough = tl.sum(tl.where(run_weights >= weight, reaching, 0.0), axis=0) >= wanted
        lo, hi = tl.where(enough, middle, lo), tl.where(enough, hi, middle)
    return lo


@triton.jit
def _threshold(
    logits, listed, count, high, scale, wanted, lo, highest, least_rank,
    BY_MASS: tl.constexpr, VOCAB: tl.constexpr, NUM_RUNS: tl.constexpr, RUN: tl.constexpr, LISTED_TILE: tl.constexpr,
):  # fmt: skip
    """Return the highest threshold, at least `lo`, that as many listed tokens reach as wanted, or as much weight.

    It is a rank or, BY_MASS, a weight's bits. Each round halves what lies between, and goes on to numbers that occur.
    """
    hi = highest + 1
    while lo < hi - 1:
        middle = (lo & hi) + ((lo ^ hi) >> 1)
        amounts = tl.zeros([LISTED_TILE * RUN], tl.float32)
        above = tl.full([LISTED_TILE * RUN], _HIGHEST, tl.int32)
        below = tl.full([LISTED_TILE * RUN], _LOWEST, tl.int32)
        for start in range(0, count, LISTED_TILE):
            _, values = _read(logits, listed, start, count, VOCAB, NUM_RUNS, RUN, LISTED_TILE)
            numbers = _ranks(values)
            if BY_MASS:
                weights = _weights(values, high, scale)
                numbers = tl.where(numbers >= least_rank, weights.to(tl.int32, bitcast=True), _LOWEST)
                amounts += tl.where(numbers >= middle, weights, 0.0)
            else:
                amounts += tl.where(numbers >= middle, 1.0, 0.0)
            above = tl.minimum(above, tl.where(numbers >= middle, numbers, _HIGHEST))
            below = tl.maximum(below, tl.where(numbers >= middle, _LOWEST, numbers))
        enough = tl.sum(amounts.to(tl.float64), axis=0) >= wanted
        lo, hi = tl.where(enough, tl.min(above, axis=0), lo), tl.where(enough, hi, tl.max(below, axis=0) + 1)
    return lo


@triton.jit
def _total(
    logits, listed, count, high, scale, least_rank, least_weight,
    VOCAB: tl.constexpr, NUM_RUNS: tl.constexpr, RUN: tl.constexpr, LISTED_TILE: tl.constexpr,
):  # fmt: skip
    """The weight of all listed tokens that are kept."""
    total = tl.full([], 0.0, tl.float64)
    for start in range(0, count, LISTED_TILE):
        _, weights = _listed(
            logits, listed, start, count, high, scale, least_rank, least_weight, VOCAB, NUM_RUNS, RUN, LISTED_TILE
        )
        total += tl.sum(weights, axis=0).to(tl.float64)
    return total


@triton.jit
def _listed(
    logits, listed, start, count, high, scale, least_rank, least_weight,
    VOCAB: tl.constexpr, NUM_RUNS: tl.constexpr, RUN: tl.constexpr, LISTED_TILE: tl.constexpr,
):  # fmt: skip
    """Tokens of a tile of listed runs, and their weights: 0 where cut."""
    tokens, values = _read(logits, listed, start, count, VOCAB, NUM_RUNS, RUN, LISTED_TILE)
    weights = _weights(values, high, scale)
    kept = (_ranks(values) >= least_rank) & (weights.to(tl.int32, bitcast=True) >= least_weight)
    return tokens, tl.where(kept, weights, 0.0)


@triton.jit
def _read(
    logits, listed, start, count,
    VOCAB: tl.constexpr, NUM_RUNS: tl.constexpr, RUN: tl.constexpr, LISTED_TILE: tl.constexpr,
):  # fmt: skip
    """Tokens of a tile of listed runs, and their logits: -inf behind the end of the list."""
    lanes = tl.arange(0, LISTED_TILE * RUN)
    entries = start + lanes // RUN
    tokens = tl.load(listed + entries, mask=entries < count, other=NUM_RUNS) * RUN + lanes % RUN
    return tokens, tl.load(logits + tokens, mask=tokens < VOCAB, other=-_INFINITY).to(tl.float32)


@triton.jit
def _invert(masses, names, target):
    """The name of the first mass with which the running sum exceeds the target; the last with any if none does."""
    running = tl.cumsum(masses.to(tl.float64), axis=0)
    first = tl.min(tl.where((masses > 0) & (running > target), names, _HIGHEST), axis=0)
    return tl.minimum(first, tl.max(tl.where(masses > 0, names, 0), axis=0))


@triton.jit
def _scale(temperature):
    return _LOG2_E / tl.maximum(temperature, _COLDEST)


@triton.jit
def _weights(values, high, scale):
    """exp((value - high) / temperature): 1 for the highest."""
    return tl.exp2((values - high) * scale)


@triton.jit
def _ranks(values):
    """Integers in the order of the values; those of 0.0 and -0.0 are the same."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def _uniform(seed, choice, index):
    """What executor/philox.py gives: 53 bits of two words of Philox4x32-10, in [0, 1). `seed` points to two halves."""
    low, high = tl.load(seed).to(tl.uint32, bitcast=True), tl.load(seed + 1).to(tl.uint32, bitcast=True)
    counter0, counter1 = choice.to(tl.uint32, bitcast=True), index.to(tl.uint32, bitcast=True)
    zero = counter0 ^ counter0
    word0, word1, _, _ = tl.philox_impl(counter0, counter1, zero, zero, low, high)
    bits = ((word0.to(tl.uint64) << 32) | word1.to(tl.uint64)) >> 11
    return bits.to(tl.float64) * (2.0**-53)


@triton.jit
def _uniforms(seeds, choices, indices, out, count, BLOCK: tl.constexpr):
    """BLOCK numbers a program: for tests, and to see a draw by itself."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.where(rows < count, rows, count - 1)
    tl.store(out + rows, _uniform(seeds + 2 * rows, tl.load(choices + rows), tl.load(indices + rows)))


def compile_cases() -> list[CompileCase]:
    """The vocabularies of Qwen3, Llama-3, SmolLM and GPT-2 (whose size is odd), and float32 logits."""
    cases = []
    types = dict.fromkeys(("slots", "places", "indices", "top_ks", "seeds", "choices", "listed", "out"), "*i32")
    types |= dict.fromkeys(("temperatures", "top_ps", "min_ps", "highs", "sums"), "*fp32")
    types |= {"token_pool": "*i32", "stride": "i32"}
    for vocab_size, dtype in ((151936, "bf16"), (128256, "bf16"), (49152, "fp32"), (50257, "fp16")):
        shape = _shape(vocab_size) | {"CHUNK_RUNS": _CHUNK_RUNS, "RUN": _RUN, "OVERLAP": True}
        tiles = _tiles(shape)
        for kernel, constants, num_warps in ((_survey, shape, _SURVEY_WARPS), (_choose, shape | tiles, _CHOOSE_WARPS)):
            kinds = types | {"logits": f"*{dtype}"} | dict.fromkeys(constants, "constexpr")
            cases.append(
                CompileCase(
                    name=f"{kernel.fn.__name__.lstrip('_')}-{vocab_size}-{dtype}",
                    kernel=kernel,
                    signature={name: kinds[name] for name in kernel.arg_names},
                    constants=constants,
                    num_warps=num_warps,
                )
            )
    return cases
