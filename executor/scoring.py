"""Which tokens of a step are scored, and how: what executor/logprobs.py does to a row, for the rows that ask for it."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.step import Logprobs, Scored
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


def who_asks(held: Resident, slots: NDArray[np.int64], ahead: int = 0) -> list[Asking]:
    """Those of the sampled rows, slots (S,), whose tokens are scored. Called before the tokens are known.

    `ahead`: so many drafts, which were right, stand behind the known tokens. A beam's row has none that is scored.
    """
    if not held.scored:
        return []
    return [
        Asking(row, SlotRef(int(held.refs[slot])), int(held.num_tokens[slot]) + ahead, int(held.logprobs[slot]))
        for row, slot in enumerate(slots.tolist())
        if slot in held.scored and slot not in held.beams
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
        owners, places = slots[part], positions[part]
        tokens, num_top = held.token_ids[owners, places], held.prompt_logprobs[owners]
        how = _score_there if logits.device.type != "cpu" else _score_here
        refs = held.refs[owners].tolist()
        for ref, position, logprobs in zip(refs, places.tolist(), how(logits[part], tokens, num_top), strict=True):
            scored.append(Scored(SlotRef(ref), position, logprobs))
    return scored


def _score_here(logits: Tensor, tokens: NDArray[np.int32], num_top: NDArray[np.int64]) -> list[Logprobs]:
    rows = logits.float().numpy()
    return [score(*each) for each in zip(rows, tokens.tolist(), num_top.tolist(), strict=True)]


def _score_there(logits: Tensor, tokens: NDArray[np.int32], num_top: NDArray[np.int64]) -> list[Logprobs]:
    """The same on a device: a row of 150,000 logits takes the host over a millisecond. Of equals any may be named."""
    rows = logits.float()
    totals = rows.logsumexp(dim=1, keepdim=True)
    chosen = rows.gather(1, torch.from_numpy(tokens.astype(np.int64)[:, None]).to(rows.device)) - totals
    most = min(int(num_top.max()), rows.shape[1])
    values, ids = rows.topk(most, dim=1)
    told = zip(chosen[:, 0].tolist(), ids.tolist(), (values - totals).tolist(), num_top.tolist(), strict=True)
    return [Logprobs(logprob, tuple(top[:count]), tuple(logprobs[:count])) for logprob, top, logprobs, count in told]
