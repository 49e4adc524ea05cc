"""The spans of HTTP requests: which there are, what they are called, and how they say that one failed."""

from __future__ import annotations

import asyncio
import json
import logging

from common import log
from common.errors import Unauthenticated, Unavailable
from protos import inference_pb2 as pb
from services import trace_context
from tests.services.gateway_calls import CHAT, HI, Call, Scheduler, Stream, ask, delta, finish, gateway
from tests.services.spans import Spans, told

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = [(b"traceparent", f"00-{TRACE}-{SPAN}-01".encode())]


def test_a_span_has_a_name_of_ours_whatever_path_a_stranger_thinks_of() -> None:
    spans = Spans()
    app = gateway(Scheduler(delta(0, 5, "a"), finish()), tracer=spans.tracer)
    for path in (CHAT, "/v1/" + "x" * 60_000, "/v1/models", "/other"):
        ask(app, HI, path=path)

    assert [span.name for span in spans.ended] == [f"POST {CHAT}", *["POST other"] * 3]
    assert max(len(str(value)) for span in spans.ended for value in (span.attributes or {}).values()) <= 256


def test_a_stream_that_fails_midway_has_a_span_that_says_so() -> None:
    spans = Spans()
    failing = gateway(Scheduler(delta(0, 5, "a"), then=Unavailable("no executor")), tracer=spans.tracer)
    ask(failing, {**HI, "stream": True})

    (span,) = spans.ended
    assert told(span, "http.response.status_code", "error.type") == [200, "503"] and not span.status.is_ok


def test_who_is_a_stranger_has_no_span_recorded_by_saying_so() -> None:
    spans = Spans()
    refused = gateway(Scheduler(then=Unauthenticated("an API key is needed")), tracer=spans.tracer)
    ask(refused, HI, headers=PARENT)
    ask(refused, {"no": "messages"}, headers=PARENT)
    assert not spans.ended

    ask(refused, HI)
    assert len(spans.ended) == 1, "the sampler decides of what has no parent"


def test_who_is_known_has_his_spans_recorded_in_his_trace_also_that_of_a_failure() -> None:
    spans = Spans()
    app = gateway(Scheduler(delta(0, 5, "a"), finish()), tracer=spans.tracer)
    ask(app, HI, headers=PARENT)
    ask(app, {"no": "messages"}, headers=PARENT)

    assert [told(span, "http.response.status_code") for span in spans.ended] == [[200], [400]]
    assert {f"{span.context.trace_id:032x}" for span in spans.ended if span.context} == {TRACE}


class Listening(Scheduler):
    """Remembers what it is told of the trace, and what a line of the log is about."""

    def __init__(self) -> None:
        super().__init__(delta(0, 5, "a"), finish())
        self.heard: list[tuple[object, object]] = []

    def ask(self, request: pb.GenerateStreamRequest, key: str) -> Stream:
        line = log.JsonFormatter().format(logging.makeLogRecord({"msg": "x"}))
        self.heard.append((trace_context.outgoing(), json.loads(line).get("trace_id")))
        return super().ask(request, key)


def test_a_request_that_waited_behind_another_one_is_not_in_its_trace() -> None:
    scheduler = Listening()

    async def run() -> None:
        app = gateway(scheduler)
        for headers in (PARENT, []):  # in one task, as uvicorn's are in one context
            each = Call(HI, headers=headers)
            await app(each.scope, each.receive, each.send)

    asyncio.run(run())
    assert scheduler.heard == [((("traceparent", PARENT[0][1].decode()),), TRACE), ((), None)]
