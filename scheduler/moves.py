"""Each move of a sequence's life, with all that must know of it: the line, the executor, who replays, who is suspected.

The table of lives (scheduler/sequence.py) says which moves there are; this makes them.
"""

from __future__ import annotations

import bisect
from collections.abc import Set
from dataclasses import replace

from common import failpoints
from common.types import FinishReason
from scheduler.beams import BeamGroup
from scheduler.counters import Counters
from scheduler.line import Line
from scheduler.prefix_cache import Match
from scheduler.recorder import Recorder
from scheduler.replays import Replays
from scheduler.sequence import Sequence, Status
from scheduler.session import Session
from scheduler.steps import Draft
from scheduler.stopping import stop_tokens
from scheduler.suspicion import Suspects


class Moves:
    """Into an executor, back into the line, and out."""

    def __init__(
        self,
        line: Line,
        suspects: Suspects,
        replays: Replays,
        counters: Counters,
        recorder: Recorder,
        *,
        eos: Set[int],
    ) -> None:
        self._line = line
        self._suspects = suspects
        self._replays = replays
        self._counters = counters
        self._recorder = recorder
        self._eos = eos

    def admit(self, sequence: Sequence, session: Session, match: Match, draft: Draft, now_ns: int) -> None:
        """From the line to an executor, with its first row there. The room was found."""
        self._line.admit(sequence, len(sequence.tokens) - match.num_tokens, now_ns)
        sequence.become(Status.RUNNING)
        sequence.attempt += 1
        sequence.placed(session.facts.determinism)
        self._recorder.admitted(sequence, session, match.num_tokens, draft.step)
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
        if sequence.beams is not None:
            self._admit_beside(sequence, sequence.beams, session)

    def _admit_beside(self, leader: Sequence, group: BeamGroup, session: Session) -> None:
        """With the beam that stood for all of them, the others come. They begin when what is common was planned."""
        for beam in group.beams[1:]:
            beam.become(Status.RUNNING)
            beam.attempt += 1
            beam.placed(session.facts.determinism)
            beam.band = leader.band
            beam.avoid = ""
            session.take_in(beam)
            bisect.insort(session.running, beam, key=rank)
        for answer in group.open_answers:
            answer.become(Status.RUNNING)
            answer.admitted_ns = answer.admitted_ns or leader.admitted_ns

    def fork(self, parent: Sequence) -> Sequence:
        """Another beam with the same tokens, all of which are computed, on the same executor."""
        session = parent.session
        assert session is not None and parent.num_computed == len(parent.tokens), "a beam is forked when it was ranked"
        child = replace(
            parent,
            tokens=parent.tokens[:],
            keys={size: keys[:] for size, keys in parent.keys.items()},
            block_table=[],
            prompt_logprobs=[],
            scores_prompt=False,
        )
        session.take_in(child, parent)
        bisect.insort(session.running, child, key=rank)
        return child

    def prune(self, beam: Sequence) -> None:
        """A beam does not go on."""
        assert beam.session is not None
        beam.session.release(beam)
        self._forget(beam, FinishReason.ABORTED)

    def end_beams(self, group: BeamGroup, *, forget: bool = False) -> None:
        """The search is over, or nobody waits for it any more."""
        if group.leader.session is None:
            self._line.remove(group.leader)
        for beam in group.beams:
            if beam.session is not None:
                beam.session.release(beam, forget=forget)
            self._forget(beam, FinishReason.ABORTED)

    def preempt(self, session: Session, sequence: Sequence, why: str = "memory") -> None:
        """Its blocks go to others. It computes its tokens again when there is room; none is lost."""
        failpoints.hit("on_preempt")
        self._recorder.preempted(sequence, session, why)
        self.set_aside(session, sequence)
        sequence.preemptions += 1
        self._counters.preemptions += 1

    def displace(self, session: Session, sequence: Sequence, *, forget: bool = False) -> None:
        """What the executor has of it is lost, or with `forget` not to be trusted: it is computed again elsewhere."""
        self.set_aside(session, sequence, forget=forget)
        for each in sequence.beams.beams if sequence.beams is not None else (sequence,):
            self._replays.add(each)

    def set_aside(self, session: Session, sequence: Sequence, *, forget: bool = False) -> None:
        """Its executor holds it no more, nor anything of its group: back into the line with it."""
        group = sequence.beams
        if group is None:
            session.release(sequence, forget=forget)
            self.wait_again(sequence)
            return
        group.ranked.clear()
        for beam in group.beams:
            session.release(beam, forget=forget)
            beam.attempt += 1  # what is in flight is void: its last token is computed again, and ranked, anyway
            if beam is not group.leader:
                beam.become(Status.WAITING)
        for answer in group.open_answers:
            answer.become(Status.WAITING)
        self.wait_again(group.leader)

    def wait_again(self, sequence: Sequence) -> None:
        """Back to its old place in the line, with all tokens that it has."""
        sequence.become(Status.WAITING)
        sequence.fork_of = None
        self._line.add_again(sequence)

    def end(self, sequence: Sequence, reason: FinishReason, *, forget: bool = False) -> None:
        """Out, for `reason`. With `forget`, nothing of what it computed is found again."""
        assert reason, f"sequence {sequence.id} ends without a reason"
        group = sequence.request.beams
        if group is not None:
            pass  # an answer: it is its beams that are computed
        elif sequence.session is not None:
            sequence.session.release(sequence, forget=forget)
        else:
            self._line.remove(sequence)
        self._forget(sequence, reason)
        if group is not None and not group.open_answers:
            self.end_beams(group, forget=forget)
        self._counters.finished[reason] = self._counters.finished.get(reason, 0) + 1
        self._recorder.finished(sequence, reason)

    def _forget(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.become(Status.FINISHED)
        sequence.reason = reason
        if self._suspects:
            self._suspects.forget(sequence)
        if self._replays:
            self._replays.forget(sequence)


def rank(sequence: Sequence) -> tuple[int, int]:
    """Who keeps its blocks when they run out: the better band, then who came first."""
    return sequence.band, sequence.order
