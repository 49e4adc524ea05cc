"""Each move of a sequence's life, with all that must know of it: the line, the executor, who replays, who is suspected.

The table of lives (scheduler/sequence.py) says which moves there are; this makes them.
"""

from __future__ import annotations

import bisect
from collections.abc import Set

from common import failpoints
from common.types import FinishReason
from scheduler.counters import Counters
from scheduler.line import Line
from scheduler.replays import Replays
from scheduler.sequence import Sequence, Status
from scheduler.session import Draft, Match, Session
from scheduler.stopping import stop_tokens
from scheduler.suspicion import Suspects


class Moves:
    """Into an executor, back into the line, and out."""

    def __init__(self, line: Line, suspects: Suspects, replays: Replays, counters: Counters, *, eos: Set[int]) -> None:
        self._line = line
        self._suspects = suspects
        self._replays = replays
        self._counters = counters
        self._eos = eos

    def admit(self, sequence: Sequence, session: Session, match: Match, draft: Draft, now_ns: int) -> None:
        """From the line to an executor, with its first row there. The room was found."""
        self._line.admit(sequence, len(sequence.tokens) - match.num_tokens, now_ns)
        sequence.become(Status.RUNNING)
        sequence.attempt += 1
        sequence.placed(session.facts.determinism)
        if not sequence.admitted_ns:
            sequence.admitted_ns = now_ns
            num_cached = min(match.num_tokens, sequence.num_prompt)
            self._counters.cached_prompt_tokens += num_cached
            if sequence.request.num_cached_prompt is None:  # what its siblings find is what it computes
                sequence.request.num_cached_prompt = num_cached
        bisect.insort(session.running, sequence, key=rank)
        sequence.avoid = ""
        if match.num_tokens:
            failpoints.hit("on_prefix_hit")
        tokens = min(len(sequence.tokens) - match.num_tokens, draft.budget)
        if self._replays and sequence in self._replays:
            tokens = min(tokens, draft.replay_budget)
            draft.replay_budget -= tokens
        session.admit(sequence, match, draft, tokens, stop_tokens(sequence.stop, self._eos))
        session.add_row(sequence, match.num_tokens, tokens, len(sequence.tokens), draft)

    def preempt(self, session: Session, sequence: Sequence) -> None:
        """Its blocks go to others. It computes its tokens again when there is room; none is lost."""
        failpoints.hit("on_preempt")
        session.release(sequence)
        sequence.preemptions += 1
        self._counters.preemptions += 1
        self.wait_again(sequence)

    def displace(self, session: Session, sequence: Sequence, *, forget: bool = False) -> None:
        """What the executor has of it is lost, or with `forget` not to be trusted: it is computed again elsewhere."""
        session.release(sequence, forget=forget)
        self.wait_again(sequence)
        self._replays.add(sequence)

    def wait_again(self, sequence: Sequence) -> None:
        """Back to its old place in the line, with all tokens that it has."""
        sequence.become(Status.WAITING)
        sequence.fork_of = None
        self._line.add_again(sequence)

    def end(self, sequence: Sequence, reason: FinishReason, *, forget: bool = False) -> None:
        """Out, for `reason`. With `forget`, nothing of what it computed is found again."""
        assert reason, f"sequence {sequence.id} ends without a reason"
        if sequence.session is not None:
            sequence.session.release(sequence, forget=forget)
        else:
            self._line.remove(sequence)
        sequence.become(Status.FINISHED)
        sequence.reason = reason
        if self._suspects:
            self._suspects.forget(sequence)
        if self._replays:
            self._replays.forget(sequence)
        self._counters.finished[reason] = self._counters.finished.get(reason, 0) + 1


def rank(sequence: Sequence) -> tuple[int, int]:
    """Who keeps its blocks when they run out: the better band, then who came first."""
    return sequence.band, sequence.order
