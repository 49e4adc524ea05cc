"""What becomes of members that nobody knows, wherever in a body they are."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from tests.services.gateway_calls import CHAT, HI, Call, Scheduler, ask, finish, gateway

COMPLETIONS, RESPONSES, EMBEDDINGS = "/v1/completions", "/v1/responses", "/v1/embeddings"
CLOCK: dict[str, Any] = {"name": "clock", "parameters": {"type": "object"}}
TOOLS = {"tools": [{"type": "function", "function": CLOCK}]}
FLAT: dict[str, Any] = {"input": "hi", "tools": [{"type": "function", **CLOCK}]}
USER: dict[str, Any] = {"role": "user", "content": "hi"}
SCHEMA: dict[str, Any] = {"name": "a", "schema": {"type": "object"}}
X: dict[str, Any] = {"x": [{"deep": float("nan")}]}
"""A member that nobody knows, with a value that must not be told again."""

INSIDE: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {**HI, **X}, "x"),
    (CHAT, {"messages": [{**USER, **X}]}, "messages[0].x"),
    (CHAT, {"messages": [{**USER, "content": [{"type": "text", "text": "hi", **X}]}]}, "messages[0].content[0].x"),
    (CHAT, {**HI, "stream": True, "stream_options": X}, "stream_options.x"),
    (CHAT, {**HI, "beams": {"width": 2, **X}}, "beams.x"),
    (CHAT, {**HI, "tools": [{"type": "function", "function": CLOCK, **X}]}, "tools[0].x"),
    (CHAT, {**HI, "tools": [{"type": "function", "function": {**CLOCK, **X}}]}, "tools[0].function.x"),
    (CHAT, {**HI, **TOOLS, "tool_choice": {"function": {"name": "clock", **X}}}, "tool_choice.function.x"),
    (CHAT, {**HI, "response_format": {"type": "json_object", **X}}, "response_format.x"),
    (
        CHAT,
        {**HI, "response_format": {"type": "json_schema", "json_schema": {**SCHEMA, **X}}},
        "response_format.json_schema.x",
    ),
    (COMPLETIONS, {"prompt": "hi", "beams": {"width": 2, **X}}, "beams.x"),
    (RESPONSES, {"input": [{**USER, **X}]}, "input[0].x"),
    (RESPONSES, {"input": "hi", "text": X}, "text.x"),
    (RESPONSES, {"input": "hi", "text": {"format": {"type": "text", **X}}}, "text.format.x"),
    (RESPONSES, {"input": "hi", "text": {"format": {"type": "text", "schema": X}}}, "text.format.schema"),
    (RESPONSES, {"input": "hi", "text": {"format": {"type": "json_schema", **SCHEMA, **X}}}, "text.format.x"),
    (RESPONSES, {"input": "hi", "reasoning": X}, "reasoning.x"),
    (RESPONSES, {"input": "hi", "stream_options": X}, "stream_options.x"),
    (RESPONSES, {**FLAT, "tools": [{**FLAT["tools"][0], **X}]}, "tools[0].x"),
    (RESPONSES, {**FLAT, "tool_choice": {"type": "function", "name": "clock", **X}}, "tool_choice.x"),
    (
        RESPONSES,
        {**FLAT, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "clock", **X}], **X}},
        "tool_choice.tools[0].x",
    ),
]


def asked(path: str, body: dict[str, Any], *, ignore: bool) -> Call:
    return ask(gateway(Scheduler(finish()), unknown_fields="ignore" if ignore else "refuse"), body, path=path)


@pytest.mark.parametrize(("path", "body", "param"), INSIDE)
def test_a_member_that_is_not_known_is_refused_by_its_name_or_let_pass_wherever_it_is(
    path: str, body: dict[str, Any], param: str, caplog: pytest.LogCaptureFixture
) -> None:
    refused = asked(path, body, ignore=False)
    with caplog.at_level(logging.WARNING):
        taken = asked(path, body, ignore=True)

    assert (refused.status, refused.json["error"]["param"]) == (400, param)
    assert taken.status == 200
    assert b"deep" not in b"".join(taken.parts) and b"NaN" not in b"".join(taken.parts)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(" members of a request are not known here, and ignored")
    assert int(line.split()[0]) == json.dumps(body).count('"x"') or param.endswith("schema")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{**USER, "content": 1, **X}]}, "messages[0].content"),
        (CHAT, {"messages": [{**USER, "content": [{"type": "text", "text": 1, **X}]}]}, "messages[0].content[0].text"),
        (CHAT, {"messages": [{**USER, "content": [{"type": "image_url", **X}]}]}, "messages[0].content[0].type"),
        (CHAT, {"messages": [{**USER, "content": [1]}]}, "messages[0].content[0]"),
        (CHAT, {"messages": [1]}, "messages[0]"),
        (CHAT, {**HI, "stream": True, "stream_options": {"include_usage": 1, **X}}, "stream_options.include_usage"),
        (CHAT, {**HI, "tools": [{"type": "function", "function": {"name": 1, **X}}]}, "tools[0].function.name"),
        (CHAT, {**HI, **TOOLS, "tool_choice": {"function": X}}, "tool_choice.function.name"),
        (
            CHAT,
            {**HI, "response_format": {"type": "json_schema", "json_schema": X}},
            "response_format.json_schema.schema",
        ),
        (RESPONSES, {"input": [{"type": "reasoning", **X}]}, "input[0].type"),
        (RESPONSES, {**FLAT, "tool_choice": {"type": "allowed_tools", "mode": "never", **X}}, "tool_choice.mode"),
        (EMBEDDINGS, {"input": 1, **X}, "input"),
    ],
)
def test_what_is_known_and_wrong_is_refused_all_the_same(path: str, body: dict[str, Any], param: str) -> None:
    refused = asked(path, body, ignore=True)

    assert (refused.status, refused.json["error"]["param"]) == (400, param)


def test_of_two_requests_each_counts_its_own(caplog: pytest.LogCaptureFixture) -> None:
    app = gateway(Scheduler(finish()), unknown_fields="ignore")
    with caplog.at_level(logging.WARNING):
        for body in ({**HI, **X}, HI, {"messages": [{**USER, **X, "y": 1, "z": None}]}):
            assert ask(app, body).status == 200

    assert [record.getMessage().split()[0] for record in caplog.records] == ["1", "2"]
