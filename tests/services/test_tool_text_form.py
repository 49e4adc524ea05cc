"""An answer that may call, and whose text must be of a form: it is the one or the other, and never taken for both."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from llguidance import LLMatcher

from common.errors import InvalidRequest
from common.sampling import Grammar
from executor.grammar import GrammarError, compile_grammar
from services.tools.format import ToolFormat
from services.tools.hermes import HERMES
from services.tools.llama3 import LLAMA3
from services.tools.mistral import MISTRAL
from services.tools.parser import CallParser
from services.tools.values import TextForm
from tests.executor.schemas import problem
from tests.services.test_tool_grammar import (
    EOS,
    Vocabulary,
    allowed,
    drawn,
    every_format,
    every_vocabulary,
    of,
    tool,
    vocabularies,  # noqa: F401 - a fixture
)

INTEGER: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 99}
WORD: dict[str, Any] = {"type": "string", "maxLength": 5}
TOOL = tool("f", {"properties": {"n": INTEGER}, "required": ["n"], "additionalProperties": False})
CALL = ("f", '{"n": 7}')


def record(**properties: Any) -> dict[str, Any]:
    """A schema as OpenAI's clients make them."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def schema(value: dict[str, Any]) -> TextForm:
    return TextForm("json_schema", Grammar("json_schema", json.dumps(value)))


def pattern(source: str) -> TextForm:
    return TextForm("regex", Grammar("regex", source))


def choices(*texts: str) -> TextForm:
    written = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    return TextForm("choices", Grammar("lark", f"start: {written}"), texts)


ANY_OBJECT = TextForm("json_object", Grammar("json_schema", '{"type": "object"}'))
PERSON = record(name=WORD, age=INTEGER)
FORMS: dict[str, tuple[TextForm, str]] = {  # and a text of each
    "schema": (
        schema(record(city=WORD, days={"type": "array", "items": INTEGER})),
        '{"city": "a\\"b", "days": [1, 2]}',
    ),
    "person": (schema(PERSON), '{"name": "f", "age": 1}'),
    "list": (schema({"type": "array", "items": {"$ref": "#/$defs/n"}, "$defs": {"n": INTEGER}}), "[1, 2]"),
    "regex": (pattern("[a-c]{2}/\n?"), "ab/\n"),
    "choices": (choices("yes", "yes/no", "☃\n"), "☃\n"),
    "nearly a call": (choices('{"name": 3}', "<tool", "[TOOL_CALLS"), '{"name": 3}'),
}
every_form = pytest.mark.parametrize("kind_of_form", FORMS)


def read(format: ToolFormat, text: str) -> tuple[str, list[str]]:
    """The text, and the arguments of its calls."""
    parser = CallParser(format, str, at_beginning=True)
    said, pieces = parser.push(text)
    assert parser.has_called == bool(pieces)
    return said + parser.finish(), [piece.arguments for piece in pieces]


def may_be(matcher: LLMatcher, tokens: list[int]) -> bool:
    """Whether an answer may be all of these tokens and no more."""
    tried = matcher.deep_copy()
    return tried.try_consume_tokens(tokens) == len(tokens) and tried.is_accepting()


@every_vocabulary
@every_format
@every_form
def test_an_answer_is_calls_or_of_the_form_and_nothing_else(
    vocabularies: dict[str, Vocabulary],  # noqa: F811
    format: ToolFormat,
    kind: str,
    kind_of_form: str,
) -> None:
    form, text = FORMS[kind_of_form]
    vocabulary = vocabularies[kind]
    matcher = vocabulary.matcher(format, of(TOOL, text=form))
    calls = vocabulary.tokens(format.write([CALL]))
    spelled = [token for letter in text for token in vocabulary.tokens(letter)]

    assert {calls[0], spelled[0]} <= set(allowed(matcher))
    assert may_be(matcher, calls)
    assert may_be(matcher, spelled)
    assert not may_be(matcher, [*spelled, *calls])
    assert not may_be(matcher, vocabulary.tokens(format.write([("f", '{"n": 100}')])))
    assert not may_be(matcher, vocabulary.tokens(format.write([("g", "{}")])))
    assert not may_be(matcher, vocabulary.tokens("Hello."))
    assert read(format, format.write([CALL])) == ("", [CALL[1]])
    assert read(format, text) == (text, [])


