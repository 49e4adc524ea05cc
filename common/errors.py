"""The callers' mistakes and the service's refusals, as a tree. services/status.py maps each to a gRPC status, once.

PagewireError
├── InvalidRequest      the caller must change the request (names the field and the limit)
├── Unauthenticated     the caller showed no API key that is valid here
├── UnknownModel        the request names a model that is not served here
├── UnknownRequest      an operator asks about a request that is not remembered
├── Overloaded          too much is open or waits, or the tenant's rate is used up; try again later
├── Unavailable         no executor, draining; try again later
├── RequestFailed       executors died with this request again and again; sending it anew does not help
├── DeadlineExceeded    the caller's deadline passed while it waited or ran
├── AlreadyRunning      another request of that id runs already
├── Superseded          another call has taken this request over
├── SlowReader          the caller takes its messages too slowly
├── TicketRefused       a ticket that was not given for this request and these tokens
├── TicketStale         a ticket that was good once: it has expired, or another model is served now
├── ExecutorRejected    the two halves do not fit together (model, version); an operator must act
├── NameTaken           another executor of this name is connected; the newcomer waits for its end
├── StaleEpoch          the executor has served a later scheduler; this one must not use it
└── ModelFolderError    a model's files are missing, truncated or of an unknown kind
"""

from __future__ import annotations


class PagewireError(Exception):
    """Anything that is not a bug. Its text may be shown to the caller."""


class InvalidRequest(PagewireError):
    """The request can never succeed as it is. `field` is the name in the public API."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[object, ...]:
        """As it was made; by default it would be made of its text, which another process could not read."""
        return type(self), (self.field, self.problem), self.__dict__


class Unauthenticated(PagewireError):
    """Who calls is not known here. One text for every reason, so that nothing is learned from it."""


class UnknownModel(PagewireError):
    """The named model is not served here."""


class UnknownRequest(PagewireError):
    """No request of that id runs here, or is remembered."""


class Overloaded(PagewireError):
    """Nothing is wrong with the request; there is no room for it now. `limit` names what it met, for operators."""

    def __init__(self, message: str, retry_after_s: float = 1.0, limit: str = "") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.limit = limit


class Unavailable(PagewireError):
    """Nothing can serve the request now: no executor is connected, or the scheduler drains."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestFailed(PagewireError):
    """The request was given up for what it did to executors. `error_id` is the one in the server's log."""

    def __init__(self, message: str, error_id: str = "") -> None:
        super().__init__(message)
        self.error_id = error_id


class DeadlineExceeded(PagewireError):
    """The caller's deadline passed before the answer was complete."""


class AlreadyRunning(PagewireError):
    """The request's id is taken by another one that is resumable and runs."""


class Superseded(PagewireError):
    """Another call reads on where this one was: there is one reader at a time, the newest."""


class SlowReader(PagewireError):
    """The caller has taken no message for too long. What it has not read is dropped; its last ticket is good."""


class TicketRefused(PagewireError):
    """The ticket does not fit the request, the choice or the tokens, or was made with a key that is not here."""


class TicketStale(PagewireError):
    """The ticket has expired, or belongs to a model that is not served any more. Ask anew, from the beginning."""


class ExecutorRejected(PagewireError):
    """Scheduler and executor do not fit together; retrying does not help."""


class NameTaken(PagewireError):
    """An executor of this name is connected already, and lives."""


class StaleEpoch(PagewireError):
    """The executor has been welcomed by a scheduler that started later than this one."""


class ModelFolderError(PagewireError):
    """A model's files cannot be used. The message says which file, why, and what to type next."""
