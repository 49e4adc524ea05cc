"""What a chat may offer to call: defaults, limits, and refusals that name the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from common.errors import InvalidRequest
from common.sampling import Grammar, RequestLimits
from protos import inference_pb2 as pb
from services.codec_public import request_from_pb
from services.request import Chat
from services.tools.values import NO_PARAMETERS, TextForm, Tool, ToolCall, Tools

LIMITS = RequestLimits(max_tools=3, max_tools_bytes=400, max_structured_bytes=350)
AUTO, NONE, REQUIRED = pb.TOOL_CHOICE_MODE_AUTO, pb.TOOL_CHOICE_MODE_NONE, pb.TOOL_CHOICE_MODE_REQUIRED
SCHEMA = '{"properties": {"a": {"type": "integer"}}}'
DEEP = '{"":' * 65 + "1" + "}" * 65
F, G = pb.Tool(name="f"), pb.Tool(name="g", description="Does it.", parameters=SCHEMA, strict=True)


def chat(*tools: pb.Tool, messages: list[pb.ChatMessage] | None = None, **given: Any) -> pb.GenerateRequest:
    said = messages or [pb.ChatMessage(role="user", content="hi")]
    return pb.GenerateRequest(chat=pb.ChatMessages(messages=said, tools=tools, **given))


def understood(request: pb.GenerateRequest) -> Chat:
    source = request_from_pb(request, LIMITS, vocab_size=100).input
    assert isinstance(source, Chat)
    return source


def choice(mode: int) -> pb.ToolChoice:
    return pb.ToolChoice(mode=mode)  # type: ignore[arg-type]


def test_tools_are_offered_and_may_be_called_together_unless_the_chat_says_otherwise() -> None:
    f, g = Tool(name="f", parameters=NO_PARAMETERS), Tool(
        name="g", description="Does it.", parameters=json.loads(SCHEMA), strict=True
    )  # fmt: skip

    assert understood(chat(F, G)).tools == Tools(offered=(f, g), callable=(f, g))
    assert understood(chat(F, G, tool_choice=choice(AUTO))).tools == Tools(offered=(f, g), callable=(f, g))
    assert understood(chat(F, parallel_tool_calls=False)).tools == Tools(offered=(f,), callable=(f,), parallel=False)
    required = Tools(offered=(f, g), callable=(f, g), required=True)
    assert understood(chat(F, G, tool_choice=choice(REQUIRED))).tools == required
    named = Tools(offered=(f, g), callable=(g,), required=True, parallel=False)
    assert understood(chat(F, G, tool_choice=pb.ToolChoice(function="g"))).tools == named
    assert understood(chat(F, G, tool_choice=choice(NONE))).tools is None
    assert understood(chat()).tools is None


def test_messages_have_calls_and_results() -> None:
    called = pb.ToolCall(id="x1", name="f", arguments='{"a": 1}')
    messages = [
        pb.ChatMessage(role="assistant", tool_calls=[called, pb.ToolCall(name="g")]),
        pb.ChatMessage(role="tool", content="2", tool_call_id="x1", name="f"),
    ]

    assistant, tool = understood(chat(messages=messages)).messages

    assert assistant.tool_calls == (
        ToolCall(id="x1", name="f", arguments='{"a": 1}'),
        ToolCall(id="", name="g", arguments="{}"),
    )
    assert (tool.role, tool.content, tool.tool_call_id, tool.name) == ("tool", "2", "x1", "f")


def message(role: str = "assistant", **given: Any) -> list[pb.ChatMessage]:
    return [pb.ChatMessage(role="user", content="hi"), pb.ChatMessage(role=role, **given)]


@pytest.mark.parametrize(
    ("request_", "field", "problem"),
    [
        (chat(F, F), "chat.tools[1].name", "is there twice"),
        (chat(*(pb.Tool(name=f"f{i}") for i in range(4))), "chat.tools", "at most 3, got 4"),
        (chat(pb.Tool(name="")), "chat.tools[0].name", "must be 1 to 64 of"),
        (chat(pb.Tool(name="n" * 65)), "chat.tools[0].name", "must be 1 to 64 of"),
        (chat(F, pb.Tool(name="my tool")), "chat.tools[1].name", "must be 1 to 64 of"),
        (chat(pb.Tool(name="f\n")), "chat.tools[0].name", "must be 1 to 64 of"),
        (chat(pb.Tool(name="f", description="d" * 400)), "chat.tools", "at most 400 bytes together, got 401"),
        (chat(pb.Tool(name="f", parameters=" " * 351)), "chat.tools[0].parameters", "at most 350 bytes, got 351"),
        (chat(F, pb.Tool(name="g", parameters="{")), "chat.tools[1].parameters", "must be a JSON object"),
        (chat(pb.Tool(name="f", parameters=DEEP)), "chat.tools[0].parameters", "at most 64 deep"),
        (chat(pb.Tool(name="f", parameters="[]")), "chat.tools[0].parameters", "must be a JSON object"),
        (chat(pb.Tool(name="f", parameters='{"const": NaN}')), "chat.tools[0].parameters", "must be a JSON object"),
        (chat(pb.Tool(name="f", parameters='{"type": "string"}')), "chat.tools[0].parameters", '"type": "object"'),
        (chat(F, tool_choice=pb.ToolChoice(function="g")), "chat.tool_choice.function", "one of chat.tools"),
        (chat(F, tool_choice=pb.ToolChoice(function="")), "chat.tool_choice.function", "one of chat.tools"),
        (chat(F, tool_choice=choice(9)), "chat.tool_choice.mode", "must be one of AUTO, NONE, REQUIRED, got 9"),
        (chat(tool_choice=choice(REQUIRED)), "chat.tool_choice", "there are no chat.tools"),
        (chat(tool_choice=pb.ToolChoice(function="f")), "chat.tool_choice", "there are no chat.tools"),
        (chat(parallel_tool_calls=True), "chat.parallel_tool_calls", "there are no chat.tools"),
        (chat(messages=message("user", tool_calls=[pb.ToolCall(name="f")])), "chat.messages[1].tool_calls", "assist"),
        (chat(messages=message("user", tool_call_id="x")), "chat.messages[1].tool_call_id", "the role tool"),
        (chat(messages=message("tool", tool_call_id="x" * 129)), "chat.messages[1].tool_call_id", "at most 128"),
        (chat(messages=message(name="x" * 129)), "chat.messages[1].name", "at most 128"),
        (chat(messages=message(tool_calls=[pb.ToolCall(name="f")] * 4)), "chat.messages[1].tool_calls", "at most 3"),
        (chat(messages=message(tool_calls=[pb.ToolCall(name="a b")])), "chat.messages[1].tool_calls[0].name", "1 to"),
        (
            chat(messages=message(tool_calls=[pb.ToolCall(name="f", id="x" * 129)])),
            "chat.messages[1].tool_calls[0].id",
            "at most 128",
        ),
        (
            chat(messages=message(tool_calls=[pb.ToolCall(name="f", arguments=" " * 351)])),
            "chat.messages[1].tool_calls[0].arguments",
            "at most 350 bytes, got 351",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_tool_or_a_call_is_told_by_its_field(
    request_: pb.GenerateRequest, field: str, problem: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        understood(request_)

    assert refused.value.field == field
    assert problem in refused.value.problem


def test_an_answer_that_may_call_is_of_its_form_where_it_does_not() -> None:
    request = chat(F)
    request.sampling.structured.regex = "a"

    tools = understood(request).tools
    assert tools is not None and tools.text == TextForm("regex", Grammar("regex", "a"))
    request.chat.tool_choice.mode = REQUIRED
    assert understood(request).tools == understood(chat(F, tool_choice=choice(REQUIRED))).tools, "it has no text"
    request.chat.tool_choice.mode = NONE
    assert understood(request).tools is None

    request.sampling.structured.choices.values.extend(["a", "b", "a"])
    request.chat.tool_choice.mode = AUTO
    tools = understood(request).tools
    assert tools is not None and tools.text == TextForm("choices", Grammar("lark", 'start: "a" | "b"'), ("a", "b", "a"))


def test_a_grammar_does_not_go_together_with_tools_that_may_be_called() -> None:
    request = chat(F)
    request.sampling.structured.grammar = 'start: "a"'

    with pytest.raises(InvalidRequest, match=r"chat\.tools") as refused:
        understood(request)
    assert refused.value.field == "grammar"

    for mode in (NONE, REQUIRED):
        request.chat.tool_choice.mode = mode
        understood(request)
