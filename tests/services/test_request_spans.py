"""What a request's span says of it, told from its timeline."""

from __future__ import annotations

import pytest

from common.types import FinishReason
from scheduler.timeline import Timeline
from tests.services.spans import Spans, told


@pytest.mark.parametrize("operation", ["chat", "text_completion", "embeddings"])
def test_a_span_is_called_by_what_was_asked_for(operation: str) -> None:
    timeline = Timeline("r", 1, operation=operation)
    timeline.ended_ns = 2
    spans = Spans()
    spans.tracer.request_ended(timeline)

    span = next(span for span in spans.ended if span.name == f"{operation} ")
    assert told(span, "gen_ai.operation.name", "gen_ai.response.id") == [operation, "r"]


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        (FinishReason.EOS, "stop"),
        (FinishReason.STOP_TOKEN, "stop"),
        (FinishReason.STOP_STRING, "stop"),
        (FinishReason.EMBEDDED, "stop"),
        (FinishReason.LENGTH, "length"),
        (FinishReason.ABORTED, "aborted"),
        (FinishReason.ERROR, "error"),
    ],
)
def test_why_an_answer_ended_is_told_in_openais_word_where_it_has_one(reason: FinishReason, word: str) -> None:
    timeline = Timeline("r", 1)
    timeline.ended_ns, timeline.reason = 2, reason
    spans = Spans()
    spans.tracer.request_ended(timeline)

    whole = next(span for span in spans.ended if span.name.startswith("text_completion"))
    assert told(whole, "gen_ai.response.finish_reasons") == [(word,)]
    assert whole.status.is_ok is (reason is not FinishReason.ERROR)
