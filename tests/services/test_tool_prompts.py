"""Tools, calls and results in a prompt: as the model's template has them, or in words where it has none."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from common.config import SchedulerConfig
from common.errors import InvalidRequest
from common.model_folder import read_model_folder
from services.chat_template import ChatTemplate
from services.request import Message
from services.tools.format import ToolFormat
from services.tools.formats import FORMATS, format_in
from services.tools.hermes import HERMES
from services.tools.llama3 import LLAMA3
from services.tools.mistral import MISTRAL
from services.tools.parser import CallParser
from services.tools.values import Tool, ToolCall
from tests.services.tool_templates import HERMES_TEMPLATE, LLAMA3_TEMPLATE, MISTRAL_TEMPLATE, PLAIN_TEMPLATE

WEATHER = Tool(
    name="get_weather",
    description="The weather in a city <now>.",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
CLOCK = Tool(name="clock")
SPECIAL: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
DEEPER = '{"a": ' * 65 + "1" + "}" * 65
DEEP = pytest.param("[" * 100_000, id="deep")
TEMPLATES = {"hermes": HERMES_TEMPLATE, "llama3": LLAMA3_TEMPLATE, "mistral": MISTRAL_TEMPLATE}


def user(content: str) -> Message:
    return Message(role="user", content=content)


def call(name: str, arguments: str, id: str = "Abcde0123") -> ToolCall:
    return ToolCall(id=id, name=name, arguments=arguments)


def calling(*calls: ToolCall, content: str = "") -> Message:
    return Message(role="assistant", content=content, tool_calls=calls)


def result(content: str, id: str = "Abcde0123") -> Message:
    return Message(role="tool", content=content, tool_call_id=id, name="get_weather")


ONE_CALL = [user("Is it raining?"), calling(call("get_weather", '{"city":"Zürich"}')), result('{"rain": true}')]
TWO_CALLS = [
    Message(role="system", content="Be brief."),
    user("Where is it raining?"),
    calling(call("get_weather", '{"city": "Paris"}'), call("get_weather", "{}", "zzzzzzzz9"), content="Let me see."),
    result("yes"),
    result("no", "zzzzzzzz9"),
    user("And now?"),
]


def as_transformers_has_it(message: Message) -> dict[str, Any]:
    told: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        told["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": json.loads(c.arguments)}}
            for c in message.tool_calls
        ]
    if message.tool_call_id:
        told |= {"tool_call_id": message.tool_call_id, "name": message.name}
    return told


def in_json(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


@pytest.mark.parametrize("tools", [(), (WEATHER,), (WEATHER, CLOCK)])
@pytest.mark.parametrize(
    ("name", "chat"),
    [
        *(pytest.param(name, ONE_CALL, id=f"{name}, one call") for name in TEMPLATES),
        *(pytest.param(name, TWO_CALLS, id=f"{name}, two calls") for name in TEMPLATES if name != "llama3"),
    ],
)
def test_a_template_that_knows_tools_is_told_of_them_as_by_transformers(
    name: str, chat: list[Message], tools: tuple[Tool, ...]
) -> None:
    theirs: Any = render_jinja_template(
        [[as_transformers_has_it(message) for message in chat]],
        tools=[in_json(tool) for tool in tools] or None,
        chat_template=TEMPLATES[name],
        add_generation_prompt=True,
        **SPECIAL,
    )

    assert ChatTemplate(TEMPLATES[name], SPECIAL).render(chat, tools) == theirs[0][0]


@pytest.mark.parametrize(
    ("source", "format"),
    [
        (HERMES_TEMPLATE, HERMES),
        (LLAMA3_TEMPLATE, LLAMA3),
        (MISTRAL_TEMPLATE, MISTRAL),
        (PLAIN_TEMPLATE, None),
        ("{{ tools }}<tool_call>\n<function=f>", None),  # Qwen3-Coder's calls are XML
        ("{{ tools }}<tool_call>f\n<arg_key>", None),  # so are GLM's
        ("{{ tools }}[TOOL_CALLS]f[ARGS]{}", None),  # Mistral's of version 11
    ],
)
def test_the_format_of_calls_is_found_in_the_template(source: str, format: ToolFormat | None) -> None:
    assert format_in(source) is format
    assert ChatTemplate(source, {}).knows_tools == (format is not None)
    assert ChatTemplate(source, {}).tool_format is (format or HERMES)


def test_an_operator_may_know_better_how_a_template_writes_calls() -> None:
    template = ChatTemplate("{{ tools[0].function.name }}", {}, tool_format=MISTRAL)

    assert (template.knows_tools, template.tool_format) == (True, MISTRAL)
    assert template.render([user("hi")], [CLOCK]) == "clock"


def test_every_format_is_one_that_an_operator_may_name() -> None:
    named = typing.get_args(typing.get_type_hints(SchedulerConfig)["tool_format"])

    assert set(named) == {"auto", *FORMATS}


def test_a_template_without_tools_is_told_of_them_in_the_system_message() -> None:
    prompt = ChatTemplate(PLAIN_TEMPLATE, {}).render(TWO_CALLS, [WEATHER, CLOCK])

    system, asked, called, results, again, _ = prompt.split("<|im_start|>")[1:]
    assert system.startswith("system\nBe brief.\n\n")
    signatures = system.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    assert [json.loads(line) for line in signatures] == [in_json(WEATHER), in_json(CLOCK)]
    assert '<tool_call>\n{"name": "NAME", "arguments": {"PARAMETER": "VALUE"}}\n</tool_call>' in system
    assert asked == "user\nWhere is it raining?<|im_end|>\n"
    assert called.startswith("assistant\nLet me see.\n<tool_call>\n")
    assert results == (
        "user\n<tool_response>\nyes\n</tool_response>\n<tool_response>\nno\n</tool_response><|im_end|>\n"
    )
    assert again == "user\nAnd now?<|im_end|>\n"


def test_without_a_system_message_there_is_one_for_the_tools() -> None:
    prompt = ChatTemplate(PLAIN_TEMPLATE, {}).render([user("hi")], [CLOCK])

    assert prompt.startswith("<|im_start|>system\nYou may call functions")
    assert prompt.endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_knows_no_system_message_is_told_in_the_first_one() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + PLAIN_TEMPLATE

    prompt = ChatTemplate(strict, {}).render([user("hi")], [CLOCK])

    assert prompt.startswith("<|im_start|>user\nYou may call functions")
    assert prompt.endswith("\n\nhi<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(InvalidRequest, match="template does not accept"):
        ChatTemplate(strict, {}).render(TWO_CALLS, [CLOCK])


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
def test_calls_in_words_are_those_that_the_parser_reads(format: ToolFormat) -> None:
    calls = TWO_CALLS[2].tool_calls if format.between else TWO_CALLS[2].tool_calls[:1]
    chat = [user("?"), calling(*calls)]

    prompt = ChatTemplate(PLAIN_TEMPLATE, {}, tool_format=format).render(chat)

    said = prompt.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n")
    _, pieces = CallParser(format, str).push(said)
    assert [(piece.name, json.loads(piece.arguments)) for piece in pieces] == [(c.name, c.parsed()) for c in calls]


def test_a_chat_that_has_to_do_with_no_tools_is_left_to_the_template() -> None:
    chat = [user("hi"), Message(role="tool", content="what the template makes of it")]

    assert ChatTemplate(PLAIN_TEMPLATE, {}).render(chat) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>tool\nwhat the template makes of it<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_default_model_is_told_in_words(default_model: Path) -> None:
    template = ChatTemplate.of(read_model_folder(default_model))

    assert (template.knows_tools, template.tool_format) == (False, HERMES)
    assert "get_weather" in template.render([user("hi")], [WEATHER])


@pytest.mark.parametrize("template", [HERMES_TEMPLATE, PLAIN_TEMPLATE], ids=["template", "words"])
@pytest.mark.parametrize("arguments", ["[]", "{", "null", "{}{}", '{"a": NaN}', '{"a": "\\ud800"}', DEEPER, DEEP])
def test_arguments_that_are_no_object_are_refused_by_their_place(template: str, arguments: str) -> None:
    chat = [user("?"), calling(call("f", "{}"), call("f", arguments))]

    with pytest.raises(InvalidRequest, match="must be a JSON object") as refused:
        ChatTemplate(template, {}).render(chat)

    assert refused.value.field == "chat.messages[1].tool_calls[1].arguments"
