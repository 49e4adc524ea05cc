"""The tokens that one sequence prefers, may not choose, or may not choose yet: its request's lists, ready for numpy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.sampling import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """Lists of one sequence, made once at its admission. An empty one says nothing."""

    biased: NDArray[np.int64]  # each token once
    biases: NDArray[np.float32]  # one for each of `biased`
    allowed: NDArray[np.int64]  # empty allows every token
    banned: NDArray[np.int64]
    ends: NDArray[np.int64]  # tokens that end the sequence: not chosen before `min_tokens`
    min_tokens: int  # output tokens
    bad_words: BadWords

    def mentioned(self) -> Iterator[int]:
        """Every token id in the lists."""
        for ids in (self.biased, self.allowed, self.banned, self.ends):
            yield from ids.tolist()
        yield from self.bad_words.mentioned()


class BadWords:
    """Sequences of tokens that are never completed, found by the token before their last one."""

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        """`words` are not empty."""
        assert all(words), "a bad word without a token"
        self.longest = max(map(len, words), default=0)
        self._words = words
        self._alone = sorted({word[0] for word in words if len(word) == 1})
        self._behind: dict[int, list[tuple[list[int], int]]] = {}  # last token of the beginning -> (beginning, rest)
        for word in words:
            if len(word) > 1:
                self._behind.setdefault(word[-2], []).append((list(word[:-1]), word[-1]))

    def next(self, tokens: Sequence[int]) -> list[int]:
        """Tokens that would complete one behind `tokens`; of those the last `longest` are enough."""
        found = self._alone.copy()
        for beginning, last in self._behind.get(tokens[-1], ()):
            if tokens[-len(beginning) :] == beginning:
                found.append(last)
        return found

    def mentioned(self) -> Iterator[int]:
        """Every token id in them."""
        for word in self._words:
            yield from word


def rules_of(sampling: SamplingParams, ends: Sequence[int], min_tokens: int) -> TokenRules | None:
    """The rules of a sequence that the tokens `ends` end; None where it has none."""
    if not (
        sampling.logit_bias
        or sampling.allowed_token_ids
        or sampling.banned_token_ids
        or sampling.bad_words
        or (min_tokens and ends)
    ):
        return None
    return TokenRules(
        biased=_ids([token for token, _ in sampling.logit_bias]),
        biases=np.array([bias for _, bias in sampling.logit_bias], np.float32),
        allowed=_ids(sampling.allowed_token_ids),
        banned=_ids(sampling.banned_token_ids),
        ends=_ids(ends),
        min_tokens=min_tokens,
        bad_words=BadWords(sampling.bad_words),
    )


def _ids(tokens: Sequence[int]) -> NDArray[np.int64]:
    return np.array(tokens, np.int64)
