"""Tools in the client for Python: what its user gives is what is sent, and what comes is put together."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from common.errors import InvalidRequest
from pagewire import ToolCall, ToolCallDelta
from pagewire.asking import Settings, request_of
from pagewire.continuation import Continuation, OutOfStep
from protos import inference_pb2 as pb

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def chat(**settings: Any) -> pb.ChatMessages:
    return request_of(None, cast("Settings", {"messages": HI, **settings})).chat


def test_every_field_of_tools_is_a_setting_of_that_name() -> None:
    assert set(pb.ChatMessages.DESCRIPTOR.fields_by_name) <= Settings.__annotations__.keys()


def test_a_tool_is_given_plainly_or_as_openai_has_it() -> None:
    plain = {"name": "f", "description": "Does it.", "parameters": SCHEMA, "strict": True}
    sent = pb.Tool(name="f", description="Does it.", parameters=json.dumps(SCHEMA), strict=True)

    assert list(chat(tools=[plain]).tools) == [sent]
    assert list(chat(tools=[{"type": "function", "function": plain}]).tools) == [sent]
    assert list(chat(tools=[{"name": "f", "parameters": '{"a": 1}', "description": None}]).tools) == [
        pb.Tool(name="f", parameters='{"a": 1}')
    ]


def test_what_must_be_called_is_a_mode_or_a_name() -> None:
    assert chat(tool_choice="required").tool_choice == pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED)
    assert chat(tool_choice="none").tool_choice == pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_NONE)
    assert chat(tool_choice="auto").tool_choice == pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_AUTO)
    assert chat(tool_choice="f").tool_choice == pb.ToolChoice(function="f")
    assert not chat().HasField("tool_choice")
    assert chat(parallel_tool_calls=False).HasField("parallel_tool_calls")


def test_calls_and_results_in_messages_are_ours_or_as_openai_has_them() -> None:
    call = ToolCall(id="x", name="f", arguments='{"a": 1}')
    theirs = {"id": "x", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    sent = pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(id="x", name="f", arguments='{"a": 1}')])

    for given in (call, theirs, {"id": "x", "name": "f", "arguments": '{"a": 1}'}):
        assert list(chat(messages=[{"role": "assistant", "content": None, "tool_calls": [given]}]).messages) == [sent]
    assert list(chat(messages=[call.result("2")]).messages) == [
        pb.ChatMessage(role="tool", content="2", tool_call_id="x", name="f")
    ]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"tools": [{"name": 3}]}, "tools[0].name"),
        ({"tools": [{"name": "f"}, {"name": "g", "colour": "secret"}]}, "tools[1].colour"),
        ({"tool_choice": 3}, "tool_choice"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"x": 1}]}]}, "messages[0].tool_calls[0].x"),
        ({"messages": [{"role": "user", "content": "", "picture": "secret"}]}, "messages[0]"),
    ],
)  # fmt: skip
def test_what_cannot_be_sent_is_named_without_its_words(settings: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat(**settings)

    assert refused.value.field == field
    assert "secret" not in str(refused.value)


def test_tools_without_a_chat_are_a_mistake_of_the_program() -> None:
    with pytest.raises(TypeError, match="tools= goes with messages="):
        request_of("hi", {"tools": [{"name": "f"}]})


def delta(index: int, *parts: pb.ToolCallDelta) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(delta=pb.Delta(index=index, token_ids=[7], tool_calls=parts))


def test_parts_of_calls_are_told_as_they_come_and_put_together_once() -> None:
    heard = Continuation(request_of(None, {"messages": HI}))
    first = delta(0, pb.ToolCallDelta(index=0, id="x", name="f", arguments="{"))
    second = delta(
        1, pb.ToolCallDelta(index=0, arguments="}"), pb.ToolCallDelta(index=1, id="y", name="g", arguments='{"a"')
    )

    told = [heard.hear(message) for message in (first, first, second)]
    heard.hear(pb.GenerateStreamResponse(finish=pb.Finish(reason=pb.FINISH_REASON_LENGTH)))

    assert told[0] is not None and told[1] is None
    assert getattr(told[0], "tool_calls", None) == (ToolCallDelta(index=0, id="x", name="f", arguments="{"),)
    answer = heard.answer()
    assert answer.tool_calls == (
        ToolCall(id="x", name="f", arguments="{}"),
        ToolCall(id="y", name="g", arguments='{"a"'),
    )
    assert answer.message == {"role": "assistant", "content": "", "tool_calls": answer.tool_calls}
    assert answer.tool_calls[0].parsed == {}
    with pytest.raises(ValueError, match="delimiter"):
        answer.tool_calls[1].parsed  # noqa: B018 - asking is what raises


def test_a_part_of_a_call_that_never_began_is_not_believed() -> None:
    heard = Continuation(request_of(None, {"messages": HI}))

    with pytest.raises(OutOfStep, match="never began"):
        heard.hear(delta(0, pb.ToolCallDelta(index=1, id="x", name="f")))
    assert heard.hear(delta(0)) is not None
