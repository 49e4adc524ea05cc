"""When a sequence ends by a token. Pure; the executor applies the same rule, this one has the last word."""

from __future__ import annotations

from collections.abc import Set
from typing import Final

from common.sampling import StopConditions
from common.types import FinishReason

_GOES_ON: Final = FinishReason.NONE  # looked up once: this runs for every token, and an enum's member is slow to find


def finish_reason(token: int, num_output: int, stop: StopConditions, eos: Set[int]) -> FinishReason:
    """Why the sequence ends with this token, its `num_output`-th (from 1); NONE when it goes on."""
    if token in eos and not stop.ignore_eos:
        return FinishReason.EOS
    if token in stop.stop_token_ids:
        return FinishReason.STOP_TOKEN
    if num_output >= stop.max_tokens:
        return FinishReason.LENGTH
    return _GOES_ON


def stop_tokens(stop: StopConditions, eos: Set[int]) -> tuple[int, ...]:
    """Every token that ends the sequence, for the executor."""
    return tuple(sorted({*stop.stop_token_ids, *(() if stop.ignore_eos else eos)}))
