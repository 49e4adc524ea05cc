"""What HTTP requests come to: every field of our own API can be asked for, and no body does harm."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidRequest, PagewireError, TicketRefused
from protos import inference_pb2 as pb
from services.gateway import chat, completions, embeddings, positions, responses
from services.gateway.asked import Asked
from services.gateway.bodies import parse
from services.gateway.errors import NotServed, told
from services.gateway.fields import Fields
from services.gateway.positions import Heard, Position

HI: list[Any] = [{"role": "user", "content": "hi"}]

READERS: dict[str, Callable[[Fields], Asked]] = {
    "chat": chat.read,
    "completions": lambda body: completions.read(body, max_prompts=4),
    "responses": responses.read,
}

# What each field of the API is asked for as, and what it is then. A field that is new there must be here.
OF_SAMPLING: dict[str, tuple[Any, Any]] = {
    "temperature": (0.5, 0.5),
    "top_k": (5, 5),
    "top_p": (0.5, 0.5),
    "min_p": (0.25, 0.25),
    "seed": (7, 7),
    "n": (2, 2),
    "typical_p": (0.5, 0.5),
    "repetition_penalty": (1.5, 1.5),
    "presence_penalty": (-0.5, -0.5),
    "frequency_penalty": (0.5, 0.5),
    "logit_bias": ({"5": 1.5, "9": -2}, {5: 1.5, 9: -2.0}),
    "allowed_token_ids": ([1, 2], [1, 2]),
    "banned_token_ids": ([3], [3]),
    "bad_words": ("no", ["no"]),
    "logprobs": (2, 2),
    "prompt_logprobs": (3, 3),
    "best_of": (3, 3),
}
OF_CACHE: dict[str, tuple[Any, Any]] = {
    "cache_salt": ("mine", "mine"),
    "no_cache": (True, True),
    "pin_seconds": (60, 60),
    "pin_tokens": (16, 16),
}
OF_STRUCTURED: dict[str, tuple[Any, Any]] = {
    "json_schema": ({"type": "string"}, '{"type": "string"}'),
    "regex": ("a+", "a+"),
    "grammar": ('start: "a"', 'start: "a"'),
    "json_object": (True, True),
}
OF_STOPPING: dict[str, tuple[Any, Any]] = {
    "max_tokens": (9, 9),
    "stop": (["x", "y"], ["x", "y"]),
    "stop_token_ids": ([4], [4]),
    "ignore_eos": (True, True),
    "min_tokens": (2, 2),
    "include_stop": (True, True),
}
OF_REQUEST: dict[str, tuple[Any, Any]] = {
    "request_id": ("mine", "mine"),
    "model": ("m", "m"),
    "skip_special_tokens": (False, False),
    "priority": ("low", pb.PRIORITY_LOW),
    "max_drafts": (0, 0),
}


def body_of(members: dict[str, Any]) -> Fields:
    return parse(json.dumps(members).encode())


def completion(**members: Any) -> Asked:
    return completions.read(body_of({"prompt": "hi", **members}), max_prompts=8)


def plain(value: Any) -> Any:
    """A field of a message as something that can be compared."""
    if isinstance(value, str | int | float):
        return value
    return dict(value) if hasattr(value, "items") else list(value)


@pytest.mark.parametrize(
    ("part", "name", "given", "expected"),
    [
        (part, name, *each)
        for part, table in (
            ("sampling", OF_SAMPLING),
            ("sampling.structured", OF_STRUCTURED),
            ("stopping", OF_STOPPING),
            ("cache", OF_CACHE),
            ("", OF_REQUEST),
        )
        for name, each in table.items()
    ],
)
def test_every_field_of_our_own_api_is_asked_for_by_its_name(part: str, name: str, given: Any, expected: Any) -> None:
    message: Message = completion(**{name: given}).requests[0]
    for step in filter(None, part.split(".")):
        message = getattr(message, step)

    assert plain(getattr(message, name)) == expected


def test_those_are_all_fields_there_are() -> None:
    told_apart = {"sampling", "stopping", "structured", "text", "token_ids", "chat", "resumable", "choices"}
    told_apart |= {"beams", "cache"}
    messages = (
        pb.GenerateStreamRequest, pb.SamplingParams, pb.StopConditions, pb.StructuredOutput, pb.CacheControl,
    )  # fmt: skip
    fields = {name for message in messages for name in message.DESCRIPTOR.fields_by_name}

    assert fields - told_apart == {*OF_SAMPLING, *OF_STRUCTURED, *OF_STOPPING, *OF_REQUEST, *OF_CACHE}
    assert list(completion(choices=["a", "b"]).requests[0].sampling.structured.choices.values) == ["a", "b"]
    assert completion(resumable=True).manner.resumable


def test_a_beam_search_is_its_width_or_all_that_can_be_said_of_one() -> None:
    full = pb.BeamSearch(width=4, length_penalty=0.5, early_stopping=pb.EARLY_STOPPING_NEVER)
    asked = {"width": 4, "length_penalty": 0.5, "early_stopping": "never"}

    assert completion(beams=4).requests[0].sampling.beams == pb.BeamSearch(width=4)
    assert completion(beams=asked).requests[0].sampling.beams == full
    for wrong, field in (({**asked, "early_stopping": 1}, "beams.early_stopping"), ({"size": 4}, "beams.size")):
        with pytest.raises(InvalidRequest) as refused:
            completion(beams=wrong)
        assert refused.value.field == field


def test_a_tool_a_choice_and_a_call_are_ours_without_what_is_around_them() -> None:
    called = {"id": "a", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    request = chat.read(
        body_of({
            "messages": [
                *HI,
                {"role": "assistant", "content": None, "tool_calls": [called]},
                {"role": "tool", "tool_call_id": "a", "content": "noon"},
            ],
            "tools": [{"type": "function", "function": {"name": "clock", "parameters": {}, "strict": True}}],
            "tool_choice": {"type": "function", "function": {"name": "clock"}},
            "parallel_tool_calls": False,
        })
    ).requests[0]  # fmt: skip

    assert request.chat == pb.ChatMessages(
        messages=[
            pb.ChatMessage(role="user", content="hi"),
            pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(id="a", name="clock", arguments="{}")]),
            pb.ChatMessage(role="tool", content="noon", tool_call_id="a", name="clock"),
        ],
        tools=[pb.Tool(name="clock", parameters="{}", strict=True)],
        tool_choice=pb.ToolChoice(function="clock"),
        parallel_tool_calls=False,
    )


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("chat.tools[1].parameters", "tools[1].function.parameters"),
        ("chat.tools", "tools"),
        ("chat.tool_choice.function", "tool_choice.function.name"),
        ("chat.messages[0].tool_calls[0].arguments", "messages[0].tool_calls[0].function.arguments"),
        ("chat.messages[0].tool_call_id", "messages[0].tool_call_id"),
    ],
)
def test_what_the_scheduler_says_of_tools_is_told_by_openais_names(field: str, expected: str) -> None:
    function = {"function": {"name": "clock"}}
    message = {"role": "assistant", "tool_calls": [function]}
    names = chat.read(body_of({"messages": [message], "tools": [function, function]})).names

    assert told(InvalidRequest(field, "is wrong"), names).param == expected


def test_a_response_s_tools_calls_and_results_are_ours_as_a_chat_s_are() -> None:
    called = {"type": "function_call", "id": "fc_1", "status": "completed", "name": "clock", "arguments": "{}"}
    words = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]}
    asked = responses.read(
        body_of({
            "instructions": "Be brief.",
            "input": [
                *HI,
                words,
                {**called, "call_id": "a"},
                {**called, "call_id": "b"},
                {"type": "function_call_output", "call_id": "b", "output": "noon"},
                {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "one"}]},
                {**called, "call_id": "c"},
            ],
            "tools": [{"type": "function", "name": "clock", "description": None, "parameters": {}, "strict": True}],
            "tool_choice": {"type": "function", "name": "clock"},
            "parallel_tool_calls": False,
        })
    )  # fmt: skip

    assert asked.requests[0].chat == pb.ChatMessages(
        messages=[
            pb.ChatMessage(role="system", content="Be brief."),
            pb.ChatMessage(role="user", content="hi"),
            pb.ChatMessage(
                role="assistant",
                content="Let me see.",
                tool_calls=[pb.ToolCall(id=id, name="clock", arguments="{}") for id in "ab"],
            ),
            pb.ChatMessage(role="tool", content="noon", tool_call_id="b", name="clock"),
            pb.ChatMessage(role="tool", content="one", tool_call_id="a", name="clock"),
            pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(id="c", name="clock", arguments="{}")]),
        ],
        tools=[pb.Tool(name="clock", parameters="{}", strict=True)],
        tool_choice=pb.ToolChoice(function="clock"),
        parallel_tool_calls=False,
    )
    for field, expected in {
        "chat.messages[0].content": "instructions",
        "chat.messages[1].role": "input[0].role",
        "chat.messages[2].tool_calls[1].arguments": "input[3].arguments",
        "chat.messages[2].tool_calls[0].id": "input[2].call_id",
        "chat.messages[4].tool_call_id": "input[5].call_id",
        "chat.messages[4].content": "input[5].output",
        "chat.messages": "input",
        "chat.tools[0].parameters": "tools[0].parameters",
        "chat.tool_choice.function": "tool_choice.name",
    }.items():
        assert told(InvalidRequest(field, "is wrong"), asked.names).param == expected


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "clock"}}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "clock", "colour": "red"}]}, "tools[0].colour"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "clock", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output"),
        ({"input": [{"role": "assistant", "content": "", "tool_calls": []}]}, "input[0].tool_calls"),
    ],
)
def test_what_a_response_cannot_be_asked_for_is_refused_by_its_name(asked: dict[str, Any], field: str) -> None:
    with pytest.raises((InvalidRequest, NotServed)) as refused:
        responses.read(body_of({"input": "hi", **asked}))
    assert isinstance(refused.value, InvalidRequest | NotServed) and refused.value.field == field


FUNCTIONS: list[dict[str, Any]] = [{"type": "function", "name": name} for name in ("clock", "rain", "wind")]


def with_allowed(endpoint: str, names: list[str], mode: str = "auto", **more: Any) -> dict[str, Any]:
    """A body with three tools, of which these are allowed."""
    chosen: list[dict[str, Any]] = [{"type": "function", "name": name, **more} for name in names]
    if endpoint == "responses":
        choice: dict[str, Any] = {"type": "allowed_tools", "mode": mode, "tools": chosen}
        return {"input": "hi", "tools": FUNCTIONS, "tool_choice": choice}
    deeper = [
        [{"type": "function", "function": {**each, "type": None}} for each in tools] for tools in (FUNCTIONS, chosen)
    ]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": deeper[1]}}
    return {"messages": HI, "tools": deeper[0], "tool_choice": choice}


@pytest.mark.parametrize("endpoint", ["chat", "responses"])
@pytest.mark.parametrize(
    ("mode", "expected"), [("auto", pb.TOOL_CHOICE_MODE_AUTO), ("required", pb.TOOL_CHOICE_MODE_REQUIRED)]
)
def test_of_all_tools_only_those_that_are_allowed_are_offered(
    endpoint: str, mode: str, expected: pb.ToolChoiceMode.ValueType
) -> None:
    asked = READERS[endpoint](body_of(with_allowed(endpoint, ["wind", "rain", "wind"], mode)))

    chat = asked.requests[0].chat
    assert [tool.name for tool in chat.tools] == ["rain", "wind"]
    assert chat.tool_choice == pb.ToolChoice(mode=expected)
    named = told(InvalidRequest("chat.tools[1].parameters", "is wrong"), asked.names).param
    assert named == ("tools[2].function.parameters" if endpoint == "chat" else "tools[2].parameters")


@pytest.mark.parametrize(
    ("endpoint", "body", "field"),
    [
        ("chat", with_allowed("chat", ["snow"]), "tool_choice.allowed_tools.tools[0].function.name"),
        ("chat", with_allowed("chat", ["rain"], "none"), "tool_choice.allowed_tools.mode"),
        ("chat", with_allowed("chat", []), "tool_choice.allowed_tools.tools"),
        ("chat", {"messages": HI, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ("responses", with_allowed("responses", ["rain", "snow"]), "tool_choice.tools[1].name"),
        ("responses", with_allowed("responses", ["rain"], colour="red"), "tool_choice.tools[0].colour"),
    ],
)
def test_what_cannot_be_allowed_is_refused_by_its_name(endpoint: str, body: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        READERS[endpoint](body_of(body))
    assert refused.value.field == field


def test_an_assistant_that_refused_said_so() -> None:
    said = [
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "assistant", "content": "", "refusal": "no"},
    ]
    request = chat.read(body_of({"messages": said})).requests[0]

    assert [message.content for message in request.chat.messages] == ["no", ""]


NOTHING: list[tuple[str, dict[str, Any]]] = [
    ("chat", {"reasoning_effort": "none"}),
    ("chat", {"verbosity": "medium"}),
    ("responses", {"reasoning": {"effort": "none", "summary": None}}),
    ("responses", {"text": {"verbosity": "medium"}}),
    ("responses", {"truncation": "auto"}),
    ("responses", {"top_logprobs": 0}),
]


@pytest.mark.parametrize(("endpoint", "asked"), NOTHING)
def test_what_asks_for_nothing_is_let_pass(endpoint: str, asked: dict[str, Any]) -> None:
    body, plain = (body_of({"messages" if endpoint == "chat" else "input": HI, **more}) for more in (asked, {}))

    assert READERS[endpoint](body).requests == READERS[endpoint](plain).requests
    body.refuse_unknown()


@pytest.mark.parametrize(
    ("endpoint", "asked", "field"),
    [
        ("chat", {"reasoning_effort": "high"}, "reasoning_effort"),
        ("chat", {"verbosity": "low"}, "verbosity"),
        ("chat", {"web_search_options": {}}, "web_search_options"),
        ("chat", {"prediction": {"type": "content", "content": "a"}}, "prediction"),
        ("chat", {"prompt_cache_options": {"mode": "explicit"}}, "prompt_cache_options"),
        ("responses", {"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ("responses", {"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ("responses", {"text": {"verbosity": "low"}}, "text.verbosity"),
        ("responses", {"conversation": "conv_1"}, "conversation"),
        ("responses", {"prompt": {"id": "pmpt_1"}}, "prompt"),
        ("responses", {"max_tool_calls": 3}, "max_tool_calls"),
    ],
)
def test_what_openai_has_and_is_not_to_be_had_here_is_refused_as_that(
    endpoint: str, asked: dict[str, Any], field: str
) -> None:
    body = body_of({"messages" if endpoint == "chat" else "input": HI, **asked})

    def read() -> None:
        READERS[endpoint](body)
        body.refuse_unknown()

    with pytest.raises(NotServed) as refused:
        read()
    failed = told(refused.value)
    assert (failed.param, failed.code) == (field, "unsupported")
    assert "is not known here" not in failed.message and len(failed.message) > 30


def test_embeddings_let_pass_what_changes_nothing_as_answers_do() -> None:
    body = body_of({"input": "hi", "metadata": {"a": "b"}, "user": "me", "store": False})

    embeddings.read(body)
    body.refuse_unknown()


def test_what_is_not_asked_for_is_left_to_the_scheduler() -> None:
    request = chat.read(body_of({"messages": HI, "temperature": None})).requests[0]

    assert request == pb.GenerateStreamRequest(
        chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
    )


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"type": "json_object"}, pb.StructuredOutput(json_object=True)),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "null"}}},
         pb.StructuredOutput(json_schema='{"type": "null"}')),
        ({"type": "text"}, pb.StructuredOutput()),
    ],
)  # fmt: skip
def test_a_response_format_is_our_structured_output(asked: Any, expected: pb.StructuredOutput) -> None:
    request = chat.read(body_of({"messages": HI, "response_format": asked})).requests[0]
    assert request.sampling.structured == expected


def test_a_text_format_is_our_structured_output() -> None:
    asked = {"type": "json_schema", "name": "x", "strict": True, "schema": {"type": "null"}}
    request = responses.read(body_of({"input": "hi", "text": {"format": asked}})).requests[0]
    assert request.sampling.structured.json_schema == '{"type": "null"}'


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"text": {"format": {"type": "json_object"}}, "regex": "[a-z]{3}"}, "text.format"),
        ({"text": {"format": {"type": "json_object"}}, "response_format": {"type": "json_object"}}, "text.format"),
        ({"response_format": {"type": "json_object"}, "choices": ["a"]}, "response_format"),
    ],
)
def test_of_two_things_that_a_response_must_be_none_is_dropped(asked: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match="only one of") as refused:
        responses.read(body_of({"input": "hi", **asked}))
    assert refused.value.field == field


def test_a_text_format_that_is_plain_text_leaves_the_rest_as_it_is() -> None:
    request = responses.read(body_of({"input": "hi", "text": {"format": {"type": "text"}}, "regex": "a+"})).requests[0]
    assert request.sampling.structured.regex == "a+"


@pytest.mark.parametrize("n", [0, 129])
def test_a_limit_of_the_gateway_s_own_is_not_told_as_the_scheduler_s(n: int) -> None:
    with pytest.raises(InvalidRequest, match=f"^n: the gateway passes on 1 to 128, .* fewer, got {n}$"):
        completion(n=n)
    assert completion(n=128).requests[0].sampling.n == 128


def test_seeds_may_be_negative_as_openais_are() -> None:
    assert completion(seed=-1).requests[0].sampling.seed == (1 << 64) - 1


def test_what_several_prompts_share_is_not_copied_without_bound() -> None:
    body = {"prompt": ["a"] * 8, "regex": "a" * 2_000_000}

    with pytest.raises(InvalidRequest, match=r"8 prompts times 2000\d+ bytes") as refused:
        completions.read(body_of(body), max_prompts=8)
    assert refused.value.field == "prompt"
    assert len(completions.read(body_of({**body, "prompt": ["a"] * 3}), max_prompts=8).requests) == 3


def test_prompts_have_the_same_seed_where_it_is_given_and_their_own_where_it_is_not() -> None:
    same, own = completion(prompt=["a", "a"], seed=5), completion(prompt=["a", "a"])
    for asked in (same, own):
        asked.begin(None)

    assert [request.sampling.seed for request in same.requests] == [5, 5]
    first, second = (request.sampling.seed for request in own.requests)
    assert second == first + 1
    assert len({request.request_id for request in same.requests}) == 2


def test_a_completion_has_openais_sixteen_tokens_unless_told() -> None:
    assert completion().requests[0].stopping.max_tokens == 16
    assert completion(max_tokens=0, echo=True).requests[0].stopping.max_tokens == 1


def test_both_names_of_a_limit_may_say_the_same_and_no_two_things() -> None:
    both = {"messages": HI, "max_tokens": 5}
    assert chat.read(body_of({**both, "max_completion_tokens": 5})).requests[0].stopping.max_tokens == 5
    with pytest.raises(InvalidRequest, match="give one of them"):
        chat.read(body_of({**both, "max_completion_tokens": 6}))


def test_a_scheduler_s_field_is_told_by_the_name_that_its_caller_knows() -> None:
    names = chat.read(body_of({"messages": HI, "max_completion_tokens": 5})).names

    assert told(InvalidRequest("max_tokens", "x"), names).param == "max_completion_tokens"
    assert told(InvalidRequest("chat.messages[3].role", "is empty"), names).param == "messages[3].role"
    assert told(InvalidRequest("top_k", "x"), names).param == "top_k"


@pytest.mark.parametrize("secret", ["my secret prompt", "hi"])
@pytest.mark.parametrize(
    ("endpoint", "name", "around"),
    [
        ("chat", "messages", "{}"),
        ("chat", "messages", "[{}]"),
        ("chat", "messages", '[{{"role": "user", "content": [{}]}}]'),
        ("chat", "messages", '[{{"role": "user", "content": {{"x": {}}}}}]'),
        ("chat", "tools", "[{}]"),
        ("chat", "temperature", "{}"),
        ("completions", "prompt", "[[{}]]"),
        ("completions", "prompt", "[1, {}]"),
        ("responses", "input", "[{}]"),
        ("responses", "input", '[{{"content": [{}], "role": "user"}}]'),
    ],
)
def test_no_text_that_may_be_a_prompt_is_in_an_error(endpoint: str, name: str, around: str, secret: str) -> None:
    body = f'{{"{name}": {around.format(json.dumps(secret))}}}'
    with pytest.raises(InvalidRequest) as refused:
        READERS[endpoint](parse(body.encode()))
    assert refused.value.field.startswith(name) and secret not in str(refused.value)


def test_a_word_that_is_none_of_a_few_is_told() -> None:
    for body in ({"priority": "urgent"}, {"tool_choice": "urgent"}, {"tools": [{"type": "urgent"}]}):
        with pytest.raises((InvalidRequest, NotServed), match="got 'urgent'"):
            chat.read(body_of({"messages": HI, **body}))


# ---- bodies that nobody would send

NAMES = [
    *OF_SAMPLING, *OF_STRUCTURED, *OF_STOPPING, *OF_REQUEST, "choices", "resumable", "messages", "prompt", "input",
    "stream", "stream_options", "response_format", "text", "tools", "tool_choice", "logprobs", "top_logprobs", "echo",
    *OF_CACHE, "beams", "parallel_tool_calls", "functions", "suffix", "max_completion_tokens", "max_output_tokens",
    "instructions", "include", "reasoning", "user",
    "metadata", "return_token_ids", "resume_token_ids", "modalities", "audio", "truncation", "background",
    "previous_response_id", "nonsense", "reasoning_effort", "verbosity", "prediction", "conversation",
]  # fmt: skip
INNER = ["role", "content", "type", "text", "format", "schema", "json_schema", "name", "strict", "5", "-1", "x"]
INNER += ["function", "parameters", "tool_calls", "call_id", "output", "arguments"]
INNER += ["allowed_tools", "mode", "tools", "refusal", "effort", "verbosity"]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.sampled_from(
        [
            "",
            "hi",
            "user",
            "text",
            "json_schema",
            "json_object",
            "message",
            "function_call",
            "function_call_output",
            "allowed_tools",
            "auto",
            "assistant",
            "none",
            "\ud800",
            "\x00",
        ]
    )
    | st.text(max_size=3)
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER), inner, max_size=3)
)
VALID: dict[str, Any] = {"messages": HI, "prompt": "hi", "input": "hi"}
BODIES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4).map(lambda asked: {**VALID, **asked})


@pytest.mark.parametrize("endpoint", list(READERS))
@settings(max_examples=25, deadline=None)
@given(body=BODIES)
def test_any_body_is_understood_or_refused_by_the_name_of_a_member(endpoint: str, body: dict[str, Any]) -> None:
    try:
        fields = parse(json.dumps(body).encode())
        asked = READERS[endpoint](fields)
        fields.refuse_unknown()
        asked.begin(None)
    except (InvalidRequest, NotServed) as error:
        failed = told(error)
        assert failed.status == 400 and failed.param
        assert json.loads(failed.body)["error"]["message"]
    else:
        for request in asked.requests:
            assert pb.GenerateStreamRequest.FromString(request.SerializeToString()) == request
            assert math.isfinite(request.sampling.temperature)


@settings(max_examples=40, deadline=None)
@given(
    body=st.binary(max_size=60)
    | st.text(alphabet='{}[]":,\\ue0d8a12tfnN.-+ "messages"', max_size=60).map(lambda text: text.encode())
)
def test_any_bytes_are_an_object_or_refused(body: bytes) -> None:
    try:
        found = parse(body).names()
    except InvalidRequest as error:
        found = [error.field, error.problem]
    assert all(found) or b'""' in body


def test_the_member_that_is_nested_too_deep_is_named() -> None:
    deep = '{"a": {"x": [1, "[[["]}, "b": ' + "[" * 100_000 + "]" * 100_000 + ', "c": 1}'
    with pytest.raises(InvalidRequest) as refused:
        parse(deep.encode())
    assert refused.value.field == "b"


def test_a_body_that_is_nested_too_deep_is_not_looked_through_to_its_end() -> None:
    deep = '{"a": [' + "[]," * 1_000_000 + "[" * 100_000

    with pytest.raises(InvalidRequest, match=r"^body: .* nested too deep"):  # a millisecond, and not a second
        parse(deep.encode())


@pytest.mark.parametrize(
    ("read", "body", "field"),
    [
        (chat.read, {"messages": [{}] * 4097}, "messages"),
        (chat.read, {"messages": [{"role": "user", "content": [{}] * 4097}]}, "messages[0].content"),
        (chat.read, {"messages": [{"role": "assistant", "tool_calls": [{}] * 4097}]}, "messages[0].tool_calls"),
        (chat.read, {"messages": HI, "tools": [{}] * 4097}, "tools"),
        (chat.read, {"messages": HI, "stop": ["a"] * 4097}, "stop"),
        (chat.read, {"messages": HI, "resume_token_ids": [[]] * 17}, "resume_token_ids"),
        (responses.read, {"input": [{}] * 8193}, "input"),
    ],
)
def test_a_list_of_more_than_anybody_means_is_refused_before_it_is_taken_apart(
    read: Callable[[Fields], object], body: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest, match="at most") as caught:
        read(Fields(body))

    assert caught.value.field == field


def test_a_string_without_an_end_behind_it_costs_one_look() -> None:
    deep = '{"a": ' + "[" * 100_000 + "]" * 100_000 + ', "b": "' + '\\"' * 200_000 + "[" * 100_001
    with pytest.raises(InvalidRequest) as refused:
        parse(deep.encode())
    assert refused.value.field == "a"


# ---- ids of events

MOST = 2**32 - 2**24 - 1
NUMBERS = st.integers(0, MOST)
CALLS = st.just((0, 0)) | st.tuples(st.integers(1, MOST), NUMBERS)  # arguments are those of calls
HEARD = st.builds(
    lambda calls, **others: Heard(calls=calls[0], arguments=calls[1], **others),
    calls=CALLS,
    tokens=NUMBERS,
    characters=NUMBERS,
    ended=st.booleans(),
    digest=st.binary(min_size=8, max_size=8),
    ticket=st.binary(max_size=80),
)


@given(
    heard=st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(HEARD, min_size=n, max_size=n), min_size=1, max_size=3)
    ),
    seed=st.integers(0, 2**64 - 1),
    done=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_an_id_tells_where_its_stream_was(heard: list[list[Heard]], seed: int, done: bool) -> None:
    writer = positions.Writer("a-name", seed, 1_800_000_000, prompts=len(heard), choices=len(heard[0]))
    most = list(range(len(heard)))

    packed = [
        positions.pack_prompt(number) + b"".join(each.packed() for each in of_prompt)
        for number, of_prompt in zip(most, heard, strict=True)
    ]
    id = writer.id(41, b"".join(packed), done=done)

    assert positions.read(id) == Position(
        request_id="a-name",
        seed=seed,
        created=1_800_000_000,
        event=41,
        done=done,
        max_tokens=tuple(most),
        choices=tuple(map(tuple, heard)),
    )
    for broken in (id[:-4], id + "AAAA", "é", ""):
        with pytest.raises(TicketRefused):
            positions.read(broken)


def id_of(*choices: Heard, seed: int = 7, prompts: int = 1, event: int = 3) -> str:
    writer = positions.Writer("a-name", seed, 1_800_000_000, prompts=prompts, choices=len(choices))
    return writer.id(event, (positions.pack_prompt(16) + b"".join(each.packed() for each in choices)) * prompts)


TOO_MANY = 2**32 - 1
NONE = Heard(digest=bytes(8))


@pytest.mark.parametrize(
    "forged",
    [
        id_of(NONE, event=TOO_MANY),
        id_of(replace(NONE, characters=TOO_MANY)),
        id_of(replace(NONE, calls=1, arguments=TOO_MANY)),
    ],
    ids=["event", "characters", "arguments"],
)
def test_an_id_with_a_number_that_no_stream_comes_to_is_refused(forged: str) -> None:
    with pytest.raises(TicketRefused):
        positions.read(forged)


def test_an_id_with_a_seed_that_has_no_next_one_is_of_one_who_chose_it() -> None:
    position = positions.read(id_of(NONE, seed=(1 << 64) - 1, prompts=2))

    completion(prompt=["a", "b"], seed=-1).begin(position)
    with pytest.raises(TicketRefused, match="chose its seed"):
        completion(prompt=["a", "b"]).begin(position)


@given(id=st.text(max_size=80) | st.binary(max_size=80).map(lambda data: data.hex()))
@settings(max_examples=40, deadline=None)
def test_what_is_no_id_is_refused(id: str) -> None:
    with pytest.raises(PagewireError):
        positions.read(id)
