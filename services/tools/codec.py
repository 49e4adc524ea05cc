"""Protobuf ↔ values, for tools: their limits are checked here, each problem told with its field."""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import replace
from typing import Any, Final

from common.errors import InvalidRequest
from common.sampling import Grammar, RequestLimits
from protos import inference_pb2 as pb
from services.tools.values import (
    MAX_DEPTH,
    NAME,
    NAME_RULE,
    NO_PARAMETERS,
    CallPiece,
    TextForm,
    Tool,
    ToolCall,
    Tools,
    object_of,
)

_MAX_CALL_ID: Final = 128
_MODES: Final = frozenset(pb.ToolChoiceMode.values())


def tools_from_pb(chat: pb.ChatMessages, limits: RequestLimits) -> Tools | None:
    """What the answer may call; None where that is nothing. Raises InvalidRequest naming the field and the limit."""
    if not chat.tools:
        _check_nothing_is_chosen(chat)
        return None
    if len(chat.tools) > limits.max_tools:
        raise InvalidRequest("chat.tools", f"at most {limits.max_tools}, got {len(chat.tools)}")
    size = sum(len(part.encode()) for tool in chat.tools for part in (tool.name, tool.description, tool.parameters))
    if size > limits.max_tools_bytes:
        raise InvalidRequest("chat.tools", f"at most {limits.max_tools_bytes} bytes together, got {size}")
    tools: dict[str, Tool] = {}
    for i, asked in enumerate(chat.tools):
        tool = _tool(f"chat.tools[{i}]", asked, limits)
        if tool.name in tools:
            raise InvalidRequest(f"chat.tools[{i}].name", "is there twice")
        tools[tool.name] = tool
    offered = tuple(tools.values())
    parallel = chat.parallel_tool_calls if chat.HasField("parallel_tool_calls") else True
    choice = chat.tool_choice
    if choice.WhichOneof("kind") == "function":
        if choice.function not in tools:
            raise InvalidRequest("chat.tool_choice.function", "must be the name of one of chat.tools")
        return Tools(offered=offered, callable=(tools[choice.function],), required=True, parallel=False)
    mode = _mode(choice)
    if mode == pb.TOOL_CHOICE_MODE_NONE:
        return None
    required = mode == pb.TOOL_CHOICE_MODE_REQUIRED
    return Tools(offered=offered, callable=offered, required=required, parallel=parallel)


def calls_from_pb(field: str, message: pb.ChatMessage, limits: RequestLimits) -> tuple[ToolCall, ...]:
    """The calls of a message of a chat; what a message of its role cannot have is refused."""
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(f"{field}.tool_calls", "only a message with the role assistant has calls")
    if len(message.tool_calls) > limits.max_tools:
        raise InvalidRequest(f"{field}.tool_calls", f"at most {limits.max_tools}, got {len(message.tool_calls)}")
    for name in ("tool_call_id", "name"):
        given: str = getattr(message, name)
        if given and name == "tool_call_id" and message.role != "tool":
            raise InvalidRequest(f"{field}.{name}", "only a message with the role tool is the result of a call")
        if len(given) > _MAX_CALL_ID:
            raise InvalidRequest(f"{field}.{name}", f"at most {_MAX_CALL_ID} characters, got {len(given)}")
    for j, call in enumerate(message.tool_calls):
        if not NAME.fullmatch(call.name):
            raise InvalidRequest(f"{field}.tool_calls[{j}].name", NAME_RULE)
        if len(call.id) > _MAX_CALL_ID:
            problem = f"at most {_MAX_CALL_ID} characters, got {len(call.id)}"
            raise InvalidRequest(f"{field}.tool_calls[{j}].id", problem)
        if (size := len(call.arguments.encode())) > limits.max_structured_bytes:
            problem = f"at most {limits.max_structured_bytes} bytes, got {size}"
            raise InvalidRequest(f"{field}.tool_calls[{j}].arguments", problem)
    return tuple(ToolCall(id=call.id, name=call.name, arguments=call.arguments or "{}") for call in message.tool_calls)


def with_text(tools: Tools, field: str, grammar: Grammar, structured: pb.StructuredOutput) -> Tools:
    """The same tools, for an answer whose text must be of a grammar: a field of the request says so.

    An answer that must be calls has no text. Raises InvalidRequest where nobody could tell the two apart.
    """
    if tools.required:
        return tools
    if field == "grammar":  # its texts may begin as calls do, and nobody can tell
        problem = "does not go together with chat.tools, unless their tool_choice is none, required or a function"
        raise InvalidRequest(field, f"{problem}; json_schema, regex and choices do")
    return replace(tools, text=TextForm(field, grammar, tuple(structured.choices.values)))


def call_delta_pb(piece: CallPiece) -> pb.ToolCallDelta:
    """The message of a part of a call."""
    return pb.ToolCallDelta(index=piece.place, id=piece.id, name=piece.name, arguments=piece.arguments)


def add_calls(calls: MutableSequence[pb.ToolCall], pieces: Sequence[CallPiece]) -> None:
    """Put the parts of calls together."""
    for piece in pieces:
        if piece.place == len(calls):
            calls.append(pb.ToolCall(id=piece.id, name=piece.name))
        calls[piece.place].arguments += piece.arguments


def _check_nothing_is_chosen(chat: pb.ChatMessages) -> None:
    if chat.HasField("parallel_tool_calls"):
        raise InvalidRequest("chat.parallel_tool_calls", "there are no chat.tools")
    choice = chat.tool_choice
    if choice.WhichOneof("kind") == "function" or _mode(choice) == pb.TOOL_CHOICE_MODE_REQUIRED:
        raise InvalidRequest("chat.tool_choice", "there are no chat.tools that could be called")


def _mode(choice: pb.ToolChoice) -> int:
    if choice.mode not in _MODES:  # a number that the enum does not have goes through the wire
        names = ", ".join(name.removeprefix("TOOL_CHOICE_MODE_") for name in pb.ToolChoiceMode.keys()[1:])
        raise InvalidRequest("chat.tool_choice.mode", f"must be one of {names}, got {int(choice.mode)}")
    return choice.mode


def _tool(field: str, asked: pb.Tool, limits: RequestLimits) -> Tool:
    if not NAME.fullmatch(asked.name):
        raise InvalidRequest(f"{field}.name", NAME_RULE)
    size = len(asked.parameters.encode())
    if size > limits.max_structured_bytes:
        raise InvalidRequest(f"{field}.parameters", f"at most {limits.max_structured_bytes} bytes, got {size}")
    return Tool(
        name=asked.name,
        description=asked.description,
        parameters=_parameters(f"{field}.parameters", asked.parameters),
        strict=asked.strict,
    )


def _parameters(field: str, source: str) -> Mapping[str, Any]:
    if not source:
        return NO_PARAMETERS
    try:
        schema = object_of(source)
    except ValueError:
        raise InvalidRequest(field, f"must be a JSON object, at most {MAX_DEPTH} deep") from None
    if schema.get("type", "object") != "object":
        raise InvalidRequest(field, 'must have "type": "object": arguments have names')
    return schema
