"""OpenTelemetry's spans over real processes: one trace from the HTTP request to the executor's steps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from grpc import aio
from opentelemetry.sdk.trace import TracerProvider

from common.errors import Unavailable
from pagewire import Client
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from services.handlers import Context
from tests.e2e.cluster import Cluster
from tests.e2e.collector import Collector, Seen
from tests.e2e.gateways import Gateway
from tests.services.scripted import played
from tests.services.spans import Spans

SECRET = "the caller's own words"
CALL = "pagewire.v1.InferenceService/GenerateStream"
RESUME = "pagewire.v1.InferenceService/Resume"


class Traced(NamedTuple):
    collector: Collector
    cluster: Cluster
    gateway: Gateway


@pytest.fixture(scope="module")
def traced(fake_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    """A gateway, a scheduler and an executor that all send their spans to one collector."""
    folder = tmp_path_factory.mktemp("traced")
    with Collector() as collector, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        flag = f"--otlp-endpoint={collector.address}"
        cluster = Cluster(fake_folder, folder, flags=[flag])
        try:
            cluster.start_executor(flag)
            with Gateway(cluster.address, folder / "gateway.log", flag) as gateway:
                yield Traced(collector, cluster, gateway)
        finally:
            cluster.close()


def asked(traced: Traced, trace_id: str, *, sampled: bool = True, max_tokens: int = 5) -> None:
    header = f"00-{trace_id}-{'2' * 16}-{sampled:02x}"
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": max_tokens}
    assert traced.gateway.post("/v1/chat/completions", body, {"traceparent": header}).json()["choices"]


def of(spans: list[Seen], trace_id: str) -> Mapping[str, Seen]:
    return {span.name: span for span in spans if span.trace_id == trace_id}


def has_all(spans: list[Seen], trace_id: str) -> bool:
    return len(of(spans, trace_id)) == 6 and {"step", "link"} <= {span.name for span in spans if trace_id in span.links}


def test_one_trace_leads_from_the_http_request_to_the_step_of_an_executor(traced: Traced) -> None:
    trace_id = "a" * 32
    asked(traced, trace_id)
    spans = traced.collector.until(lambda spans: has_all(spans, trace_id))
    found = of(spans, trace_id)

    parents = {
        name: next((n for n, s in found.items() if s.span_id == span.parent_id), "") for name, span in found.items()
    }
    http, request = "POST /v1/chat/completions", "chat fake"
    assert parents == {http: "", CALL: http, request: CALL, "queue": request, "prefill": request, "decode": request}
    assert found[http].parent_id == "2" * 16
    assert {name: span.service for name, span in found.items()} == {
        http: "pagewire-gateway",
        **dict.fromkeys((CALL, request, "queue", "prefill", "decode"), "pagewire-scheduler"),
    }
    parts = sum(found[name].seconds for name in ("queue", "prefill", "decode"))
    assert parts == pytest.approx(found[request].seconds, abs=1e-5)
    steps = {span.name: span for span in spans if trace_id in span.links}
    assert {name: (span.service, span.parent_id) for name, span in steps.items()} == {
        "step": ("pagewire-executor", ""),
        "link": ("pagewire-scheduler", ""),
    }
    assert steps["link"].attributes["pagewire.executor"] == "executor-0"
    assert steps["step"].attributes["pagewire.rows"] == 1


def test_a_request_has_the_attributes_of_generative_ai_and_no_word_of_its_caller(traced: Traced) -> None:
    trace_id = "b" * 32
    asked(traced, trace_id)
    found = of(traced.collector.until(lambda spans: has_all(spans, trace_id)), trace_id)
    told = found["chat fake"].attributes

    assert {name: told[name] for name in told if name.startswith("gen_ai.") and not isinstance(told[name], float)} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "pagewire",
        "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake",
        "gen_ai.response.id": told["gen_ai.response.id"],
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.seed": told["gen_ai.request.seed"],
        "gen_ai.usage.input_tokens": told["gen_ai.usage.input_tokens"],
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": told["gen_ai.usage.cache_read.input_tokens"],
    }
    assert (told["gen_ai.request.temperature"], told["gen_ai.request.top_p"]) == (1.0, 1.0)
    assert 0 < told["gen_ai.server.time_to_first_token"] <= told["gen_ai.server.request.duration"]
    assert found["chat fake"].events[0] == "admitted" and found["chat fake"].events[-1] == "finished"
    assert found["POST /v1/chat/completions"].attributes["http.response.status_code"] == 200
    assert SECRET.encode() not in traced.collector.said


def test_vectors_are_traced_as_what_they_are(traced: Traced) -> None:
    trace_id = "e" * 32
    header = {"traceparent": f"00-{trace_id}-{'2' * 16}-01"}
    assert traced.gateway.post("/v1/embeddings", {"input": SECRET}, header).json()["data"]
    spans = traced.collector.until(lambda spans: "embeddings fake" in of(spans, trace_id))

    told = of(spans, trace_id)["embeddings fake"].attributes
    assert (told["gen_ai.operation.name"], told["gen_ai.usage.output_tokens"]) == ("embeddings", 0)
    assert "gen_ai.request.temperature" not in told
    assert told["gen_ai.response.finish_reasons"] == ["stop"] and told["gen_ai.usage.input_tokens"] > 0


def test_a_trace_that_its_caller_does_not_record_is_not_recorded_here(traced: Traced) -> None:
    asked(traced, "c" * 32, sampled=False)
    asked(traced, "d" * 32)
    spans = traced.collector.until(lambda spans: has_all(spans, "d" * 32))

    assert not of(spans, "c" * 32)
    assert all("c" * 32 not in span.links for span in spans)


def test_the_python_client_passes_on_the_span_that_its_program_is_in_where_it_has_none_of_its_own(
    traced: Traced,
) -> None:
    with (
        TracerProvider().get_tracer("program").start_as_current_span("mine") as span,
        Client(traced.cluster.address) as client,
    ):
        client.generate(SECRET, max_tokens=2)
    mine = span.get_span_context()
    trace_id = f"{mine.trace_id:032x}"
    spans = traced.collector.until(lambda spans: len(of(spans, trace_id)) == 5)

    assert of(spans, trace_id)[CALL].parent_id == f"{mine.span_id:016x}"
    assert "text_completion fake" in of(spans, trace_id)


def test_one_trace_leads_from_the_python_client_s_own_span_over_a_call_that_breaks_to_an_executor_s_step(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = Spans()
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: programs.provider)

    async def relayed(request: Any, context: Context) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """The first tokens are another's, which then breaks: a relay that is cut."""
        trace = [(name, value) for name, value in context.invocation_metadata() or () if name == "traceparent"]
        async with aio.insecure_channel(traced.cluster.address) as channel:
            stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
            async for message in stub.GenerateStream(request, metadata=tuple(trace)):
                yield message
                if message.HasField("delta"):
                    raise Unavailable("it dies", 0.0)

    def generate(address: str) -> Any:
        with Client([address, traced.cluster.address]) as client:
            return client.generate(SECRET, max_tokens=5)

    with played(relayed) as (_, run):
        answer = run(lambda address: asyncio.to_thread(generate, address))
    (mine,) = programs.ended
    assert mine.context is not None and [event.name for event in mine.events] == ["call_broke"]
    trace_id = f"{mine.context.trace_id:032x}"
    spans = traced.collector.until(
        lambda spans: (
            {CALL, RESUME, mine.name} <= of(spans, trace_id).keys()
            and {"step", "link"} <= {span.name for span in spans if trace_id in span.links}
        )
    )

    assert len(answer.token_ids) == 5 and mine.name == "text_completion fake"
    calls = [of(spans, trace_id)[name] for name in (CALL, RESUME)]
    assert [call.parent_id for call in calls] == [f"{mine.context.span_id:016x}"] * 2
    assert of(spans, trace_id)[mine.name].parent_id in [call.span_id for call in calls]
    assert SECRET.encode() not in traced.collector.said and SECRET not in mine.to_json()
