"""OpenAI's own client against a live gateway, and what becomes of its streams when things break."""

from __future__ import annotations

import base64
import math
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from executor.fake_runner import digests_of, fake_vector
from pagewire import Answer, Client
from services.text import Tokenizer
from tests.e2e.cluster import Cluster
from tests.e2e.gateways import Gateway, Reply

HI: list[Any] = [{"role": "user", "content": "hi"}]
LONG = {"messages": HI, "max_tokens": 60, "ignore_eos": True, "seed": 7}
MODEL = "fake"


@pytest.fixture(scope="module")
def gateway(shared: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Gateway(shared.address, tmp_path_factory.mktemp("gateway") / "log", f"--http-admin={shared.admin}") as running:
        yield running


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with gateway.client() as made:
        yield made


def direct(running: Cluster, **settings: Any) -> Answer:
    """The answer over gRPC."""
    with Client(running.address) as made:
        return made.generate(**settings)


# ---- chat


def test_a_chat_is_answered_as_over_grpc(client: OpenAI, shared: Cluster) -> None:
    told = client.chat.completions.create(model=MODEL, messages=HI, max_completion_tokens=12, temperature=0, seed=3)
    expected = direct(shared, messages=HI, max_tokens=12, temperature=0, seed=3)

    assert told.object == "chat.completion" and told.model == MODEL
    (choice,) = told.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == "length"
    assert told.usage is not None
    assert told.usage.prompt_tokens == expected.usage.prompt_tokens
    assert (told.usage.completion_tokens, told.usage.total_tokens) == (12, 12 + expected.usage.prompt_tokens)


def test_a_chat_is_streamed_in_chunks_that_make_the_same(client: OpenAI, shared: Cluster) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=HI, max_tokens=40, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    expected = direct(shared, messages=HI, max_tokens=40)

    assert len({(chunk.id, chunk.model, chunk.created) for chunk in chunks}) == 1
    for index in (0, 1):
        told = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert told[0].delta.role == "assistant" and all(c.delta.role is None for c in told[1:])
        assert "".join(c.delta.content or "" for c in told) == expected.text
        assert [c.finish_reason for c in told if c.finish_reason] == ["length"]
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 80


def test_a_stop_string_ends_the_answer_and_is_named(client: OpenAI, shared: Cluster) -> None:
    whole = direct(shared, messages=HI, max_tokens=20).text

    told = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=20, stop=[whole[5:7], "never"])

    assert told.choices[0].message.content == whole[:5]
    assert told.choices[0].finish_reason == "stop"
    assert told.choices[0].model_dump()["stop_reason"] == whole[5:7]


def test_parts_of_a_message_are_one_text_and_a_developer_is_the_system(client: OpenAI, shared: Cluster) -> None:
    told = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
        ],
        max_tokens=8,
    )

    expected = direct(shared, messages=[{"role": "system", "content": "Be brief."}, *HI], max_tokens=8)
    assert told.choices[0].message.content == expected.text
    assert told.usage is not None and told.usage.prompt_tokens == expected.usage.prompt_tokens


def test_log_probabilities_are_those_of_grpc(client: OpenAI, shared: Cluster) -> None:
    expected = direct(shared, messages=HI, max_tokens=5, logprobs=2).logprobs

    told = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=5, logprobs=True, top_logprobs=2)
    streamed = client.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=5, logprobs=True, top_logprobs=2, stream=True
    )

    whole = told.choices[0].logprobs
    assert whole is not None and whole.content is not None
    parts = [p for chunk in streamed for c in chunk.choices if c.logprobs for p in c.logprobs.content or ()]
    for found in (whole.content, parts):
        assert [each.logprob for each in found] == [each.token.logprob for each in expected]
        assert [bytes(each.bytes or []) for each in found] == [each.token.text for each in expected]
        assert [[top.logprob for top in each.top_logprobs] for each in found] == [
            [top.logprob for top in each.top] for each in expected
        ]


# ---- completions


