"""What an operator is told of one request."""

from __future__ import annotations

import asyncio
from typing import Any, get_args

import pytest

from common.errors import DeadlineExceeded, Overloaded, UnknownRequest
from common.sampling import StopConditions
from common.types import FinishReason, Priority
from protos import monitoring_pb2 as pb
from scheduler.timeline import Kind, Timeline, Wait
from services import explain, trace_context
from services.admission import Ask
from services.engine import Engine
from services.monitoring import Monitoring
from services.timelines import Timelines
from tests.services.test_engine import GREEDY, join, read, run, standing

NO_CONTEXT: Any = None


def ended(timelines: Timelines, request_id: str, now_ns: int, tenant: str = "") -> None:
    timeline = timelines.make(request_id, now_ns, tenant=tenant)
    timelines.opened(timeline)
    timeline.ended_ns = now_ns + 1
    timelines.ended(timeline)


def test_a_request_is_found_while_it_runs_and_after() -> None:
    async def test(engine: Engine) -> None:
        link = join(engine, steps=2)
        monitoring = Monitoring(engine)
        stream = engine.submit(
            [1, 2, 3],
            GREEDY,
            StopConditions(max_tokens=4),
            tenant="acme",
            timeline=engine.timeline("mine", tenant="acme"),
        )
        await stream.take()
        running = await monitoring.Explain(pb.ExplainRequest(request_id="mine"), NO_CONTEXT)
        link.allow(9)
        await read(stream)
        told = await monitoring.Explain(pb.ExplainRequest(request_id="mine", tenant="acme"), NO_CONTEXT)

        assert running.running and not told.running
        assert (told.prompt_tokens, told.output_tokens, told.choices, told.tenant) == (3, 4, 1, "acme")
        assert 0 < told.admitted_ns <= told.first_token_ns <= told.ended_ns <= told.received_ns_ago
        names = [pb.TimelineEventKind.Name(event.kind).removeprefix("TIMELINE_EVENT_KIND_") for event in told.events]
        assert names == ["RECEIVED", "ADMITTED", "PREFILL", "FIRST_TOKEN", "FINISHED"]
        with pytest.raises(UnknownRequest):
            await monitoring.Explain(pb.ExplainRequest(request_id="mine", tenant="other"), NO_CONTEXT)

    run(test)


def test_an_unknown_id_says_how_many_are_remembered_and_by_which_flag() -> None:
    with pytest.raises(UnknownRequest, match=r"the last 7 that ended.*--max-timelines"):
        Timelines(max_requests=7).find("nobody")


def test_the_last_of_an_id_is_told_and_as_many_are_remembered_as_may_be() -> None:
    timelines = Timelines(max_requests=3)
    for now_ns, name in enumerate(["a", "b", "b", "c"]):
        ended(timelines, name, now_ns)

    assert timelines.find("b").received_ns == 2
    with pytest.raises(UnknownRequest):
        timelines.find("a")
    assert len(timelines) == 3


def test_one_tenants_id_is_not_anothers() -> None:
    timelines = Timelines()
    ended(timelines, "same", 1, tenant="one")
    ended(timelines, "same", 2, tenant="two")

    assert timelines.find("same").tenant == "two"
    assert timelines.find("same", "one").received_ns == 1


def test_a_refused_request_is_told_with_its_limit_and_makes_no_other_forgotten() -> None:
    timelines = Timelines(max_requests=2)
    ended(timelines, "served", 1)
    for number in range(10):
        timelines.refused(f"refused-{number}", "waiting_tokens", 5)
    timelines.refused("x" * 1000, "calls", 5)

    told = explain.response_of(timelines.find("refused-9"), 10)
    assert [(event.kind, event.why) for event in told.events] == [(pb.TIMELINE_EVENT_KIND_REFUSED, "waiting_tokens")]
    assert timelines.find("served").is_over
    assert len(timelines) == 3


