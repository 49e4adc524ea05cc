"""Words that an answer may not contain, as the sequences of tokens that would say them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from common.errors import InvalidRequest
from services.text import Tokenizer


def token_sequences(words: Sequence[str], tokenizer: Tokenizer, eos: Collection[int]) -> tuple[tuple[int, ...], ...]:
    """Each word without and with a space before it: most vocabularies have tokens of their own for a word's beginning.

    A word can be spelled in other tokens, too, which nobody forbids; so do vLLM and Transformers. As there, an
    end-of-sequence token alone is no word. Raises InvalidRequest for a word without a token.
    """
    spelled = [word.lstrip(" ") for word in words]
    without, with_space = tokenizer.encode_all(spelled), tokenizer.encode_all([" " + word for word in spelled])
    for number, (ids, spaced) in enumerate(zip(without, with_space, strict=True)):
        if not spelled[number] or not (ids or spaced):
            raise InvalidRequest("bad_words", f"number {number} has no token but those of spaces")
    sequences = dict.fromkeys(tuple(ids) for pair in zip(without, with_space, strict=True) for ids in pair if ids)
    ends = {(token,) for token in eos}
    return tuple(ids for ids in sequences if ids not in ends)
