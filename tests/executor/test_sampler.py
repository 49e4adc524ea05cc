"""Sampling: the right sets, the right frequencies, and no row that notices the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from executor.sampler import SamplingColumns, keep, kth_largest, sample

Params = tuple[float, int, float, float, float]  # temperature, top_k, top_p, min_p, typical_p
NO_INPUT = torch.LongTensor([[0]])
PLAIN: Params = (1.0, 0, 1.0, 0.0, 1.0)


def columns(rows: list[Params], *, first_index: int = 0, seeds: list[int] | None = None) -> SamplingColumns:
    temperature, top_k, top_p, min_p, typical_p = zip(*rows, strict=True)
    count = len(rows)
    return SamplingColumns(
        temperature=np.array(temperature, np.float64),
        top_k=np.array(top_k, np.int64),
        top_p=np.array(top_p, np.float64),
        min_p=np.array(min_p, np.float64),
        typical_p=np.array(typical_p, np.float64),
        seed=np.array(seeds or [3] * count, np.uint64),
        choice=np.zeros(count, np.int64),
        index=np.arange(count) + first_index,
    )


def noise(rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((rows, vocab_size)) * scale).astype(np.float32)


def weights_of(logits: NDArray[np.float32], params: Params) -> NDArray[np.float32]:
    temperature, top_k, top_p, min_p, typical_p = params
    ids, weights = keep(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p
    )  # fmt: skip
    if ids is None:
        return weights
    dense = np.zeros_like(logits)
    dense[ids] = weights
    return dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_greedy_row_is_torchs_argmax(dtype: torch.dtype) -> None:
    logits = torch.from_numpy(noise(64, 5000)).to(dtype)  # in bfloat16 the highest value occurs more than once

    chosen = sample(logits.float().numpy(), columns([(0.0, 5, 0.5, 0.1, 0.5)] * 64))

    assert chosen.tokens == torch.argmax(logits, dim=1).tolist()
    assert chosen.failed == []


@pytest.mark.parametrize(
    "params",
    [
        (0.7, 0, 1.0, 0.0, 1.0),
        (1.0, 1, 1.0, 0.0, 1.0),
        (1.3, 50, 1.0, 0.0, 1.0),
        (1.0, 4999, 1.0, 0.0, 1.0),
        (1.0, 10_000, 1.0, 0.0, 1.0),
        (1.0, 0, 0.9, 0.0, 1.0),
        (2.5, 0, 0.999, 0.0, 1.0),
        (0.3, 0, 0.01, 0.0, 1.0),
        (1.0, 0, 1.0, 0.05, 1.0),
        (0.8, 40, 0.95, 0.02, 1.0),
        (5.0, 1000, 0.5, 0.3, 1.0),
        (1.0, 0, 1.0, 0.0, 0.9),
        (0.7, 0, 1.0, 0.0, 0.2),
        (1.0, 0, 1.0, 0.0, 1e-6),
        (2.0, 0, 1.0, 0.0, 0.999),
        (0.8, 40, 0.95, 0.02, 0.7),
    ],
)
def test_the_kept_tokens_and_their_probabilities_are_those_of_transformers(params: Params) -> None:
    temperature, top_k, top_p, min_p, typical_p = params
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    if typical_p < 1:
        warpers.append(TypicalLogitsWarper(typical_p))
    for logits in noise(20, 5000, seed=1):
        # in float64: their sums of float32 end a token apart, on one kind of processor or another
        theirs = warpers(NO_INPUT, torch.from_numpy(logits).double()[None])[0]

        ours = weights_of(logits, params)

        assert (ours > 0).nonzero()[0].tolist() == theirs.isfinite().nonzero()[:, 0].tolist()
        np.testing.assert_allclose(ours / ours.sum(), theirs.softmax(0).numpy(), rtol=1e-5, atol=1e-9)


def test_tokens_equal_to_the_last_one_kept_are_kept_too() -> None:
    logits = np.array([2, 1, 1, 1, 0], np.float32)

    assert (weights_of(logits, (1.0, 2, 1.0, 0.0, 1.0)) > 0).tolist() == [True, True, True, True, False]
    assert (weights_of(logits, (1.0, 0, 0.6, 0.0, 1.0)) > 0).tolist() == [True, True, True, True, False]


@given(values=st.lists(st.floats(-9, 9, width=16), min_size=2, max_size=1000), at=st.floats(0, 1, exclude_max=True))
def test_the_kth_largest_is_that_of_the_sorted_values(values: list[float], at: float) -> None:
    k = 1 + int(at * (len(values) - 1))

    assert kth_largest(np.array(values, np.float32), k) == sorted(values, reverse=True)[k - 1]


@pytest.mark.parametrize(
    "params",
    [PLAIN, (0.6, 0, 1.0, 0.0, 1.0), (1.5, 20, 0.9, 0.0, 1.0), (1.0, 0, 0.8, 0.05, 1.0), (1.0, 0, 1.0, 0.0, 0.5)],
)
def test_tokens_come_as_often_as_their_probability_says(params: Params) -> None:
    count = 10_000
    logits = noise(1, 300, seed=5, scale=1.0)
    weights = weights_of(logits[0], params).astype(np.float64)
    expected = weights / weights.sum() * count

    rows = np.ascontiguousarray(np.broadcast_to(logits, (count, 300)))
    observed = np.bincount(sample(rows, columns([params] * count)).tokens, minlength=300)

    assert observed[expected == 0].sum() == 0
    often = expected > 0
    freedom = int(often.sum()) - 1
    chi_square = float(((observed - expected)[often] ** 2 / expected[often]).sum())
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5  # four standard deviations; the draws are fixed


@settings(deadline=None, max_examples=60)
@given(
    vocab_size=st.sampled_from([1, 2, 127, 128, 129, 1000, 4097]),
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 1e-40, 0.3, 1.0, 2.0, 100.0]),
            st.sampled_from([0, 1, 7, 200, 100_000]),
            st.sampled_from([1e-6, 0.5, 0.95, 1.0]),
            st.sampled_from([0.0, 0.1, 1.0]),
            st.sampled_from([1.0, 0.5, 1e-6]),
        ),
        min_size=1,
        max_size=9,
    ),
    seed=st.integers(0, (1 << 64) - 1),
    index=st.integers(0, 1 << 20),
)
def test_a_row_alone_gives_the_same_token_as_among_others(
    vocab_size: int, rows: list[Params], seed: int, index: int
) -> None:
    logits = noise(len(rows), vocab_size, seed=index)

    together = sample(logits, columns(rows, first_index=index, seeds=[seed] * len(rows)))

    alone = [
        sample(logits[n : n + 1].copy(), columns([row], first_index=index + n, seeds=[seed])).tokens[0]
        for n, row in enumerate(rows)
    ]
    assert together.tokens == alone


def test_a_row_that_is_not_finite_fails_alone() -> None:
    logits = noise(6, 1000)
    healthy = sample(logits, columns([PLAIN] * 6)).tokens
    logits[1, 999] = np.nan
    logits[3, 0] = np.inf
    logits[4] = -np.inf

    chosen = sample(logits, columns([PLAIN] * 6))

    assert list(chosen.failed) == [1, 3, 4]
    assert [chosen.tokens[n] for n in (0, 2, 5)] == [healthy[n] for n in (0, 2, 5)]


def test_a_token_of_probability_zero_is_never_chosen() -> None:
    logits = np.full((2000, 400), -np.inf, np.float32)
    logits[:, [130, 399]] = 0

    assert set(sample(logits, columns([PLAIN] * 2000)).tokens) == {130, 399}
