"""Whose trace a call is part of: what counts as a header, and where it is passed on."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from common.sampling import SamplingParams
from common.step import NewSequence, StepPlan, StepResult
from common.types import SlotRef
from services import step_spans, trace_context
from services.lifecycle import StartupError
from services.step_spans import StepSpans
from services.timelines import Timelines
from services.trace_context import TraceContext
from services.traced_calls import TracedCalls
from services.tracing import ENDPOINT, open_tracer

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADER = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("header", "context"),
    [
        (HEADER, TraceContext(TRACE, SPAN, True)),
        (f"00-{TRACE}-{SPAN}-00", TraceContext(TRACE, SPAN, False)),
        (f"cc-{TRACE}-{SPAN}-09-what-comes-later", TraceContext(TRACE, SPAN, True)),
        (f"00-{TRACE}-{SPAN}-01-more", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (HEADER.upper(), None),
        (f"{HEADER}\n", None),
        ("00-" + "a" * 10_000, None),
        ("", None),
    ],
)
def test_a_header_is_what_w3c_allows_or_as_if_it_were_not_there(header: str, context: TraceContext | None) -> None:
    assert trace_context.parse(header) == context


def test_what_is_passed_on_says_the_same() -> None:
    context = trace_context.parse(HEADER)
    assert context is not None and context.header == HEADER


def test_a_call_is_in_the_trace_that_its_metadata_names_and_passes_it_on() -> None:
    async def called(metadata: Any) -> Any:
        details: Any = SimpleNamespace(method="/any/Method", invocation_metadata=metadata)

        async def go_on(_: Any) -> Any:
            return trace_context.outgoing()

        return await TracedCalls(None, "any").intercept_service(go_on, details)

    assert asyncio.run(called((("traceparent", HEADER),))) == (("traceparent", HEADER),)
    assert asyncio.run(called((("traceparent", b"bytes"), ("other", "x")))) == ()


def test_executors_are_told_of_a_trace_only_where_it_is_recorded() -> None:
    async def made(*, records: bool, sampled: bool) -> bool:
        trace_context.enter(TraceContext(TRACE, SPAN, sampled))
        return Timelines(records=records).make("x", 0).is_recorded

    kinds = [(records, sampled) for records in (False, True) for sampled in (False, True)]
    assert [asyncio.run(made(records=r, sampled=s)) for r, s in kinds] == [False, False, False, True]


def test_without_an_endpoint_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENDPOINT, raising=False)
    assert open_tracer("test", "") is None


def test_an_endpoint_without_opentelemetry_is_refused_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(StartupError, match="pip install opentelemetry-sdk"):
        open_tracer("test", "http://127.0.0.1:4317")


def test_a_variable_that_is_there_for_other_programs_stops_no_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:4317")

    assert open_tracer("test", "") is None
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "pip install opentelemetry-sdk" in record.getMessage()


class Spans:
    """In place of a tracer: the steps that had a span, and how many links."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def begin(self, name: str, parent: object, kind: str, attributes: Any, *, links: Any, started_ns: int) -> Any:
        self.told.append((attributes["pagewire.step"], len(links)))
        return SimpleNamespace(end=lambda attributes: None)


def plan(step: int, rows: int, *, new: dict[int, str] | None = None, released: tuple[int, ...] = ()) -> StepPlan:
    told = [
        NewSequence(
            ref=SlotRef(ref), attempt=1, token_ids=[1], num_prompt=1, num_computed=0, block_table=[],
            sampling=SamplingParams(), choice=0, max_tokens=9, stop_token_ids=(), trace=trace,
        )
        for ref, trace in (new or {}).items()
    ]  # fmt: skip
    refs = [SlotRef(ref) for ref in range(rows)]
    return StepPlan(step=step, refs=refs, num_scheduled=[1] * rows, new=told, released=[SlotRef(r) for r in released])


def result(step: int) -> StepResult:
    return StepResult(step=step, refs=[], tokens=[], indices=[])


def test_a_step_that_admits_a_traced_request_has_a_span_and_of_the_others_few() -> None:
    tracer: Any = Spans()
    now_ns = [0]
    spans = StepSpans(tracer, clock_ns=lambda: now_ns[0])
    steps = [
        plan(0, 2, new={0: "", 1: "no header"}),
        plan(1, 3, new={2: HEADER}),
        plan(2, 3),
        plan(3, 4, new={3: HEADER}),
        plan(4, 4),
    ]
    for each in steps:
        spans.planned(each)
        spans.answered(result(each.step))
    now_ns[0] += step_spans._EVERY_NS
    for each in (plan(5, 4), plan(6, 4), plan(7, 2, released=(2, 3))):
        spans.planned(each)
        spans.answered(result(each.step))
        now_ns[0] += step_spans._EVERY_NS // 2

    assert tracer.told == [(1, 1), (3, 2), (5, 2)]


def test_a_session_begins_with_no_trace() -> None:
    tracer: Any = Spans()
    spans = StepSpans(tracer)
    spans.planned(plan(0, 1, new={0: HEADER}))
    spans.began()
    spans.planned(plan(0, 1))
    spans.answered(result(0))

    assert tracer.told == []