def test_a_deadline_is_the_error_of_its_request() -> None:
    async def test(engine: Engine) -> None:
        timeline = engine.timeline("late")
        stream = engine.submit(
            [1], GREEDY, StopConditions(max_tokens=4), deadline_ns=engine.deadline_after(0.01), timeline=timeline
        )
        with pytest.raises(DeadlineExceeded):
            await read(stream)
        assert (timeline.error, timeline.reason) == ("DeadlineExceeded", FinishReason.ABORTED)
        assert [event.kind for event in timeline.events] == [Kind.RECEIVED, Kind.QUEUED, Kind.FINISHED]

    run(test, clock_ns=standing)


def test_another_reader_is_told_but_not_of_a_request_that_is_over() -> None:
    async def test(engine: Engine) -> None:
        join(engine)
        timeline = engine.timeline("twice")
        stream = engine.submit([1, 2], GREEDY, StopConditions(max_tokens=3), timeline=timeline)
        other = engine.attach(stream, {0: 0})
        await read(other)
        engine.attach(other, {0: 3})

        timeline.check()
        assert [event.num_tokens for event in timeline.events if event.kind is Kind.ATTACHED] == [0]

    run(test)


def test_people_are_told_in_words() -> None:
    timeline = Timeline(
        "mine", 1_000_000, tenant="acme", trace=trace_context.TraceContext("a" * 32, "b" * 16, True).header
    )
    timeline.num_choices = 2
    timeline.add(Kind.RECEIVED, 1_000_000, num_tokens=24, number=2)
    timeline.waits("memory", 2_500_000)
    timeline.add(Kind.ADMITTED, 3_000_000, executor="gpu-0", step=7, num_tokens=16)
    timeline.add(Kind.PREFILL, 3_000_000, step=7, position=16, num_tokens=8)
    timeline.add(Kind.MOVED, 4_000_000, choice=1, executor="gpu-0", why="silent")
    timeline.add(Kind.FINISHED, 5_000_000, choice=1, why="length", num_tokens=5)

    assert explain.lines(explain.response_of(timeline, 2_001_000_000)) == [
        f"mine of acme: received 2.0 s ago, runs or waits, trace {'a' * 32}",
        "    0.000 ms  received: 24 tokens of prompt, 2 choices",
        "    1.500 ms  choice 0: waits: too few KV blocks are free",
        "    2.000 ms  choice 0: admitted by gpu-0 in step 7, 16 tokens were in its prefix cache",
        "    2.000 ms  choice 0: computes 8 tokens from position 16 on, in step 7",
        "    3.000 ms  choice 1: loses gpu-0, which said nothing any more",
        "    4.000 ms  choice 1: finished: length, 5 tokens",
    ]


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_of_event_has_its_number_on_the_wire_and_its_words(kind: Kind) -> None:
    assert pb.TimelineEventKind.Name(pb.TimelineEventKind.ValueType(kind)) == f"TIMELINE_EVENT_KIND_{kind.name}"
    told = explain.lines(pb.ExplainResponse(events=[pb.TimelineEvent(kind=pb.TimelineEventKind.ValueType(kind))]))
    assert "TIMELINE" not in told[1]


def test_every_reason_to_wait_has_its_words() -> None:
    for why in get_args(Wait):
        told = explain.lines(pb.ExplainResponse(events=[pb.TimelineEvent(kind=pb.TIMELINE_EVENT_KIND_QUEUED, why=why)]))
        assert f"waits: {why}" not in told[1]


def test_a_refusal_names_its_limit_for_operators() -> None:
    async def test(engine: Engine) -> None:
        ask = Ask(tenant="", priority=Priority.NORMAL, prompt_tokens=10, max_tokens=10, choices=3000, deadline_ns=0)
        with pytest.raises(Overloaded) as refused:
            engine.check_room(ask)
        assert refused.value.limit == "waiting_sequences"

    run(test)


def test_a_trace_that_the_caller_names_is_kept_with_its_request() -> None:
    async def main() -> None:
        trace_context.enter(trace_context.parse(f"00-{'1' * 32}-{'2' * 16}-01"))
        told = explain.response_of(Timelines().make("traced", 0), 1)
        assert told.trace_id == "1" * 32

    asyncio.run(main())
