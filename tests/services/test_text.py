"""Text comes out of tokens whole, in time, and the same however it was cut."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import processors

from common.errors import ModelFolderError
from services.text import REPLACEMENT, IncrementalDecoder, StopMatcher, Tokenizer
from tests.services.tokenizers_at_hand import (
    BYTES,
    CORPUS,
    LETTERS,
    byte_fallback_bpe,
    byte_level_bpe,
    byte_level_bpe_of_torn_characters,
    every_tokenizer,
    metaspace_unigram,
    saved,
    tokenizer_of,
    vocab_of,
    wordpiece,
)


def told(decoder: IncrementalDecoder, ids: list[int], cuts: list[int]) -> str:
    """Everything the decoder returns for ids cut into pieces."""
    borders = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    pieces = [decoder.push(ids[begin:end]) for begin, end in itertools.pairwise(borders)]
    return "".join(pieces) + decoder.finish()


def without_common_beginning(whole: str, prompt: str) -> str:
    num_common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(whole, prompt, strict=False)))
    return whole[num_common:]


# Any ids at all: torn characters, single bytes in any order, special tokens, and ids that the vocabulary lacks.
# The last ids are the rare ones.
id_lists = st.lists(st.one_of(st.integers(-12, -1), st.integers(0, 10_000)), max_size=40)
cut_lists = st.lists(st.integers(0, 10_000), max_size=40)


@every_tokenizer
@given(ids=id_lists, cuts=cut_lists, skip=st.booleans())
def test_the_pieces_of_any_tokens_are_together_their_whole_decoding(
    build: Callable[[], tokenizers.Tokenizer], ids: list[int], cuts: list[int], skip: bool
) -> None:
    tokenizer = tokenizer_of(build)
    ids = [id % (len(vocab_of(build)) + 2) for id in ids]

    assert told(IncrementalDecoder(tokenizer, (), skip), ids, cuts) == tokenizer.decode(ids, skip)


@every_tokenizer
@given(prompt=id_lists, ids=id_lists, cuts=cut_lists, skip=st.booleans())
def test_after_a_prompt_the_pieces_are_the_whole_decoding_without_the_prompts(
    build: Callable[[], tokenizers.Tokenizer], prompt: list[int], ids: list[int], cuts: list[int], skip: bool
) -> None:
    tokenizer = tokenizer_of(build)
    prompt, ids = [[id % (len(vocab_of(build)) + 2) for id in part] for part in (prompt, ids)]

    text = told(IncrementalDecoder(tokenizer, prompt, skip), ids, cuts)

    assert text == without_common_beginning(tokenizer.decode(prompt + ids, skip), tokenizer.decode(prompt, skip))


# Characters that are hard to cut: several bytes, several code points, and the one that stands for lost ones.
hard_text = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from("👩\u200d💻🏽e\u0301你好▁\x00 \N{REPLACEMENT CHARACTER}"),
    )
)


@every_tokenizer
@given(text=hard_text, cuts=cut_lists)
def test_the_pieces_of_any_text_are_together_its_whole_decoding(
    build: Callable[[], tokenizers.Tokenizer], text: str, cuts: list[int]
) -> None:
    tokenizer = tokenizer_of(build)
    ids = tokenizer.encode(text)

    assert told(IncrementalDecoder(tokenizer), ids, cuts) == tokenizer.decode(ids)


@pytest.mark.parametrize("build", [byte_level_bpe, byte_fallback_bpe], ids=lambda build: build.__name__)
@given(text=hard_text)
def test_any_text_comes_back_from_a_tokenizer_with_bytes(build: Callable[[], tokenizers.Tokenizer], text: str) -> None:
    tokenizer = tokenizer_of(build)
    spelled = text if build is byte_level_bpe else text.replace("▁", " ")  # where ▁ is how spaces are spelled

    ids = tokenizer.encode(text)

    assert tokenizer.decode(ids) == spelled
    assert told(IncrementalDecoder(tokenizer), ids, list(range(len(ids)))) == spelled


@pytest.mark.parametrize("build", [byte_level_bpe, byte_fallback_bpe], ids=lambda build: build.__name__)
@given(content=st.binary(max_size=24))
@example(content=b"\xed\xa0")  # half of a surrogate pair: Python waits for the third byte, though none can help
@example(content=b"\xe0\x80\xf0\x9f\x98\xf5\xc0\xaf")
def test_bytes_that_are_no_text_are_decoded_as_python_does(
    build: Callable[[], tokenizers.Tokenizer], content: bytes
) -> None:
    tokenizer = tokenizer_of(build)
    names = BYTES if build is byte_fallback_bpe else LETTERS
    vocab = vocab_of(build)
    ids = [vocab[names[byte]] for byte in b"." + content]

    whole = (b"." + content).decode(errors="replace")
    assert tokenizer.decode(ids) == whole
    assert told(IncrementalDecoder(tokenizer), ids, list(range(len(ids)))) == whole


@pytest.mark.parametrize("build", [byte_level_bpe, byte_fallback_bpe], ids=lambda build: build.__name__)
@given(prompt=st.binary(max_size=5), output=st.binary(max_size=5))
@example(prompt=b"\xed\xa0", output=b".")
@example(prompt=b"\xed\xa0", output=b"\x80")
def test_after_a_prompt_of_bytes_that_are_no_text_nothing_is_told_twice(
    build: Callable[[], tokenizers.Tokenizer], prompt: bytes, output: bytes
) -> None:
    names = BYTES if build is byte_fallback_bpe else LETTERS
    vocab = vocab_of(build)
    prompt_ids, ids = ([vocab[names[byte]] for byte in part] for part in (b"." + prompt, output))

    text = told(IncrementalDecoder(tokenizer_of(build), prompt_ids), ids, list(range(len(ids))))

    whole, before = ((b"." + part).decode(errors="replace") for part in (prompt + output, prompt))
    assert text == without_common_beginning(whole, before)


def test_a_character_is_told_when_its_last_byte_is_there() -> None:
    for build in (byte_level_bpe, byte_fallback_bpe):
        tokenizer = tokenizer_of(build)
        ids = tokenizer.encode("a😀b")
        decoder = IncrementalDecoder(tokenizer)

        pieces = [decoder.push([id]) for id in ids]

        assert "".join(pieces) == "a😀b"
        assert not any(REPLACEMENT in piece for piece in pieces)
        assert pieces[-1] == "b"
        assert pieces[-2] == "😀"
        assert pieces[-5:-2] == ["", "", ""]


def test_a_bad_byte_in_a_run_does_not_take_back_the_characters_before_it() -> None:
    tokenizer = tokenizer_of(byte_fallback_bpe)
    ids = [tokenizer.byte_token(byte) for byte in "é".encode() + b"\xff"]
    decoder = IncrementalDecoder(tokenizer)

    assert [decoder.push([id]) for id in ids] == ["", "é", REPLACEMENT]
    assert tokenizer.decode(ids) == "é" + REPLACEMENT


def test_a_space_that_begins_a_text_is_stripped_also_where_it_is_a_byte() -> None:
    tokenizer, vocab = tokenizer_of(byte_fallback_bpe), vocab_of(byte_fallback_bpe)

    for ids in ([vocab["<0x20>"]], [vocab["<0x20>"], vocab["▁the"]], [vocab["<0x20>"], vocab["<0x20>"]]):
        assert told(IncrementalDecoder(tokenizer), ids, [1]) == tokenizer.decode(ids)
    assert tokenizer.decode([vocab["<0x20>"], vocab["▁the"]]) == " the"


def test_a_character_is_completed_over_tokens_of_nothing() -> None:
    build = byte_level_bpe_of_torn_characters
    vocab = vocab_of(build)
    first, second, third = (vocab[LETTERS[byte]] for byte in "你".encode())

    assert told(IncrementalDecoder(tokenizer_of(build)), [first, second, *[vocab[""]] * 20, third], []) == "你"


def test_a_replacement_character_before_a_byte_comes_out() -> None:
    tokenizer, vocab = tokenizer_of(byte_fallback_bpe), vocab_of(byte_fallback_bpe)

    assert told(IncrementalDecoder(tokenizer), [vocab[REPLACEMENT], vocab["<0x41>"]], []) == REPLACEMENT + "A"


def test_a_real_replacement_character_comes_out() -> None:
    for build in (byte_level_bpe, byte_fallback_bpe):
        tokenizer = tokenizer_of(build)
        decoder = IncrementalDecoder(tokenizer)

        text = decoder.push(tokenizer.encode(f"a{REPLACEMENT}b{REPLACEMENT}"))

        assert text + decoder.finish() == f"a{REPLACEMENT}b{REPLACEMENT}"


def test_a_real_replacement_character_is_told_at_once_where_tokens_are_bytes() -> None:
    tokenizer = tokenizer_of(byte_level_bpe)

    assert IncrementalDecoder(tokenizer).push(tokenizer.encode(f"a{REPLACEMENT}")) == f"a{REPLACEMENT}"


def test_an_unfinished_character_ends_as_one_replacement_character() -> None:
    for build in (byte_level_bpe, byte_fallback_bpe):
        tokenizer = tokenizer_of(build)
        decoder = IncrementalDecoder(tokenizer)

        assert decoder.push(tokenizer.encode("a😀")[:-1]) == "a"
        assert decoder.finish() == REPLACEMENT


def test_the_first_word_after_a_prompt_keeps_its_space() -> None:
    for build in (byte_fallback_bpe, metaspace_unigram, wordpiece):
        tokenizer = tokenizer_of(build)
        prompt, word = tokenizer.encode("the"), tokenizer.encode("fox")

        assert told(IncrementalDecoder(tokenizer, prompt), word, []) == " fox"
        assert told(IncrementalDecoder(tokenizer), word, []) == "fox"


def test_a_character_that_the_prompt_began_is_told_by_the_output_that_completes_it() -> None:
    for build in (byte_level_bpe, byte_fallback_bpe):
        tokenizer = tokenizer_of(build)
        ids = tokenizer.encode("a😀b")

        assert told(IncrementalDecoder(tokenizer, ids[:-3]), ids[-3:], []) == "😀b"
        assert told(IncrementalDecoder(tokenizer, ids[:-3]), ids[-1:], []) == "b"


@every_tokenizer
def test_the_work_for_a_token_does_not_grow_with_the_text(
    build: Callable[[], tokenizers.Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of(build)
    lengths: list[int] = []
    raw_decode = Tokenizer.raw_decode

    def counting(self: Tokenizer, ids: list[int]) -> str:
        lengths.append(len(ids))
        return raw_decode(self, ids)

    monkeypatch.setattr(Tokenizer, "raw_decode", counting)
    sound = tokenizer.encode(" ".join(CORPUS) * 20)
    silent = [tokenizer.encode("a", add_special_tokens=False)[0], *[0] * 300, *[10_000] * 300]
    torn = [len(vocab_of(build)) - 6] * 300  # where tokens are torn: the middle of a character, over and over
    for ids in (sound, silent, torn):
        lengths.clear()
        decoder = IncrementalDecoder(tokenizer, ids)
        decoder.push(ids)
        decoder.finish()
        assert max(lengths, default=0) <= 8
        assert sum(lengths) <= 10 * (len(ids) + 10)


def test_settings_of_training_do_not_cut_or_pad_a_text() -> None:
    trained = byte_level_bpe()
    trained.enable_truncation(3)
    trained.enable_padding(length=50)

    tokenizer = saved(trained)

    text = "The quick brown fox jumps over the lazy dog"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_added_and_skipped_on_request() -> None:
    trained = byte_level_bpe()
    trained.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = saved(trained)

    ids = tokenizer.encode("fox")
    assert ids[0] == 0
    assert tokenizer.encode("fox", add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == "fox"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>fox"


@every_tokenizer
def test_special_tokens_that_are_shown_are_text_and_the_others_are_not(
    build: Callable[[], tokenizers.Tokenizer],
) -> None:
    tokenizer, vocab = tokenizer_of(build), vocab_of(build)
    decoder = IncrementalDecoder(tokenizer, shown=frozenset({vocab["</s>"]}))

    text = decoder.push([vocab["<s>"], vocab["</s>"], vocab["<unk>"]]) + decoder.finish()

    assert "</s>" in text
    assert "<s>" not in text and "<unk>" not in text


def test_a_megabyte_of_text_and_zeros_comes_back() -> None:
    tokenizer = tokenizer_of(byte_level_bpe)

    for text in ("The quick brown fox\x00" * 50_000, "\x00" * 1_000_000, " " * 1_000_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    for content in ("{}", '{"version": "1.0", "model"', json.dumps({"model": {"type": "Nothing"}})):
        file.write_text(content)
        with pytest.raises(ModelFolderError, match=r"tokenizer\.json: not a tokenizer .*pagewire pull smollm2"):
            Tokenizer(file)


def fold(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    """What a reader sees of the text, and why it ended."""
    matcher, seen, matched = StopMatcher(stops), "", None
    for piece in pieces:
        text, matched = matcher.push(piece)
        seen += text
    return seen + matcher.flush(), matched


def test_the_text_ends_before_the_stop_string() -> None:
    assert fold(["STOP"], ["one STOP two"]) == ("one ", "STOP")
    assert fold(["STOP"], ["one two"]) == ("one two", None)
    assert fold(["STOP"], ["STOP"]) == ("", "STOP")
    assert fold([], ["one"]) == ("one", None)


def test_a_stop_string_is_found_across_the_borders_of_tokens() -> None:
    assert fold(["\n\nUser:"], ["yes.", "\n", "\nUs", "er", ": no"]) == ("yes.", "\n\nUser:")


def test_what_may_be_the_beginning_of_a_stop_string_is_held_back_and_no_more() -> None:
    matcher = StopMatcher(["abac"])

    assert matcher.push("xaba") == ("x", None)
    assert matcher.push("b") == ("ab", None)
    assert matcher.push("a") == ("", None)
    assert matcher.push("d") == ("abad", None)
    assert matcher.push("ab") == ("", None)
    assert matcher.flush() == "ab"
    assert matcher.push("ac") == ("ac", None)


def test_the_match_that_is_complete_first_wins_and_then_the_longest() -> None:
    assert fold(["abcd", "bc"], ["xabcd"]) == ("xa", "bc")
    assert fold(["bc", "abc"], ["xabc"]) == ("x", "abc")


def test_after_a_match_there_is_no_more_text() -> None:
    matcher = StopMatcher(["."])

    assert matcher.push("a.b.") == ("a", ".")
    assert matcher.push("c") == ("", ".")
    assert matcher.flush() == ""


def first_match(stops: list[str], text: str) -> tuple[str, str | None]:
    """The same rule, told plainly."""
    found = [(end, -len(stop), stop) for stop in stops for end in range(len(text) + 1) if text[:end].endswith(stop)]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end - len(stop)], stop


short_text = st.text("ab", max_size=30)


@given(stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4), pieces=st.lists(short_text, max_size=8))
def test_any_cutting_of_a_text_ends_it_at_the_same_place(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)

    assert fold(stops, pieces) == fold(stops, [text]) == fold(stops, list(text)) == first_match(stops, text)


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4), early=st.text("ab", max_size=9), late=short_text
)
def test_a_match_that_may_not_end_the_text_is_passed_over(stops: list[str], early: str, late: str) -> None:
    matcher = StopMatcher(stops)
    seen = "".join(matcher.push(letter, may_end=False)[0] for letter in early)
    told, matched = matcher.push(late)

    text = early + late
    ends = range(len(early) + 1, len(text) + 1)
    found = min(((end, -len(stop), stop) for stop in stops for end in ends if text[:end].endswith(stop)), default=None)
    assert seen + told + matcher.flush() == (text if found is None else text[: found[0] + found[1]])
    assert matched == (None if found is None else found[2])


@given(stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4), text=short_text)
def test_what_is_held_back_is_the_longest_end_that_a_stop_string_begins_with(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops)

    _, matched = matcher.push(text)

    if matched is None:
        beginnings = {stop[:length] for stop in stops for length in range(len(stop))} | {""}
        assert matcher.flush() == max((end for end in beginnings if text.endswith(end)), key=len)


@every_tokenizer
def test_the_texts_of_tokens_make_the_whole_but_for_spaces(build: Callable[[], tokenizers.Tokenizer]) -> None:
    tokenizer = tokenizer_of(build)
    ids = tokenizer.encode("the quick fox, a  b", add_special_tokens=False)

    spelled = b"".join(map(tokenizer.bytes_of, ids)).decode(errors="replace")

    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert "".join(spelled.split()) == "".join(whole.split())
    if tokenizer.spelling(skip_special_tokens=False) is not None:
        assert spelled == whole


def test_a_token_that_there_is_not_has_no_text() -> None:
    assert tokenizer_of(byte_level_bpe).bytes_of(100_000) == b""
