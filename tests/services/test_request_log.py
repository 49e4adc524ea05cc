"""The line that a request leaves in the log."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from common import log
from common.sampling import StopConditions
from common.types import FinishReason
from scheduler.timeline import Timeline
from services import request_log
from services.engine import Engine
from services.latencies import Latencies
from services.timelines import Timelines
from tests.services.test_engine import GREEDY, join, read, run

TRACE = f"00-{'1' * 32}-{'2' * 16}-01"


@pytest.fixture
def said() -> Iterator[io.StringIO]:
    """All that our packages log at info, in JSON."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(log.JsonFormatter())
    logger = logging.getLogger("services")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield out
    logger.removeHandler(handler)
    logger.setLevel(level)


def lines(said: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said.getvalue().splitlines()]


def test_a_request_that_ended_leaves_one_line_with_all_its_times(said: io.StringIO) -> None:
    timeline = Timeline("mine", 1_000_000, tenant="acme", trace=TRACE)
    timeline.num_choices, timeline.num_prompt, timeline.num_cached, timeline.num_output = 1, 24, 16, 5
    timeline.num_preemptions, timeline.num_drafted, timeline.num_accepted = 2, 4, 3
    timeline.admitted_ns, timeline.first_token_ns = 3_000_000, 7_500_000
    timeline.last_token_ns, timeline.ended_ns, timeline.reason = 9_000_000, 9_100_000, FinishReason.LENGTH
    request_log.tell(timeline)

    (line,) = lines(said)
    assert line.pop("time") and line.pop("logger") == "services.request_log"
    assert line == {
        "level": "info",
        "message": "request mine finished: length, 5 tokens, 8.1 ms",
        "request_id": "mine",
        "trace_id": "1" * 32,
        "tenant": "acme",
        "reason": "length",
        "error": None,
        "choices": 1,
        "prompt_tokens": 24,
        "cached_prompt_tokens": 16,
        "output_tokens": 5,
        "preemptions": 2,
        "drafted_tokens": 4,
        "accepted_tokens": 3,
        "queue_ms": 2.0,
        "prefill_ms": 4.5,
        "decode_ms": 1.5,
        "total_ms": 8.1,
    }


def test_one_that_never_ran_has_waited_until_its_end(said: io.StringIO) -> None:
    timeline = Timeline("late", 0)
    timeline.ended_ns, timeline.reason, timeline.error = 2_000_000, FinishReason.ABORTED, "DeadlineExceeded"
    request_log.tell(timeline)

    (line,) = lines(said)
    assert (line["queue_ms"], line["prefill_ms"], line["decode_ms"], line["trace_id"]) == (2.0, None, None, None)
    assert line["message"] == "request late finished: DeadlineExceeded, 0 tokens, 2.0 ms"


def test_a_request_leaves_its_line_once_whatever_number_of_choices_it_has(said: io.StringIO) -> None:
    latencies = Latencies()

    async def test(engine: Engine) -> None:
        join(engine)
        stream = engine.submit([1, 2], GREEDY, StopConditions(max_tokens=3), choices=3, timeline=engine.timeline("x"))
        await read(stream)
        assert engine.timelines.num_open == 0

    run(test, timelines=Timelines(max_requests=0, on_end=(request_log.tell, latencies.add)))

    assert [(line["request_id"], line["output_tokens"]) for line in lines(said)] == [("x", 9)]
    assert (sum(latencies.request.counts), sum(latencies.first_token.counts), sum(latencies.token.counts)) == (1, 1, 0)


def test_who_fails_to_hear_of_an_ended_request_disturbs_nobody(said: io.StringIO) -> None:
    def plug_in(timeline: Timeline) -> None:
        raise RuntimeError(timeline.request_id)

    latencies = Latencies()
    timelines = Timelines(on_end=(plug_in, latencies.add))
    timeline = Timeline("secret", 0)
    timelines.opened(timeline)
    timelines.ended(timeline)

    assert timelines.find("secret") is timeline and sum(latencies.request.counts) == 1
    assert "RuntimeError" in said.getvalue() and "secret" not in said.getvalue()


def test_a_line_about_a_request_says_which_and_others_do_not(said: io.StringIO) -> None:
    logger = logging.getLogger("services.anything")

    async def about_one() -> None:
        log.about(request_id="mine", trace_id="")
        log.about(trace_id="1" * 32)
        logger.info("it waits", extra={"fields": {"steps": 3}})

    async def main() -> None:
        await asyncio.create_task(about_one())
        logger.info("nothing in particular")

    asyncio.run(main())

    first, second = lines(said)
    assert (first["request_id"], first["trace_id"], first["steps"]) == ("mine", "1" * 32, 3)
    assert not {"request_id", "trace_id"} & second.keys()


def test_what_a_line_is_about_has_a_name_that_may_hold_words() -> None:
    with pytest.raises(AssertionError, match="prompt"):
        log.about(prompt="the caller's words")