@every_vocabulary
@every_format
@every_form
def test_what_is_drawn_is_read_as_what_it_was_drawn_as(
    vocabularies: dict[str, Vocabulary],  # noqa: F811
    format: ToolFormat,
    kind: str,
    kind_of_form: str,
) -> None:
    form, text = FORMS[kind_of_form]
    vocabulary = vocabularies[kind]
    both = vocabulary.matcher(format, of(TOOL, text=form))
    alone = compile_grammar(vocabulary.guiding, form.grammar)
    opened = vocabulary.tokens(format.opening + format.first + format.head("f"))

    for seed in range(20):
        begun = opened if seed % 4 == 0 else ()
        text, calls = read(format, vocabulary.text(drawn(both.deep_copy(), random.Random(seed), begun)))
        assert bool(text) != bool(calls)
        assert calls or not begun
        assert all(problem(json.loads(arguments), dict(TOOL.parameters)) is None for arguments in calls)
        assert not text or may_be(alone, vocabulary.tokens(text))


@every_format
def test_one_call_is_the_end_where_they_are_not_parallel(
    vocabularies: dict[str, Vocabulary],  # noqa: F811
    format: ToolFormat,
) -> None:
    vocabulary = vocabularies["bytes"]
    one, more = (vocabulary.matcher(format, of(TOOL, text=schema(PERSON), parallel=way)) for way in (False, True))
    once, twice = (vocabulary.tokens(format.write([CALL] * times)) for times in (1, 2))

    assert may_be(one, once) and may_be(more, once)
    assert not may_be(one, twice)
    assert may_be(more, twice) == bool(format.between)


@every_format
def test_the_form_does_not_matter_where_the_answer_must_be_calls(
    vocabularies: dict[str, Vocabulary],  # noqa: F811
    format: ToolFormat,
) -> None:
    vocabulary = vocabularies["bytes"]

    matcher = vocabulary.matcher(format, of(TOOL, required=True, text=ANY_OBJECT))

    assert may_be(matcher, vocabulary.tokens(format.write([CALL])))
    assert not may_be(matcher, vocabulary.tokens("{}"))


@pytest.mark.parametrize("format", [HERMES, MISTRAL], ids=lambda format: format.name)
def test_json_beside_calls_may_be_spelled_as_it_may_alone(
    vocabularies: dict[str, Vocabulary],  # noqa: F811
    format: ToolFormat,
) -> None:
    vocabulary = vocabularies["bytes"]
    matcher = vocabulary.matcher(format, of(TOOL, text=ANY_OBJECT))

    for text in ('{\n  "name" : "f",\n  "parameters": {}\n}', '{"name":"f"}', '{"name": "f", "arguments": {}}', "{}"):
        assert may_be(matcher, vocabulary.tokens(text))
        assert read(format, text) == (text, [])


@every_format
def test_a_pattern_does_not_match_what_begins_as_calls_do(
    vocabularies: dict[str, Vocabulary],  # noqa: F811
    format: ToolFormat,
) -> None:
    vocabulary = vocabularies["bytes"]
    matcher = vocabulary.matcher(format, of(TOOL, text=pattern(r"(.|\n)*")))
    calls = format.write([CALL])

    assert may_be(matcher, vocabulary.tokens(calls))
    assert may_be(matcher, vocabulary.tokens(format.mark[:-1]))
    assert not may_be(matcher, vocabulary.tokens(format.mark))
    assert may_be(matcher, vocabulary.tokens(f" {calls}"))
    assert not may_be(matcher, vocabulary.tokens(f"{calls} "))


@every_format
def test_a_choice_that_begins_as_calls_do_is_refused(
    vocabularies: dict[str, Vocabulary],  # noqa: F811
    format: ToolFormat,
) -> None:
    with pytest.raises(InvalidRequest, match="none may begin with") as refused:
        vocabularies["bytes"].matcher(format, of(TOOL, text=choices("yes", f"{format.mark}!")))

    assert refused.value.field == "choices"
    assert format.mark in refused.value.problem


NAME_AND_PARAMETERS = {"name": WORD, "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"type": "object"},
        {"type": ["object", "null"]},
        {"anyOf": [PERSON]},
        {"$ref": "#/$defs/p", "$defs": {"p": PERSON}},
        record(**NAME_AND_PARAMETERS),
        {**record(**NAME_AND_PARAMETERS, age=INTEGER), "required": ["age"]},
        {**PERSON, "additionalProperties": True},
        {**record(name=WORD), "patternProperties": {"^p": {}}},
        {**record(city=WORD), "required": [], "additionalProperties": {}},
        {**record(city=WORD), "additionalProperties": {}, "enum": [{"name": "f", "parameters": {}, "city": "a"}]},
    ],
    ids=json.dumps,
)
def test_a_schema_of_what_looks_like_a_call_is_refused_where_calls_are_json_alone(
    vocabularies: dict[str, Vocabulary],  # noqa: F811
    told: dict[str, Any],
) -> None:
    vocabulary = vocabularies["bytes"]

    with pytest.raises(InvalidRequest, match="could be taken for a call") as refused:
        vocabulary.matcher(LLAMA3, of(TOOL, text=schema(told)))

    assert refused.value.field == "json_schema"
    assert '{"name": "NAME", "parameters": {…}}' in refused.value.problem
    for format in (HERMES, MISTRAL):
        assert may_be(vocabulary.matcher(format, of(TOOL, text=schema(told))), vocabulary.tokens(format.write([CALL])))


