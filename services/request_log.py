"""The line that a request leaves in the log when it has ended: how long each part took, and what it cost."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from scheduler.timeline import Timeline
from services import trace_context

log = logging.getLogger(__name__)


def tell(timeline: Timeline) -> None:
    """One line, at info."""
    if log.isEnabledFor(logging.INFO):
        log.info(
            "request %s finished: %s, %d tokens, %.1f ms",
            timeline.request_id,
            timeline.error or timeline.reason.name.lower(),
            timeline.num_output,
            _ms(timeline.received_ns, timeline.ended_ns),
            extra={"fields": fields_of(timeline)},
        )


def fields_of(timeline: Timeline) -> Mapping[str, object]:
    """What is in the line besides its text. A part that the request never came to is null."""
    t, trace = timeline, trace_context.parse(timeline.trace)
    return {
        "request_id": t.request_id,
        "trace_id": trace.trace_id if trace is not None else None,
        "tenant": t.tenant,
        "reason": t.reason.name.lower(),
        "error": t.error or None,
        "choices": t.num_choices,
        "prompt_tokens": t.num_prompt,
        "cached_prompt_tokens": t.num_cached,
        "output_tokens": t.num_output,
        "preemptions": t.num_preemptions,
        "drafted_tokens": t.num_drafted,
        "accepted_tokens": t.num_accepted,
        "queue_ms": _ms(t.received_ns, t.admitted_ns or t.ended_ns),
        "prefill_ms": _ms(t.admitted_ns, t.first_token_ns) if t.first_token_ns else None,
        "decode_ms": _ms(t.first_token_ns, t.last_token_ns) if t.first_token_ns else None,
        "total_ms": _ms(t.received_ns, t.ended_ns),
    }


def _ms(begin_ns: int, end_ns: int) -> float:
    return round(max(0, end_ns - begin_ns) / 1e6, 3)
