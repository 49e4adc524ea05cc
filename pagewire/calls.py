"""What both clients know of the wire: which methods there are, and one request's state between its calls."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from pagewire import conventions
from pagewire.access import Access, Metadata
from pagewire.answers import Delta, Finish, FinishReason
from pagewire.borrowed import borrow
from pagewire.continuation import Continuation, OutOfStep
from pagewire.failures import Failure, Trailers, judge, lost, parse
from pagewire.retrying import Attempts, RetryBudget
from pagewire.traces import Span

if TYPE_CHECKING:
    from common import errors
    from protos import inference_pb2 as pb
    from services import grpc_options
else:
    errors = borrow("common.errors")
    grpc_options = borrow("services.grpc_options")
    pb = borrow("protos.inference_pb2")

_Told = TypeVar("_Told", bound=Message)


class Method(NamedTuple, Generic[_Told]):
    """One that answers with one message, wherever it is asked again."""

    path: str
    answer: type[_Told]


_SERVICE: Final = "/pagewire.v1.InferenceService/"
GENERATE: Final = _SERVICE + "GenerateStream"
RESUME: Final = _SERVICE + "Resume"
CANCEL: Final = _SERVICE + "Cancel"
UNPIN: Final = _SERVICE + "Unpin"
EMBED: Final = Method(_SERVICE + "Embed", pb.EmbedResponse)
TOKENIZE: Final = Method(_SERVICE + "Tokenize", pb.TokenizeResponse)
DETOKENIZE: Final = Method(_SERVICE + "Detokenize", pb.DetokenizeResponse)
GET_MODEL: Final = Method(_SERVICE + "GetModel", pb.GetModelResponse)

CANCEL_TIMEOUT_S: Final = 1.0
UNPIN_TIMEOUT_S: Final = 10.0
DEFAULT_TIMEOUT_S: Final = 600.0
DEFAULT_PATIENCE_S: Final = 30.0
_LONGEST_S: Final = 366 * 86_400.0  # as long as any call lasts; gRPC cannot be told of much more
_NOTICED_S: Final = 3.0
"""Within it a connection is given up that cannot be made or stands still: see client_options."""


_OF_ONE_SERVER: Final = (errors.TicketRefused, errors.TicketStale, errors.UnknownModel, errors.Unauthenticated)
"""What a server says that has other keys, or another model, than the one that began with a request."""


class Call(NamedTuple):
    """What to call next."""

    address: str
    method: str
    request: bytes
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How a client goes about its calls."""

    addresses: tuple[str, ...]
    timeout_s: float | None  # for a whole answer; None or infinity is no limit
    patience_s: float  # while calls fail
    access: Access

    def __post_init__(self) -> None:
        if not _timeout_s(self.timeout_s) > 0:
            raise ValueError(f"timeout_s must be more than 0, got {self.timeout_s}")
        if not self.patience_s >= 0:
            raise ValueError(f"patience_s must be at least 0, got {self.patience_s}")

    @property
    def options(self) -> tuple[tuple[str, int], ...]:
        """Of each channel."""
        return grpc_options.client_options()


def unpin_request(pin_id: str | None) -> bytes:
    """The message that ends a pin, or all that the caller has."""
    request = pb.UnpinRequest(all=True) if pin_id is None else pb.UnpinRequest(pin_id=pin_id)
    return request.SerializeToString()


def unpinned_tokens(answer: bytes) -> int:
    """What the answer to it says."""
    return parse(pb.UnpinResponse, answer).tokens


def addresses_of(text: str | Sequence[str]) -> tuple[str, ...]:
    """The addresses in `HOST:PORT,HOST:PORT`, or in a sequence of them. Raises ValueError when there is none."""
    found = [part.strip() for part in (text.split(",") if isinstance(text, str) else text)]
    if not all(found) or not found:
        raise ValueError(f"no address in {text!r}; give HOST:PORT, or several with commas between them")
    return tuple(dict.fromkeys(found))


def _timeout_s(given: float | None) -> float:
    """None is no limit. Raises ValueError for what is no number."""
    if given is None:
        return math.inf
    if math.isnan(given):
        raise ValueError("timeout_s must be a number, got nan")
    return given


