"""The span that a request of the Python client has where its program traces, and what its server is told of it."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import INVALID_SPAN, SpanKind, StatusCode

from common.errors import InvalidRequest, Overloaded, PagewireError, UnknownModel
from pagewire import AsyncClient, AsyncStream, Client
from pagewire.traces import Span
from protos import inference_pb2 as pb
from services.handlers import Context
from tests.services.scripted import GONE, Script, delta, finish, first, played, saying
from tests.services.served import until
from tests.services.spans import Spans, told
from tests.services.test_client_embeddings import answer as vectors
from tests.services.test_client_streams import call, standing, texts

both = pytest.mark.parametrize("kind", [Client, AsyncClient])
Kind = type[Client | AsyncClient]

SECRET = "the caller's own words"
END = pb.GenerateStreamResponse(
    finish=pb.Finish(
        reason=pb.FINISH_REASON_STOP_STRING,
        usage=pb.Usage(prompt_tokens=7, cached_prompt_tokens=4, completion_tokens=2),
    )
)


def set_up(monkeypatch: pytest.MonkeyPatch, spans: Spans) -> Spans:
    """What a program does once, for all of its process."""
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: spans.provider)
    return spans


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    return set_up(monkeypatch, Spans())


def listening(script: Script) -> tuple[Script, list[str]]:
    """The script, and the traces that its calls are part of."""
    traces: list[str] = []

    async def listen(request: Any, context: Context) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        traces.append(str(dict(context.invocation_metadata() or ()).get("traceparent")))
        async for message in script(request, context):
            yield message

    return listen, traces


async def ask(kind: Kind, address: str, method: str = "generate", *args: Any, **settings: Any) -> Any:
    """By either client. One that is refused gives up at once."""
    args = args or ("hi",)
    if issubclass(kind, AsyncClient):
        async with kind(address, patience_s=0.5) as client:
            return await getattr(client, method)(*args, **settings)

    def blocking() -> Any:
        with kind(address, patience_s=0.5) as client:
            return getattr(client, method)(*args, **settings)

    return await asyncio.to_thread(blocking)


async def first_text(stream: Any) -> str:
    new = await anext(stream) if isinstance(stream, AsyncStream) else await asyncio.to_thread(next, stream)
    return str(new.text)


def header(span: Any) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def the_one(spans: Spans) -> ReadableSpan:
    (span,) = spans.ended
    return span


# ---- what it says


@both
def test_a_request_has_a_span_with_what_was_asked_for_and_what_came_of_it(kind: Kind, spans: Spans) -> None:
    addresses: list[str] = []

    async def generate(address: str) -> Any:
        addresses.append(address)
        settings = {"temperature": 0.1, "top_k": 5, "presence_penalty": 0.5, "seed": 3, "stop": SECRET, "model": "m"}
        return await ask(kind, address, "generate", SECRET, request_id="r", **settings)

    with played(saying(first(prompt_tokens=7), delta(0, 65, 66), END)) as (_, run):
        run(generate)

    span = the_one(spans)
    assert (span.name, span.kind, span.status.status_code) == ("text_completion m", SpanKind.CLIENT, StatusCode.UNSET)
    attributes = dict(span.attributes or {})
    waited_s: Any = attributes.pop("gen_ai.response.time_to_first_chunk")
    assert 0 < waited_s < 30
    assert attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "pagewire",
        "gen_ai.request.model": "m",
        "gen_ai.request.stream": True,
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.max_tokens": 9,  # as its server told
        "gen_ai.request.temperature": 0.1,
        "gen_ai.request.top_k": 5,
        "gen_ai.request.presence_penalty": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.response.id": "r",
        "gen_ai.response.model": "m",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "pagewire.broken_calls": 0,
        "server.address": "127.0.0.1",
        "server.port": int(addresses[0].rpartition(":")[2]),
    }
    assert SECRET not in span.to_json() and "AB" not in span.to_json()


def test_a_chat_is_called_one_and_a_model_that_was_not_asked_for_is_the_one_that_answered(spans: Spans) -> None:
    async def generate(address: str) -> None:
        async with AsyncClient(address) as client:
            await client.generate(messages=[{"role": "user", "content": SECRET}], seed=(1 << 64) - 1, n=2)

    with played(saying(first(), delta(0, 65), finish(), delta(0, 66, choice=1), finish(1))) as (_, run):
        run(generate)

    span = the_one(spans)
    assert span.name == "chat m" and "gen_ai.request.model" not in (span.attributes or {})
    assert "gen_ai.request.seed" not in (span.attributes or {}), "no collector can be sent so great a number"
    assert told(span, "gen_ai.request.choice.count", "gen_ai.response.finish_reasons") == [2, ("length", "length")]
    assert told(span, "gen_ai.usage.output_tokens") == [2]


@both
@pytest.mark.parametrize(
    ("method", "args", "name"),
    [
        ("embed", (SECRET,), "embeddings v"),
        ("tokenize", (SECRET,), "tokenize"),
        ("detokenize", ([65],), "detokenize"),
        ("model", ("m",), "get_model m"),
        ("model", ("",), "get_model m"),
    ],
)
def test_what_one_message_answers_has_a_span_too(
    kind: Kind, method: str, args: tuple[Any, ...], name: str, spans: Spans
) -> None:
    answer = vectors([0.5, 1.0], [1.0, 0.0])
    answer.model, answer.dimensions = "v", 2
    with played(vectors=[answer]) as (_, run):
        run(lambda address: ask(kind, address, method, *args))

    span = the_one(spans)
    assert (span.name, span.kind) == (name, SpanKind.CLIENT)
    if method == "embed":
        assert told(span, "gen_ai.usage.input_tokens", "gen_ai.usage.cache_read.input_tokens") == [3, 1]
        assert told(span, "gen_ai.embeddings.dimension.count") == [2]
    assert SECRET not in span.to_json()


@both
def test_its_server_is_told_of_that_span_which_is_in_the_one_that_its_program_is_in(kind: Kind, spans: Spans) -> None:
    script, traces = listening(saying(first(), delta(0, 65), END))
    with spans.provider.get_tracer("program").start_as_current_span("mine") as mine, played(script) as (_, run):
        run(lambda address: ask(kind, address))

    span = spans.ended[0]
    assert span.parent is not None and span.parent.span_id == mine.get_span_context().span_id
    assert traces == [header(span)]


def test_a_span_that_is_not_recorded_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = set_up(monkeypatch, Spans(ALWAYS_OFF))
    script, traces = listening(saying(first(), END))
    with played(script) as (_, run):
        run(lambda address: ask(AsyncClient, address))

    assert [int(trace[-2:], 16) & 1 for trace in traces] == [0] and not spans.ended


# ---- calls that break


@both
def test_a_call_that_broke_is_an_event_of_the_one_span_that_all_calls_are_in(kind: Kind, spans: Spans) -> None:
    addresses: list[str] = []

    def begin(address: str) -> Any:
        addresses.append(address)
        return ask(kind, address)

    scripts = (
        saying(then=GONE),
        saying(first(), delta(0, 65), then=GONE),
        saying(first(resumed=True), delta(1, 66), END),
    )
    calls = [listening(script) for script in scripts]
    with played(*(script for script, _ in calls)) as (_, run):
        assert run(begin).text == "AB"

    span = the_one(spans)
    port = int(addresses[0].rpartition(":")[2])
    events = [dict(event.attributes or {}) for event in span.events]
    assert [event.name for event in span.events] == ["call_broke"] * 2
    assert all(isinstance(event.pop("pagewire.wait_s"), float) for event in events)
    why = {"error.type": "Unavailable", "server.address": "127.0.0.1", "server.port": port}
    assert events == [{**why, "pagewire.heard_tokens": heard} for heard in (0, 1)]
    assert span.start_time is not None and span.end_time is not None
    assert span.start_time <= span.events[0].timestamp <= span.events[1].timestamp <= span.end_time
    assert told(span, "pagewire.broken_calls", "server.port", "error.type") == [2, port, None]
    assert span.status.status_code is StatusCode.UNSET
    assert [trace for _, traces in calls for trace in traces] == [header(span)] * 3


@both
def test_vectors_that_are_asked_for_again_are_one_span(kind: Kind, spans: Spans) -> None:
    with played(vectors=[GONE, vectors([1.0])]) as (_, run):
        run(lambda address: ask(kind, address, "embed"))

    span = the_one(spans)
    assert [told_of.name for told_of in span.events] == ["call_broke"]
    assert told(span, "pagewire.broken_calls", "error.type") == [1, None]


# ---- its end


@both
@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("generate", InvalidRequest("stop", SECRET)),
        ("embed", InvalidRequest("inputs", SECRET)),
        ("embed", Overloaded("full", 9.0)),
        ("generate", Overloaded("full", 9.0)),
        ("model", UnknownModel("x")),
    ],
)
def test_a_request_that_fails_ends_its_span_as_that(
    kind: Kind, method: str, error: PagewireError, spans: Spans
) -> None:
    with played(saying(then=error), vectors=[error]) as (_, run), pytest.raises(type(error)):
        run(lambda address: ask(kind, address, method, "x"))

    span = the_one(spans)
    assert told(span, "error.type") == [type(error).__name__]
    assert span.status.status_code is StatusCode.ERROR
    assert SECRET not in span.to_json()


@both
def test_an_answer_that_its_server_gave_up_ends_its_span_as_a_failure(kind: Kind, spans: Spans) -> None:
    ended = pb.GenerateStreamResponse(finish=pb.Finish(reason=pb.FINISH_REASON_ERROR))
    with played(saying(first(), delta(0, 65), ended)) as (_, run):
        run(lambda address: ask(kind, address))

    span = the_one(spans)
    assert told(span, "error.type", "gen_ai.response.finish_reasons") == ["error", ("error",)]
    assert span.status.status_code is StatusCode.ERROR


@both
def test_a_stream_that_is_left_ends_its_span_once_and_well(kind: Kind, spans: Spans) -> None:
    async def leave(address: str) -> None:
        client = kind(address)
        stream = client.stream("hi")
        assert await first_text(stream) == "A"
        assert not spans.ended
        await call(stream.close)
        assert len(spans.ended) == 1
        await call(stream.close)
        await call(client.close)
        with pytest.raises(AssertionError):
            _ = stream.answer

    more, _ = standing(first(), delta(0, 65))
    with played(more) as (_, run):
        run(leave)

    span = the_one(spans)
    assert told(span, "gen_ai.usage.output_tokens", "gen_ai.response.finish_reasons") == [1, None]
    assert span.status.status_code is StatusCode.UNSET


def test_a_stream_ends_its_span_with_its_answer_though_nobody_closes_it(spans: Spans) -> None:
    async def read(address: str) -> None:
        async with AsyncClient(address) as client:
            stream = client.stream("hi")
            await texts(stream)
            assert len(spans.ended) == 1

    with played(saying(first(), delta(0, 65), END)) as (_, run):
        run(read)
    assert len(spans.ended) == 1


def test_a_task_that_is_cancelled_ends_its_span(spans: Spans) -> None:
    async def cancel(address: str) -> None:
        async with AsyncClient(address) as client:
            asking = asyncio.ensure_future(client.generate("hi"))
            await stands.wait()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    more, stands = standing(first(), delta(0, 65))
    with played(more) as (_, run):
        run(cancel)
    assert told(the_one(spans), "error.type") == ["CancelledError"]


@both
@pytest.mark.parametrize("method", ["generate", "embed"])
def test_a_program_that_is_interrupted_ends_its_span(
    kind: Kind, method: str, spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    async def caught(address: str) -> None:
        with pytest.raises(KeyboardInterrupt):
            await guarded(address)

    async def guarded(address: str) -> None:
        if issubclass(kind, AsyncClient):
            await ask(kind, address, method)
            return
        raised = await asyncio.to_thread(outcome, address)
        raise raised

    def outcome(address: str) -> BaseException:
        with Client(address) as client:
            try:
                getattr(client, method)("hi")
            except BaseException as error:  # noqa: BLE001
                return error
        raise AssertionError

    monkeypatch.setattr("pagewire.calls.Asked.hear", interrupt)
    monkeypatch.setattr("pagewire.calls.AskedOnce.hear", interrupt)
    with played(saying(first(), END), vectors=[vectors([1.0])]) as (_, run):
        run(caught)
    assert told(the_one(spans), "error.type") == ["KeyboardInterrupt"]


def test_a_read_that_was_disturbed_is_no_end_and_no_error_where_the_answer_goes_on(spans: Spans) -> None:
    async def read(address: str) -> None:
        async with AsyncClient(address) as client, client.stream("hi") as stream:
            assert (await anext(stream)).text == "A"
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), 0.05)
            assert not spans.ended
            assert await texts(stream) == ["B"]

    more, _ = standing(first(), delta(0, 65))
    with played(more, saying(first(resumed=True), delta(1, 66), END)) as (_, run):
        run(read)
    assert told(the_one(spans), "error.type") == [None]


@both
def test_a_stream_that_is_dropped_ends_its_span(kind: Kind, spans: Spans) -> None:
    async def drop(address: str) -> None:
        client = kind(address)
        assert await first_text(client.stream("hi")) == "A"
        await until(lambda: bool(spans.ended))
        await call(client.close)

    more, _ = standing(first(), delta(0, 65))
    gc.disable()  # it would find the span at last, whenever it comes
    try:
        with played(more) as (_, run):
            run(drop)
    finally:
        gc.enable()
    assert told(the_one(spans), "gen_ai.usage.output_tokens", "error.type") == [1, None]


@both
def test_a_client_that_is_closed_ends_the_spans_of_what_it_has_under_way(kind: Kind, spans: Spans) -> None:
    async def close(address: str) -> None:
        client = kind(address)
        asking = asyncio.ensure_future(call(client.generate, "hi"))
        await stands.wait()
        await call(client.close)
        with pytest.raises(PagewireError, match="the client was closed"):
            await asking

    more, stands = standing(first(), delta(0, 65))
    with played(more) as (_, run):
        run(close)
    assert told(the_one(spans), "error.type") == ["PagewireError"]


# ---- programs that do not trace, or not so


def test_a_program_that_never_loaded_opentelemetry_has_not_loaded_it_for_us() -> None:
    code = (
        "import sys; from pagewire import Client, Unavailable\n"
        "try: Client('127.0.0.1:1', patience_s=0).generate('hi')\n"
        "except Unavailable: print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


REQUEST = pb.GenerateStreamRequest(text="hi")


def test_without_opentelemetry_its_server_is_told_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)
    assert Span(REQUEST, "a:1").metadata == ()


def test_a_program_that_has_not_said_where_its_spans_go_passes_on_the_one_that_it_is_in() -> None:
    script, traces = listening(saying(first(), END))
    with Spans().provider.get_tracer("program").start_as_current_span("mine") as mine, played(script) as (_, run):
        run(lambda address: ask(AsyncClient, address))
    assert traces == [header(mine)]


def test_so_it_is_where_an_older_opentelemetry_makes_a_span_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = SimpleNamespace(start_span=lambda *_, **__: INVALID_SPAN)
    older = SimpleNamespace(get_tracer=lambda *_, **__: nothing)
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: older)
    with Spans().provider.get_tracer("program").start_as_current_span("mine") as mine:
        assert Span(REQUEST, "a:1").metadata == (("traceparent", header(mine)),)
    assert Span(REQUEST, "a:1").metadata == ()


def test_who_names_a_trace_himself_is_in_no_other(spans: Spans) -> None:
    mine = f"00-{1:032x}-{2:016x}-01"
    script, traces = listening(saying(first(), END))

    async def generate(address: str) -> None:
        async with AsyncClient(address, metadata=[("Traceparent", mine)]) as client:
            await client.generate("hi")

    with played(script) as (_, run):
        run(generate)
    assert traces == [mine] and not spans.ended


class Broken:
    """An API in which one thing fails, whoever asks for it."""

    def __init__(self, real: Any, what: str) -> None:
        self._real = real
        self._what = what

    def __getattr__(self, name: str) -> Any:
        if name == self._what:
            raise RuntimeError(SECRET)
        found = getattr(self._real, name)
        if name in ("get_tracer", "start_span", "get_current_span"):
            return lambda *args, **settings: Broken(found(*args, **settings), self._what)
        return found


@both
@pytest.mark.parametrize(
    "what",
    [
        "get_tracer", "SpanKind", "start_span", "get_span_context", "is_recording", "get_current_span", "add_event",
        "set_attributes", "set_status", "update_name", "end",
    ],
)  # fmt: skip
def test_no_failure_of_opentelemetry_harms_a_request(
    kind: Kind, what: str, spans: Spans, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", Broken(sys.modules["opentelemetry.trace"], what))
    scripts = (saying(first(), delta(0, 65), then=GONE), saying(first(resumed=True), END))
    with played(*scripts, vectors=[GONE, vectors([1.0])]) as (_, run):
        assert run(lambda address: ask(kind, address)).text == "A"
        assert len(run(lambda address: ask(kind, address, "embed"))) == 1
    with played(saying(then=InvalidRequest("n", "bad"))) as (_, run), pytest.raises(InvalidRequest):
        run(lambda address: ask(kind, address))

    ours = [record for record in caplog.records if record.name == "pagewire.traces"]
    assert SECRET not in caplog.text
    if what in ("add_event", "set_attributes", "set_status", "update_name"):
        assert len(spans.ended) == 3, "it ends with what it has"
    assert ours or what == "get_current_span", "it is not asked for where there is a span"


def test_many_who_end_a_span_end_it_once(spans: Spans, caplog: pytest.LogCaptureFixture) -> None:
    span = Span(REQUEST, "unix:/a/socket")
    ends: list[Callable[[], None]] = [span.end, lambda: span.end("late"), span.__del__]
    for end in ends:
        end()

    assert told(the_one(spans), "server.address", "server.port", "error.type") == ["unix:/a/socket", None, None]
    assert not caplog.records


def test_the_port_of_a_server_that_broke_is_not_told_of_the_socket_that_is_asked_next(spans: Spans) -> None:
    span = Span(REQUEST, "a:1")
    span.broke("Unavailable", "a:1", "unix:/a/socket")
    span.end()

    assert told(the_one(spans), "server.address", "server.port") == ["unix:/a/socket", None]


def test_of_many_calls_that_broke_the_last_are_told(spans: Spans) -> None:
    span = Span(REQUEST, "a:1")
    for number in range(200):
        span.broke("Unavailable", "a:1", "b:2", wait_s=number)
    span.end()

    events = the_one(spans).events
    assert [(event.attributes or {})["pagewire.wait_s"] for event in events] == list(range(72, 200))
    assert told(the_one(spans), "pagewire.broken_calls", "server.address") == [200, "b"]
