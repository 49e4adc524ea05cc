"""The input of a response: items, from which the messages of a chat are made."""

from __future__ import annotations

from typing import Any, Final

from common.errors import InvalidRequest
from protos import inference_pb2 as pb
from services.gateway.chat import CONTENT, add_message, content_text
from services.gateway.errors import NotServed
from services.gateway.fields import MOST_LISTED, Fields, array, shown_word, text
from services.gateway.roles import ROLES

_KINDS: Final = ("message", "function_call", "function_call_output")
_OF_ITEMS: Final = ("id", "status")  # what items bring along when they are sent back as they came
_MOST_ITEMS: Final = 2 * MOST_LISTED  # an answer's calls are one message, and what came of each is one more
_OF_CHATS: Final = ("tool_calls", "tool_call_id")

_ITEM: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "type": {"enum": list(_KINDS)},
        "role": {"enum": list(ROLES)},
        "content": CONTENT,
        "call_id": {"type": "string"},
        "name": {"type": "string"},
        "arguments": {"type": "string"},
        "output": CONTENT,
    },
}
INPUT: Final = {"anyOf": [{"type": "string"}, {"type": "array", "items": _ITEM, "minItems": 1}]}


def read_input(body: Fields, chat: pb.ChatMessages) -> tuple[str | None, dict[str, str]]:
    """Add the messages, and before them the instructions, which are returned.

    With what the caller calls them: the scheduler counts messages, and he counts items. Raises InvalidRequest,
    NotServed.
    """
    reading = _Reading(chat)
    instructions = body.string("instructions")
    if instructions is not None:
        reading.add_text("system", instructions, "instructions")
    value = body.take("input", INPUT)
    if isinstance(value, str):
        reading.add_text("user", text(value, "input"), "input")
        return instructions, reading.names
    items = array(value, "input", _MOST_ITEMS)
    if not items:
        raise InvalidRequest("input", "must be a string or a list of items, and is empty")
    for i, each in enumerate(items):
        reading.add(body.inside(each, f"input[{i}]"))
    return instructions, reading.names


class _Reading:
    def __init__(self, chat: pb.ChatMessages) -> None:
        self._chat = chat
        self._functions: dict[str, str] = {}  # by the ids of their calls
        self._of_calls: dict[str, str] = {}
        self._of_messages: dict[str, str] = {}
        self._may_call = False  # whether the last message is an assistant's, which has said nothing since

    @property
    def names(self) -> dict[str, str]:
        """What the caller calls the scheduler's fields: what is told more exactly comes first."""
        return {**self._of_calls, **self._of_messages}

    def add_text(self, role: str, words: str, path: str) -> None:
        """A message that was given as a text alone."""
        self._of_messages[f"{self._next}.content"] = path
        self._of_messages[self._next] = path
        self._chat.messages.add(role=role, content=words)

    def add(self, item: Fields) -> None:
        """An item. Raises InvalidRequest, NotServed."""
        kind, path = item.kind("type", _KINDS) or "message", item.path("type")
        if kind not in _KINDS:
            raise NotServed(path, f"{path}: {shown_word(kind)} is not served here; {', '.join(_KINDS)} are")
        item.ignore(*_OF_ITEMS)
        if kind == "message":
            self._add_message(item)
            return
        if kind == "function_call":
            self._add_call(item)
        else:
            self._add_output(item)
        item.refuse_unknown()

    @property
    def _next(self) -> str:
        """The scheduler's name for the message that is added now."""
        return f"chat.messages[{len(self._chat.messages)}]"

    def _add_message(self, item: Fields) -> None:
        for name in _OF_CHATS:
            if item.has(name):
                path = item.path(name)
                raise NotServed(path, f"{path}: calls and what came of them are items of their own here")
        self._of_messages[self._next] = item.here
        add_message(self._chat, item, {})
        self._may_call = self._chat.messages[-1].role == "assistant"

    def _add_call(self, item: Fields) -> None:
        """Calls are one message with each other, and with the assistant's words before them: an answer has both."""
        if not self._may_call:
            self._of_messages[self._next] = item.here
            self._chat.messages.add(role="assistant")
            self._may_call = True
        calls = self._chat.messages[-1].tool_calls
        ours = f"chat.messages[{len(self._chat.messages) - 1}].tool_calls[{len(calls)}]"
        call = calls.add(id=item.required_string("call_id"), name=item.required_string("name"))
        call.arguments = item.string("arguments") or ""
        self._functions[call.id] = call.name
        self._of_calls[f"{ours}.id"] = item.path("call_id")
        self._of_calls[ours] = item.here

    def _add_output(self, item: Fields) -> None:
        self._may_call = False
        ours = self._next
        id = item.required_string("call_id")
        name = item.string("name") or self._functions.get(id, "")
        content = content_text(item.take("output", CONTENT), item, "output")
        self._chat.messages.add(role="tool", tool_call_id=id, name=name, content=content)
        self._of_messages[f"{ours}.tool_call_id"] = item.path("call_id")
        self._of_messages[f"{ours}.content"] = item.path("output")
        self._of_messages[ours] = item.here
