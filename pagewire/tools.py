"""Tools as a client's user gives and gets them: functions that a chat may call, calls, and their results.

A tool is a mapping with "name", "description", "parameters" (a JSON schema) and "strict", of which only the name must
be there, or the same inside {"type": "function", "function": …}, as OpenAI's API has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

_OF_A_MESSAGE: Final = frozenset({"role", "content", "tool_calls", "tool_call_id", "name"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A function that an answer calls."""

    id: str
    name: str
    arguments: str  # a JSON object; its beginning, where the answer was cut short

    @property
    def parsed(self) -> dict[str, Any]:
        """The arguments. Raises ValueError where the answer was cut short in them."""
        arguments: dict[str, Any] = json.loads(self.arguments)
        return arguments

    def result(self, content: str) -> dict[str, Any]:
        """The message that tells what came of the call."""
        return {"role": "tool", "content": content, "tool_call_id": self.id, "name": self.name}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """A part of a call: the first one has its id and name, and all arguments put together are the call's."""

    index: int  # among the calls of its choice
    id: str
    name: str
    arguments: str


def fits(calls: Sequence[ToolCall], deltas: Iterable[ToolCallDelta]) -> bool:
    """Whether each part is of a call that has begun, or begins the next one."""
    begun = len(calls)
    for delta in deltas:
        if delta.index > begun:
            return False
        begun = max(begun, delta.index + 1)
    return True


def add_to(calls: list[ToolCall], deltas: Iterable[ToolCallDelta]) -> None:
    """Put the parts of calls, which fit, together."""
    for delta in deltas:
        if delta.index == len(calls):
            calls.append(ToolCall(id=delta.id, name=delta.name, arguments=""))
        call = calls[delta.index]
        calls[delta.index] = replace(call, arguments=call.arguments + delta.arguments)


def tool_fields(tool: Mapping[str, Any]) -> dict[str, Any]:
    """What is sent of a tool."""
    inner = tool.get("function", tool)
    fields = {name: value for name, value in inner.items() if value is not None and name != "type"}
    if isinstance(fields.get("parameters"), Mapping):
        fields["parameters"] = json.dumps(fields["parameters"])
    return fields


def call_fields(call: ToolCall | Mapping[str, Any]) -> dict[str, Any]:
    """What is sent of a call in a message: one of ours, or a mapping with "id", "name" and "arguments"."""
    if isinstance(call, ToolCall):
        return {"id": call.id, "name": call.name, "arguments": call.arguments}
    fields = {"id": call.get("id", ""), **call.get("function", call)}
    fields.pop("type", None)
    if isinstance(fields.get("arguments"), Mapping):
        fields["arguments"] = json.dumps(fields["arguments"])
    return fields


def problem_of(message: Mapping[str, Any]) -> str:
    """Why this is no message; empty where it is one."""
    if not {"role", "content"} <= message.keys() <= _OF_A_MESSAGE:
        others = ", ".join(sorted(_OF_A_MESSAGE - {"role", "content"}))
        return f'must have "role" and "content", and beside them at most {others}'
    return ""
