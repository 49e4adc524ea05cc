"""Tools over real processes: what is called, streamed and resumed. tests/e2e/test_structured.py kills executors."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.errors import InvalidRequest
from pagewire import Client, FinishReason, ToolCall
from protos import inference_pb2 as pb
from tests.e2e import fake_model
from tests.e2e.cluster import ROOT, Cluster
from tests.e2e.gateways import Event, Gateway
from tests.e2e.programs import PAGEWIRE, run
from tests.executor.schemas import problem

EXAMPLE = (sys.executable, str(ROOT / "examples" / "python" / "tools.py"))
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"enum": ["celsius", "kelvin"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {"name": "weather", "description": "The weather in a city.", "parameters": SCHEMA}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
VERDICT: dict[str, Any] = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["mood", "stars"],
    "additionalProperties": False,
}
ASKED: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What will the weather be?"}],
    "tools": [WEATHER, CLOCK],
    "seed": 4,
    "max_tokens": 250,
}


def check(calls: Sequence[ToolCall]) -> None:
    assert calls
    schemas: Mapping[str, Any] = {"weather": SCHEMA, "clock": {"type": "object", "additionalProperties": False}}
    for call in calls:
        assert problem(call.parsed, schemas[call.name]) is None


def test_the_example_of_the_readme_works(server: Cluster) -> None:
    ended = run(*EXAMPLE, server.address, "What is 17 times 23?")

    assert ended.code == 0, ended.err
    assert ended.out.startswith('calculate({"left": ')
    assert len(ended.out.splitlines()) > 1, "an answer behind it"


def test_an_answer_that_must_call_is_calls_and_ends_behind_them(server: Cluster) -> None:
    short: dict[str, Any] = {**ASKED, "max_tokens": 12, "tool_choice": "none"}
    with Client(server.address) as client:
        one = client.generate(**ASKED, tool_choice="required", parallel_tool_calls=False, n=3)
        named = client.generate(**ASKED, tool_choice="clock")
        none = client.generate(**short)

    for choice in one.choices:
        assert (choice.finish.reason, choice.text, len(choice.tool_calls)) == (FinishReason.TOOL_CALLS, "", 1)
        check(choice.tool_calls)
    assert len({choice.tool_calls[0].id for choice in one.choices}) == 3
    assert [call.name for call in named.tool_calls] == ["clock"]
    assert none.tool_calls == () and none.text


def test_a_chat_goes_on_with_what_was_called_and_what_came_of_it(server: Cluster) -> None:
    called = ToolCall(id="abcdefghi", name="clock", arguments="{}")
    chat = pb.ChatMessages(
        messages=[
            pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(id=called.id, name="clock", arguments="{}")]),
            pb.ChatMessage(role="tool", content="noon", tool_call_id=called.id, name="clock"),
        ]
    )
    prompt = server.stub.Detokenize(
        pb.DetokenizeRequest(token_ids=server.stub.Tokenize(pb.TokenizeRequest(chat=chat)).token_ids)
    )

    with Client(server.address) as client:
        messages = [{"role": "assistant", "content": None, "tool_calls": [called]}, called.result("noon")]
        answer = client.generate(messages=messages, max_tokens=8, temperature=0.0)
        same = client.generate(prompt.text, max_tokens=8, temperature=0.0)

    assert '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>' in prompt.text
    assert answer.token_ids == same.token_ids


def test_where_it_may_call_it_is_free_until_it_does(server: Cluster) -> None:
    """A model that was never trained comes to a call where its opening is favoured."""
    text: dict[str, Any] = {**ASKED, "max_tokens": 40, "banned_token_ids": [fake_model.TOOL_CALL]}
    asked: dict[str, Any] = {
        **ASKED,
        "logit_bias": {fake_model.TOOL_CALL: 4.0},
        "parallel_tool_calls": False,
        "request_id": "auto",
    }
    with Client(server.address) as client:
        free = client.generate(**text)
        called = client.generate(**asked)
        streamed = list(client.stream(**asked))

    assert (free.tool_calls, free.finish.reason) == ((), FinishReason.LENGTH)
    assert called.text and called.finish.reason is FinishReason.TOOL_CALLS
    check(called.tool_calls)
    assert "".join(delta.text for delta in streamed) == called.text
    parts = [part for delta in streamed for part in delta.tool_calls]
    assert (parts[0].id, parts[0].name) == (called.tool_calls[0].id, called.tool_calls[0].name)
    assert "".join(part.arguments for part in parts) == called.tool_calls[0].arguments


FORMS: list[tuple[dict[str, Any], Callable[[str], bool]]] = [
    ({"json_schema": VERDICT}, lambda text: problem(json.loads(text), VERDICT) is None),
    ({"regex": "[a-c]{3}/[0-9]"}, lambda text: re.fullmatch("[a-c]{3}/[0-9]", text) is not None),
    ({"choices": ["yes", "no"]}, {"yes", "no"}.__contains__),
]


@pytest.mark.parametrize(("form", "is_right"), FORMS)
def test_an_answer_with_tools_and_a_form_is_calls_or_of_the_form(
    server: Cluster, form: dict[str, Any], is_right: Callable[[str], bool]
) -> None:
    asked: dict[str, Any] = {**ASKED, **form, "n": 4, "max_tokens": 300}
    with Client(server.address) as client:
        text = client.generate(**asked, banned_token_ids=[fake_model.TOOL_CALL])
        calls = client.generate(**asked, logit_bias={fake_model.TOOL_CALL: 50.0})
        required = client.generate(**asked, tool_choice="clock")

    for choice in text.choices:
        assert (choice.finish.reason, choice.tool_calls) == (FinishReason.EOS, ())
        assert is_right(choice.text)
    for choice in calls.choices:
        assert (choice.finish.reason, choice.text) == (FinishReason.TOOL_CALLS, "")
        check(choice.tool_calls)
    for choice in required.choices:
        assert [call.name for call in choice.tool_calls] == ["clock"]


def test_the_command_line_shows_what_is_called(server: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([CLOCK]))
    generate = [*PAGEWIRE, "generate", "--address", server.address, "--no-stats", "--max-tokens=200"]

    called = run(*generate, f"--tools={file}", "--tool-choice=clock", "hi")
    refused = [
        run(*generate, *flags, "hi")
        for flags in (["--raw", "--tool-choice=auto"], [f"--tools={tmp_path / 'none'}"], [f"--tools={__file__}"])
    ]

    assert (called.code, called.out) == (0, "\nclock {}\n"), called.err
    told = ["go with the chat template", "No such file", "not JSON"]
    assert all(ended.code == 1 and why in ended.err for ended, why in zip(refused, told, strict=True)), refused


Told = list[tuple[list[int], str, list[tuple[int, str, str, str]]]]


def told(messages: Sequence[pb.GenerateStreamResponse]) -> Told:
    """Tokens, text and parts of calls, delta by delta."""
    deltas = [message.delta for message in messages if message.HasField("delta")]
    return [(list(d.token_ids), d.text, [(c.index, c.id, c.name, c.arguments) for c in d.tool_calls]) for d in deltas]


def whole(heard: Told) -> tuple[list[int], str, str]:
    """All of it, put together."""
    tokens = [token for ids, _, _ in heard for token in ids]
    calls = "".join("".join(part[1:]) for _, _, parts in heard for part in parts)
    return tokens, "".join(text for _, text, _ in heard), calls


@pytest.mark.parametrize("bias", [50.0, -100.0])
def test_a_stream_with_tools_and_a_form_goes_on_behind_any_token(server: Cluster, bias: float) -> None:
    asked = pb.GenerateStreamRequest(
        request_id="formed",
        chat=pb.ChatMessages(
            messages=[pb.ChatMessage(role="user", content="How is it?")],
            tools=[pb.Tool(name="weather", parameters=json.dumps(SCHEMA))],
            parallel_tool_calls=False,
        ),
        sampling=pb.SamplingParams(
            seed=5,
            logit_bias={fake_model.TOOL_CALL: bias},
            structured=pb.StructuredOutput(json_schema=json.dumps(VERDICT)),
        ),
        stopping=pb.StopConditions(max_tokens=300),
    )
    _, *deltas, end = server.stub.GenerateStream(asked)
    alone = told(deltas)
    _, text, calls = whole(alone)
    assert bool(text) == (bias < 0) and bool(calls) == (bias > 0)

    for number in range(0, len(deltas), 7):
        sent = [token for ids, _, _ in alone[: number + 1] for token in ids]
        point = pb.ResumePoint(choice=0, ticket=deltas[number].delta.ticket, token_ids=sent)
        _, *rest = server.stub.Resume(pb.ResumeRequest(request=asked, choices=[point]))
        assert whole(alone[: number + 1] + told(rest)) == whole(alone)
        assert rest[-1].finish.reason == end.finish.reason

    first = pb.ResumePoint(choice=0, ticket=deltas[0].delta.ticket, token_ids=alone[0][0])
    asked.sampling.structured.json_schema = json.dumps({**VERDICT, "title": "another"})
    with pytest.raises(grpc.RpcError, match="does not belong to this request"):
        list(server.stub.Resume(pb.ResumeRequest(request=asked, choices=[first])))


def test_a_stream_tells_what_a_whole_answer_does_and_goes_on_in_the_middle_of_a_call(server: Cluster) -> None:
    chat = pb.ChatMessages(
        messages=[pb.ChatMessage(role="user", content="And the weather?")],
        tools=[pb.Tool(name="weather", parameters=json.dumps(SCHEMA))],
        tool_choice=pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED),
        parallel_tool_calls=False,
    )
    sampling, stopping = pb.SamplingParams(seed=5), pb.StopConditions(max_tokens=250)
    asked = pb.GenerateStreamRequest(request_id="tools", chat=chat, sampling=sampling, stopping=stopping)
    _, *deltas, end = server.stub.GenerateStream(asked)
    alone = told(deltas)
    assert len([parts for _, _, parts in alone if parts]) > 5, "arguments come in pieces"

    at_once = pb.GenerateRequest(request_id="tools", chat=chat, sampling=sampling, stopping=stopping)
    [call] = server.stub.Generate(at_once).choices[0].tool_calls
    assert call.id + call.name + call.arguments == whole(alone)[2]

    for number in range(0, len(deltas), 9):
        sent = [token for ids, _, _ in alone[: number + 1] for token in ids]
        point = pb.ResumePoint(choice=0, ticket=deltas[number].delta.ticket, token_ids=sent)
        _, *rest = server.stub.Resume(pb.ResumeRequest(request=asked, choices=[point]))
        assert whole(alone[: number + 1] + told(rest)) == whole(alone)
        assert rest[-1].finish.reason == end.finish.reason == pb.FINISH_REASON_TOOL_CALLS


@pytest.mark.parametrize(
    ("changes", "field", "problem"),
    [
        ({"grammar": 'start: "a"'}, "grammar", "does not go together with chat.tools"),
        ({"choices": ["<tool_call>"]}, "choices", "none may begin with <tool_call>"),
        ({"regex": "(("}, "regex", "unclosed group"),
        ({"ignore_eos": True}, "ignore_eos", "must be false"),
        ({"tool_choice": "rain"}, "chat.tool_choice.function", "one of chat.tools"),
        ({"tools": [{**WEATHER, "parameters": {"not": {}}, "strict": True}]}, "chat.tools", "not"),
        ({"tools": [{**WEATHER, "colour": "red"}]}, "tools[0].colour", "there is no such field"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_its_field(
    server: Cluster, changes: dict[str, Any], field: str, problem: str
) -> None:
    with Client(server.address) as client, pytest.raises(InvalidRequest) as refused:
        client.generate(**{**ASKED, **changes})

    assert refused.value.field == field
    assert problem in refused.value.problem


# ---- OpenAI's API

TOOLS: list[Any] = [{"type": "function", "function": WEATHER}, CLOCK]
OVER_HTTP: dict[str, Any] = {
    "messages": ASKED["messages"], "tools": TOOLS, "tool_choice": "required", "seed": 4, "max_tokens": 250,
}  # fmt: skip


@pytest.fixture(scope="module")
def gateway(server: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Client(server.address) as client:  # tries again until the worker that compiles grammars has started
        client.generate(**ASKED, tool_choice="clock")
    with Gateway(server.address, tmp_path_factory.mktemp("gateway") / "log") as running:
        yield running


def test_openais_client_is_told_what_is_called_and_tells_what_came_of_it(server: Cluster, gateway: Gateway) -> None:
    asked: dict[str, Any] = {**OVER_HTTP, "model": "", "parallel_tool_calls": False}
    with gateway.client() as openai, Client(server.address) as client:
        [choice] = openai.chat.completions.create(**asked, extra_body={"request_id": "same"}).choices
        chunks = list(openai.chat.completions.create(**asked, stream=True, extra_body={"request_id": "same"}))
        result = {"role": "tool", "tool_call_id": "", "content": "rain"}
        [called] = choice.message.tool_calls or []
        assert called.type == "function"
        messages: list[Any] = [*ASKED["messages"], choice.message, {**result, "tool_call_id": called.id}]
        said = openai.chat.completions.create(model="", messages=messages, tools=TOOLS, tool_choice="none",
                                              max_tokens=8, temperature=0)  # fmt: skip
        own = ToolCall(id=called.id, name=called.function.name, arguments=called.function.arguments)
        message = {"role": "assistant", "content": "", "tool_calls": [own]}
        again = [*ASKED["messages"], message, own.result("rain")]
        expected = client.generate(messages=again, max_tokens=8, temperature=0.0)

    check([own])
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or ()]
    heads = [(part.index, part.id, part.type, part.function.name) for part in parts if part.id and part.function]
    assert heads == [(0, own.id, "function", own.name)]
    assert "".join(part.function.arguments or "" for part in parts if part.function) == own.arguments
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices[0].delta.role] == ["assistant"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert said.choices[0].message.content == expected.text
    assert said.usage is not None and said.usage.prompt_tokens == expected.usage.prompt_tokens


def told_over_http(events: Sequence[Event]) -> tuple[list[int], str, list[str], list[str]]:
    """Tokens, text, each call with its parts put together, and ends."""
    tokens: list[int] = []
    text, calls, ends = "", list[str](), list[str]()
    for event in events[:-1]:
        [choice] = event.data["choices"]
        tokens += choice["token_ids"]
        text += choice["delta"].get("content") or ""
        for part in choice["delta"].get("tool_calls", ()):
            if "id" in part:
                calls.append(part["id"] + part["function"]["name"])
            calls[part["index"]] += part["function"]["arguments"]
        ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    return tokens, text, calls, ends


def test_a_stream_over_http_goes_on_in_the_middle_of_a_call(gateway: Gateway) -> None:
    path = "/v1/chat/completions"
    without_end = {"logit_bias": {str(fake_model.EOS): -50}, "max_tokens": 200}  # so one call comes after the other
    asked = {**OVER_HTTP, **without_end, "stream": True, "return_token_ids": True, "request_id": "calls"}
    whole = list(gateway.post(path, asked).events())
    _, _, calls, ends = told_over_http(whole)
    assert len(calls) > 1 and ends == ["length"]

    for cut in range(3, len(whole) - 1, len(whole) // 3):
        heard = whole[:cut]
        tokens = {"resume_token_ids": [told_over_http([*heard, heard[-1]])[0]]}
        for more in ({}, tokens):
            rest = list(gateway.post(path, {**asked, **more}, {"last-event-id": heard[-1].id}).events())
            assert told_over_http([*heard, *rest]) == told_over_http(whole)


CALLED_OVER_HTTP: dict[str, Any] = {
    "model": "",
    "input": "What will the weather be?",
    "tools": [{"type": "function", **WEATHER}, {"type": "function", "name": "clock"}],
    "tool_choice": "required",
    "max_output_tokens": 250,
}


def test_a_response_calls_and_goes_on_with_what_came_of_it(server: Cluster, gateway: Gateway) -> None:
    asked: dict[str, Any] = {**CALLED_OVER_HTTP, "parallel_tool_calls": False}
    same: dict[str, Any] = {"extra_body": {"request_id": "response", "seed": 4}}
    with gateway.client() as openai, Client(server.address) as client:
        whole = openai.responses.create(**asked, **same)
        with openai.responses.stream(**asked, **same) as stream:
            events = list(stream)
            streamed = stream.get_final_response()
        [call] = whole.output
        assert call.type == "function_call"
        output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        talk: list[Any] = [{"role": "user", "content": asked["input"]}, call, output]
        said = openai.responses.create(
            model="", input=talk, tools=asked["tools"], tool_choice="none", max_output_tokens=8, temperature=0
        )
        own = ToolCall(id=call.call_id, name=call.name, arguments=call.arguments)
        message = {"role": "assistant", "content": "", "tool_calls": [own]}
        again = [*ASKED["messages"], message, own.result("rain")]
        expected = client.generate(messages=again, max_tokens=8, temperature=0.0)

    check([own])
    assert (whole.status, call.status, whole.output_text) == ("completed", "completed", "")
    assert [item.model_dump() for item in streamed.output] == [{**call.model_dump(), "parsed_arguments": None}]
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:3] == ["created", "in_progress", "output_item.added"]
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    assert set(kinds[3:-3]) == {"function_call_arguments.delta"}
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments and len(deltas) > 1
    assert said.output_text == expected.text
    assert said.usage is not None and said.usage.input_tokens == expected.usage.prompt_tokens


def test_a_response_s_stream_goes_on_in_the_middle_of_a_call(gateway: Gateway) -> None:
    path = "/v1/responses"
    asked = {**CALLED_OVER_HTTP, "stream": True, "request_id": "going", "seed": 4}
    whole = list(gateway.post(path, asked).events())
    named = [i for i, event in enumerate(whole) if event.id]

    for cut in named[1 :: len(named) // 3]:
        rest = list(gateway.post(path, asked, {"last-event-id": whole[cut].id}).events())
        assert [event.data for event in (*whole[: cut + 1], *rest)] == [event.data for event in whole]


FORMAT: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": VERDICT, "strict": True}}
WAYS: dict[str, tuple[int, str]] = {"calls": (50, "tool_calls"), "text": (-100, "stop")}  # bias of the opening, and end


@pytest.mark.parametrize("way", WAYS)
def test_a_chat_completion_has_calls_or_its_format(gateway: Gateway, way: str) -> None:
    bias, end = WAYS[way]
    asked = {**OVER_HTTP, "tool_choice": "auto", "response_format": FORMAT, "logit_bias": {fake_model.TOOL_CALL: bias}}
    with gateway.client() as openai:
        [choice] = openai.chat.completions.create(model="", **asked, extra_body={"request_id": way}).choices
    path = "/v1/chat/completions"
    events = list(gateway.post(path, {**asked, "stream": True, "return_token_ids": True, "request_id": way}).events())
    _, text, calls, ends = told_over_http(events)

    assert (choice.finish_reason, ends) == (end, [end])
    assert text == (choice.message.content or "")
    if way == "text":
        assert (choice.message.tool_calls, calls) == (None, [])
        assert problem(json.loads(text), VERDICT) is None
    else:
        assert choice.message.content is None and choice.message.tool_calls
        functions = [call.function for call in choice.message.tool_calls if call.type == "function"]
        check([ToolCall(id="", name=each.name, arguments=each.arguments) for each in functions])
        assert [call[9:] for call in calls] == [each.name + each.arguments for each in functions]


@pytest.mark.parametrize("way", WAYS)
def test_a_response_has_calls_or_its_format(gateway: Gateway, way: str) -> None:
    asked: dict[str, Any] = {**CALLED_OVER_HTTP, "tool_choice": "auto"}
    more = {"seed": 4, "logit_bias": {fake_model.TOOL_CALL: WAYS[way][0]}}
    told: Any = {"format": {"type": "json_schema", "name": "verdict", "schema": VERDICT, "strict": True}}
    with gateway.client() as openai:
        response = openai.responses.create(**asked, text=told, extra_body=more)

    assert response.status == "completed"
    kinds = {item.type for item in response.output}
    assert kinds == ({"message"} if way == "text" else {"function_call"})
    assert way == "calls" or problem(json.loads(response.output_text), VERDICT) is None


def test_a_format_that_cannot_be_kept_is_refused_by_its_name(gateway: Gateway) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array", "uniqueItems": True}}}
    asked = {**OVER_HTTP, "tool_choice": "auto", "response_format": schema}

    error = gateway.post("/v1/chat/completions", asked).error()

    assert error["param"] == "response_format.json_schema.schema" and "uniqueItems" in error["message"]
