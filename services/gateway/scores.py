"""How likely tokens were, in the words of three endpoints."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Final

from pagewire.answers import TokenLogprob, TokenLogprobs
from pagewire.scores import Scores
from services.gateway.long_json import Long

_LEAST: Final = -9999.0
"""In place of minus infinity, which JSON has not. OpenAI tells as much of what is not among the likeliest."""


def of_chat(told: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    """Chat completions and Responses: an object for each token."""
    return [_of_token(each) for each in told]


def all_of_chat(told: Scores) -> Long:
    """The same of a whole answer or prompt. Nothing says how likely the first token of a prompt was."""
    return Long(lambda: map(_of_token, told))


class Offsets:
    """Where tokens begin in a text, in characters. One that ends no character stands where the character begins."""

    def __init__(self, at: int = 0) -> None:
        """`at` is where the first one begins."""
        self.at = at
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # as the text itself is made

    def of(self, tokens: Iterable[TokenLogprob]) -> Iterator[int]:
        """Of the next tokens."""
        for token in tokens:
            yield self.at
            self.at += len(self._decoder.decode(token.text))


def of_completion(told: Sequence[TokenLogprobs], offsets: Offsets) -> dict[str, list[Any]]:
    """Completions: a list for each property. `offsets` has counted what was told before.

    A token that is no whole text is told by its bytes, as OpenAI does, so that no two tokens look the same.
    """
    tokens = [each.token for each in told]
    return {
        "tokens": [spelled(token.text) for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [_top(each) for each in told],
        "text_offset": list(offsets.of(tokens)),
    }


def all_of_completion(told: Scores, new: Sequence[TokenLogprobs] = ()) -> dict[str, Long]:
    """The same of a whole answer, or of a prompt and what is `new` behind it; from the beginning of the text."""

    def tokens() -> Iterator[TokenLogprob]:
        return chain(told.tokens(), (each.token for each in new))

    return {
        "tokens": Long(lambda: (spelled(token.text) for token in tokens())),
        "token_logprobs": Long(lambda: (_finite(token.logprob) for token in tokens())),
        "top_logprobs": Long(lambda: map(_top, chain(told, new))),
        "text_offset": Long(lambda: Offsets().of(tokens())),
    }


def spelled(text: bytes) -> str:
    """A token's text, or its bytes where they are none."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def _of_token(told: TokenLogprobs) -> dict[str, Any]:
    return {**_one(told.token), "top_logprobs": [_one(top) for top in told.top]}


def _top(told: TokenLogprobs) -> dict[str, float | None] | None:
    """The likeliest, and the token itself, by name."""
    if told.token.logprob is None:
        return None
    top = {spelled(other.text): _finite(other.logprob) for other in told.top}
    top.setdefault(spelled(told.token.text), _finite(told.token.logprob))
    return top


def _one(told: TokenLogprob) -> dict[str, Any]:
    return {
        "token": spelled(told.text),
        "logprob": _finite(told.logprob),
        "bytes": list(told.text),
        "token_id": told.token_id,
    }


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(_LEAST, logprob)
