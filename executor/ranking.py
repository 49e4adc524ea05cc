"""What a beam's row brings instead of a token: its likeliest continuations. The scheduler chooses among them.

As in Transformers' beam search the controls (executor/controls.py) are applied to log-probabilities, not to logits: a
row goes through `to_logprobs`, then `controls.edit`, then `rank`. What the controls have ruled out is no continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.step import Ranked
from common.types import SlotRef
from executor.resident import Resident
from executor.sampler import Choice, kth_largest

_NEVER: Final = np.float32(-np.inf)


class Ranking(NamedTuple):
    """A row to be ranked."""

    row: int  # of the sampled ones
    ref: SlotRef
    output_index: int  # of the token that may come next: 0 is the first after the prompt
    num_candidates: int  # continuations that are wanted
    num_top: int  # likeliest tokens that are told beside, or -1 where nothing is told


def who_ranks(held: Resident, slots: NDArray[np.int64], waiting: Sequence[int] = ()) -> list[Ranking]:
    """Those of the sampled rows, slots (S,), that are beams, but for those `waiting` for their grammar."""
    if not held.beams:
        return []
    return [
        Ranking(
            row,
            SlotRef(int(held.refs[slot])),
            int(held.num_tokens[slot] - held.num_prompt[slot]),
            int(held.num_candidates[slot]),
            int(held.logprobs[slot]),
        )
        for row, slot in enumerate(slots.tolist())
        if slot in held.beams and row not in waiting
    ]


def to_logprobs(logits: NDArray[np.float32]) -> bool:
    """Turn a row of logits (vocab_size,) into their log-softmax, in place. False where they were not finite."""
    highest = logits.max()
    if not np.isfinite(highest):
        return False
    logits -= highest
    logits -= np.float32(np.log(np.exp(logits).sum(dtype=np.float64)))
    return True


def rank(logprobs: NDArray[np.float32], each: Ranking, raw: NDArray[np.float32] | None = None) -> Ranked:
    """The likeliest continuations by a row of log-probabilities (vocab_size,), which are `raw` without the controls."""
    ids = _likeliest(logprobs, each.num_candidates)
    ranked = Ranked(each.ref, each.output_index, ids.tolist(), logprobs[ids].tolist())
    if raw is None:
        return ranked
    top = _likeliest(raw, each.num_top) if each.num_top else ids[:0]
    return ranked._replace(raw=raw[ids].tolist(), top_ids=tuple(top.tolist()), top=tuple(raw[top].tolist()))


def _likeliest(logprobs: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The best first; of equals the lower id first. None that was ruled out."""
    least = kth_largest(logprobs, count) if count < len(logprobs) else _NEVER
    ids = np.flatnonzero(logprobs >= least)
    ids = ids[np.isfinite(logprobs[ids])]
    return ids[np.argsort(-logprobs[ids], kind="stable")][:count]


class Prepared(NamedTuple):
    """A row that was finite, before the controls were applied."""

    ranking: Ranking
    raw: NDArray[np.float32] | None  # its log-probabilities, where they are to be told


def prepare(logits: NDArray[np.float32], ranking: list[Ranking]) -> list[Prepared]:
    """Turn these rows of logits (S, vocab_size) into log-probabilities. Returns those that were finite."""
    return [
        Prepared(each, logits[each.row].copy() if each.num_top >= 0 else None)
        for each in ranking
        if to_logprobs(logits[each.row])
    ]


def rank_all(
    logprobs: NDArray[np.float32], ranking: list[Ranking], finite: list[Prepared], chosen: Choice
) -> tuple[list[Ranked], Choice]:
    """Rank those rows of logprobs (S, vocab_size) that were `finite`, and of which anything may come next.

    Where that is nothing, a grammar cannot go on. Such a row failed, as it would without beams: `chosen` says so, and
    so does what is returned with the rows that were ranked.
    """
    if not ranking:
        return [], chosen
    rows = {each.ranking.row for each in finite}
    failed = {*chosen.failed, *(each.row for each in ranking if each.row not in rows)}
    ranked = [rank(logprobs[each.ranking.row], *each) for each in finite if each.ranking.row not in failed]
    return ranked, Choice(tokens=chosen.tokens, failed=sorted(failed))