def test_prompts_are_texts_or_tokens_one_or_several(client: OpenAI, shared: Cluster) -> None:
    one = client.completions.create(model=MODEL, prompt=[7, 8, 9], max_tokens=4, extra_body={"return_token_ids": True})
    many = client.completions.create(
        model=MODEL, prompt=[[7, 8, 9], [1] * 5], max_tokens=4, n=2, extra_body={"return_token_ids": True}
    )
    words = client.completions.create(model=MODEL, prompt=["The sea", "is"], max_tokens=4)

    def ids(choice: Any) -> list[int]:
        return list(choice.model_dump()["token_ids"])

    assert ids(one.choices[0]) == [3, 4, 5, 6]
    assert [(c.index, ids(c)) for c in many.choices] == [
        (0, [3, 4, 5, 6]),
        (1, [3, 4, 5, 6]),
        (2, [5, 6, 7, 8]),
        (3, [5, 6, 7, 8]),
    ]
    assert many.usage is not None and (many.usage.prompt_tokens, many.usage.completion_tokens) == (8, 16)
    assert [c.text for c in words.choices] == [direct(shared, prompt=p, max_tokens=4).text for p in ("The sea", "is")]


def test_several_prompts_are_streamed_side_by_side(client: OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=["The sea", "is"], max_tokens=30, n=2)
    chunks = client.completions.create(model=MODEL, prompt=["The sea", "is"], max_tokens=30, n=2, stream=True)

    texts = [""] * 4
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_tells_the_prompt_and_scores_it(client: OpenAI, shared: Cluster, max_tokens: int, stream: bool) -> None:
    prompt = [70, 71, 72, 5, 9]
    expected = direct(shared, token_ids=prompt, max_tokens=1, prompt_logprobs=1, logprobs=1)

    asked: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "echo": True, "logprobs": 1}
    if stream:
        choices = [c for chunk in client.completions.create(**asked, stream=True) for c in chunk.choices]
    else:
        choices = client.completions.create(**asked).choices

    scored = (*expected.prompt_logprobs, *(expected.logprobs if max_tokens else ()))
    told = [c.logprobs for c in choices if c.logprobs]
    assert [p for logprobs in told for p in logprobs.token_logprobs or ()] == [s.token.logprob for s in scored]
    tops = [top for logprobs in told for top in logprobs.top_logprobs or ()]
    assert tops[0] is None and all(0.0 in top.values() for top in tops[1:])  # the fake model's likeliest
    assert "".join(c.text for c in choices).startswith("ghi")
    assert choices[-1].finish_reason == "length"


def test_what_is_asked_for_beyond_openais_api_is_told_as_over_grpc(gateway: Gateway, shared: Cluster) -> None:
    beams: dict[str, Any] = {"beams": {"width": 2}, "max_tokens": 4, "n": 2}
    pinned = {"prompt": [70] * 40, "max_tokens": 2, "pin_seconds": 5, "prompt_logprobs": 0}
    expected = direct(shared, token_ids=[71, 72, 73], **beams)
    pin = direct(shared, token_ids=[70] * 40, max_tokens=1, pin_seconds=5).pinned

    told = gateway.post("/v1/completions", {"prompt": [71, 72, 73], **beams}).json()["choices"]
    whole = gateway.post("/v1/completions", pinned).json()["choices"]
    stream = [event.data for event in gateway.post("/v1/completions", {**pinned, "stream": True}).events()]

    assert [choice["score"] for choice in told] == [choice.finish.score for choice in expected.choices]
    streamed = [choice for data in stream if data != "[DONE]" for choice in data["choices"]]
    assert pin is not None
    for choices in (whole, streamed):
        (each,) = [choice["pinned"] for choice in choices if "pinned" in choice]
        assert (each["id"], each["tokens"]) == (pin.pin_id, pin.tokens) and each["expires"] >= pin.expires_s
        assert [len(choice["prompt_logprobs"]) for choice in choices if "prompt_logprobs" in choice] == [40]


# ---- responses


def test_a_response_is_told_whole_and_in_named_events(client: OpenAI, shared: Cluster) -> None:
    expected = direct(shared, messages=[{"role": "system", "content": "Be brief."}, *HI], max_tokens=9)
    asked: dict[str, Any] = {
        "model": MODEL, "input": "hi", "instructions": "Be brief.", "max_output_tokens": 9, "metadata": {"a": "b"},
    }  # fmt: skip

    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))

    assert whole.output_text == expected.text
    assert (whole.status, whole.metadata) == ("incomplete", {"a": "b"})
    assert whole.incomplete_details is not None and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None and whole.usage.output_tokens == 9
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected.text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_response_goes_on_from_a_list_of_messages(client: OpenAI, shared: Cluster) -> None:
    first = client.responses.create(model=MODEL, input="hi", max_output_tokens=4)
    talk: list[Any] = [{"role": "user", "content": "hi"}, *(item.model_dump() for item in first.output)]

    second = client.responses.create(model=MODEL, input=[*talk, {"role": "user", "content": "go on"}])

    messages = [*HI, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "go on"}]
    assert second.output_text == direct(shared, messages=messages).text


