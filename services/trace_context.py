"""Whose trace a call is part of: W3C's `traceparent` header, as it comes and as it is passed on.

Set once where a call comes in, read wherever it matters. Costs a look at a call's metadata, whether anything is traced
or not: a trace's id stands in the log lines of its requests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Final, NamedTuple

NAME: Final = "traceparent"

_FORM: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED: Final = 1


class TraceContext(NamedTuple):
    """A span, of this process or another."""

    trace_id: str  # 32 hex digits
    span_id: str  # 16
    sampled: bool  # it is recorded, so what it causes should be

    @property
    def header(self) -> str:
        """The header's value."""
        return f"00-{self.trace_id}-{self.span_id}-{self.sampled:02x}"


def parse(value: str) -> TraceContext | None:
    """What a header says; None where it says nothing that W3C allows, which is then as if it were not there."""
    found = _FORM.fullmatch(value) if len(value) <= 512 else None
    if found is None or (value.startswith("00-") and found[4]):
        return None
    return TraceContext(found[1], found[2], bool(int(found[3], 16) & _SAMPLED))


def of_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> TraceContext | None:
    """That of a gRPC call, or of other headers."""
    for name, value in metadata:
        if name == NAME and isinstance(value, str):
            return parse(value)
    return None


_current: ContextVar[TraceContext | None] = ContextVar("trace context", default=None)


def current() -> TraceContext | None:
    """That of the call which is being handled."""
    return _current.get()


def enter(context: TraceContext | None) -> None:
    """The rest of this task is part of that trace."""
    _current.set(context)


def outgoing() -> tuple[tuple[str, str], ...]:
    """The metadata that passes it on; none where there is no trace."""
    context = _current.get()
    return ((NAME, context.header),) if context is not None else ()
