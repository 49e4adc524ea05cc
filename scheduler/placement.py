"""On which executor a waiting sequence starts: `policy.place` over those that could take it now."""

from __future__ import annotations

from collections.abc import Mapping

from common.blocks import blocks_for
from scheduler import policy
from scheduler.line import Line
from scheduler.prefix_cache import Match
from scheduler.sequence import Sequence, Status
from scheduler.session import Session


class Placement:
    """Asked by one executor at a time, whether it is here.

    `patience_ns`: nobody is kept waiting for an executor that left a step unanswered for so long.
    """

    def __init__(self, sessions: Mapping[int, Session], line: Line, *, patience_ns: int) -> None:
        self._sessions = sessions
        self._line = line
        self._patience_ns = patience_ns

    def may_come(self, sequence: Sequence, session: Session, now_ns: int, *, quarantined: bool) -> bool:
        """Whether it may run here although this executor is in quarantine, or sent an unusable row for it before.

        Where there is no other executor, the second try is here, too: it shows whose fault the first was.
        """
        if sequence.avoid != session.facts.name:
            return not quarantined
        return not any(
            other is not session
            and other.takes_work(now_ns)
            and not other.is_quarantined(now_ns)
            and other.could_hold(sequence)
            for other in self._sessions.values()
        )

    def has_slot_elsewhere(self, session: Session, now_ns: int) -> bool:
        """Whether another executor could take a sequence now."""
        return any(
            other is not session and other.has_slot and other.takes_work(now_ns) for other in self._sessions.values()
        )

    def belongs_here(self, sequence: Sequence, session: Session, match: Match, now_ns: int) -> bool:
        """Whether this executor is the best of those that could take the sequence now."""
        if len(self._sessions) == 1:
            return True
        places = [policy.Place(match.num_tokens, len(session.running))]
        for other in self._sessions.values():
            if other is session or other.full or other.num_free_slots < sequence.num_slots:
                continue
            if not other.takes_work(now_ns) or other.is_quarantined(now_ns) or other.facts.name == sequence.avoid:
                continue
            if not other.could_hold(sequence) or other.silent_since(now_ns - self._patience_ns):
                continue
            there = other.match(sequence)
            reserved = not (other.leaves_reserve(sequence, there) or self._line.owes(sequence.tenant))
            if other.can_admit(sequence, there) and not reserved:
                places.append(policy.Place(there.num_tokens, len(other.running)))
        return policy.place(places) == 0


def fork_parent(sequence: Sequence, now_ns: int) -> Sequence | None:
    """The first choice of the request, while its prompt's blocks are there or will be."""
    parent = sequence.fork_of
    if parent is None:
        return None
    if parent.status is Status.FINISHED or parent.attempt > 1 or (parent.attempt and parent.session is None):
        sequence.fork_of = None
        return None
    there = parent.session
    if there is not None and (not there.takes_work(now_ns) or there.is_quarantined(now_ns) or not there.has_slot):
        return None  # another executor, or a prefix hit, may serve it sooner
    return parent


def fork_match(session: Session, parent: Sequence) -> Match | None:
    """All of the prompt but its last token, which makes the logits; None until that is computed or sent."""
    shared = parent.num_prompt - 1
    if parent.session is not session or session.num_planned(parent) < shared:
        return None
    return Match(parent.block_table[: blocks_for(shared, session.block_size)], None, shared)
