"""Logits to tokens with all that their requests ask for: scored as the model gave them, edited, and sampled.

And the same along drafts, for as long as they are right. The token at a position is a function of its logits and its
request, the random number of that position included. So a draft is right if it *is* that token, and the first that is
wrong has told which token stands in its place: an answer has the same tokens with and without drafts, whatever its
temperature. (Leviathan et al. and Chen et al., 2023, reject a draft by chance, and so keep the distribution alone; a
stream that goes on elsewhere must keep its tokens. Who guesses draws the same random number, so it agrees as often.)

Positions are looked at in order, those of all rows side by side, and none behind the first wrong draft of its row: what
is not kept costs no sampling, and a grammar never has to take a token back.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.step import Scored
from common.types import SlotRef
from executor.batch import InputBatch
from executor.controls import columns, edit
from executor.resident import Resident
from executor.sampler import Choice, sample
from executor.scoring import score_sampled, who_asks


class Run(NamedTuple):
    """What the sampled rows of a step brought."""

    first: Choice  # behind the known tokens of each
    more: dict[SlotRef, list[int]]  # behind the drafts that were right
    scored: list[Scored]


def choose(
    logits: NDArray[np.float32], held: Resident, slots: NDArray[np.int64], indices: NDArray[np.int64], ahead: int = 0
) -> tuple[Choice, list[Scored]]:
    """Choose one token a row, and score it where that is asked for. logits (S, vocab_size) are changed.

    slots (S,) says whose they are, indices (S,) which output token each is; `ahead` drafts count as known tokens.
    """
    asking = who_asks(held, slots, ahead)
    raw = logits[[each.row for each in asking]] if asking else logits  # a copy: of the model's own logits
    edit(logits, held, slots, ahead)
    chosen = sample(logits, columns(held, slots, indices))
    return chosen, score_sampled(asking, raw, chosen.or_none()) if asking else []


def choose_run(logits: NDArray[np.float32], held: Resident, batch: InputBatch) -> Run:
    """Choose the tokens of a batch. logits (S + D, vocab_size) are changed."""
    slots, indices = batch.sampled_slots, batch.sampled_indices
    first, scored = choose(logits[: len(slots)], held, slots, indices)
    more: dict[SlotRef, list[int]] = {}
    if not len(batch.draft_rows):
        return Run(first, more, scored)
    newest = np.array(first.or_none(), np.int64)  # (S,) token that was sampled last; -1 where nothing can follow it
    known = held.num_tokens[slots]
    for place in range(1, int(batch.draft_places[-1]) + 1):
        drafts = np.flatnonzero(batch.draft_places == place)
        rows = batch.draft_rows[drafts]
        right = held.token_ids[slots[rows], known[rows] + place - 1] == newest[rows]
        goes_on = [token not in held.stop_token_ids[slot] for slot, token in _pairs(slots[rows], newest[rows])]
        drafts, rows = drafts[right & goes_on], rows[right & goes_on]
        if not len(rows):
            break
        chosen, scores = choose(logits[len(slots) + drafts], held, slots[rows], indices[rows] + place, place)
        scored += scores
        newest = np.full_like(newest, -1)
        newest[rows] = chosen.or_none()
        for ref, token in _pairs(held.refs[slots[rows]], newest[rows]):
            if token >= 0:  # else the step that begins here fails, if it does again
                more.setdefault(SlotRef(ref), []).append(token)
    return Run(first, more, scored)


def _pairs(one: NDArray[np.int64], other: NDArray[np.int64]) -> zip[tuple[int, int]]:
    return zip(one.tolist(), other.tolist(), strict=True)
