"""Logits to tokens, on the host. A row's token depends on its own logits and parameters, bit for bit, on nothing else.

The order is that of Transformers' processors: what executor/controls.py does, then temperature, top-k, top-p, min-p,
typical-p. Each cut is a *threshold on the value*: tokens as likely as the last one kept are kept too, so no order among
equals decides. Then one uniform number is drawn by (seed, choice, output index) and the distribution is inverted in the
order of the vocabulary.

Rows are worked one by one in numpy: a vocabulary is far longer than numpy's call overhead, while torch's vectorised
loops round differently in the middle of a tensor and at its end, and so by place in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from executor.philox import uniforms

_CHUNK: Final = 128  # neighbours that are first summed, or compared, among themselves
_COLDEST: Final = 1e-30  # temperatures below this are this: the quotient stays defined


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingColumns:
    """How each of S rows is sampled. Ranges as in common/sampling.py."""

    temperature: NDArray[np.float64]  # (S,) 0 is greedy
    top_k: NDArray[np.int64]  # (S,) 0 keeps every token
    top_p: NDArray[np.float64]  # (S,)
    min_p: NDArray[np.float64]  # (S,)
    typical_p: NDArray[np.float64]  # (S,)
    seed: NDArray[np.uint64]  # (S,)
    choice: NDArray[np.int64]  # (S,)
    index: NDArray[np.int64]  # (S,) output index of the token to be chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The chosen tokens. A failed row's token means nothing."""

    tokens: list[int]  # (S,)
    failed: Sequence[int]  # rows whose logits hold NaN or +inf, or nothing but -inf

    def or_none(self, but: Sequence[int] = ()) -> list[int]:
        """The tokens (S,); -1 for rows that failed, and for those of `but`."""
        tokens = list(self.tokens)
        for row in (*self.failed, *but):
            tokens[row] = -1
        return tokens


def sample(logits: NDArray[np.float32], how: SamplingColumns | None) -> Choice:
    """Choose one token a row. logits (S, vocab_size), contiguous. Without `how` every row is greedy."""
    best = logits.argmax(axis=1)  # numpy's argmax stops at a NaN, so the maximum also says whether all is finite
    highest = logits[np.arange(len(logits)), best]
    sound = np.isfinite(highest)
    failed = [] if sound.all() else np.flatnonzero(~sound).tolist()
    tokens: list[int] = best.tolist()
    if how is None:
        return Choice(tokens=tokens, failed=failed)
    draws = uniforms(how.seed, how.choice, how.index)
    for row in np.flatnonzero((how.temperature > 0) & sound).tolist():
        ids, weights = keep(
            logits[row],
            temperature=float(how.temperature[row]),
            top_k=int(how.top_k[row]),
            top_p=float(how.top_p[row]),
            min_p=float(how.min_p[row]),
            typical_p=float(how.typical_p[row]),
        )
        token = invert(weights, float(draws[row]))
        tokens[row] = token if ids is None else int(ids[token])
    return Choice(tokens=tokens, failed=failed)


def keep(
    logits: NDArray[np.float32],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    typical_p: float = 1.0,
) -> tuple[NDArray[np.int64] | None, NDArray[np.float32]]:
    """Return token ids (K,), or None for all of them, and their weights (K,): 0 where cut, 1 for the likeliest."""
    ids = None
    values = logits
    if 0 < top_k < len(logits):
        ids = np.flatnonzero(logits >= kth_largest(logits, top_k))
        values = logits[ids]
    weights = values - values.max()
    with np.errstate(over="ignore"):  # a very low temperature may drive a logit to -inf: weight 0
        weights /= np.float32(max(temperature, _COLDEST))
    np.exp(weights, out=weights)
    if top_p < 1:
        weights[weights < _nucleus_threshold(weights, top_p)] = 0
    if min_p > 0:
        weights[weights < np.float32(min_p)] = 0
    if typical_p < 1:
        _keep_typical(weights, typical_p)
    return ids, weights


def invert(weights: NDArray[np.float32], draw: float) -> int:
    """Return the first place at which the running sum of `weights` exceeds `draw` (in [0, 1)) times the whole."""
    running = _chunked(np.add, weights).cumsum(dtype=np.float64)
    target = min(draw * running[-1], np.nextafter(running[-1], 0))
    chunk = int(running.searchsorted(target, side="right"))
    before = running[chunk - 1] if chunk else 0.0
    inside = weights[chunk * _CHUNK : (chunk + 1) * _CHUNK]
    place = int((before + inside.cumsum(dtype=np.float64)).searchsorted(target, side="right"))
    if place == len(inside):  # the two ways to sum rounded apart: the last place of the chunk that has any weight
        place = int(np.flatnonzero(inside)[-1])
    return chunk * _CHUNK + place


def kth_largest(values: NDArray[np.float32], k: int) -> np.float32:
    """Return the k-th largest value, k at least 1 and less than len(values)."""
    highs = _chunked(np.maximum, values)
    if k <= len(highs):  # k chunks hold a value this high, so the k-th largest is no lower: look only there
        values = values[values >= np.partition(highs, len(highs) - k)[len(highs) - k]]
    return np.float32(np.partition(values, len(values) - k)[len(values) - k])


def _nucleus_threshold(weights: NDArray[np.float32], top_p: float) -> np.float32:
    """Return the smallest weight in the smallest set of tokens, likeliest first, that holds `top_p` of the whole."""
    total = float(_chunked(np.add, weights).sum(dtype=np.float64))
    # all tokens below (1 - top_p) / len(weights) of the whole hold less than 1 - top_p: the set ends above them
    candidates = weights[weights >= np.float32(total * (1 - top_p) / len(weights))]
    candidates = np.sort(candidates)[::-1]
    running = candidates.cumsum(dtype=np.float64)
    last = int(running.searchsorted(total * top_p, side="left"))
    return np.float32(candidates[min(last, len(candidates) - 1)])


def _keep_typical(weights: NDArray[np.float32], typical_p: float) -> None:
    """Cut all but the tokens whose surprise is nearest to the expected one, the nearest first, up to `typical_p`."""
    some = np.flatnonzero(weights)
    chances = weights[some].astype(np.float64)
    chances /= chances.sum()
    surprise = -np.log(chances)
    expected = (surprise * chances).sum()
    distance = np.abs(surprise - expected)
    near = np.flatnonzero(distance <= expected)  # what is farther away is so unlikely that it seldom matters
    if chances[near].sum() < typical_p:
        near = np.arange(len(some))
    order = near[np.argsort(distance[near])]
    last = int(chances[order].cumsum().searchsorted(typical_p, side="left"))
    weights[some[distance > distance[order[min(last, len(order) - 1)]]]] = 0


def _chunked(reduce: np.ufunc, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Reduce each run of _CHUNK values to one; the last run may be shorter."""
    whole = len(values) - len(values) % _CHUNK
    reduced: NDArray[np.float32] = reduce.reduce(values[:whole].reshape(-1, _CHUNK), axis=1)
    return np.append(reduced, reduce.reduce(values[whole:])) if whole < len(values) else reduced
