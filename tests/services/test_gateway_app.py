"""The gateway as an ASGI application, before a scheduler that says what a test wants."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import pytest

from common.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PagewireError,
    RequestFailed,
    Superseded,
    TicketRefused,
    TicketStale,
    Unauthenticated,
    Unavailable,
)
from pagewire.answers import Delta, Finish
from protos import inference_pb2 as pb
from protos.monitoring_pb2 import GetStatusResponse
from services.gateway import app as app_module
from services.gateway import positions, upstream
from services.gateway.bodies import Bodies
from services.gateway.events import ABORT
from services.gateway.known_keys import KnownKeys
from services.gateway.metrics import Metrics
from services.gateway.positions import Heard, Writer, pack_prompt
from services.gateway.upstream import Upstream
from tests.services.gateway_calls import CHAT, HI, Call, Scheduler, Stream, ask, delta, finish, gateway
from tests.services.served import HANG_S


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Overloaded("full", 2.5), 429, "rate_limit_exceeded"),
        (Unavailable("no executor", 1.0), 503, "unavailable"),
        (RequestFailed("it kills", "id"), 500, "request_failed"),
        (PagewireError("odd"), 500, None),
    ],
)
def test_an_error_before_the_first_token_has_a_status_of_its_own(
    stream: bool, error: Exception, status: int, code: str | None
) -> None:
    call = ask(gateway(Scheduler(then=error)), {**HI, "stream": stream})

    assert (call.status, call.json["error"]["code"]) == (status, code)
    if isinstance(error, Overloaded):
        assert (call.headers["retry-after"], call.headers["retry-after-ms"]) == ("3", "2500")


def test_an_error_behind_the_first_token_is_the_last_event() -> None:
    call = ask(gateway(Scheduler(delta(0, 5, "a"), then=Superseded("another one reads on"))), {**HI, "stream": True})

    assert call.status == 200
    assert call.events[0]["choices"][0]["delta"]["content"] == "a"
    assert call.events[-1]["error"]["code"] == "superseded"


@pytest.mark.parametrize("error", [TicketRefused("another key"), TicketStale("another model")])
def test_who_sent_no_id_is_not_told_that_it_was_refused(error: PagewireError) -> None:
    begun = [delta(0, 5, "a")]
    stream = ask(gateway(Scheduler(*begun, then=error)), {**HI, "stream": True})
    whole = ask(gateway(Scheduler(*begun, then=error)), HI)

    assert stream.events[-1]["error"]["code"] == "unavailable" and str(error) in stream.events[-1]["error"]["message"]
    assert (whole.status, whole.json["error"]["type"]) == (503, "server_error")


def test_a_stream_that_fails_midway_is_counted_as_a_failure() -> None:
    app = gateway(Scheduler(delta(0, 5, "a"), then=Unavailable("no executor")))
    assert ask(app, {**HI, "stream": True}).status == 200

    lines = b"".join(ask(app, {}, path="/metrics", method="GET").parts).decode().splitlines()
    counted = [line for line in lines if line.startswith("pagewire_gateway_requests_total")]
    assert counted == ['pagewire_gateway_requests_total{path="/v1/chat/completions",status="503"} 1']


@pytest.mark.parametrize("stream", [True, False])
def test_a_bug_is_told_by_an_id_and_its_words_by_nobody(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        call = ask(gateway(Scheduler(then=RuntimeError("a secret"))), {**HI, "stream": stream})

    assert call.status == 500
    told = call.json["error"]
    assert told["code"] == "internal_error" and "a secret" not in told["message"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert told["message"].split()[2].rstrip(";") in line and "RuntimeError" in line and "a secret" not in line


@pytest.mark.parametrize(("resumable", "lingers"), [(None, False), (True, True)])
def test_a_reader_who_leaves_ends_his_request_unless_it_waits_for_him(resumable: bool | None, lingers: bool) -> None:
    scheduler = Scheduler(delta(0, 5, "a"))

    async def run() -> None:
        call = Call({**HI, "stream": True, "resumable": resumable})
        answering = asyncio.create_task(gateway(scheduler)(call.scope, call.receive, call.send))
        while not call.parts:
            await asyncio.sleep(0)
        call.left.set()
        await answering

    asyncio.run(run())
    assert scheduler.streams[0].closed == [lingers]


def test_a_reader_who_leaves_before_the_whole_answer_is_there_ends_it() -> None:
    scheduler = Scheduler(delta(0, 5, "a"))

    async def run() -> int:
        call = Call(HI)
        answering = asyncio.create_task(gateway(scheduler)(call.scope, call.receive, call.send))
        while not scheduler.streams:
            await asyncio.sleep(0)
        call.left.set()
        await answering
        return call.status

    assert asyncio.run(run()) == 0
    assert scheduler.streams[0].closed == [False]


def test_a_whole_answer_that_the_gateway_s_end_cuts_off_may_be_asked_for_elsewhere() -> None:
    async def run() -> tuple[Call, Scheduler]:
        scheduler = Scheduler(delta(0, 5, "a"))
        app, call = gateway(scheduler), Call(HI)
        answering = asyncio.create_task(app(call.scope, call.receive, call.send))
        while not scheduler.streams:
            await asyncio.sleep(0)
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
        assert answering.cancelled()
        return call, scheduler

    call, scheduler = asyncio.run(run())
    assert (call.status, call.json["error"]["code"]) == (503, "unavailable")
    assert scheduler.streams[0].closed == [False]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("is_read", [True, False], ids=["made", "written"])
def test_what_is_cut_off_by_the_gateway_s_end_while_it_is_made_or_written_is_counted_as_a_failure(
    stream: bool, is_read: bool
) -> None:
    async def run() -> list[str]:
        scheduler = Scheduler(delta(0, 5, "a"), *(() if is_read else (finish(),)))
        app, call, writes = gateway(scheduler), Call({**HI, "stream": stream}), asyncio.Event()

        async def send(message: Any) -> None:
            writes.set()
            if not is_read:
                await asyncio.Event().wait()
            await call.send(message)

        answering = asyncio.create_task(app(call.scope, call.receive, send))
        async with asyncio.timeout(HANG_S):
            while not (scheduler.streams if is_read and not stream else writes.is_set()):
                await asyncio.sleep(0)
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
        look = Call({}, "/metrics", method="GET")
        await app(look.scope, look.receive, look.send)
        return b"".join(look.parts).decode().splitlines()

    lines = asyncio.run(run())
    counted = [line for line in lines if line.startswith("pagewire_gateway_requests_total{")]
    assert counted == ['pagewire_gateway_requests_total{path="/v1/chat/completions",status="503"} 1']
    assert "pagewire_gateway_request_duration_seconds_count 1" in lines


def cut(body: dict[str, Any], path: str, send: Callable[[Call, Any], Awaitable[None]] = Call.send) -> Call:
    """A stream that the gateway's end cuts off behind its first event."""

    async def run() -> Call:
        scheduler = Scheduler(delta(0, 5, "a"))
        call = Call({**body, "stream": True}, path)
        answering = asyncio.create_task(
            gateway(scheduler)(call.scope, call.receive, lambda message: send(call, message))
        )
        async with asyncio.timeout(HANG_S):
            while b'"a"' not in b"".join(call.parts):
                await asyncio.sleep(0)
            await asyncio.sleep(0)  # it waits for the next one
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
        assert answering.cancelled()
        assert scheduler.streams[0].closed == [True], "it goes on for who comes back"
        return call

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, HI), ("/v1/completions", {"prompt": "a"}), ("/v1/responses", {"input": "a"})]
)
def test_a_stream_that_the_gateway_s_end_cuts_off_ends_with_an_error_and_its_last_id_is_good(
    path: str, body: dict[str, Any]
) -> None:
    call = cut({**body, "request_id": "mine", "seed": 7}, path)

    *told, last = call.events
    assert told and last.get("error", last)["code"] == "unavailable"
    assert last.get("sequence_number") == (len(told) if path == "/v1/responses" else None)
    assert b"id: " not in b"".join(call.parts).split(b"\n\n")[-2], "who comes back does so behind what he was told"


