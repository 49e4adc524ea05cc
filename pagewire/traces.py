"""The span of one request, in the trace that its program is in, by OpenTelemetry's API.

Nothing is imported for that: a program that traces has loaded the API and said where its spans go; without that there
is no span, and its server goes on with the one that the program is in, if any. No failure of the API harms a request.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self

from google.protobuf.message import Message

from pagewire import conventions
from pagewire.conventions import Attributes

NAME: Final = "traceparent"

_MOST_EVENTS: Final = 128  # that are told, as OpenTelemetry has it
_log = logging.getLogger(__name__)


class Span:
    """From when a request is asked for to its end, over all its calls. It ends once, whatever is done after that.

    What happens meanwhile is kept until then: the API has locks, and a signal's handler may end what it interrupts. Its
    end takes them.
    """

    def __init__(
        self,
        request: Message,
        address: str,
        metadata: Iterable[tuple[str, str | bytes]] = (),
        *,
        outcome: Callable[[], Attributes] = dict,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin it, unless `metadata` names another one already.

        `outcome` is asked for at the end. It must not lead here: what nobody holds any more ends at once.
        """
        self._span: Any = None  # not None: it is recorded
        self.interrupted_by = ""  # the kind of what ended its last read; it may have gone on since
        self._outcome = outcome
        self._clock_s = clock_s
        self._began_s = clock_s()
        self._first_s = 0.0  # when the first token was there
        self._num_broken = 0
        self._broken: deque[tuple[int, Attributes]] = deque(maxlen=_MOST_EVENTS)
        self._told: dict[str, Any] = {}
        self._has_ended = threading.Lock()  # whoever gets it ends it
        self._api: Any = sys.modules.get("opentelemetry.trace")
        self.metadata: tuple[tuple[str, str], ...] = ()
        """What names it to a server: it, or the span that the program is in."""

        if self._api is None or any(name.lower() == NAME for name, _ in metadata):
            return
        context = None
        with _harmless():
            told = conventions.asked(request, address)
            tracer, kind = self._api.get_tracer("pagewire"), self._api.SpanKind.CLIENT
            begun = {name: value for name, value in told.items() if name != "server.port"}  # the next may have none
            span = tracer.start_span(conventions.name_of(told), kind=kind, attributes=begun)
            self._told.update(told)
            context = span.get_span_context()
            self._span = span if span.is_recording() else None
        with _harmless():
            if context is None or not context.is_valid:
                context = self._api.get_current_span().get_span_context()
            if context.is_valid:
                trace = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
                self.metadata = ((NAME, trace),)

    def heard(self) -> None:
        """There are new tokens."""
        if not self._first_s:
            self._first_s = self._clock_s()

    def broke(self, error: str, address: str, next_address: str, **numbers: float) -> None:
        """The call to `address` ended with this kind of error, and there will be another one."""
        self._num_broken += 1
        if self._span is not None:
            told = {f"pagewire.{name}": number for name, number in numbers.items()}
            self._broken.append((time.time_ns(), {"error.type": error, **conventions.server(address), **told}))
            self._told.pop("server.port", None)
            self._told.update(conventions.server(next_address))

    def tell(self, attributes: Attributes) -> None:
        """This is known of it, too."""
        self._told.update(attributes)

    def end(self, error: str = "") -> None:
        """The request has ended: with this kind of error, with what its last read was interrupted by, or well."""
        if self._span is None or not self._has_ended.acquire(blocking=False):
            return
        error = error or self.interrupted_by
        with _harmless():
            try:
                told = {**self._told, **self._outcome(), "pagewire.broken_calls": self._num_broken}
                if self._first_s:
                    told["gen_ai.response.time_to_first_chunk"] = self._first_s - self._began_s
                if error:
                    told["error.type"] = error
                    self._span.set_status(self._api.StatusCode.ERROR)
                for at_ns, what in tuple(self._broken):
                    self._span.add_event("call_broke", what, timestamp=at_ns)
                self._span.set_attributes(told)
                self._span.update_name(conventions.name_of(told))
            finally:
                self._span.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end(kind.__name__ if kind is not None else "")

    def __del__(self) -> None:
        """Its request was dropped."""
        self.end()


@contextmanager
def _harmless() -> Generator[None]:
    """What is raised meanwhile, by code that is not ours, costs a line in the log."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        _log.warning("OpenTelemetry failed, and a request goes on without all of its span: %s", type(error).__name__)
