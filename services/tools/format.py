"""How a model writes calls: a handful of strings, from which grammar, parser and prompts follow.

The calls of an answer are

    opening first CALL (between CALL)* closing,   where CALL is   before_name NAME after_name ARGUMENTS after_arguments

and ARGUMENTS is a JSON object. `opening` is what tells calls from text: behind it nothing but calls comes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """One way to write calls."""

    name: str
    opening: str  # empty: an answer that begins with `before_name` is calls, and any other one is text
    first: str = ""
    before_name: str
    after_name: str
    after_arguments: str
    between: str  # empty: an answer makes one call at most
    closing: str = ""
    markers: tuple[str, ...] = ()  # parts of these strings that some vocabularies have as a token of its own
    is_in: Callable[[str], bool]  # whether a chat template writes calls in this way

    def write(self, calls: Iterable[tuple[str, str]]) -> str:
        """The text of calls, each a name and arguments in JSON; empty where there are none."""
        written = [self.head(name) + arguments + self.after_arguments for name, arguments in calls]
        return self.opening + self.first + self.between.join(written) + self.closing if written else ""

    def head(self, name: str) -> str:
        """What a call of this function begins with."""
        return self.before_name + name + self.after_name

    @property
    def mark(self) -> str:
        """What calls begin with, and no text that must be of a form."""
        return self.opening or self.before_name

    @property
    def is_json(self) -> bool:
        """Calls are JSON, and nothing else."""
        return self.mark.startswith("{")

    @property
    def at_beginning(self) -> bool:
        """Calls and text exclude each other: the first character tells which an answer is."""
        return not self.opening

    def split(self, text: str) -> list[str]:
        """The text in pieces that are a marker, or have none."""
        if not self.markers:
            return [text] if text else []
        pattern = "(" + "|".join(map(re.escape, self.markers)) + ")"
        return [piece for piece in re.split(pattern, text) if piece]