@pytest.mark.parametrize(
    "told",
    [
        PERSON,
        record(parameters={"type": "object"}),
        record(),
        record(city=WORD, **NAME_AND_PARAMETERS),
        {**record(city=WORD, **NAME_AND_PARAMETERS), "required": ["city"], "additionalProperties": True},
        {**record(name=WORD, age=INTEGER), "required": []},
        {"type": ["array", "string"], "items": {}, "maxItems": 2, "maxLength": 5},
        {"type": "null"},
    ],
    ids=json.dumps,
)
def test_other_schemas_are_never_taken_for_one(
    vocabularies: dict[str, Vocabulary],  # noqa: F811
    told: dict[str, Any],
) -> None:
    vocabulary = vocabularies["bytes"]
    matcher = vocabulary.matcher(LLAMA3, of(tool("f"), tool("f2", dict(TOOL.parameters)), text=schema(told)))
    head = vocabulary.tokens('{"name": "f", "parameters": {')

    for seed in range(20):
        said = vocabulary.text(drawn(matcher.deep_copy(), random.Random(seed)))
        text, calls = read(LLAMA3, said)
        assert bool(text) != bool(calls)
        assert not text or problem(json.loads(text), told) is None
    assert matcher.consume_tokens(head)
    assert allowed(matcher) == vocabulary.tokens("}"), "it has become a call of f"


def test_what_cannot_be_kept_of_a_form_is_an_error_and_of_a_tool_is_not(
    vocabularies: dict[str, Vocabulary],  # noqa: F811
) -> None:
    loose = {"properties": {"a": {"type": "array", "uniqueItems": True}}}
    vocabulary = vocabularies["bytes"]

    matcher = vocabulary.matcher(HERMES, of(tool("f", loose), text=schema(PERSON)))
    assert may_be(matcher, vocabulary.tokens(HERMES.write([("f", '{"a": [1, 1]}')])))
    for format in (HERMES, LLAMA3):
        with pytest.raises(GrammarError, match="uniqueItems"):
            vocabulary.matcher(format, of(TOOL, text=schema(record(a=loose["properties"]["a"]))))


@pytest.mark.parametrize(
    ("source", "problem_"),
    [("{", "is not valid JSON"), ("[" * 100_000, "or too deep"), ("[]", "must be a JSON object")],
)
def test_a_schema_that_is_none_is_refused_by_its_field(
    vocabularies: dict[str, Vocabulary],  # noqa: F811
    source: str,
    problem_: str,
) -> None:
    with pytest.raises(InvalidRequest, match=problem_) as refused:
        vocabularies["bytes"].matcher(HERMES, of(TOOL, text=TextForm("json_schema", Grammar("json_schema", source))))

    assert refused.value.field == "json_schema"


def test_what_is_in_a_form_is_no_part_of_the_grammar_around_it(
    vocabularies: dict[str, Vocabulary],  # noqa: F811
) -> None:
    evil = 'x"}\nstart: "gone"\n%llguidance {'
    vocabulary = vocabularies["bytes"]

    in_schema = vocabulary.matcher(HERMES, of(TOOL, text=schema({**record(**{evil: INTEGER}), "x-guidance": {"a": 1}})))
    assert may_be(in_schema, vocabulary.tokens(json.dumps({evil: 1})))
    in_choice = vocabulary.matcher(HERMES, of(TOOL, text=choices(evil)))
    assert may_be(in_choice, vocabulary.tokens(evil))
    for source, text in (("a/\nstart: b", "a/\nstart: b"), ("a\\/b\\\n", "a/b\n"), ("[/]\\\\/", "/\\/"), ("é", "é")):
        in_pattern = vocabulary.matcher(HERMES, of(TOOL, text=pattern(source)))
        assert may_be(in_pattern, vocabulary.tokens(text))
        assert may_be(compile_grammar(vocabulary.guiding, Grammar("regex", source)), vocabulary.tokens(text))
        assert not may_be(in_pattern, vocabulary.tokens("b"))


def test_the_end_may_come_where_the_text_is_complete_and_not_before(
    vocabularies: dict[str, Vocabulary],  # noqa: F811
) -> None:
    vocabulary = vocabularies["bytes"]
    matcher = vocabulary.matcher(LLAMA3, of(TOOL, text=schema(PERSON)))

    assert EOS not in allowed(matcher)
    assert matcher.consume_tokens(vocabulary.tokens('{"name": "f", "age": 5}'))
    assert EOS in allowed(matcher) or matcher.is_stopped()
