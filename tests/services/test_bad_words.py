"""Bad words become the tokens that would say them, at a word's beginning and within one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tokenizers

from common.errors import InvalidRequest
from common.sampling import SamplingParams, StopConditions, check_choosable
from services.bad_words import token_sequences
from tests.services.tokenizers_at_hand import byte_level_bpe, every_tokenizer, tokenizer_of


@every_tokenizer
def test_a_word_is_refused_with_and_without_a_space_before_it(build: Callable[[], tokenizers.Tokenizer]) -> None:
    tokenizer = tokenizer_of(build)

    sequences = token_sequences(["fox", " a"], tokenizer, eos=())

    for text in ("fox", " fox", "a", " a"):
        assert not (ids := tokenizer.encode(text, add_special_tokens=False)) or tuple(ids) in sequences
    assert len(set(sequences)) == len(sequences)


def test_an_end_of_sequence_token_is_no_word() -> None:
    tokenizer = tokenizer_of(byte_level_bpe)
    (eos,) = tokenizer.encode("</s>", add_special_tokens=False)

    sequences = token_sequences(["</s>", "fox"], tokenizer, eos=(eos,))

    assert (eos,) not in sequences
    assert tuple(tokenizer.encode("fox", add_special_tokens=False)) in sequences


@pytest.mark.parametrize("word", [" ", "   "])
def test_a_word_of_spaces_is_refused_by_its_number(word: str) -> None:
    with pytest.raises(InvalidRequest, match="bad_words: number 1 has no token but those of spaces"):
        token_sequences(["fox", word], tokenizer_of(byte_level_bpe), eos=())


EOS = {9}


@pytest.mark.parametrize(
    ("sampling", "stop"),
    [
        (SamplingParams(allowed_token_ids=(9, 1)), StopConditions(max_tokens=5, min_tokens=5)),
        (SamplingParams(allowed_token_ids=(9,)), StopConditions(max_tokens=5, min_tokens=5, ignore_eos=True)),
        (SamplingParams(allowed_token_ids=(9,)), StopConditions(max_tokens=5)),
        (SamplingParams(banned_token_ids=tuple(range(9))), StopConditions(max_tokens=5)),
    ],
)
def test_what_leaves_a_token_to_choose_is_taken(sampling: SamplingParams, stop: StopConditions) -> None:
    check_choosable(sampling, stop, EOS, vocab_size=10)


@pytest.mark.parametrize(
    ("sampling", "stop", "problem"),
    [
        (
            SamplingParams(allowed_token_ids=(9, 3)),
            StopConditions(max_tokens=5, min_tokens=2, stop_token_ids=(3,)),
            "allowed_token_ids: has only tokens that end the answer, which must have at least 2, min_tokens",
        ),
        (
            SamplingParams(banned_token_ids=tuple(range(9))),
            StopConditions(max_tokens=5, min_tokens=1),
            "banned_token_ids: leaves none of 10 tokens to choose",
        ),
        (
            SamplingParams(banned_token_ids=tuple(range(10))),
            StopConditions(max_tokens=5),
            "banned_token_ids: leaves none of 10 tokens to choose",
        ),
        (
            SamplingParams(),
            StopConditions(max_tokens=5, min_tokens=6),
            "min_tokens: must be at most max_tokens, 5, got 6",
        ),
    ],
)
def test_what_leaves_no_token_to_choose_is_refused(
    sampling: SamplingParams, stop: StopConditions, problem: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        check_choosable(sampling, stop, EOS, vocab_size=10)
    assert str(refusal.value) == problem
