"""How likely tokens were, in the words of three endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from pagewire.answers import TokenLogprob, TokenLogprobs

_LEAST: Final = -9999.0
"""In place of minus infinity, which JSON has not. OpenAI tells as much of what is not among the likeliest."""


def of_chat(told: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    """Chat completions and Responses: an object for each token."""
    return [{**_one(each.token), "top_logprobs": [_one(top) for top in each.top]} for each in told]


def of_prompt(told: Sequence[TokenLogprobs]) -> list[dict[str, Any] | None]:
    """The tokens of a prompt; the first has nothing before it, so nothing says how likely it was."""
    return [{**_one(each.token), "top_logprobs": [_one(top) for top in each.top]} for each in told]


def of_completion(told: Sequence[TokenLogprobs], offset: int) -> dict[str, list[Any]]:
    """Completions: a list for each property. `offset` is where in the text the first token begins, in characters.

    A token that is no whole text is told by its bytes, as OpenAI does, so that no two tokens look the same.
    """
    tokens: list[str] = []
    offsets: list[int] = []
    tops: list[dict[str, float | None] | None] = []
    for each in told:
        name = spelled(each.token.text)
        tokens.append(name)
        offsets.append(offset)
        offset += len(each.token.text.decode("utf-8", "ignore"))
        if each.token.logprob is None:
            tops.append(None)
            continue
        top = {spelled(other.text): _finite(other.logprob) for other in each.top}
        top.setdefault(name, _finite(each.token.logprob))
        tops.append(top)
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(each.token.logprob) for each in told],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def spelled(text: bytes) -> str:
    """A token's text, or its bytes where they are none."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def _one(told: TokenLogprob) -> dict[str, Any]:
    return {
        "token": spelled(told.text),
        "logprob": _finite(told.logprob),
        "bytes": list(told.text),
        "token_id": told.token_id,
    }


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(_LEAST, logprob)
