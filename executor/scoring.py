"""Which tokens of a step are scored, and how: what executor/logprobs.py does to a row, for the rows that ask for it."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common.step import Scored
from common.types import SlotRef
from executor.logprobs import score
from executor.resident import Resident

_AT_ONCE: Final = 64  # rows of logits in float32


class Asking(NamedTuple):
    """A sampled row whose token is scored."""

    row: int  # of the sampled ones
    ref: SlotRef
    position: int  # of the token that is chosen now
    num_top: int


def who_asks(held: Resident, slots: NDArray[np.int64]) -> list[Asking]:
    """Those of the sampled rows, slots (S,), whose tokens are scored. Called before the tokens are known."""
    if not held.scored:
        return []
    return [
        Asking(row, SlotRef(int(held.refs[slot])), int(held.num_tokens[slot]), int(held.logprobs[slot]))
        for row, slot in enumerate(slots.tolist())
        if slot in held.scored
    ]


def score_sampled(asking: list[Asking], logits: NDArray[np.float32], tokens: list[int]) -> list[Scored]:
    """How likely the chosen tokens of the rows `asking` are, whose logits as the model gave them are `logits`.

    `tokens` (S,) are those of all sampled rows; below 0 for none.
    """
    return [
        Scored(each.ref, each.position, score(row, tokens[each.row], each.num_top))
        for each, row in zip(asking, logits, strict=True)
        if tokens[each.row] >= 0
    ]


def score_prompts(
    logits: Tensor, held: Resident, slots: NDArray[np.int64], positions: NDArray[np.int64]
) -> list[Scored]:
    """How likely the tokens at `positions` (P,) of the prompts in `slots` (P,) are, by logits (P, vocab_size).

    A few rows at a time: in float32, all would be as much again.
    """
    scored: list[Scored] = []
    for begin in range(0, len(logits), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        rows = logits[part].float().cpu().numpy()
        for slot, position, row in zip(slots[part].tolist(), positions[part].tolist(), rows, strict=True):
            logprobs = score(row, int(held.token_ids[slot, position]), int(held.prompt_logprobs[slot]))
            scored.append(Scored(SlotRef(int(held.refs[slot])), position, logprobs))
    return scored