def test_a_reader_who_is_slow_when_the_gateway_ends_does_not_keep_it() -> None:
    async def first_only(call: Call, message: Any) -> None:
        if b'"unavailable"' in message.get("body", b""):
            await asyncio.Event().wait()
        await call.send(message)

    call = cut(HI, CHAT, first_only)
    assert all("error" not in event for event in call.events)


def test_a_gateway_is_ready_until_it_drains_and_alive_even_then() -> None:
    app = gateway(Scheduler(then=Unavailable("none is there")))

    assert (ask(app, {}, path="/ready", method="GET").status, ask(app, {}, path="/live", method="GET").status) == (
        200,
        200,
    )
    app.draining = True
    call = ask(app, {}, path="/ready", method="GET")
    assert (call.status, call.json) == (503, {"status": "draining"})
    assert ask(app, {}, path="/live", method="GET").status == 200


@pytest.mark.parametrize(
    ("accept", "resumable", "count"),
    [
        (b"text/event-stream", None, 2),
        (b"application/json, Text/Event-Stream;q=0.5", None, 2),
        (b"text/event-stream", False, 0),
        (b"*/*", None, 0),  # as clients ask that know lines of data alone
        (b"application/json", None, 0),  # as OpenAI's own do
        (b"application/json", True, 2),
    ],
)
def test_events_have_ids_for_who_takes_events_unless_the_caller_says_otherwise(
    accept: bytes, resumable: bool | None, count: int
) -> None:
    asked = {**HI, "stream": True, "resumable": resumable}
    call = ask(gateway(Scheduler(delta(0, 5, "a"), finish())), asked, accept=accept)

    assert len(call.ids) == count
    assert count or all(line.startswith(b"data: ") for line in b"".join(call.parts).splitlines() if line)


