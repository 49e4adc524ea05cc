"""Hermes's way, which Qwen has taken over: each call between tags of its own.

Source: NousResearch's Hermes-Function-Calling and the chat template of Qwen2.5.
"""

from __future__ import annotations

from typing import Final

from services.tools.format import ToolFormat


def _is_in(template: str) -> bool:
    plain = template.replace("\\", "")  # quotes in a string of the template
    other = "<function=" in plain or "<arg_key>" in plain  # the same tag around something that is no JSON
    return "<tool_call>" in plain and '{"name": ' in plain and '"arguments"' in plain and not other


HERMES: Final = ToolFormat(
    name="hermes",
    opening="<tool_call>",
    first="\n",
    before_name='{"name": "',
    after_name='", "arguments": ',
    after_arguments="}\n</tool_call>",
    between="\n<tool_call>\n",
    markers=("<tool_call>", "</tool_call>"),
    is_in=_is_in,
)