# ---- what is there


def test_the_model_is_listed_and_found_by_its_name(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-4o")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_health_and_paths_that_are_not_there(gateway: Gateway) -> None:
    assert gateway.get("/health").json() == {"status": "serving"}
    assert gateway.get("/v1/nothing").error()["type"] == "invalid_request_error"
    refused = gateway.get("/v1/chat/completions")
    assert refused.status == 405 and refused.headers["allow"] == "POST"
    refused.close()


# ---- embeddings

TEXTS = ["The sea", " is wide. ", "x"]


def vector_of(ids: Sequence[int], dimensions: int = 8) -> Any:
    """The fake model's, which becomes 1 long."""
    values = struct.unpack("<8f", fake_vector(digests_of(ids)[-1], 8))[:dimensions]
    return pytest.approx([value / math.hypot(*values) for value in values], abs=1e-6)


def test_every_text_has_its_vector(client: OpenAI, shared: Cluster, fake_folder: Path) -> None:
    ids = [Tokenizer(fake_folder / "tokenizer.json").encode(text.strip()) for text in TEXTS]

    told = client.embeddings.create(model=MODEL, input=TEXTS)  # the client asks for base64, and unpacks it
    numbers = client.embeddings.create(model=MODEL, input=TEXTS[1], encoding_format="float", user="me")
    encoded: Any = client.embeddings.create(model="", input=ids, encoding_format="base64", dimensions=3)
    one = client.embeddings.create(model="", input=ids[0], extra_body={"priority": "low", "request_id": "mine"})
    with Client(shared.address) as made:
        over_grpc = made.embed([TEXTS[0], *ids[1:]], no_cache=True)

    assert (told.object, told.model, [each.index for each in told.data]) == ("list", MODEL, [0, 1, 2])
    assert [each.embedding for each in told.data] == [vector_of(each) for each in ids]
    num_tokens = sum(map(len, ids))
    assert (told.usage.prompt_tokens, told.usage.total_tokens) == (num_tokens, num_tokens)
    assert numbers.data[0].embedding == vector_of(ids[1])
    unpacked = [list(struct.unpack("<3f", base64.b64decode(each.embedding))) for each in encoded.data]
    assert unpacked == [vector_of(each, 3) for each in ids]
    assert one.data[0].embedding == vector_of(ids[0])
    assert [list(each.values) for each in over_grpc] == [vector_of(each) for each in ids]
    assert [(each.prompt_tokens, each.cached_prompt_tokens) for each in over_grpc] == [(len(each), 0) for each in ids]


@pytest.mark.parametrize(
    ("asked", "param", "problem"),
    [
        ({"input": []}, "input", "must be a string, a list of token ids, or a list of these, and is empty"),
        ({"input": ""}, "input", "is empty"),
        ({"input": "  "}, "input", "is empty"),
        ({"input": ["a", ""]}, "input[1]", "is empty"),
        ({"input": ["a", {}]}, "input[1]", "must be a string or a list of token ids"),
        ({"input": ["a"] * 2049}, "input", "must be 1 to 2048 texts, got 2049"),
        ({"input": [[1], [1, 999]]}, "input[1]", "must be in [0, 320), got 999 at index 1"),
        ({"input": "a" * 600}, "input", "This model's maximum context length is for each text by itself."),
        ({"input": "a", "dimensions": 9}, "dimensions", "must be in [1, 8], got 9"),
        ({"input": "a", "dimensions": 0}, "dimensions", "must be at least 1"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "must be one of float, base64"),
        ({"input": "a", "extra_body": {"pooling": "mean"}}, "pooling", "is not known here"),
        ({"input": "a", "extra_body": {"request_id": "a\nb"}}, "request_id", "must be printable ASCII"),
    ],
)
def test_what_is_wrong_with_a_request_for_embeddings_is_told_by_its_member(
    client: OpenAI, asked: dict[str, Any], param: str, problem: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="", **{"encoding_format": "float", **asked})
    assert refused.value.param == param and problem in refused.value.message


def test_an_embedding_of_a_model_that_is_not_there_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.embeddings.create(model="text-embedding-3-small", input="a")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_metrics_are_told_for_prometheus_and_under_the_names_of_vllm(gateway: Gateway, client: OpenAI) -> None:
    client.chat.completions.create(model=MODEL, messages=HI, max_tokens=1)

    lines = gateway.get("/metrics").text().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['pagewire_gateway_requests_total{path="/v1/chat/completions",status="200"}']) >= 1
    assert float(values["pagewire_gateway_time_to_first_token_seconds_count"]) >= 1
    assert values["pagewire_gateway_scheduler_reachable"] == "1"
    assert float(values["pagewire_output_tokens_total"]) >= 1
    assert float(values['pagewire_executor_blocks{executor="executor-0"}']) == 4096
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert float(values[f"vllm:{name}"]) >= 0
    assert {name.partition("{")[0] for name in values} >= {"vllm:cache_config_info", "vllm:lora_requests_info"}