def test_who_comes_back_with_an_id_gets_more_of_them() -> None:
    asked = {**HI, "stream": True, "request_id": "mine", "seed": 7}
    first = ask(gateway(Scheduler(delta(0, 5, "a"), then=Superseded("it breaks"))), asked)
    said = (delta(0, 5, "a"), delta(1, 6, "b"), finish())
    rest = ask(gateway(Scheduler(*said)), asked, headers=[(b"last-event-id", first.ids[-1])], accept=b"*/*")

    assert rest.ids


@pytest.mark.parametrize(
    ("path", "body", "kept"),
    [
        (CHAT, {**HI, "logprobs": True, "stream": True}, 0),
        ("/v1/completions", {"prompt": "a", "logprobs": 0, "stream": True}, 0),
        (CHAT, {**HI, "logprobs": True}, 2),
        ("/v1/responses", {"input": "a", "include": ["message.output_text.logprobs"], "stream": True}, 2),
    ],
)
def test_log_probabilities_that_were_told_are_kept_only_where_the_end_tells_them_again(
    path: str, body: dict[str, Any], kept: int
) -> None:
    said = [delta(0, 5, "a"), delta(1, 6, "b")]
    for each in said:
        each.delta.logprobs.add(token=pb.TokenLogprob(token_id=5, logprob=-1.0, text=each.delta.text.encode()))
    scheduler = Scheduler(*said, finish())

    call = ask(gateway(scheduler), body, path=path)

    assert b"".join(call.parts).count(b"-1.0") >= 2
    assert len(scheduler.streams[0].continuation.heard(0)[1]) == kept


def test_half_a_character_is_told_with_the_rest_of_it() -> None:
    call = ask(gateway(Scheduler(delta(0, 5, ""), delta(1, 6, "é"), finish())), {**HI, "stream": True})

    assert [event["choices"][0]["delta"] for event in call.events[:-1]] == [{"role": "assistant", "content": "é"}, {}]


def test_an_echoed_prompt_is_told_once_though_its_reader_comes_back_after_half_a_character() -> None:
    asked = {"prompt": "hi", "echo": True, "stream": True, "request_id": "mine", "seed": 7}
    half, rest = delta(0, 5, ""), delta(1, 6, "é")
    broken = ask(gateway(Scheduler(half, then=Superseded("it breaks"))), asked, path="/v1/completions")
    assert broken.events[0]["choices"][0]["text"] == "hi"

    again = gateway(Scheduler(half, rest, finish()))
    call = ask(again, asked, path="/v1/completions", headers=[(b"last-event-id", broken.ids[0])])

    assert [event["choices"][0]["text"] for event in call.events[:-1]] == ["é", ""]


