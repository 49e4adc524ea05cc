"""What a scheduler counts over its life."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.types import FinishReason


@dataclass(slots=True)
class Counters:
    """What happened so far. Only ever counted up."""

    steps: int = 0
    preemptions: int = 0
    moved: int = 0  # sequences that lost their executor
    rows_dropped: int = 0  # result rows of another attempt or index
    results_fenced: int = 0  # results of a session that is over, dropped whole
    unclean_ends: int = 0  # sessions that ended otherwise than by leaving
    suspected: int = 0  # requests that were in a step that an executor may have died of, each time
    trials: int = 0  # requests that had an executor to themselves for that
    given_up: int = 0  # requests that ended because executors died with them
    rows_unusable: int = 0  # result rows that had no token, or one that cannot be
    rows_unready: int = 0  # result rows whose grammar said nothing yet
    quarantines: int = 0  # of executors that sent too many of those
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    output_tokens: int = 0
    speculating_rows: int = 0  # that might carry drafts
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of output_tokens, those that took no row of their own
    finished: dict[FinishReason, int] = field(default_factory=dict[FinishReason, int])
