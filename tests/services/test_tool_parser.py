"""What an answer calls does not depend on where its text was cut, and every text has a meaning."""

from __future__ import annotations

import json
from functools import partial
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.tools.format import ToolFormat
from services.tools.formats import FORMATS
from services.tools.hermes import HERMES
from services.tools.llama3 import LLAMA3
from services.tools.mistral import MISTRAL
from services.tools.parser import CallParser

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
words = st.text('ab"\\{}[]<>/:, \n☃', max_size=6)
values = st.one_of(
    st.none(), st.integers(), words, st.lists(words, max_size=2), st.dictionaries(words, words, max_size=2)
)
objects = st.dictionaries(words, values, max_size=2)
names = st.text("aZ0_-", min_size=1, max_size=5)
few = settings(max_examples=30)


class Told(NamedTuple):
    """All that a reader was told."""

    text: str
    calls: list[tuple[str, str, str]]  # id, name, arguments
    has_called: bool


def read(format: ToolFormat, *pieces: str, at_beginning: bool = False) -> Told:
    """What the pieces of a whole text say."""
    parser = CallParser(format, "call {}".format, at_beginning=at_beginning)
    text = ""
    calls: list[tuple[str, str, str]] = []
    for piece in pieces:
        told, parts = parser.push(piece)
        text += told
        for part in parts:
            if part.place == len(calls):
                assert part.id and part.name, "the first part of a call names it"
                calls.append((part.id, part.name, part.arguments))
            else:
                assert part.place == len(calls) - 1 and not part.id and not part.name
                calls[-1] = (*calls[-1][:2], calls[-1][2] + part.arguments)
    return Told(text + parser.finish(), calls, parser.has_called)


def texts_of(format: ToolFormat) -> st.SearchStrategy[str]:
    """Texts that are nearly calls: what formats are made of, in any order, whole and torn."""
    calls = st.lists(st.tuples(names, objects.map(json.dumps)), min_size=1, max_size=2).map(format.write)
    parts = st.sampled_from(
        [
            *(format.opening, format.first, format.before_name, format.after_name, format.after_arguments),
            *(format.between, format.closing, format.head("get"), format.opening + format.first + format.head("get")),
            *('{"a": "}', '{"a": [1, {}]}', "{", "}", '"', "\\", "<", "\n", "[", "]", "get", "☃"),
        ]
    )
    torn = st.tuples(calls, st.integers(0, 99), st.integers(0, 99)).map(lambda at: at[0][at[1] : at[1] + at[2]])
    return st.lists(st.one_of(calls, parts, parts, torn, words), max_size=5).map("".join)


@every_format
@few
@given(data=st.data())
def test_a_text_means_the_same_wherever_it_is_cut(format: ToolFormat, data: st.DataObject) -> None:
    text = data.draw(texts_of(format))
    told = partial(read, format, at_beginning=data.draw(st.booleans()))
    whole = told(text)

    assert told(*text) == whole
    assert {str(told(text[:at], text[at:])) for at in range(len(text))} <= {str(whole)}


@every_format
@few
@given(before=words, calls=st.lists(st.tuples(names, objects), min_size=1, max_size=3))
@example(before="<tool_call", calls=[("f", {"": "</tool_call>"})])
@example(before="[[TOOL_CALLS", calls=[("f", {"a": '"}]'}), ("f", {})])
def test_calls_that_are_written_are_read(
    format: ToolFormat, before: str, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    calls = calls if format.between else calls[:1]
    before = "" if format.at_beginning else before
    written = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]

    told = read(format, *(before + format.write(written)))

    assert told == Told(before, [(f"call {i}", *call) for i, call in enumerate(written)], has_called=True)


@every_format
def test_the_name_is_told_as_soon_as_it_is_known_and_arguments_as_they_come(format: ToolFormat) -> None:
    parser = CallParser(format, str)
    arguments = '{"city": "Par\\"is}", "days": [1, 2]}'

    assert parser.push(format.opening + format.first + format.head("weather")) == ("", [])
    told = [parser.push(letter) for letter in arguments]

    assert told[0] == ("", [(0, "{", "0", "weather")])
    assert told[1:] == [("", [(0, letter, "", "")]) for letter in arguments[1:]]
    assert parser.push(format.after_arguments + format.closing) == ("", [])
    assert parser.has_called


@pytest.mark.parametrize(
    ("format", "text"),
    [
        (HERMES, "a <tool_call> tag"),
        (HERMES, '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": []}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "%s", "arguments": {}}\n</tool_call>' % ("n" * 65)),
        (HERMES, '{"name": "f", "arguments": {}}'),
        (LLAMA3, 'Sure: {"name": "f", "parameters": {}}'),
        (LLAMA3, '{"name": "f"}'),
        (MISTRAL, "[TOOL_CALLS] none"),
        (MISTRAL, "[TOOL_CALLS][]"),
    ],
)
def test_what_is_no_call_after_all_is_text(format: ToolFormat, text: str) -> None:
    assert read(format, *text) == Told(text, [], has_called=False)


def test_a_call_behind_something_like_a_call_is_one() -> None:
    text = '<tool_call>\n{"no<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'

    assert read(HERMES, text) == Told('<tool_call>\n{"no', [("call 0", "f", '{"a": 1}')], has_called=True)


@every_format
def test_an_answer_that_was_cut_short_in_a_call_tells_what_there_is_of_it(format: ToolFormat) -> None:
    whole = format.write([("first", "{}"), ("second", '{"a": "b"}')] if format.between else [("second", '{"a": "b"}')])
    cut = whole[: whole.index('"b') + 2]

    told = read(format, cut)

    assert told.calls[-1][1:] == ("second", '{"a": "b')
    assert (told.text, told.has_called) == ("", False)


@every_format
def test_the_beginning_of_an_opening_at_the_very_end_is_text(format: ToolFormat) -> None:
    for size in range(1, len(format.opening)):
        text = f"so {format.opening[:size]}"
        assert read(format, text) == Told(text, [], has_called=False)


@every_format
def test_where_calls_come_at_the_beginning_they_are_text_anywhere_else(format: ToolFormat) -> None:
    calls = format.write([("f", '{"a": 1}')])

    assert read(format, *calls, at_beginning=True) == Told("", [("call 0", "f", '{"a": 1}')], has_called=True)
    for before in ("so ", format.mark[:1], format.mark[:-1]):
        assert read(format, *before, *calls, at_beginning=True) == Told(before + calls, [], has_called=False)


@every_format
def test_a_text_that_is_the_beginning_of_an_opening_is_told_at_its_end(format: ToolFormat) -> None:
    for size in range(1, len(format.mark)):
        text = format.mark[:size]
        assert read(format, text, at_beginning=True) == Told(text, [], has_called=False)
    assert read(format, format.mark, at_beginning=True).text == "", "it was cut short in a call"


def test_what_comes_behind_calls_is_text() -> None:
    call = ("call 0", "f", "{}")

    assert read(HERMES, HERMES.write([("f", "{}")]) + "\nand?") == Told("\nand?", [call], has_called=True)
    assert read(LLAMA3, LLAMA3.write([("f", "{}")]) + " and?") == Told(" and?", [call], has_called=True)
    assert read(MISTRAL, MISTRAL.write([("f", "{}")]) + " and?") == Told(" and?", [call], has_called=True)
