"""The client for plain Python. A server that dies in the middle of an answer is a pause in it, and nothing else."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, Unpack, cast

import grpc
from google.protobuf.message import Message

from pagewire.access import Metadata, access
from pagewire.answers import Answer, Delta, Finish
from pagewire.asking import Settings, request_of
from pagewire.borrowed import borrow
from pagewire.calls import (
    CANCEL,
    CANCEL_TIMEOUT_S,
    DEFAULT_PATIENCE_S,
    DEFAULT_TIMEOUT_S,
    DETOKENIZE,
    EMBED,
    GET_MODEL,
    TOKENIZE,
    UNPIN,
    UNPIN_TIMEOUT_S,
    Asked,
    AskedOnce,
    Call,
    Manner,
    Method,
    addresses_of,
    unpin_request,
    unpinned_tokens,
)
from pagewire.continuation import OutOfStep
from pagewire.embeddings import Embedding, EmbedSettings, embed_request, embeddings_of
from pagewire.failures import Trailers, closed, judge
from pagewire.retrying import RetryBudget
from pagewire.tokens import (
    Model,
    TokenizeSettings,
    detokenize_request,
    model_of,
    model_request,
    tokenize_request,
)

if TYPE_CHECKING:
    from common import errors
    from protos import inference_pb2 as pb
else:
    errors = borrow("common.errors")


_Told = TypeVar("_Told", bound=Message)


class Running(Protocol):
    """A stream of messages, as gRPC gives it."""

    def __next__(self) -> bytes:
        """The next one."""
        ...

    def cancel(self) -> bool:
        """Ask for no more."""
        ...


class _Open:
    """The channels of one process, and what guards them."""

    def __init__(self) -> None:
        self.channels: dict[str, grpc.Channel] = {}
        self.lock = threading.RLock()  # a signal's handler may close what it interrupts


class _Connections:
    """A channel for each address that was ever asked, shared by the streams of one client."""

    def __init__(self, manner: Manner) -> None:
        self.first = manner.addresses[0]  # who answered last: a new request begins there
        self._manner = manner
        self._is_closed = False
        # By process. What a fork takes along is of no use there: who holds the lock may be no more, and nobody moves
        # what goes over the channels. They are left as they are, for to close them would wait for that.
        self._open: dict[int, _Open] = {}
        self._pauses: dict[object, queue.SimpleQueue[None]] = {}  # who waits between two calls

    def call(self, asked: Asked) -> Running:
        """Begin the next call of a request."""
        call = asked.next_call()
        method: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channel(call.address).unary_stream(call.method)
        return cast("Running", method(call.request, timeout=call.timeout_s, metadata=asked.metadata))

    def cancel(self, asked: Asked) -> None:
        """End a request where it may run still. Where that fails it ends a little later by itself."""
        address = asked.runs_at
        if address is None:
            return
        # no connection | metadata that gRPC does not take | the client was closed
        with contextlib.suppress(grpc.RpcError, ValueError, errors.PagewireError):
            self._ask(Call(address, CANCEL, asked.cancellation(), CANCEL_TIMEOUT_S), asked.metadata)

    def once(self, asked: AskedOnce[_Told]) -> _Told:
        """The answer to a request that has one message. Raises PagewireErrors."""
        with asked.span:
            while True:
                call = asked.next_call()
                try:
                    answer = self._ask(call, asked.metadata)
                except grpc.RpcError as error:
                    self.pause(asked, asked.failed(error.code(), error.details(), _trailers(error)))
                else:
                    self.first = call.address
                    return asked.hear(answer)

    def unpin(self, pin_id: str | None) -> int:
        """End a pin, or all, on the server that answered last."""
        call = Call(self.first, UNPIN, unpin_request(pin_id), UNPIN_TIMEOUT_S)
        try:
            return unpinned_tokens(self._ask(call, self._manner.access.metadata))
        except grpc.RpcError as error:
            raise judge(error.code(), error.details() or "", _trailers(error), call.address).error from error

    def pause(self, asked: Asked | AskedOnce[Any], after_s: float) -> None:
        """Wait before the next call, but no longer than until the client or the stream is closed."""
        waking = self._pauses[asked] = queue.SimpleQueue()  # a signal's handler may put something in
        try:
            if not (self._is_closed or asked.is_closed):
                with contextlib.suppress(queue.Empty):
                    waking.get(timeout=after_s)
        finally:
            self._pauses.pop(asked, None)

    def wake(self, asked: Asked) -> None:
        """End the pause of a stream that was closed."""
        if (waking := self._pauses.get(asked)) is not None:
            waking.put(None)

    def close(self) -> None:
        """End all calls."""
        opened = self._here()
        with opened.lock:
            self._is_closed = True
            channels, opened.channels = opened.channels, {}
        for waking in list(self._pauses.values()):
            waking.put(None)
        for channel in channels.values():
            channel.close()

    def check_open(self) -> None:
        """Raise the error of a closed client, which gRPC tells as a ValueError, or as a call that was cancelled."""
        if self._is_closed:
            raise closed()

    def _ask(self, call: Call, metadata: Metadata) -> bytes:
        """One message for another."""
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel(call.address).unary_unary(call.method)
        try:
            return method(call.request, timeout=call.timeout_s, metadata=tuple(metadata))
        except (grpc.RpcError, ValueError):
            self.check_open()
            raise

    def _channel(self, address: str) -> grpc.Channel:
        opened = self._here()
        with opened.lock:
            self.check_open()
            channel = opened.channels.get(address)
            if channel is None:
                options, credentials = self._manner.options, self._manner.access.credentials
                if credentials is None:
                    channel = grpc.insecure_channel(address, options=options)
                else:
                    channel = grpc.secure_channel(address, credentials, options=options)
                opened.channels[address] = channel
            return channel

    def _here(self) -> _Open:
        pid = os.getpid()
        return self._open.get(pid) or self._open.setdefault(pid, _Open())


class Client:
    """Asks one server, or the first of several that answers. Safe to share between threads.

    >>> with Client("127.0.0.1:50051") as client:
    ...     print(client.generate("The sea is", max_tokens=8).text)

    An answer goes on after a lost connection, on the server that comes back or on the next of the addresses. It is an
    error only once `timeout_s` is over (DeadlineExceeded), or calls have failed for `patience_s` with nothing new heard
    (Unavailable, Overloaded), or the request can never succeed (InvalidRequest and others).
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        api_key: str | None = None,
        tls_ca: str | Path | None = None,
        tls_cert: str | Path | None = None,
        tls_key: str | Path | None = None,
        insecure: bool = False,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        patience_s: float = DEFAULT_PATIENCE_S,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Metadata = (),
    ) -> None:
        """`address` is HOST:PORT, or several with commas between them.

        `api_key`: the environment's PAGEWIRE_API_KEY where none is given. `tls_ca`: a file of authorities (PEM) for the
        servers' certificates, or "system" for the public ones; without it nothing is encrypted, and then a key is shown
        to this machine alone, unless `insecure`. `tls_cert` and `tls_key`: for servers that ask for a certificate. In
        place of these three, `credentials` are gRPC's own. `metadata` goes with every call. `timeout_s`: for a whole
        answer, unless a call says otherwise; None is no limit.

        Raises ValueError for what does not fit together, OSError for a file that cannot be read.
        """
        addresses = addresses_of(address)
        shown = access(
            addresses,
            api_key=api_key,
            tls_ca=tls_ca,
            tls_cert=tls_cert,
            tls_key=tls_key,
            insecure=insecure,
            credentials=credentials,
            metadata=metadata,
        )
        self._manner = Manner(addresses=addresses, timeout_s=timeout_s, patience_s=patience_s, access=shown)
        self._budget = RetryBudget()
        self._connections = _Connections(self._manner)

    def generate(
        self, prompt: str | None = None, *, timeout_s: float | None = None, **settings: Unpack[Settings]
    ) -> Answer:
        """The whole answer. Raises PagewireErrors; see Settings for what can be set."""
        with self.stream(prompt, timeout_s=timeout_s, **settings) as stream:
            for _ in stream:
                pass
            return stream.answer

    def stream(
        self, prompt: str | None = None, *, timeout_s: float | None = None, **settings: Unpack[Settings]
    ) -> Stream:
        """The answer as it is made. Leave it with `with`, or `close` it, and the server stops at once."""
        return self.send(request_of(prompt, settings), timeout_s=timeout_s)

    def send(self, request: pb.GenerateStreamRequest, *, timeout_s: float | None = None) -> Stream:
        """Stream the answer to a request in the words of the API itself."""
        return Stream(
            self._connections,
            Asked(request, self._manner, self._budget, first=self._connections.first, timeout_s=timeout_s),
        )

    def embed(
        self,
        inputs: str | Sequence[str | Sequence[int]],
        *,
        timeout_s: float | None = None,
        **settings: Unpack[EmbedSettings],
    ) -> tuple[Embedding, ...]:
        """The vectors of texts, or of token ids, one for each. Raises PagewireErrors."""
        return embeddings_of(self._once(EMBED, embed_request(inputs, settings), timeout_s))

    def tokenize(
        self, text: str | None = None, *, timeout_s: float | None = None, **settings: Unpack[TokenizeSettings]
    ) -> tuple[int, ...]:
        """The tokens of a text, or of a chat as the model is given it. Raises PagewireErrors."""
        answer = self._once(TOKENIZE, tokenize_request(text, settings), timeout_s)
        return tuple(answer.token_ids)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        model: str = "",
        timeout_s: float | None = None,
    ) -> str:
        """The text of tokens, by default without those that are special. Raises PagewireErrors."""
        request = detokenize_request(token_ids, skip_special_tokens=skip_special_tokens, model=model)
        answer = self._once(DETOKENIZE, request, timeout_s)
        return answer.text

    def model(self, name: str = "", *, timeout_s: float | None = None) -> Model:
        """What is served. Raises PagewireErrors; UnknownModel where `name` is another's."""
        return model_of(self._once(GET_MODEL, model_request(name), timeout_s))

    def unpin(self, pin_id: str | None = None) -> int:
        """End a pin (`Answer.pinned`) on the server that answered last, or all that its tenant has there.

        Returns the tokens that were pinned. Raises PagewireErrors.
        """
        return self._connections.unpin(pin_id)

    def _once(self, method: Method[_Told], request: Message, timeout_s: float | None) -> _Told:
        first = self._connections.first
        asked = AskedOnce(method, request, self._manner, self._budget, first=first, timeout_s=timeout_s)
        return self._connections.once(asked)

    def close(self) -> None:
        """Close the connections. What is under way then, and what is asked later, ends with a PagewireError."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Stream:
    """The deltas of one answer. When they have come to an end, `answer` is the whole of it."""

    def __init__(self, connections: _Connections, asked: Asked) -> None:
        self._connections = connections
        self._asked = asked
        self._call: Running | None = None

    @property
    def request_id(self) -> str:
        """What the server's log calls it."""
        return self._asked.continuation.request_id

    @property
    def finishes(self) -> dict[int, Finish]:
        """The ends that are known, by choice."""
        return dict(self._asked.continuation.finishes)

    @property
    def finish(self) -> Finish | None:
        """The end of the first choice; None before it has come."""
        return self._asked.continuation.finishes.get(0)

    @property
    def answer(self) -> Answer:
        """The whole answer, once the stream has ended."""
        return self._asked.continuation.answer()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        """The next delta of any choice. Raises PagewireErrors."""
        try:
            while not self._asked.is_closed and not self._asked.is_done:
                if (new := self._read()) is not None:
                    return new
        except BaseException as error:  # also of a signal's handler: gRPC cannot go on with a read that was interrupted
            self._asked.stopped(error)
            self._drop()
            raise
        raise StopIteration

    def close(self) -> None:
        """Read no more, in whatever thread. What still runs on the server is stopped."""
        if not self._asked.is_closed:
            self._asked.leave()  # first: no reader takes what follows for a lost connection
            self._connections.wake(self._asked)
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _read(self) -> Delta | None:
        """One message, or one way in which a call ends and another begins."""
        try:
            call = self._call
            if call is None:
                call = self._call = self._connections.call(self._asked)
                if self._asked.is_closed:  # while it was begun
                    self._stop()
                    return None
            new = self._asked.hear(next(call))
            self._connections.first = self._asked.address
            return new if isinstance(new, Delta) else None
        except StopIteration:
            after_s = self._asked.broke()
        except OutOfStep as why:
            after_s = self._asked.broke(why)
        except ValueError:
            self._connections.check_open()
            raise
        except grpc.RpcError as error:
            if self._asked.is_closed:  # it was we who ended it
                return None
            self._connections.check_open()
            after_s = self._asked.failed(error.code(), error.details(), _trailers(error))
        self._drop()
        self._connections.pause(self._asked, after_s)
        return None

    def _stop(self) -> None:
        self._drop()
        self._connections.cancel(self._asked)

    def _drop(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.cancel()


def _trailers(error: grpc.RpcError) -> Trailers:
    """They are pairs, also where the stubs say otherwise."""
    return cast("Trailers", error.trailing_metadata() or ())
