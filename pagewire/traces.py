"""The trace that a program is in, for the server to go on with: W3C's `traceparent`, from OpenTelemetry if it is there.

Nothing is imported for that: a program that traces has loaded OpenTelemetry's API, and another one has not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Final

NAME: Final = "traceparent"


def traceparent(metadata: Iterable[tuple[str, str | bytes]] = ()) -> tuple[tuple[str, str], ...]:
    """Metadata that names the current span; none without one, or where `metadata` names one already."""
    api: Any = sys.modules.get("opentelemetry.trace")
    if api is None or any(name.lower() == NAME for name, _ in metadata):
        return ()
    span = api.get_current_span().get_span_context()
    if not span.is_valid:
        return ()
    return ((NAME, f"00-{span.trace_id:032x}-{span.span_id:016x}-{int(span.trace_flags):02x}"),)
