"""What a choice says: a function of its tokens and of nothing else, wherever they are cut.

Half of a character, the beginning of a stop string, where the prompt ends: all of it is found again by going through
the tokens once more. So a scheduler that is handed the first tokens of an answer goes on as the one that made them
would have: `fold(a + b)` is `resume(fold(a), b)`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Final, NamedTuple

from common.types import FinishReason
from services.text import IncrementalDecoder, StopMatcher, Tokenizer

_GOES_ON: Final = FinishReason.NONE  # looked up once: an enum's member is slow to find
_MARKS: Final = (FinishReason.EOS, FinishReason.STOP_TOKEN)  # these end the text and are no part of it
_BY_TOKENS: Final = (*_MARKS, FinishReason.LENGTH)  # ends that the tokens themselves tell of


class Piece(NamedTuple):
    """What some tokens have added."""

    tokens: list[int]  # those up to the end; a stop string may end the text before the last
    text: str
    reason: FinishReason  # NONE: it goes on
    matched_stop: str | None = None
    matched_token_id: int | None = None


class ChoiceText:
    """Tokens in, text out, until the end."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        stop_strings: Sequence[str],
        skip_special_tokens: bool,
        min_tokens: int = 0,
        include_stop: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """A stop string that is complete before `min_tokens` tokens ends nothing. `include_stop`: the text has it.

        `shown` are special tokens that are in the text though others are skipped.
        """
        self._decoder = IncrementalDecoder(tokenizer, prompt, skip_special_tokens=skip_special_tokens, shown=shown)
        self._stops = StopMatcher(stop_strings) if stop_strings else None
        self._num_unstoppable = max(0, min_tokens - 1)  # tokens behind which no stop string ends the text
        self._include_stop = include_stop

    def fork(self) -> ChoiceText:
        """Another one that stands where this one does."""
        other = copy.copy(self)
        other._decoder = self._decoder.fork()
        other._stops = self._stops.fork() if self._stops is not None else None
        return other

    def push(self, tokens: list[int], reason: FinishReason) -> Piece:
        """Take the next tokens, and why they are the last, if they are.

        What was held back is told where the tokens themselves are the end. Where the end is another one (the request
        was aborted, or failed) the answer is not complete, and neither is its last character.
        """
        if reason is _GOES_ON and self._stops is None:  # most of the time
            return Piece(tokens, self._decoder.push(tokens), reason)
        is_marked = reason in _MARKS
        is_whole = reason in _BY_TOKENS
        words = tokens[:-1] if is_marked else tokens
        if self._stops is None:
            text = self._decoder.push(words) + (self._decoder.finish() if is_whole else "")
        else:
            text, matched, used = self._up_to_stop(self._stops, words, is_whole=is_whole)
            if matched is not None:
                text += matched if self._include_stop else ""
                return Piece(tokens[:used], text, FinishReason.STOP_STRING, matched_stop=matched)
        return Piece(tokens, text, reason, matched_token_id=tokens[-1] if is_marked else None)

    def _up_to_stop(
        self, stops: StopMatcher, words: list[int], *, is_whole: bool
    ) -> tuple[str, str | None, int | None]:
        """Text before a stop string, the stop string, and how many tokens that took; None is all there are."""
        text = ""
        for used, token in enumerate(words, start=1):  # one by one: a stop ends at its token
            may_end = not self._num_unstoppable
            self._num_unstoppable -= not may_end
            piece, matched = stops.push(self._decoder.push([token]), may_end=may_end)
            text += piece
            if matched is not None:
                return text, matched, used
        if not is_whole:
            return text, None, None
        piece, matched = stops.push(self._decoder.finish())
        return text + piece + ("" if matched else stops.flush()), matched, None


class StopFollower:
    """Where a stop string ends the text of a beam: the scheduler's TextFollower."""

    def __init__(self, text: ChoiceText) -> None:
        self._text = text

    def behind(self, token: int) -> tuple[StopFollower, bool]:
        """One that stands behind `token`, too, and whether that completes a stop string. This one stays as it is."""
        text = self._text.fork()
        return StopFollower(text), text.push([token], _GOES_ON).reason is not _GOES_ON
