"""Tools: what a caller offers a model to call, and what the model called. Nothing of it is served yet.

The one place for it: `read_tools` is given the members of a chat request, `read_tool_message` those of a message,
before what is left over is refused.
"""

from __future__ import annotations

from typing import Final

from services.gateway.errors import NotServed
from services.gateway.fields import Fields

_OF_A_REQUEST: Final = ("tools", "functions")
_OF_A_MESSAGE: Final = ("tool_calls", "function_call", "tool_call_id")


def read_tools(fields: Fields) -> None:
    """Raise NotServed where tools are offered. A choice among none is no choice."""
    for name in _OF_A_REQUEST:
        if fields.take(name):
            raise NotServed(name, f"{name}: not served here yet")
    if fields.take("tool_choice") not in (None, "none", "auto"):
        raise NotServed("tool_choice", "tool_choice: there are no tools to choose from")
    fields.take("function_call")
    fields.boolean("parallel_tool_calls")


def read_tool_message(fields: Fields) -> None:
    """Raise NotServed where a message is a tool's, or calls one."""
    for name in _OF_A_MESSAGE:
        if fields.take(name):
            raise NotServed(fields.path(name), f"{fields.path(name)}: tools are not served here yet")