class Reader(Scheduler):
    """Tells the text of tokens when a test says so."""

    def __init__(self) -> None:
        super().__init__(delta(0, 5, "a"), finish())
        self.go_on = asyncio.Event()
        self.problem: PagewireError | None = None
        self.num_asked = self.num_open = 0

    async def text(self, ids: Sequence[int], key: str) -> str:
        self.num_asked += 1
        self.num_open += 1
        try:
            await self.go_on.wait()
            if self.problem is not None:
                raise self.problem
            return f"<{ids[0]}>"
        finally:
            self.num_open -= 1


ECHO: dict[str, Any] = {"prompt": [*([i] for i in range(19)), "words"], "echo": True, "max_tokens": 0}


async def echoing(then: Callable[[Reader, Call], None]) -> tuple[Reader, Call]:
    """A request for many echoes, of which the first ones are asked for when `then` is called."""
    reader, call = Reader(), Call(ECHO, "/v1/completions")
    answering = asyncio.create_task(gateway(reader, max_prompts=20)(call.scope, call.receive, call.send))
    async with asyncio.timeout(HANG_S):
        while reader.num_open < 8:
            await asyncio.sleep(0)
        then(reader, call)
        await answering
    assert reader.num_open == 0
    return reader, call


def test_the_texts_of_prompts_are_asked_for_a_few_at_once_and_told_in_their_order() -> None:
    open_at_once: list[int] = []

    def go_on(reader: Reader, call: Call) -> None:
        open_at_once.append(reader.num_open)
        reader.go_on.set()

    reader, call = asyncio.run(echoing(go_on))

    assert [choice["text"] for choice in call.json["choices"]] == [*(f"<{i}>" for i in range(19)), "words"]
    assert (open_at_once, reader.num_asked) == ([8], 19)


def test_who_leaves_before_his_prompts_are_read_is_asked_for_no_more() -> None:
    reader, call = asyncio.run(echoing(lambda reader, call: call.left.set()))

    assert (reader.num_asked, reader.streams, call.status) == (8, [], 0)


def test_a_prompt_whose_text_is_not_to_be_had_ends_its_request_and_the_other_questions() -> None:
    def fail(reader: Reader, call: Call) -> None:
        reader.problem = Unavailable("gone")
        reader.go_on.set()

    reader, call = asyncio.run(echoing(fail))

    assert (call.status, reader.streams) == (503, []) and reader.num_asked < 19


def test_an_id_with_more_calls_than_tokens_is_refused_before_room_is_made_for_them() -> None:
    forged = Heard(calls=1000, digest=bytes(8))
    id = Writer("mine", 7, 0, prompts=1, choices=1).id(1, pack_prompt(9) + forged.packed())
    asked = {**HI, "stream": True, "resume_token_ids": [[]]}

    call = ask(gateway(Scheduler(delta(0, 5, "a"), finish())), asked, headers=[(b"last-event-id", id.encode())])

    assert (call.status, call.json["error"]["param"]) == (400, "Last-Event-ID")


def test_requests_are_bounded() -> None:
    async def run() -> Call:
        app = gateway(Scheduler(delta(0, 5, "a")), max_requests=1)
        first, second = Call({**HI, "stream": True}), Call(HI)
        answering = asyncio.create_task(app(first.scope, first.receive, first.send))
        while not first.parts:
            await asyncio.sleep(0)
        await app(second.scope, second.receive, second.send)
        first.left.set()
        await answering
        return second

    second = asyncio.run(run())
    assert second.status == 429 and "1 requests are open" in second.json["error"]["message"]


async def read_beside(others: int, body: bytes) -> bytes:
    """Read `body` while that many bytes of another one are here, and the rest of it is not."""
    bodies = Bodies(max_bytes=1_000_000, limit_s=30, max_total_bytes=200_000)
    scope = {"headers": [(b"content-type", b"application/json")]}

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    parts = iter([{"type": "http.request", "body": bytes(others), "more_body": True}])

    async def receive_a_part() -> Any:
        return next(parts, None) or await asyncio.Event().wait()

    reading = asyncio.create_task(bodies.read(scope, receive_a_part))
    await asyncio.sleep(0)
    try:
        return await bodies.read(scope, receive)
    finally:
        reading.cancel()


def test_large_bodies_of_strangers_are_bounded_and_refuse_no_small_one() -> None:
    assert asyncio.run(read_beside(199_999, b"{}")) == b"{}"
    with pytest.raises(Overloaded):
        asyncio.run(read_beside(260_000, bytes(80_000)))


