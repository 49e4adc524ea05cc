"""What a model may write that has tools: calls that are valid by their schemas, in the format that the parser reads."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken

from common.sampling import Grammar
from executor.grammar import GrammarError, compile_grammar, load_tokenizer
from services.text import Tokenizer
from services.tools.calling import ToolCalling
from services.tools.format import ToolFormat
from services.tools.formats import FORMATS
from services.tools.hermes import HERMES
from services.tools.llama3 import LLAMA3
from services.tools.mistral import MISTRAL
from services.tools.parser import CallParser
from services.tools.values import Tool, Tools
from tests.e2e import fake_model
from tests.executor.schemas import drawn_schema, problem

EOS = fake_model.EOS
FULL = fake_model.VOCAB_SIZE + 3
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
every_vocabulary = pytest.mark.parametrize("kind", ["bytes", "markers"])


class Vocabulary:
    """A tokenizer as both sides have it."""

    def __init__(self, folder: Path, size: int) -> None:
        self.tokenizer = Tokenizer(folder / "tokenizer.json")
        self.guiding: LLTokenizer = load_tokenizer(folder / "tokenizer.json", vocab_size=size, eos=[EOS])

    def matcher(self, format: ToolFormat, tools: Tools) -> LLMatcher:
        return compile_grammar(self.guiding, ToolCalling(format, self.tokenizer).grammar(tools))

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Vocabulary]:
    """One whose tokens are bytes, and one that has the formats' markers, too."""
    plain = fake_model.write(tmp_path_factory.mktemp("tools") / "bytes")
    without = (plain / "tokenizer.json").read_text().replace("<tool_call>", "a token")
    (plain / "tokenizer.json").write_text(without)
    marked = fake_model.write(tmp_path_factory.mktemp("tools") / "markers")
    tokenizer = tokenizers.Tokenizer.from_file(str(marked / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("</tool_call>", "<think>")])
    tokenizer.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True)])
    tokenizer.save(str(marked / "tokenizer.json"))
    return {"bytes": Vocabulary(plain, fake_model.VOCAB_SIZE), "markers": Vocabulary(marked, FULL)}


def of(*tools: Tool, **changes: Any) -> Tools:
    return Tools(**{"offered": tools, "callable": tools, **changes})


def tool(name: str, parameters: dict[str, Any] | None = None, **changes: Any) -> Tool:
    return Tool(name=name, **changes) if parameters is None else Tool(name=name, parameters=parameters, **changes)


def varied_tools() -> list[Tool]:
    """Tools whose arguments are what schemas can say."""
    made = []
    for seed in range(12):
        value = drawn_schema(random.Random(seed))
        defs = value.pop("$defs", {})
        schema = {"type": "object", "properties": {"value": value}, "required": ["value"], "$defs": defs}
        made.append(tool(f"tool_{seed}", {**schema, "additionalProperties": False}, strict=bool(seed % 2)))
    return [*made, tool("tool_none")]


