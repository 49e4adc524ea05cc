"""What a chat offers to call, and calls: values without a wire. services/tools/codec.py makes them from messages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, NoReturn

from common.sampling import Grammar

NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")
NAME_RULE: Final = "must be 1 to 64 of a-z, A-Z, 0-9, _ and -"
MAX_DEPTH: Final = 64  # objects and arrays within each other, of a schema and of arguments
NO_PARAMETERS: Final[Mapping[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the caller has."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: NO_PARAMETERS)  # JSON schema of an object
    strict: bool = False  # a keyword of the schema that cannot be kept is an error; else it does not count

    def as_function(self) -> dict[str, Any]:
        """As chat templates and OpenAI's API have it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


class TextForm(NamedTuple):
    """What the text of an answer must be that calls nothing."""

    field: str  # of the request, which says so
    grammar: Grammar
    choices: tuple[str, ...] = ()  # where that is one of these


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What an answer may call. A chat that offers nothing, or whose tool_choice is none, has no such value."""

    offered: tuple[Tool, ...]  # what the model is told of
    callable: tuple[Tool, ...]  # those of them that it may call now
    required: bool = False  # the answer is calls alone
    parallel: bool = True  # several of them
    text: TextForm | None = None  # not None: the answer is calls alone, or this alone


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call as an assistant's message has it."""

    id: str
    name: str
    arguments: str  # a JSON object

    def parsed(self) -> dict[str, Any]:
        """The arguments. Raises ValueError where they are no JSON object."""
        return object_of(self.arguments)


def object_of(text: str) -> dict[str, Any]:
    """The JSON object that a text is. Raises ValueError where it is none, too deep, or has half a character in it."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is too deep") from None
    if not isinstance(value, dict):
        raise ValueError("it is no object")  # noqa: TRY004 - the text is wrong, not its type
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
        level = [part for part in level if isinstance(part, dict | list)]
    if level:
        raise ValueError("it is too deep")
    json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


class CallPiece(NamedTuple):
    """A part of a call that an answer makes. The first one has the id and the name."""

    place: int  # among the calls of its choice
    arguments: str
    id: str = ""
    name: str = ""
