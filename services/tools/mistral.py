"""Mistral's way up to its tokenizers of version 7: a marker, and all calls in one JSON array.

Source: Mistral's documentation of its chat templates, versions 3 and 7.
"""

from __future__ import annotations

from typing import Final

from services.tools.format import ToolFormat

MISTRAL: Final = ToolFormat(
    name="mistral",
    opening="[TOOL_CALLS]",
    first="[",
    before_name='{"name": "',
    after_name='", "arguments": ',
    after_arguments="}",
    between=", ",
    closing="]",
    markers=("[TOOL_CALLS]",),
    is_in=lambda template: "[TOOL_CALLS]" in template and "[ARGS]" not in template,  # that is version 11's
)