class OfOneKey(Scheduler):
    """A scheduler that takes one key, as long as it is there."""

    def __init__(self, *messages: pb.GenerateStreamResponse) -> None:
        super().__init__(*messages)
        self.asked: list[str] = []  # whether it takes this key
        self.is_there = True

    async def model(self, name: str, key: str) -> pb.GetModelResponse:
        self.asked.append(key)
        if not self.is_there:
            raise Unavailable("no scheduler is there")
        if key != "mine":
            raise Unauthenticated("an API key is needed")
        return pb.GetModelResponse(model="m")


class InParts(Call):
    """Its body comes in two parts."""

    num_parts = 0  # that were taken

    async def receive(self) -> Any:
        if self.num_parts == 2:
            return await super().receive()
        self.num_parts += 1
        middle = len(self._body) - 10
        part = self._body[:middle] if self.num_parts == 1 else self._body[middle:]
        self._asked = True
        return {"type": "http.request", "body": part, "more_body": self.num_parts == 1}


@pytest.mark.parametrize(
    ("size", "keys", "statuses", "parts", "asked"),
    [
        (70_000, ["other", "", "b d"], [401, 401, 401], [1, 1, 0], ["other", ""]),
        (70_000, ["mine", "mine"], [200, 200], [2, 2], ["mine"]),
        (60_000, ["other", "mine"], [200, 200], [2, 2], []),  # of such the scheduler says it
    ],
)
def test_a_large_body_is_taken_only_from_those_whose_key_is_known(
    size: int, keys: list[str], statuses: list[int], parts: list[int], asked: list[str]
) -> None:
    scheduler = OfOneKey(delta(0, 5, "a"), finish())
    app = gateway(scheduler, max_body_bytes=100_000)
    calls: list[InParts] = []

    async def run() -> None:
        for key in keys:
            headers = [(b"authorization", b"Bearer " + key.encode())] if key else []
            calls.append(InParts({"messages": [{"role": "user", "content": "x" * size}]}, headers=headers))
            await app(calls[-1].scope, calls[-1].receive, calls[-1].send)

    asyncio.run(run())
    assert [call.status for call in calls] == statuses
    assert [call.num_parts for call in calls] == parts
    assert scheduler.asked == asked


def test_a_large_body_of_a_stranger_is_not_taken_either_while_no_scheduler_says_who_he_is() -> None:
    scheduler = OfOneKey(delta(0, 5, "a"), finish())
    app = gateway(scheduler, max_body_bytes=100_000)

    def status(key: bytes) -> int:
        body = {"messages": [{"role": "user", "content": "x" * 70_000}]}
        return ask(app, body, headers=[(b"authorization", b"Bearer " + key)]).status

    assert status(b"mine") == 200
    scheduler.is_there = False
    assert [status(b"mine"), status(b"other")] == [200, 503]


def test_who_asks_for_metrics_at_once_or_soon_asks_the_scheduler_once() -> None:
    now_s, asked = [0.0], 0

    async def ask_status() -> GetStatusResponse:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise Unavailable("it is gone")
        return GetStatusResponse()

    async def run() -> list[bool]:
        metrics = Metrics(ask_status, clock_s=lambda: now_s[0])
        texts = [*await asyncio.gather(metrics.text(), metrics.text()), await metrics.text()]
        now_s[0] = 1.0
        texts += [await metrics.text(), await metrics.text()]
        return ["pagewire_up 1" in text for text in texts]

    assert asyncio.run(run()) == [True, True, True, False, False]
    assert asked == 2