# ---- refusals


@pytest.mark.parametrize(
    ("asked", "param", "code"),
    [
        ({"temperature": 101}, "temperature", None),
        ({"temperature": "hot"}, "temperature", None),
        ({"max_completion_tokens": 0, "max_tokens": None}, "max_completion_tokens", None),
        ({"max_completion_tokens": 9}, "max_tokens", None),
        ({"max_tokens": 5000}, "max_tokens", "context_length_exceeded"),
        ({"model": "gpt-4o"}, "model", "model_not_found"),
        ({"messages": []}, "messages", None),
        ({"messages": [{"role": "", "content": "x"}]}, "messages[0].role", None),
        ({"messages": [{"role": "user", "content": "x" * 4000}]}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type",
         "unsupported"),
        ({"top_logprobs": 3}, "top_logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
        ({"tools": [{"type": "function"}]}, "tools[0].function", None),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", "unsupported"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", None),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", None),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema", None),
        ({"response_format": {"type": "json_object"}, "regex": "a+"}, "response_format", None),
        ({"logit_bias": {"x": 1}}, "logit_bias['x']", None),
        ({"logit_bias": {"5": 101}}, "logit_bias", None),
        ({"temprature": 1}, "temprature", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ],
)  # fmt: skip
def test_what_is_refused_names_its_parameter(
    gateway: Gateway, asked: dict[str, Any], param: str, code: str | None
) -> None:
    reply = gateway.post("/v1/chat/completions", {"messages": HI, "max_tokens": 4, **asked})

    error = reply.error()
    assert reply.status == (404 if code == "model_not_found" else 400)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert error["message"]
    is_too_long = "This model's maximum context length is" in error["message"]
    assert is_too_long == (code == "context_length_exceeded"), "litellm knows it by these words"


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize(
    ("prompt", "param"),
    [([1, 999], "prompt"), ([[1, 999]], "prompt[0]"), ([[1], [1, 999]], "prompt[1]"), (["a", "b" * 600], "prompt[1]")],
)
def test_of_several_prompts_the_one_that_is_wrong_is_named(
    gateway: Gateway, prompt: list[Any], param: str, echo: bool
) -> None:
    reply = gateway.post("/v1/completions", {"prompt": prompt, "max_tokens": 4, "echo": echo})

    error = reply.error()
    assert reply.status == 400 and error["param"] == param
    assert "got 999 at index 1" in error["message"] or "tokens" in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "hi"}], "temperature": 1e999}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": ' + b"9" * 5000 + b"}", "max_tokens"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages[0].content"),
        (b'{"messages": [{"role": "user", "content": "hi"}], "seed": 1.5}', "seed"),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "messages"),
        (b'{"messages": "hi"', "body"),
        (b"[]", "body"),
        (b"\xff{}", "body"),
        (b"", "body"),
    ],
    ids=["NaN", "infinite", "digits", "surrogate", "fraction", "deep", "cut short", "a list", "bytes", "nothing"],
)
def test_a_body_that_is_no_request_is_refused_by_name(gateway: Gateway, body: bytes, param: str) -> None:
    reply = gateway.post("/v1/chat/completions", body)

    assert reply.status == 400
    assert reply.error()["param"] == param


def test_a_schema_shapes_the_answer_and_one_that_cannot_be_kept_is_refused(shared: Cluster, gateway: Gateway) -> None:
    def ask(schema: Any) -> Reply:
        format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        asked = {"messages": HI, "max_tokens": 40, "response_format": format_}
        reply = gateway.post("/v1/chat/completions", asked)
        until_s = time.monotonic() + 120
        while reply.status == 503 and time.monotonic() < until_s:  # its worker was too busy with its own start
            time.sleep(0.1)
            reply = gateway.post("/v1/chat/completions", asked)
        return reply

    refused = ask({"not": {}})
    assert refused.status == 400 and refused.error()["param"] == "response_format.json_schema.schema"
