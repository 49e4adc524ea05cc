"""The core's hooks that feed the timelines of requests: each is called a few times in the life of a request.

A request without a timeline costs a look at one field.
"""

from __future__ import annotations

from common.types import FinishReason
from scheduler.sequence import Sequence
from scheduler.session import Session
from scheduler.steps import Draft
from scheduler.suspicion import End
from scheduler.timeline import Kind, Wait


class Recorder:
    """`now_ns` is the time of the call that the core is in."""

    def __init__(self) -> None:
        self.now_ns = 0

    def received(self, sequences: list[Sequence], *, num_resumed: int, why: Wait | None, num_before: int) -> None:
        """A request is in the line. `num_resumed`: tokens of its answer that its caller has."""
        first = sequences[0]
        timeline = first.request.timeline
        if timeline is None:
            return
        timeline.num_choices = timeline.num_open = first.request.num_choices
        timeline.num_prompt = first.num_prompt
        timeline.add(Kind.RECEIVED, timeline.received_ns, num_tokens=first.num_prompt, number=timeline.num_choices)
        if num_resumed:
            timeline.add(Kind.RESUMED, timeline.received_ns, num_tokens=num_resumed)
        if why is not None:
            timeline.waits(why, self.now_ns, choice=first.choice, before=num_before)

    def waits(self, sequence: Sequence, why: Wait) -> None:
        """A plan was made without it."""
        timeline = sequence.request.timeline
        if timeline is not None:
            timeline.waits(why, self.now_ns, choice=sequence.choice)

    def admitted(self, sequence: Sequence, session: Session, num_cached: int, step: int) -> None:
        """It runs."""
        timeline = sequence.request.timeline
        if timeline is None:
            return
        if not timeline.admitted_ns:
            timeline.admitted_ns = self.now_ns
            timeline.num_cached = min(num_cached, sequence.num_prompt)
        timeline.runs(sequence.choice)
        timeline.add(
            Kind.ADMITTED,
            self.now_ns,
            choice=sequence.choice,
            executor=session.facts.name,
            why="alone" if session.trial is sequence.request else "",
            step=step,
            num_tokens=num_cached,
        )

    def planned(self, draft: Draft) -> None:
        """A step goes out. Of its rows those are told that compute more than the one token of a decode step."""
        for ref in draft.chunks:
            row = draft.rows[ref]
            timeline = row.sequence.request.timeline
            if timeline is not None:
                timeline.add(
                    Kind.PREFILL,
                    self.now_ns,
                    choice=row.sequence.choice,
                    step=draft.step,
                    position=row.stop - row.num_scheduled,
                    num_tokens=row.num_scheduled,
                )

    def first_token(self, sequence: Sequence) -> None:
        """The first that was made here of a choice; of a beam search, of any beam."""
        timeline = sequence.request.timeline
        if timeline is not None:
            timeline.first_token_ns = timeline.first_token_ns or self.now_ns
            timeline.add(Kind.FIRST_TOKEN, self.now_ns, choice=sequence.choice)

    def preempted(self, sequence: Sequence, session: Session, why: str) -> None:
        """Its blocks, or its slot, go to others."""
        timeline = sequence.request.timeline
        if timeline is not None:
            timeline.num_preemptions += 1
            timeline.add(Kind.PREEMPTED, self.now_ns, choice=sequence.choice, executor=session.facts.name, why=why)

    def moved(self, sequence: Sequence, session: Session, end: End | None = None) -> None:
        """What the executor has of it is lost, by this end of its session; without one, it is not to be trusted."""
        timeline = sequence.request.timeline
        if timeline is not None:
            why = "unusable_row" if end is None else end.name.lower()
            timeline.add(Kind.MOVED, self.now_ns, choice=sequence.choice, executor=session.facts.name, why=why)

    def suspected(self, sequence: Sequence, session: Session) -> None:
        """It is taken out of the crowd, and runs alone from now on."""
        timeline = sequence.request.timeline
        if timeline is not None:
            timeline.add(Kind.SUSPECTED, self.now_ns, choice=sequence.choice, executor=session.facts.name)

    def put_off(self, sequence: Sequence) -> None:
        """Its grammar said nothing yet."""
        timeline = sequence.request.timeline
        if timeline is not None:
            timeline.put_off(sequence.choice, self.now_ns)

    def finished(self, sequence: Sequence, reason: FinishReason) -> None:
        """A choice ended: the request, with the last one."""
        timeline = sequence.request.timeline
        if timeline is None:
            return
        made = sequence.num_output - sequence.num_begun
        timeline.num_output += made
        timeline.last_token_ns = max(timeline.last_token_ns, sequence.last_token_ns)
        timeline.reason = reason
        timeline.num_open -= 1
        guesses = sequence.acceptance
        if guesses.drafted:
            timeline.num_drafted += guesses.drafted
            timeline.num_accepted += guesses.accepted
            timeline.add(
                Kind.SPECULATED,
                self.now_ns,
                choice=sequence.choice,
                num_tokens=guesses.accepted,
                number=guesses.drafted,
            )
        timeline.add(Kind.FINISHED, self.now_ns, choice=sequence.choice, why=reason.name.lower(), num_tokens=made)
        if not timeline.num_open:
            timeline.ended_ns = max(1, self.now_ns)
