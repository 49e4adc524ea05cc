"""Tools in plain messages, for a model whose chat template knows none.

The system message tells of the functions and of how to call them, in the words around Hermes's tags that many models
have seen; calls become text of the assistant's, results a message of the user's, several in a row one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

from services.request import Message
from services.tools.format import ToolFormat
from services.tools.values import Tool


def in_words(
    format: ToolFormat, messages: Sequence[Message], tools: Sequence[Tool], *, by_system: bool = True
) -> list[Message]:
    """The same chat without tools, calls and results. With `by_system` false, the first message tells of the tools."""
    first, *others = _plain(format, messages)
    if not tools:
        return [first, *others]
    told = _told(format, tools)
    if first.role == "system":
        return [replace(first, content=f"{first.content}\n\n{told}"), *others]
    if by_system:
        return [Message(role="system", content=told), first, *others]
    return [replace(first, content=f"{told}\n\n{first.content}"), *others]


def _told(format: ToolFormat, tools: Sequence[Tool]) -> str:
    signatures = "\n".join(json.dumps(tool.as_function(), ensure_ascii=False) for tool in tools)
    example = format.write([("NAME", '{"PARAMETER": "VALUE"}')])
    return (
        f"You may call functions to help with the user's request. These are their signatures:\n"
        f"<tools>\n{signatures}\n</tools>\n"
        f"To call one, answer with its name and its arguments as JSON, like this:\n{example}\n"
        f"Its result is then given to you as a <tool_response>."
    )


def _plain(format: ToolFormat, messages: Sequence[Message]) -> Iterator[Message]:
    results: list[str] = []
    for message in messages:
        if message.role == "tool":
            results.append(f"<tool_response>\n{message.content}\n</tool_response>")
            continue
        if results:
            yield Message(role="user", content="\n".join(results))
            results = []
        calls = format.write((call.name, json.dumps(call.parsed(), ensure_ascii=False)) for call in message.tool_calls)
        content = "\n".join(filter(None, (message.content, calls)))
        yield Message(role=message.role, content=content)
    if results:
        yield Message(role="user", content="\n".join(results))
