"""What a chat offers to call, and calls: values without a wire. services/tools/codec.py makes them from messages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, NoReturn

NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")
NAME_RULE: Final = "must be 1 to 64 of a-z, A-Z, 0-9, _ and -"
NO_PARAMETERS: Final[Mapping[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the caller has."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: NO_PARAMETERS)  # JSON schema of an object
    strict: bool = False  # a keyword of the schema that cannot be kept is an error; else it does not count


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What an answer may call. A chat that offers nothing, or whose tool_choice is none, has no such value."""

    offered: tuple[Tool, ...]  # what the model is told of
    callable: tuple[Tool, ...]  # those of them that it may call now
    required: bool = False  # the answer is calls alone
    parallel: bool = True  # several of them


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
    """The JSON object that a text is. Raises ValueError where it is none, or has what no text can: half a character."""
    try:
        value = json.loads(text, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is too deep") from None
    if not isinstance(value, dict):
        raise ValueError("it is no object")  # noqa: TRY004 - the text is wrong, not its type
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


class CallPiece(NamedTuple):
    """A part of a call that an answer makes. The first one has the id and the name."""

    place: int  # among the calls of its choice
    arguments: str
    id: str = ""
    name: str = ""
