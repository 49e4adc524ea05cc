"""What a choice says does not depend on where it was cut: fold(a + b) is resume(fold(a), b)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from common.types import FinishReason
from services.choice_text import ChoiceText
from tests.services.tokenizers_at_hand import byte_level_bpe, every_tokenizer, tokenizer_of, vocab_of

NONE, LENGTH, EOS, ABORTED = FinishReason.NONE, FinishReason.LENGTH, FinishReason.EOS, FinishReason.ABORTED


class Said(NamedTuple):
    """All that a reader was told."""

    tokens: list[int]
    text: str
    reason: FinishReason
    matched_stop: str | None
    matched_token_id: int | None


def say(text: ChoiceText, pieces: list[list[int]], end: FinishReason) -> Said:
    """What the pieces say; the last one ends the choice with `end`, unless a stop string does so before."""
    said = Said([], "", NONE, None, None)
    for n, piece in enumerate(pieces):
        added = text.push(piece, end if n == len(pieces) - 1 else NONE)
        said = Said(said.tokens + added.tokens, said.text + added.text, *added[2:])
        if said.reason:
            break
    return said


def choice(
    build: Callable[[], tokenizers.Tokenizer],
    prompt: list[int],
    stops: list[str],
    *,
    min_tokens: int = 0,
    include_stop: bool = False,
) -> ChoiceText:
    return ChoiceText(
        tokenizer_of(build),
        prompt,
        stop_strings=stops,
        skip_special_tokens=True,
        min_tokens=min_tokens,
        include_stop=include_stop,
    )


def cut(ids: list[int], cuts: list[int]) -> list[list[int]]:
    borders = sorted({0, len(ids), *(place % (len(ids) + 1) for place in cuts)})
    return [ids[begin:end] for begin, end in itertools.pairwise(borders)]


id_lists = st.lists(st.one_of(st.integers(-12, -1), st.integers(0, 10_000)), min_size=1, max_size=30)
# letters that these vocabularies often give, so that stop strings are met, also across a cut
stop_lists = st.lists(st.text("aeth .\N{REPLACEMENT CHARACTER}", min_size=1, max_size=3), max_size=3)


@every_tokenizer
@given(
    prompt=st.lists(st.integers(0, 10_000), max_size=6),
    ids=id_lists,
    sent=st.lists(st.integers(0, 10_000), max_size=8),
    at=st.integers(0, 10_000),
    later=st.lists(st.integers(0, 10_000), max_size=8),
    stops=stop_lists,
    end=st.sampled_from([NONE, LENGTH, EOS]),
    min_tokens=st.integers(0, 12),
    include_stop=st.booleans(),
)
def test_a_choice_that_is_begun_again_behind_any_token_goes_on_as_if_it_had_never_ended(
    build: Callable[[], tokenizers.Tokenizer],
    prompt: list[int],
    ids: list[int],
    sent: list[int],
    at: int,
    later: list[int],
    stops: list[str],
    end: FinishReason,
    min_tokens: int,
    include_stop: bool,
) -> None:
    def begin() -> ChoiceText:
        return choice(build, prompt, stops, min_tokens=min_tokens, include_stop=include_stop)

    size = len(vocab_of(build)) + 2
    prompt, ids = [[id % size for id in part] for part in (prompt, ids)]
    whole = say(begin(), [ids], end)

    at %= len(ids)  # the last token is among what comes later
    before = say(begin(), cut(ids[:at], sent), NONE)  # what one server told
    if before.reason:
        assert before == whole, "a stop string had ended it"
        return
    resumed = begin()
    folded = resumed.push(ids[:at], NONE)  # what the next one finds out for itself
    after = say(resumed, cut(ids[at:], later), end)

    assert (folded.tokens, folded.text) == (before.tokens, before.text)
    assert Said(before.tokens + after.tokens, before.text + after.text, *after[2:]) == whole


@every_tokenizer
@given(ids=id_lists, stops=stop_lists, end=st.sampled_from([LENGTH, EOS]))
@example(ids=[97 + 3], stops=["a"], end=LENGTH)
def test_a_choice_that_has_ended_is_found_to_have_ended_with_the_same_words(
    build: Callable[[], tokenizers.Tokenizer], ids: list[int], stops: list[str], end: FinishReason
) -> None:
    ids = [id % (len(vocab_of(build)) + 2) for id in ids]
    told = say(choice(build, [], stops), [[id] for id in ids], end)
    again = choice(build, [], stops).push(told.tokens, end if len(told.tokens) == len(ids) else NONE)

    assert told == tuple(again)


def test_an_answer_that_was_cut_off_does_not_end_in_half_a_character() -> None:
    text = choice(byte_level_bpe, [], [])
    half = tokenizer_of(byte_level_bpe).encode("☃")[:1]

    assert text.push(half, NONE).text == ""
    assert text.push([], ABORTED).text == ""


def test_an_answer_that_is_whole_tells_even_half_a_character() -> None:
    half = tokenizer_of(byte_level_bpe).encode("☃")[:1]

    assert choice(byte_level_bpe, [], []).push(half, LENGTH).text == "\N{REPLACEMENT CHARACTER}"


def spelled(text: str) -> list[int]:
    """A token for each letter."""
    return [id for letter in text for id in tokenizer_of(byte_level_bpe).encode(letter)]


def test_a_stop_string_that_is_included_ends_the_text_and_what_follows_it_does_not() -> None:
    text = choice(byte_level_bpe, [], ["stop"], include_stop=True)

    piece = text.push(spelled("to stop, now"), NONE)

    assert (piece.text, piece.matched_stop, len(piece.tokens)) == ("to stop", "stop", len("to stop"))


def test_a_stop_string_before_min_tokens_is_text_like_any_other() -> None:
    text = choice(byte_level_bpe, [], ["ab"], min_tokens=7)

    piece = text.push(spelled("xabxabxab"), NONE)

    assert (piece.text, piece.matched_stop, len(piece.tokens)) == ("xabxabx", "ab", 9)


def test_the_token_that_makes_min_tokens_may_end_the_text() -> None:
    at_once = choice(byte_level_bpe, [], ["ab"], min_tokens=3).push(spelled("xabxab"), NONE)
    later = choice(byte_level_bpe, [], ["ab"], min_tokens=4).push(spelled("xabxab"), NONE)

    assert (at_once.text, len(at_once.tokens)) == ("x", 3)
    assert (later.text, len(later.tokens)) == ("xabx", 6)


def test_a_stop_string_may_begin_before_min_tokens_and_in_one_that_did_not_count() -> None:
    piece = choice(byte_level_bpe, [], ["aba"], min_tokens=4).push(spelled("ababa"), NONE)

    assert (piece.text, piece.matched_stop, len(piece.tokens)) == ("ab", "aba", 5)