def allowed(matcher: LLMatcher) -> list[int]:
    """Tokens that may come next."""
    mask = matcher.compute_bitmask()
    assert not matcher.is_error(), matcher.get_error()
    return [token for token in range(8 * len(mask)) if mask[token // 8] >> token % 8 & 1]


def drawn(matcher: LLMatcher, draw: random.Random, begun: Sequence[int] = ()) -> list[int]:
    """An answer at random, behind what is there; it likes to come to an end."""
    output = list(begun)
    assert matcher.consume_tokens(output)
    for _ in range(5000):
        if matcher.is_stopped() or (matcher.is_accepting() and draw.random() < 0.7):
            return output
        tokens = [token for token in allowed(matcher) if token != EOS]
        ends = [token for token in tokens if token in (ord('"') - 33, ord("}") - 33, ord("]") - 33)]
        token = draw.choice(ends if ends and draw.random() < 0.3 else tokens)
        assert matcher.consume_tokens([token])
        output.append(token)
    raise AssertionError("it never ended")


def read(format: ToolFormat, text: str) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    parser = CallParser(format, str)
    said, pieces = parser.push(text)
    assert parser.has_called
    return said + parser.finish(), [(piece.name, json.loads(piece.arguments)) for piece in pieces]


@every_vocabulary
@every_format
def test_every_call_is_of_a_tool_and_valid_by_its_schema(
    vocabularies: dict[str, Vocabulary], format: ToolFormat, kind: str
) -> None:
    known = {each.name: each.parameters for each in varied_tools()}
    vocabulary = vocabularies[kind]
    matcher = vocabulary.matcher(format, of(*varied_tools(), required=True))

    seen = set()
    for seed in range(25):
        output = drawn(matcher.deep_copy(), random.Random(seed))
        text, calls = read(format, vocabulary.text(output))
        assert text == "" and calls
        for name, arguments in calls:
            assert problem(arguments, dict(known[name])) is None
            seen.add(name)
    assert len(seen) > len(known) // 2


@every_vocabulary
@pytest.mark.parametrize("format", [HERMES, MISTRAL], ids=lambda format: format.name)
def test_text_is_free_until_calls_are_opened_and_then_all_is_held_to_the_schema(
    vocabularies: dict[str, Vocabulary], format: ToolFormat, kind: str
) -> None:
    vocabulary = vocabularies[kind]
    matcher = vocabulary.matcher(format, of(tool("f", {"properties": {"n": {"type": "integer", "maximum": 9}}})))
    text = '☃ any {"name": <tool_c [TOOL_ \n\n'

    assert matcher.is_accepting(), "it may say nothing"
    begun = vocabulary.tokens(text + format.opening)
    free = matcher.deep_copy()
    assert free.consume_tokens(vocabulary.tokens(text))
    assert free.is_accepting()
    assert len(allowed(free)) >= 128 + 51, "every byte that a character may begin with"
    for seed in range(5):
        said, calls = read(format, vocabulary.text(drawn(matcher.deep_copy(), random.Random(seed), begun)))
        assert said == text
        assert {name for name, _ in calls} == {"f"}

    assert matcher.consume_tokens(begun)
    assert not matcher.is_accepting()
    first = (format.first + format.before_name)[0]
    assert allowed(matcher) == vocabulary.tokens(first)


def test_an_opening_that_is_spelled_out_opens_too(vocabularies: dict[str, Vocabulary]) -> None:
    vocabulary = vocabularies["markers"]
    matcher = vocabulary.matcher(HERMES, of(tool("f")))

    assert matcher.consume_tokens([token for letter in "<tool_call>" for token in vocabulary.tokens(letter)])

    assert allowed(matcher) == vocabulary.tokens("\n")


def test_tokens_of_their_own_may_be_in_text_where_they_are_not_special(vocabularies: dict[str, Vocabulary]) -> None:
    vocabulary = vocabularies["markers"]
    [think], [special] = vocabulary.tokens("<think>"), vocabulary.tokens("[TOOL_CALLS]")
    for format in (HERMES, LLAMA3):
        matcher = vocabulary.matcher(format, of(tool("f")))

        assert think in allowed(matcher)
        assert special not in allowed(matcher)
        assert matcher.consume_tokens([*vocabulary.tokens("a"), think, *vocabulary.tokens("b"), think])
        assert matcher.is_accepting()


def test_an_answer_of_llama_is_text_or_a_call(vocabularies: dict[str, Vocabulary]) -> None:
    vocabulary = vocabularies["bytes"]
    matcher = vocabulary.matcher(LLAMA3, of(tool("f"), tool("g")))

    text = matcher.deep_copy()
    assert text.consume_tokens(vocabulary.tokens('So {"name'))
    assert text.is_accepting()
    assert matcher.consume_tokens(vocabulary.tokens('{"name": "'))
    assert allowed(matcher) == vocabulary.tokens("fg")


@every_format
def test_one_call_is_the_end_where_they_are_not_parallel(
    vocabularies: dict[str, Vocabulary], format: ToolFormat
) -> None:
    vocabulary = vocabularies["bytes"]
    one = vocabulary.matcher(format, of(tool("f"), required=True, parallel=False))
    more = vocabulary.matcher(format, of(tool("f"), required=True))
    written = vocabulary.tokens(format.write([("f", "{}")]))
    twice = vocabulary.tokens(format.write([("f", "{}"), ("f", "{}")]))

    assert one.deep_copy().try_consume_tokens(twice) < len(twice)
    assert (more.try_consume_tokens(twice) == len(twice)) == bool(format.between)
    assert one.consume_tokens(written)
    assert one.is_accepting()
    assert set(allowed(one)) <= {EOS}


def test_the_one_that_must_be_called_is_called(vocabularies: dict[str, Vocabulary]) -> None:
    vocabulary = vocabularies["bytes"]
    f, g = tool("f"), tool("g")
    matcher = vocabulary.matcher(HERMES, of(offered=(f, g), callable=(g,), required=True, parallel=False))

    assert matcher.consume_tokens(vocabulary.tokens(HERMES.opening + HERMES.first + HERMES.before_name))
    assert allowed(matcher) == vocabulary.tokens("g")


def test_what_cannot_be_kept_of_a_schema_does_not_count_unless_it_is_strict(
    vocabularies: dict[str, Vocabulary],
) -> None:
    schema = {"properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}}
    vocabulary = vocabularies["bytes"]

    lenient = vocabulary.matcher(HERMES, of(tool("f", schema)))
    assert lenient.consume_tokens(vocabulary.tokens(HERMES.write([("f", '{"a": [1, 1]}')])))
    with pytest.raises(GrammarError, match="uniqueItems"):
        vocabulary.matcher(HERMES, of(tool("f", schema, strict=True)))


def test_a_callers_schema_cannot_change_how_it_is_read(vocabularies: dict[str, Vocabulary]) -> None:
    schema = {"x-guidance": {"whitespace_flexible": True, "lenient": True}, "uniqueItems": True}

    with pytest.raises(GrammarError):
        vocabularies["bytes"].matcher(HERMES, of(tool("f", {"not": {}, **schema}, strict=True)))
    matcher = vocabularies["bytes"].matcher(HERMES, of(tool("f", {"properties": {"a": {}}, **schema})))
    assert not matcher.consume_tokens(vocabularies["bytes"].tokens(HERMES.write([("f", '{  "a":1}')])))


def test_a_name_in_a_schema_is_no_part_of_the_grammar(vocabularies: dict[str, Vocabulary]) -> None:
    evil = 'x"}\nstart: "gone"\n%llguidance {'
    tools = of(tool("f", {"properties": {evil: {"const": "/*\n"}}, "required": [evil], "additionalProperties": False}))
    vocabulary = vocabularies["bytes"]
    written = HERMES.write([("f", json.dumps({evil: "/*\n"}))])

    assert vocabulary.matcher(HERMES, tools).consume_tokens(vocabulary.tokens(written))


def test_many_tools_are_one_grammar(vocabularies: dict[str, Vocabulary]) -> None:
    schema = {"properties": {f"field_{i}": {"type": "string", "maxLength": 20} for i in range(10)}}
    many = [tool(f"tool_number_{i}", {**schema, "required": ["field_1"]}) for i in range(128)]
    vocabulary = vocabularies["bytes"]

    output = drawn(vocabulary.matcher(HERMES, of(*many, required=True)), random.Random(1))

    assert read(HERMES, vocabulary.text(output))[1]


def test_the_grammar_is_a_function_of_what_is_asked(vocabularies: dict[str, Vocabulary]) -> None:
    calling = ToolCalling(HERMES, vocabularies["markers"].tokenizer)

    one, other = (calling.grammar(of(*varied_tools())) for _ in range(2))

    assert one == other and isinstance(one, Grammar)