class _Asking:
    """One request's way from call to call. Both clients only move its bytes, and wait."""

    def __init__(
        self,
        request: Message,
        manner: Manner,
        budget: RetryBudget,
        *,
        first: str,
        timeout_s: float | None,
        begin_patience_s: float | None = None,
        metadata: Metadata = (),
        outcome: Callable[[], conventions.Attributes] = dict,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`metadata` goes with each call, beside the client's own and the trace. `outcome` is for the span."""
        now_s = clock_s()
        self.is_closed = False  # who asked has left
        self._clock_s = clock_s
        self._error: errors.PagewireError | None = None  # the end, where it was no answer
        self._attempts = Attempts(
            manner.addresses,
            budget,
            first=first,
            began_s=now_s,
            deadline_s=now_s + _timeout_s(manner.timeout_s if timeout_s is None else timeout_s),
            patience_s=manner.patience_s,
            jitter=lambda: random.uniform(0.5, 1.5),
            begin_patience_s=begin_patience_s,
        )
        given = (*manner.access.metadata, *metadata)
        self.span = Span(request, first, given, outcome=outcome, clock_s=clock_s)
        self.metadata = (*given, *self.span.metadata)

    @property
    def address(self) -> str:
        """The server that is asked now."""
        return self._attempts.address

    def _call(self, method: str, request: bytes) -> Call:
        if self._error is not None:  # it was told; who reads on hears it again, and no server does
            raise self._error
        self.span.interrupted_by = ""
        left_s = self._attempts.remaining_s(self._clock_s())
        return Call(self.address, method, request, min(left_s, _LONGEST_S))

    def _after(self, failure: Failure, *, worked_s: float = 0.0, **numbers: float) -> float:
        """How long to wait before the next call. `numbers` are for the span."""
        broken = self.address
        try:
            wait_s = self._attempts.failed(failure, self._clock_s(), worked_s=worked_s)
        except errors.PagewireError as error:
            self._error = error
            raise
        self.span.broke(type(failure.error).__name__, broken, self.address, wait_s=wait_s, **numbers)
        return wait_s


class AskedOnce(_Asking, Generic[_Told]):
    """A request that one message answers, and that has the same answer wherever it is asked again."""

    def __init__(
        self,
        method: Method[_Told],
        request: Message,
        manner: Manner,
        budget: RetryBudget,
        *,
        first: str,
        timeout_s: float | None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(request, manner, budget, first=first, timeout_s=timeout_s, clock_s=clock_s)
        self._method = method
        self._request = request.SerializeToString()
        self._sent_s = 0.0

    def next_call(self) -> Call:
        """What to send now, and where to."""
        self._sent_s = self._clock_s()
        return self._call(self._method.path, self._request)

    def hear(self, data: bytes) -> _Told:
        """The answer. Raises PagewireError for one that cannot be read."""
        answer = parse(self._method.answer, data)
        self.span.tell(conventions.answered(answer))
        return answer

    def failed(self, code: grpc.StatusCode, message: str | None, trailers: Trailers | None) -> float:
        """As of any request.

        No message tells when a server begins with this one. That one worked on it is known where it answered at last,
        or where the call lasted longer than a connection may stand still.
        """
        failure = judge(code, message or "", trailers or (), self.address)
        ran_s = self._clock_s() - self._sent_s
        return self._after(failure, worked_s=max(0.0, ran_s - _NOTICED_S) if failure.in_doubt else ran_s)


class Asked(_Asking):
    """A request that a stream answers: what was heard of it, and where to ask on."""

    def __init__(
        self,
        request: pb.GenerateStreamRequest,
        manner: Manner,
        budget: RetryBudget,
        *,
        first: str,
        timeout_s: float | None,
        begin_patience_s: float | None = None,
        metadata: Metadata = (),
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.continuation = Continuation(request)
        super().__init__(
            request,
            manner,
            budget,
            first=first,
            timeout_s=timeout_s,
            begin_patience_s=begin_patience_s,
            metadata=metadata,
            outcome=partial(conventions.streamed, self.continuation),
            clock_s=clock_s,
        )
        self._begun_at: str | None = None  # the server that last told something of it
        self._sent_to: str | None = None  # the one that was asked since then, and said nothing yet

    @property
    def is_done(self) -> bool:
        """The answer is complete."""
        return self.continuation.is_done

    @property
    def runs_at(self) -> str | None:
        """Where it may run still, for nobody else: a server that refused a call has nothing of ours by its id."""
        return None if self.is_done else self._sent_to or self._begun_at

    def next_call(self) -> Call:
        """What to send now, and where to."""
        request = self.continuation.next_call()
        method = GENERATE if isinstance(request, pb.GenerateStreamRequest) else RESUME
        call = self._call(method, request.SerializeToString())
        self._sent_to = call.address
        return call

    def hear(self, data: bytes) -> Delta | Finish | None:
        """What is new in a message. Raises OutOfStep."""
        if self._sent_to is not None:  # the first of this call
            self._attempts.taken(self._clock_s())
            self._begun_at, self._sent_to = self._sent_to, None
        try:
            message = pb.GenerateStreamResponse.FromString(data)
        except DecodeError:
            raise OutOfStep("a message of the stream cannot be read") from None
        new = self.continuation.hear(message)
        if new is not None:
            self._attempts.heard()
            if isinstance(new, Delta):
                self.span.heard()
            elif self.is_done:
                failed = any(finish.reason is FinishReason.ERROR for finish in self.continuation.finishes.values())
                self.span.end("error" if failed else "")
        return new

    def failed(self, code: grpc.StatusCode, message: str | None, trailers: Trailers | None) -> float:
        """As of any request; and what it says of where this one runs."""
        failure = judge(code, message or "", trailers or (), self.address)
        if not failure.in_doubt:
            self._sent_to = None
        if isinstance(failure.error, errors.Superseded | errors.AlreadyRunning):  # what has this id is another's now
            self._begun_at = None
        if isinstance(failure.error, _OF_ONE_SERVER) and self._begun_at not in (None, self.address):
            failure = replace(failure, may_pass=True, answered=True)  # the one that had it may be back in a moment
        return self._after(failure, heard_tokens=self.continuation.num_heard)

    def broke(self, why: OutOfStep | None = None) -> float:
        """The call ended without a status, and without the end of the answer."""
        failure = lost(str(why) if why else "the stream ended before the answer did")
        return self._after(failure, heard_tokens=self.continuation.num_heard)

    def stopped(self, error: BaseException) -> None:
        """A read ended with it: the end of a request that failed. One whose reader was disturbed may go on."""
        if isinstance(error, errors.PagewireError):
            self.span.end(type(error).__name__)
        else:
            self.span.interrupted_by = type(error).__name__

    def leave(self) -> None:
        """Nobody reads on."""
        self.is_closed = True
        self.span.end()

    def cancellation(self) -> bytes:
        """The request that ends this one."""
        return pb.CancelRequest(request_id=self.continuation.request_id).SerializeToString()
