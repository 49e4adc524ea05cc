"""Tools as OpenAI's API has them: what a caller offers to call, what was called, and what came of it.

In chat completions a tool, a call and a choice have their function inside of them; in responses they are it. What any
of these may be is for the scheduler to say; here they get its words, and their names back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from common.errors import InvalidRequest
from pagewire.tools import ToolCall, ToolCallDelta
from protos import inference_pb2 as pb
from services.gateway.errors import NotServed
from services.gateway.fields import Fields, shown_word

_MODES: Final = {
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "none": pb.TOOL_CHOICE_MODE_NONE,
    "required": pb.TOOL_CHOICE_MODE_REQUIRED,
}
_KINDS: Final = ", ".join(_MODES)
_OF_ALLOWED: Final = ("auto", "required")
_NAMED: Final[dict[str, Any]] = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}


def read_tools(body: Fields, chat: pb.ChatMessages, *, flat: bool = False) -> dict[str, str]:
    """What the answer may call, and how it is chosen. `flat`: as responses have it.

    Returns what the caller calls the scheduler's fields. Raises InvalidRequest, NotServed.
    """
    _refuse_functions(body)
    paths: list[str] = []
    for tool in body.list_of_fields("tools"):
        inner = _function(tool, "is what can be offered", flat=flat)
        added = chat.tools.add(name=inner.required_string("name"), description=inner.string("description") or "")
        if (schema := inner.schema("parameters")) is not None:
            added.parameters = schema
        if (strict := inner.boolean("strict")) is not None:
            added.strict = strict
        inner.refuse_unknown()
        paths.append(inner.here)
    if (choice := body.take("tool_choice", _choice_form(flat=flat))) is not None:
        for i in _read_choice(body, choice, chat, flat=flat):
            del chat.tools[i], paths[i]
    if (parallel := body.boolean("parallel_tool_calls")) is not None:
        chat.parallel_tool_calls = parallel
    return {
        **{f"chat.tools[{i}]": path for i, path in enumerate(paths)},
        "chat.tools": "tools",
        "chat.tool_choice.function": "tool_choice.name" if flat else "tool_choice.function.name",
        "chat.tool_choice": "tool_choice",
        "chat.parallel_tool_calls": "parallel_tool_calls",
    }


def read_tool_message(message: Fields, added: pb.ChatMessage, called: dict[str, str]) -> dict[str, str]:
    """The calls of an assistant's message, or whose result a tool's is.

    A result of OpenAI's does not say which function was called, which templates may ask for. So `called` has the
    functions of the calls so far, by their ids. Returns names as `read_tools` does. Raises InvalidRequest, NotServed.
    """
    if message.take("function_call"):
        path = message.path("function_call")
        raise NotServed(path, f"{path}: functions are called tools here: send tool_calls")
    names: dict[str, str] = {}
    path = message.path("tool_calls")
    for j, call in enumerate(message.list_of_fields("tool_calls")):
        added_call = added.tool_calls.add(id=call.string("id") or "")
        call.ignore("index")  # of the deltas of a stream, put together
        inner = _function(call, "is what can be called")
        added_call.name = inner.required_string("name")
        added_call.arguments = inner.string("arguments") or ""
        called[added_call.id] = added_call.name
        inner.refuse_unknown()
        for name in ("name", "arguments"):
            names[f"chat.{path}[{j}].{name}"] = f"{path}[{j}].function.{name}"
    if (id := message.string("tool_call_id")) is not None:
        added.tool_call_id = id
    if added.role == "tool":
        added.name = message.string("name") or called.get(added.tool_call_id, "")
    return names


def told_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """The calls of a whole answer, in chat completions."""
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]


def told_deltas(deltas: Sequence[ToolCallDelta]) -> list[dict[str, Any]]:
    """Parts of calls: the first one of each says which it is."""
    return [
        {
            "index": part.index,
            "id": part.id,
            "type": "function",
            "function": {"name": part.name, "arguments": part.arguments},
        }
        if part.name
        else {"index": part.index, "function": {"arguments": part.arguments}}
        for part in deltas
    ]


def _choice_form(*, flat: bool) -> dict[str, Any]:
    named: dict[str, Any] = (
        _NAMED if flat else {"type": "object", "required": ["function"], "properties": {"function": _NAMED}}
    )
    named = {**named, "properties": {**named["properties"], "type": {"const": "function"}}}
    several = {"mode": {"enum": list(_OF_ALLOWED)}, "tools": {"type": "array", "items": named, "minItems": 1}}
    allowed: dict[str, Any] = {"type": "object", "required": list(several), "properties": several}
    if not flat:
        allowed = {"type": "object", "required": ["allowed_tools"], "properties": {"allowed_tools": allowed}}
    allowed = {**allowed, "properties": {**allowed["properties"], "type": {"const": "allowed_tools"}}}
    allowed["required"] = [*allowed["required"], "type"]
    return {"anyOf": [{"enum": list(_MODES)}, *({**each, "additionalProperties": False} for each in (named, allowed))]}


def _read_choice(body: Fields, value: object, chat: pb.ChatMessages, *, flat: bool) -> list[int]:
    """Returns which tools are not to be offered, the last one first."""
    choice = chat.tool_choice
    if isinstance(value, str):
        if value not in _MODES:
            raise InvalidRequest("tool_choice", f"must be one of {_KINDS}, or a function, got {shown_word(value)}")
        choice.mode = _MODES[value]
        return []
    outer = body.inside(value, "tool_choice")
    if outer.peek("type") == "allowed_tools":
        allowed = _read_allowed(outer, chat, flat=flat)
        return [i for i in reversed(range(len(chat.tools))) if chat.tools[i].name not in allowed]
    inner = _function(outer, "is what can be chosen", flat=flat)
    choice.function = inner.required_string("name")
    inner.refuse_unknown()
    return []


def _read_allowed(outer: Fields, chat: pb.ChatMessages, *, flat: bool) -> set[str]:
    """Some of the tools, and whether one of them must be called. Returns their names."""
    outer.take("type")
    inner = outer if flat else outer.fields("allowed_tools")
    if inner is None:
        raise InvalidRequest(outer.path("allowed_tools"), "must be an object, and is not there")
    chat.tool_choice.mode = _MODES[inner.required_word("mode", _OF_ALLOWED)]
    offered = {tool.name for tool in chat.tools}
    allowed: set[str] = set()
    for each in inner.list_of_fields("tools"):
        function = _function(each, "is what can be allowed", flat=flat)
        name = function.required_string("name")
        function.refuse_unknown()
        if name not in offered:
            raise InvalidRequest(function.path("name"), "must be the name of one of tools")
        allowed.add(name)
    if not allowed:
        raise InvalidRequest(inner.path("tools"), "must have the name of one of tools, and is empty")
    for read in (inner, outer):
        read.refuse_unknown()
    return allowed


def _function(outer: Fields, what: str, *, flat: bool = False) -> Fields:
    """The function in a tool, a call or a choice, which has nothing else. `what` is said where it is no function."""
    kind, path = outer.kind("type", ("function",)), outer.path("type")
    if kind not in (None, "function"):
        raise NotServed(path, f"{path}: function {what}, got {shown_word(kind)}")
    if flat:
        return outer
    inner = outer.fields("function")
    if inner is None:
        raise InvalidRequest(outer.path("function"), "must be an object, and is not there")
    outer.refuse_unknown()
    return inner


def _refuse_functions(body: Fields) -> None:
    """What OpenAI had before it had tools."""
    if body.take("functions"):
        raise NotServed("functions", "functions: are called tools here: send tools")
    body.take("function_call")
