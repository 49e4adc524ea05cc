"""What a request's span says of it, told from its timeline."""

from __future__ import annotations

import pytest

from common.types import FinishReason
from scheduler.timeline import Controls, Timeline
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


CONTROLS = Controls(
    max_tokens=9, temperature=0.5, top_p=0.9, top_k=7, seed=3, presence_penalty=0.0, frequency_penalty=-1.0
)


def controls_told(controls: Controls | None) -> dict[str, object]:
    timeline = Timeline("r", 1)
    timeline.ended_ns, timeline.num_choices, timeline.controls = 2, 1, controls
    spans = Spans()
    spans.tracer.request_ended(timeline)
    whole = next(span for span in spans.ended if span.name.startswith("text_completion"))
    prefix = "gen_ai.request."
    found = {name.removeprefix(prefix): value for name, value in (whole.attributes or {}).items() if prefix in name}
    return {name: value for name, value in found.items() if name not in ("model", "choice.count")}


def test_how_an_answer_was_to_be_made_is_told_by_the_conventions_names() -> None:
    assert controls_told(CONTROLS) == CONTROLS._asdict()
    assert controls_told(None) == {}, "vectors have none"


def test_what_is_off_and_a_seed_that_no_collector_can_be_sent_are_left_out() -> None:
    told = controls_told(CONTROLS._replace(top_k=0, seed=1 << 63))
    assert told.keys() == CONTROLS._asdict().keys() - {"top_k", "seed"}
