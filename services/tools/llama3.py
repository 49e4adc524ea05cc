"""Llama 3's way: an answer that begins with a brace is one call, in JSON. Its templates know no second one.

Source: the prompt formats of Llama 3.1 and 3.2, "JSON based tool calling".
"""

from __future__ import annotations

from typing import Final

from services.tools.format import ToolFormat


def _is_in(template: str) -> bool:
    plain = template.replace("\\", "")
    return '"parameters": ' in plain and '{"name": ' in plain and "ipython" in plain


LLAMA3: Final = ToolFormat(
    name="llama3",
    opening="",
    before_name='{"name": "',
    after_name='", "parameters": ',
    after_arguments="}",
    between="",
    is_in=_is_in,
)
