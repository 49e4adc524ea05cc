"""Every format that is known, and which of them a chat template writes."""

from __future__ import annotations

from typing import Final

from services.tools.format import ToolFormat
from services.tools.hermes import HERMES
from services.tools.llama3 import LLAMA3
from services.tools.mistral import MISTRAL

FORMATS: Final = {format.name: format for format in (HERMES, LLAMA3, MISTRAL)}


def format_in(template: str) -> ToolFormat | None:
    """The format of calls in a chat template's source; None where it is none that is known."""
    return next((format for format in FORMATS.values() if format.is_in(template)), None)
