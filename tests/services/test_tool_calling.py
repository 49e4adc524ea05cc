"""Calls of a choice are a function of its tokens: whoever goes on behind any of them tells the same."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import tokenizers
from tokenizers import AddedToken

from common.sampling import Grammar
from common.types import FinishReason
from services.choice_text import ChoiceText
from services.text import Tokenizer
from services.tools.calling import CallReader, ToolCalling, call_id
from services.tools.format import ToolFormat
from services.tools.formats import FORMATS
from services.tools.hermes import HERMES
from services.tools.mistral import MISTRAL
from services.tools.values import CallPiece, TextForm, Tools
from tests.e2e import fake_model

NONE, EOS, LENGTH, ABORTED = FinishReason.NONE, FinishReason.EOS, FinishReason.LENGTH, FinishReason.ABORTED
END = fake_model.EOS
CALLS = [("first", '{"a": "☃\\"}", "b": [{}]}'), ("second", "{}")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of bytes, with Mistral's marker and the end as special tokens, and Hermes's opening as one that is not."""
    folder = fake_model.write(tmp_path_factory.mktemp("calling") / "fake")
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_tokens([AddedToken("<tool_call>", special=False)])
    made.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True)])
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder / "tokenizer.json")


class Told(NamedTuple):
    """All that a reader was told."""

    text: str
    calls: list[tuple[str, str, str]]  # id, name, arguments
    reason: FinishReason


class Reading:
    """One choice, as a server tells it."""

    def __init__(self, tokenizer: Tokenizer, format: ToolFormat, *stops: str, text: TextForm | None = None) -> None:
        calling = ToolCalling(format, tokenizer)
        tools = Tools(offered=(), callable=(), text=text)
        self._reader: CallReader = calling.reader("request", 2, tools)
        self._text = ChoiceText(
            tokenizer, [], stop_strings=stops, skip_special_tokens=True, shown=calling.shown
        )  # fmt: skip

    def push(self, tokens: list[int], reason: FinishReason = NONE) -> tuple[str, list[CallPiece], FinishReason]:
        piece, calls = self._reader.read(self._text.push(tokens, reason))
        return piece.text, calls, piece.reason


def told(*heard: tuple[str, list[CallPiece], FinishReason]) -> Told:
    calls: list[tuple[str, str, str]] = []
    for _, pieces, _ in heard:
        for piece in pieces:
            if piece.place == len(calls):
                calls.append((piece.id, piece.name, ""))
            calls[-1] = (*calls[-1][:2], calls[-1][2] + piece.arguments)
    return Told("".join(text for text, _, _ in heard), calls, heard[-1][2])


def tokens_of(tokenizer: Tokenizer, format: ToolFormat, text: str = "Well: ") -> list[int]:
    calls = CALLS if format.between else CALLS[:1]
    written = ("" if format.at_beginning else text) + format.write(calls)
    return tokenizer.encode(written, add_special_tokens=False)


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
def test_a_choice_that_is_begun_again_behind_any_token_tells_the_rest_of_its_calls(
    tokenizer: Tokenizer, format: ToolFormat
) -> None:
    tokens = [*tokens_of(tokenizer, format), END]
    whole = told(Reading(tokenizer, format).push(tokens, EOS))
    assert whole.reason is FinishReason.TOOL_CALLS
    names = [call[1:] for call in whole.calls]
    assert names == (CALLS if format.between else CALLS[:1])
    assert whole.text == ("" if format.at_beginning else "Well: ")

    one_by_one = Reading(tokenizer, format)
    heard = [one_by_one.push([token]) for token in tokens[:-1]]
    for at in range(len(tokens)):
        resumed = Reading(tokenizer, format)
        assert told(resumed.push(tokens[:at])) == (told(*heard[:at]) if at else Told("", [], NONE))
        assert told(*heard[:at], resumed.push(tokens[at:], EOS)) == whole


def test_a_marker_that_is_a_special_token_is_read_though_such_tokens_are_skipped(tokenizer: Tokenizer) -> None:
    tokens = tokens_of(tokenizer, MISTRAL)
    assert tokenizer.added["[TOOL_CALLS]"] in tokens

    assert told(Reading(tokenizer, MISTRAL).push([*tokens, END], EOS)).calls[0][1] == "first"
    assert Reading(tokenizer, HERMES).push([tokenizer.added["[TOOL_CALLS]"]])[0] == "", "others are skipped"


def test_an_answer_that_is_cut_short_ends_as_it_did(tokenizer: Tokenizer) -> None:
    tokens = tokens_of(tokenizer, HERMES)

    for reason in (LENGTH, ABORTED):
        cut = told(Reading(tokenizer, HERMES).push(tokens[:60], reason))
        assert cut.reason is reason
        assert CALLS[0][1].startswith(cut.calls[0][2])
    assert told(Reading(tokenizer, HERMES).push([*tokens[:60], END], EOS)).reason is EOS, "the call is not complete"
    assert told(Reading(tokenizer, HERMES).push([*tokenizer.encode("no", False), END], EOS)) == Told("no", [], EOS)


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
def test_text_that_must_be_of_a_form_ends_as_text_does_and_calls_end_as_calls_do(
    tokenizer: Tokenizer, format: ToolFormat
) -> None:
    form = TextForm("regex", Grammar("regex", r"(.|\n)*"))
    text = "so " + format.write(CALLS[:1])
    said = Reading(tokenizer, format, text=form)
    called = Reading(tokenizer, format, text=form)

    assert told(said.push([*tokenizer.encode(text, False), END], EOS)) == Told(text, [], EOS)
    assert told(called.push([*tokens_of(tokenizer, format, ""), END], EOS)).reason is FinishReason.TOOL_CALLS


def test_a_stop_string_ends_what_is_written_calls_included(tokenizer: Tokenizer) -> None:
    stopped = told(Reading(tokenizer, HERMES, '"b"').push(tokens_of(tokenizer, HERMES)))

    assert (stopped.reason, stopped.calls[0][2]) == (FinishReason.STOP_STRING, '{"a": "☃\\"}", ')


def test_ids_are_told_apart_and_told_again() -> None:
    places = [(request, choice, index) for request in ("a", "b") for choice in range(3) for index in range(3)]
    ids = [call_id(*place) for place in places]

    assert len(set(ids)) == len(ids)
    assert ids == [call_id(*place) for place in places]
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", id) for id in ids), "as Mistral's templates demand"