class Keeper:
    """In place of an Upstream that knows one key, and answers after what a test waits for."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.problem: PagewireError | None = None

    async def model(self, name: str, key: str) -> pb.GetModelResponse:
        await self.go_on.wait()
        if self.problem is not None:
            raise self.problem
        if key != "mine":
            raise Unauthenticated("an API key is needed")
        return pb.GetModelResponse(model="m")


@pytest.mark.parametrize(
    ("needs_key", "headers", "status"),
    [(False, (), 200), (True, (), 401), (True, [(b"authorization", b"Bearer mine")], 200)],
)
def test_metrics_are_for_those_with_a_key_where_it_is_needed(
    needs_key: bool, headers: Sequence[tuple[bytes, bytes]], status: int
) -> None:
    app = gateway(Keeper(), metrics_need_key=needs_key)

    assert ask(app, {}, path="/metrics", headers=headers, method="GET").status == status


@pytest.mark.parametrize("problem", [Unavailable("gone"), Overloaded("full"), DeadlineExceeded("late")])
def test_beside_a_scheduler_that_is_gone_a_known_key_hears_of_both_and_another_of_the_gateway_alone(
    problem: PagewireError,
) -> None:
    keeper = Keeper()

    async def ask_status() -> GetStatusResponse:
        raise problem

    async def ask_reachable() -> bool:
        return False

    app = gateway(keeper, metrics=Metrics(ask_status, ask_reachable), metrics_need_key=True)
    known, stranger = ([(b"authorization", b"Bearer " + key)] for key in (b"mine", b"other"))
    for headers in (known, stranger):
        ask(app, {}, path="/v1/models", headers=headers, method="GET")
    keeper.problem = problem

    told = [ask(app, {}, path="/metrics", headers=headers, method="GET") for headers in (known, stranger, ())]
    assert [call.status for call in told] == [200, 200, 401]
    lines = [b"".join(call.parts).splitlines() for call in told]
    assert all(b"pagewire_gateway_scheduler_reachable 0" in each for each in lines[:2])
    assert [b"pagewire_up 0" in each for each in lines] == [True, False, False]
    names = {line.split()[2] for line in lines[1] if line.startswith(b"# TYPE")}
    assert b"pagewire_gateway_open_requests" in names
    assert all(name.startswith(b"pagewire_gateway_") for name in names)


def test_a_scheduler_that_stands_still_keeps_nobody_from_hearing_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "_KEY_S", 0.01)
    keeper = Keeper()

    async def run() -> list[int]:
        app = gateway(keeper, metrics_need_key=True)
        keys = (b"mine", b"mine", b"other")
        calls = [
            Call({}, path="/metrics", headers=[(b"authorization", b"Bearer " + key)], method="GET") for key in keys
        ]
        await app(calls[0].scope, calls[0].receive, calls[0].send)
        keeper.go_on.clear()
        for call in calls[1:]:
            await asyncio.wait_for(app(call.scope, call.receive, call.send), HANG_S)
        return [call.status for call in calls]

    assert asyncio.run(run()) == [200, 200, 200]


def test_a_key_is_known_for_a_while_and_until_it_is_refused_or_others_were_taken() -> None:
    now_s = [0.0]
    keys = KnownKeys(for_s=10, most=2, clock_s=lambda: now_s[0])
    for key in ("a", "b", "a", "c"):
        keys.taken(key)

    assert [key in keys for key in ("a", "b", "c", "d")] == [True, False, True, False]
    keys.refused("c")
    assert "c" not in keys
    now_s[0] = 10.0
    assert "a" not in keys


def test_requests_that_only_look_are_bounded_too_and_apart() -> None:
    keeper = Keeper()

    async def run() -> list[int]:
        app = gateway(keeper, max_requests=1)
        keeper.go_on.clear()
        calls = [Call({}, path="/v1/models", method="GET") for _ in range(2)]
        answering = [asyncio.create_task(app(call.scope, call.receive, call.send)) for call in calls]
        await answering[1]
        other = Call([])
        await app(other.scope, other.receive, other.send)
        keeper.go_on.set()
        await answering[0]
        last = Call({}, path="/metrics", method="GET")
        await app(last.scope, last.receive, last.send)
        return [call.status for call in (*calls, other, last)]

    assert asyncio.run(run()) == [401, 429, 400, 200]


@pytest.mark.parametrize("name", ["mine", "m" * 101, "m" * 500])
def test_requests_that_their_caller_calls_the_same_are_two_and_told_apart(name: str) -> None:
    scheduler = Scheduler(delta(0, 5, "a"), finish())
    app = gateway(scheduler)
    told = [ask(app, HI, headers=[(b"x-request-id", name.encode())]).headers["x-request-id"] for _ in range(2)]

    assert told == [stream.continuation.request_id for stream in scheduler.streams]
    assert len(set(told)) == 2 and all(each.startswith(name[:80]) and len(each) <= 93 for each in told)


def test_a_name_in_the_body_is_the_request_s_and_a_strange_one_in_the_head_is_nobody_s() -> None:
    scheduler = Scheduler(delta(0, 5, "a"), finish())
    app, head = gateway(scheduler), [(b"x-request-id", b"mine")]

    assert ask(app, {**HI, "request_id": "exactly"}, headers=head).headers["x-request-id"] == "exactly"
    assert scheduler.streams[-1].continuation.request_id == "exactly"
    assert "words" not in ask(app, HI, headers=[(b"x-request-id", b"two words")]).headers["x-request-id"]


@pytest.mark.parametrize("kind", [b"text/plain", b"", b"application/x-www-form-urlencoded"])
def test_what_any_page_can_have_a_browser_send_is_refused(kind: bytes) -> None:
    call = ask(gateway(Scheduler()), HI, headers=[(b"content-type", kind)])

    assert (call.status, call.json["error"]["param"]) == (415, "Content-Type")


def test_a_stream_that_waits_says_that_it_is_alive() -> None:
    async def run() -> Call:
        call = Call({**HI, "stream": True})
        answering = asyncio.create_task(gateway(Scheduler(), comment_s=0.01)(call.scope, call.receive, call.send))
        while len(call.parts) < 2:
            await asyncio.sleep(0)
        call.left.set()
        await answering
        return call

    call = asyncio.run(run())
    assert call.status == 200
    assert all(line.startswith((b":", b"retry:")) for line in b"".join(call.parts).splitlines())


def test_an_event_waits_for_the_comment_that_is_being_written() -> None:
    commented = asyncio.Event()
    at_once: list[int] = []  # writes that were under way, at each one's begin

    class Later(Stream):
        async def next(self) -> Delta | Finish | None:
            await commented.wait()
            return await super().next()

    class Slow(Scheduler):
        def ask(self, request: pb.GenerateStreamRequest, key: str) -> Stream:
            return Later(request, [delta(0, 5, "a"), finish()], None)

    async def run() -> Call:
        call = Call({**HI, "stream": True})
        writing = 0

        async def send(message: Any) -> None:
            nonlocal writing
            at_once.append(writing)
            writing += 1
            if b": the answer" in message.get("body", b""):
                commented.set()
                for _ in range(20):
                    await asyncio.sleep(0)
            writing -= 1
            await call.send(message)

        await gateway(Slow(), comment_s=0.001)(call.scope, call.receive, send)
        return call

    call = asyncio.run(run())
    assert call.events[-1] == "[DONE]" and b": the answer" in call.parts[0]
    assert set(at_once) == {0}


async def nothing(message: Any) -> None:
    await asyncio.Event().wait()


async def no_comment(message: Any) -> None:
    if message.get("body", b"").startswith(b":"):
        await asyncio.Event().wait()


@pytest.mark.parametrize(("takes", "patience"), [(nothing, {}), (no_comment, {"comment_s": 0.001})])
def test_a_reader_who_does_not_take_what_is_sent_is_cut_and_his_request_ended(
    takes: Callable[[Any], Awaitable[None]], patience: dict[str, Any]
) -> None:
    cut: list[bool] = []
    scheduler = Scheduler(delta(0, 5, "a"))

    async def run() -> None:
        call = Call({**HI, "stream": True})
        call.scope["extensions"] = {ABORT: {"now": lambda: cut.append(True)}}
        app = gateway(scheduler, reader_s=0.01, **patience)
        await asyncio.wait_for(app(call.scope, call.receive, takes), HANG_S)

    asyncio.run(run())
    assert cut == [True] and scheduler.streams[0].closed == [False]


def test_the_tickets_of_an_id_are_of_what_was_told_and_not_of_what_was_read_ahead() -> None:
    first = pb.GenerateStreamResponse(prompt=pb.PromptInfo(model="m", ticket=b"0"))
    tokens = [delta(i, 65 + i, "a") for i in range(4)]
    for i, each in enumerate(tokens):
        each.delta.ticket = b"%d" % (i + 1)
    body = {"prompt": [[1], [2]], "stream": True}

    call = ask(gateway(Scheduler(first, *tokens, finish())), body, path="/v1/completions")

    ids = [line.removeprefix(b"id: ").decode() for line in b"".join(call.parts).splitlines() if line[:4] == b"id: "]
    told = [choice for id in ids for choices in positions.read(id).choices for choice in choices]
    assert {heard.tokens for heard in told} == {0, 1, 2, 3, 4}
    assert [heard.ticket for heard in told] == [b"%d" % heard.tokens for heard in told]


def test_what_answers_is_told_also_where_a_later_prompt_begins_first() -> None:
    begun = pb.GenerateStreamResponse(prompt=pb.PromptInfo(model="m", determinism="d"))

    class Late(Stream):
        async def next(self) -> Delta | Finish | None:
            for _ in range(50):
                await asyncio.sleep(0)
            return await super().next()

    class Unequal(Scheduler):
        def ask(self, request: pb.GenerateStreamRequest, key: str) -> Stream:
            kind = Stream if self.streams else Late
            self.streams.append(kind(request, [begun, delta(0, 5, "a"), delta(1, 6, "b"), finish()], None))
            return self.streams[-1]

    call = ask(gateway(Unequal()), {"prompt": ["a", "b"], "stream": True}, path="/v1/completions")

    chunks = call.events[:-1]
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [1, 1, 1, 0, 0, 0]
    assert {(chunk["model"], chunk["system_fingerprint"]) for chunk in chunks} == {("m", "fp_d")}


@pytest.mark.parametrize("tokens", [None, [[5]]], ids=["again", "resumed"])
def test_a_prompt_that_was_told_with_half_a_character_is_not_told_again(tokens: list[list[int]] | None) -> None:
    said = (delta(0, 5, ""), delta(1, 6, "é"), finish())
    body = {"prompt": "Once", "echo": True, "stream": True, "return_token_ids": tokens is not None}
    path = "/v1/completions"
    whole = ask(gateway(Scheduler(*said)), body, path=path)
    id = next(line for line in b"".join(whole.parts).splitlines() if line.startswith(b"id: ")).removeprefix(b"id: ")

    rest = ask(
        gateway(Scheduler(*(said if tokens is None else said[1:]))),
        body if tokens is None else {**body, "resume_token_ids": tokens},
        path=path,
        headers=[(b"last-event-id", id)],
    )

    told = [event["choices"][0]["text"] for event in (*whole.events[:1], *rest.events[:-1])]
    assert told == ["Once", "é", ""]


@pytest.mark.parametrize(("shown", "key"), [(b"Bearer mine", "mine"), (b"Bearer ", ""), (b"bearer", "")])
def test_a_client_without_a_key_is_let_through_to_a_scheduler_that_asks_for_none(shown: bytes, key: str) -> None:
    scheduler = Scheduler(delta(0, 5, "a"), finish())

    call = ask(gateway(scheduler), HI, headers=[(b"authorization", shown)])

    assert (call.status, scheduler.keys) == (200, [key])


class NoVectors:
    """In place of an Upstream whose model makes text."""

    async def embed(self, request: pb.EmbedRequest, key: str) -> pb.EmbedResponse:
        assert (request.inputs[0].text, key) == ("hi", "")
        raise InvalidRequest("model", "m makes text, and no embeddings: modules.json is not there")


def test_embeddings_of_a_model_that_makes_none_are_refused_as_what_is_not_served() -> None:
    told = ask(gateway(NoVectors()), {"input": "hi"}, path="/v1/embeddings")

    assert told.status == 400
    error = told.json["error"]
    assert (error["param"], error["code"]) == ("model", "unsupported")
    assert error["message"] == "model: m makes text, and no embeddings: modules.json is not there"


class Restarted(Upstream):
    """Its scheduler is gone until `answers` is 0."""

    def __init__(self, answers: int, patience_s: float) -> None:
        super().__init__(cast("Any", None), [], begin_patience_s=patience_s)
        self.answers = answers

    async def _first(self, ask: Any) -> Any:
        self.answers -= 1
        if self.answers >= 0:
            raise Unavailable("no scheduler is there")
        return pb.EmbedResponse(model="m")


def test_vectors_are_asked_for_again_where_a_scheduler_was_lost_on_the_way_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upstream, "_LOOK_AGAIN_S", 0.0)

    async def test() -> None:
        assert (await Restarted(2, patience_s=60).embed(pb.EmbedRequest(), "")).model == "m"
        with pytest.raises(Unavailable):
            await Restarted(2, patience_s=0).embed(pb.EmbedRequest(), "")

    asyncio.run(test())
