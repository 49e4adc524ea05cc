"""How likely a token was: log-softmax of a row of logits as the model gave them, before anything is done to them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.step import Logprobs


def score(logits: NDArray[np.float32], token: int, num_top: int) -> Logprobs:
    """Score `token` by a row of logits (vocab_size,), and name the `num_top` likeliest: of equals the lower id first.

    The sum is float64, so what is told is as exact as the logits are.
    """
    highest = logits.max()
    with np.errstate(invalid="ignore"):  # a row that is not finite ends its sequence anyway
        total = float(highest) + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))
    if not num_top:
        return Logprobs(float(logits[token]) - total)
    num_top = min(num_top, len(logits))
    least = np.partition(logits, len(logits) - num_top)[len(logits) - num_top]
    ids = np.flatnonzero(logits >= least)
    ids = ids[np.argsort(-logits[ids], kind="stable")][:num_top]
    top = logits[ids].astype(np.float64) - total
    return Logprobs(float(logits[token]) - total, tuple(ids.tolist()), tuple(top.tolist()))
