"""Which executor a request has to itself when it may have killed others (scheduler/suspicion.py says when it must)."""

from __future__ import annotations

from collections.abc import Mapping

from scheduler.counters import Counters
from scheduler.sequence import Request
from scheduler.session import Session
from scheduler.suspicion import Suspects, runs_alone


class Trials:
    """At most one request an executor, and one executor a request. `Session.trial` says who it is.

    `patience_ns`: an executor that left a step unanswered for so long is no place for another one's trial.
    """

    def __init__(
        self, sessions: Mapping[int, Session], suspects: Suspects, counters: Counters, *, patience_ns: int
    ) -> None:
        self._sessions = sessions
        self._suspects = suspects
        self._counters = counters
        self._patience_ns = patience_ns

    def here(self, session: Session, now_ns: int) -> Request | None:
        """The request that has this executor to itself now, if one must run alone and this is the place for it."""
        trial = session.trial
        if trial is not None and runs_alone(trial) and not (session.leaving and _has_left(session, trial)):
            return trial
        session.trial = None
        if not session.takes_work(now_ns) or session.is_quarantined(now_ns):
            return None
        on_trial = {s.trial for s in self._sessions.values()}
        for request in self._suspects:
            if runs_alone(request) and request not in on_trial and self._best_for(request, session, now_ns) is session:
                self._counters.trials += 1
                return request
        return None

    def _best_for(self, request: Request, asking: Session, now_ns: int) -> Session | None:
        """The least loaded executor that could hold all of it."""
        able = [
            s
            for s in self._sessions.values()
            if s.takes_work(now_ns)
            and not s.is_quarantined(now_ns)
            and all(s.could_hold(sequence) for sequence in request.doubts)
            and (s is asking or not s.silent_since(now_ns - self._patience_ns))
        ]
        return min(able, key=lambda s: (len(s.running), s.id), default=None)


def _has_left(session: Session, trial: Request) -> bool:
    """Nothing of the trial is on this executor, nor in flight there."""
    return not session.outstanding and all(sequence.session is not session for sequence in trial.doubts)
