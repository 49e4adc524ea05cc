"""Logits to tokens with all that their requests ask for: scored as the model gave them, edited, and sampled.

And the same along drafts, for as long as they are right. The token at a position is a function of its logits and its
request, the random number of that position included. So a draft is right if it *is* that token, and the first that is
wrong has told which token stands in its place: an answer has the same tokens with and without drafts, whatever its
temperature. (Leviathan et al. and Chen et al., 2023, reject a draft by chance, and so keep the distribution alone; a
stream that goes on elsewhere must keep its tokens. Who guesses draws the same random number, so it agrees as often.)

Positions are looked at in order, those of all rows side by side, and none behind the first wrong draft of its row: what
is not kept costs no sampling, and a grammar never has to take a token back. A row whose grammar says nothing yet
(`unready`) brings no token, whatever it carries; one whose masks a step has no time for ends with those it has.

A beam carries no drafts: it brings its likeliest continuations instead of a token (executor/ranking.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.step import Ranked, Scored
from common.types import SlotRef
from executor.batch import InputBatch
from executor.controls import MASKS_S, columns, edit, out_of_time, unready
from executor.ranking import prepare, rank_all, who_ranks
from executor.resident import Resident
from executor.sampler import Choice, sample
from executor.scoring import score_sampled, who_asks


class Run(NamedTuple):
    """What the sampled rows of a step brought."""

    first: Choice  # behind the known tokens of each
    unready: list[int]  # rows of which there is none yet
    more: dict[SlotRef, list[int]]  # behind the drafts that were right
    scored: list[Scored]
    ranked: list[Ranked]


NO_RUN = Run(Choice(tokens=[], failed=[]), [], {}, [], [])


class Chosen(NamedTuple):
    """One token a row, or what a beam brings instead."""

    choice: Choice
    scored: list[Scored]
    ranked: list[Ranked]


def choose(
    logits: NDArray[np.float32],
    held: Resident,
    slots: NDArray[np.int64],
    indices: NDArray[np.int64],
    waiting: Sequence[int] = (),
    *,
    ahead: int = 0,
) -> Chosen:
    """Choose one token a row, and score it where that is asked for. logits (S, vocab_size) are changed.

    slots (S,) says whose they are, indices (S,) which output token each is; `ahead` drafts count as known tokens. What
    is chosen for the rows `waiting` means nothing.
    """
    asking = who_asks(held, slots, ahead)
    raw = logits[[each.row for each in asking]] if asking else logits  # a copy: of the model's own logits
    ranked, chosen = pick(logits, held, slots, indices, waiting, ahead=ahead)
    return Chosen(chosen, score_sampled(asking, raw, chosen.or_none(waiting)) if asking else [], ranked)


def pick(
    logits: NDArray[np.float32],
    held: Resident,
    slots: NDArray[np.int64],
    indices: NDArray[np.int64],
    waiting: Sequence[int] = (),
    *,
    ahead: int = 0,
) -> tuple[list[Ranked], Choice]:
    """`choose` without the scores."""
    ranking = who_ranks(held, slots, waiting)
    finite = prepare(logits, ranking)
    edit(logits, held, slots, waiting, ahead=ahead)
    return rank_all(logits, ranking, finite, sample(logits, columns(held, slots, indices)))


def choose_run(logits: NDArray[np.float32], held: Resident, batch: InputBatch) -> Run:
    """Choose the tokens of a batch. logits (S + D, vocab_size) are changed."""
    slots, indices = batch.sampled_slots, batch.sampled_indices
    waiting = unready(held, slots, len(batch.seq_lens))
    first, scored, ranked = choose(logits[: len(slots)], held, slots, indices, waiting)
    more: dict[SlotRef, list[int]] = {}
    run = Run(first, waiting, more, scored, ranked)
    if not len(batch.draft_rows):
        return run
    until_s = time.monotonic() + MASKS_S  # as long again as the first tokens of all rows may take
    newest = np.array(first.or_none(waiting), np.int64)  # (S,) sampled last; -1 where nothing can follow it
    known = held.num_tokens[slots]
    for place in range(1, int(batch.draft_places[-1]) + 1):
        drafts = np.flatnonzero(batch.draft_places == place)
        rows = batch.draft_rows[drafts]
        right = held.token_ids[slots[rows], known[rows] + place - 1] == newest[rows]
        goes_on = [token not in held.stop_token_ids[slot] for slot, token in _pairs(slots[rows], newest[rows])]
        drafts, rows = drafts[right & goes_on], rows[right & goes_on]
        late = out_of_time(held, slots[rows], until_s, ahead=place)
        drafts, rows = np.delete(drafts, late), np.delete(rows, late)
        if not len(rows):
            break
        chosen = choose(logits[len(slots) + drafts], held, slots[rows], indices[rows] + place, ahead=place)
        scored += chosen.scored
        newest = np.full_like(newest, -1)
        newest[rows] = chosen.choice.or_none()
        for ref, token in _pairs(held.refs[slots[rows]], newest[rows]):
            if token >= 0:  # else the step that begins here fails, if it does again
                more.setdefault(SlotRef(ref), []).append(token)
    return run


def _pairs(one: NDArray[np.int64], other: NDArray[np.int64]) -> zip[tuple[int, int]]:
    return zip(one.tolist(), other.tolist(), strict=True)
