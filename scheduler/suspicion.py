"""Which requests may have killed an executor, and which must therefore run alone.

An executor that dies while it computes may have died of what it computed, and whoever gets that request next may die
of it, too. So every request that had a row in the step that an executor died in is suspected. At two such deaths it
runs alone, so that the next one takes nobody with it; at the third, alone, it is found out.

A request is trusted again as soon as the positions that its dead executors were to compute are computed, which an
answered step proves: what kills at a position never gets past it, and what was merely there does in its first steps
elsewhere. So executors that die for reasons of their own, however often, end no request that makes progress between.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from scheduler.sequence import Request, Sequence

if TYPE_CHECKING:
    from scheduler.steps import Outstanding

ALONE_AT: Final = 2
"""Deaths after which a request runs alone."""

GIVEN_UP_AT: Final = 3
"""Deaths after which it fails, if it was alone at the last."""


class End(enum.Enum):
    """How a session ended, which says whether its executor died of a step, and of which."""

    CLEAN = enum.auto()  # it left, or the scheduler stops
    LOST = enum.auto()  # the link broke; the process may be gone or not
    SILENT = enum.auto()  # the link stands, and nothing comes over it
    STUCK = enum.auto()  # it is alive, and has been in one step for too long
    FAILED = enum.auto()  # it is alive, and says which step failed
    WRONG = enum.auto()  # it answered what it was not asked: it is at fault, and not what it computed


def blamed(end: End, outstanding: Iterable[Outstanding], step: int) -> list[Outstanding]:
    """The outstanding steps that the executor may have died of. It had ended all steps before `step`, by its own word.

    Executors work in order. One that can still speak names its step. One that cannot was in the oldest step that is
    not answered; or in the one after that, because the answer that was written last dies with its link.
    """
    if end in (End.LOST, End.SILENT):
        return [flight for flight in outstanding if flight.step >= step][:2]
    if end in (End.STUCK, End.FAILED):
        return [flight for flight in outstanding if flight.step == step]
    return []


def runs_alone(request: Request) -> bool:
    """Whether no other request may be in a step with this one."""
    return len(request.deaths) >= ALONE_AT


def is_on_trial(sequence: Sequence, trial: Request) -> bool:
    """Whether the sequence is one for which the request runs alone. Beams go on together, so all of them are."""
    return sequence in trial.doubts or (sequence.beams is not None and sequence.request is trial)


def who_waits(sequence: Sequence) -> Sequence:
    """Who stands for the sequence in the line: of beams the first."""
    return sequence if sequence.beams is None else sequence.beams.leader


class Suspects:
    """The requests under suspicion: those with doubts. Empty almost always, and then it costs nothing."""

    def __init__(self) -> None:
        self._requests: dict[Request, None] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """In the order in which they arrived."""
        return iter(sorted(self._requests, key=lambda request: request.id))

    def accuse(self, session_id: int, flights: Iterable[Outstanding]) -> tuple[list[Request], list[Request]]:
        """A session died in one of these steps. Returns who is suspected of it, and who of them is to be given up."""
        rows = [row for flight in flights for row in flight.rows.values()]
        alone = len({row.sequence.request for row in rows}) == 1
        accused: dict[Request, None] = {}
        for row in rows:
            sequence, request = row.sequence, row.sequence.request
            if not sequence.reason:  # what has ended will not be computed again
                request.deaths.add(session_id)
                until = row.stop + row.max_drafts  # it may have died of a guess
                request.doubts[sequence] = max(request.doubts.get(sequence, 0), until)
                accused[request] = None
        self._requests.update(accused)
        given_up = [request for request in accused if alone and len(request.deaths) >= GIVEN_UP_AT]
        return list(accused), given_up

    def answered(self, flight: Outstanding) -> None:
        """A step ended well: it did not die of what it computed."""
        for row in flight.rows.values():
            until = row.sequence.request.doubts.get(row.sequence)
            if until is not None and row.is_current and row.stop >= until:
                self.forget(row.sequence)

    def forget(self, sequence: Sequence) -> None:
        """The sequence is past the doubt, or has ended."""
        request = sequence.request
        request.doubts.pop(sequence, None)
        if not request.doubts and request in self._requests:
            request.deaths.clear()
            del self._requests[request]

    def acquit(self, session_id: int) -> None:
        """That executor is alive: it was its link that died."""
        for request in list(self._requests):
            request.deaths.discard(session_id)
            if not request.deaths:
                request.doubts.clear()
                del self._requests[request]
