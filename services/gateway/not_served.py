"""Members of OpenAI's API that ask for what is not to be had here, and why. They are known, so it can be said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_REASONING: Final = "no effort of reasoning can be asked for here; none, which asks for nothing, is let pass"
_VERBOSITY: Final = "no verbosity can be asked for here, only max_tokens; medium, which asks for nothing, is let pass"
_STORED: Final = "nothing is stored here; send all of the input"

NOT_SERVED: Final[Mapping[str, str]] = {
    # chat completions
    "reasoning_effort": _REASONING,
    "verbosity": _VERBOSITY,
    "web_search_options": "nothing is looked up here: offer a function that does it, in tools",
    "prediction": "what the answer may be cannot be said before; tokens are guessed ahead by the server itself",
    "moderation": "nothing is moderated here",
    "prompt_cache_options": "prefixes are kept for all requests; pin_seconds, cache_salt and no_cache say otherwise",
    # responses
    "reasoning.effort": _REASONING,
    "reasoning.summary": "no reasoning is told here, so none is summed up",
    "reasoning.generate_summary": "no reasoning is told here, so none is summed up",
    "text.verbosity": _VERBOSITY.replace("max_tokens", "max_output_tokens"),
    "conversation": _STORED,
    "prompt": "no prompts are stored here; send what it says as messages, or instructions and input",
    "context_management": _STORED,
    "max_tool_calls": "no tools are run here; calls of functions end the answer",
}
"""By their paths."""
