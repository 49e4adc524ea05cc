"""Structured output where the logits are: what is chosen is of the grammar, in any company, after any move."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.sampling import Grammar, SamplingParams
from common.step import NewSequence, StepPlan
from common.types import BlockId, slot_ref
from executor.controls import columns, edit, unready
from executor.grammar import GrammarError, compile_grammar, load_tokenizer
from executor.guide import Grammars
from executor.resident import Resident
from executor.sampler import sample
from services.text import Tokenizer
from tests.e2e import fake_model
from tests.executor.guides import until_compiled
from tests.executor.schemas import drawn_schema, problem

VOCAB_SIZE, EOS = fake_model.VOCAB_SIZE, fake_model.EOS
LONGEST = 400
SERIAL = r"(\d{3}-){2}[a-f]{1,9}"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_model.write(tmp_path_factory.mktemp("grammar") / "fake")


@pytest.fixture(scope="module")
def grammars(folder: Path) -> Grammars:
    return Grammars(folder / "tokenizer.json", vocab_size=VOCAB_SIZE, eos=[EOS])


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder / "tokenizer.json")


def told(slot: int, sampling: SamplingParams, output: Sequence[int] = (), **changes: Any) -> NewSequence:
    """A sequence of one prompt token that has this output already."""
    new = NewSequence(
        ref=slot_ref(slot, 0),
        attempt=0,
        token_ids=[65, *output],
        num_prompt=1,
        num_computed=0,
        block_table=[BlockId(slot)],
        sampling=sampling,
        choice=0,
        max_tokens=LONGEST,
        stop_token_ids=(EOS,),
    )
    return replace(new, **changes)


def held(grammars: Grammars, *sequences: NewSequence) -> Resident:
    """Tables in which they are resident, each about to sample."""
    tables = Resident(
        num_blocks=8,
        block_size=512,
        max_sequences=8,
        max_step_tokens=4096,
        max_model_len=512,
        vocab_size=VOCAB_SIZE,
        grammars=grammars,
    )
    tables.apply(StepPlan(step=0, refs=(), num_scheduled=(), new=sequences))
    until_compiled(tables)
    return tables


def of(syntax: Any, source: Any, **changes: Any) -> SamplingParams:
    """Drawn from noise: what a grammar does not forbid, comes."""
    text = source if isinstance(source, str) else json.dumps(source)
    return SamplingParams(**{"seed": 7, "grammar": Grammar(syntax, text), **changes})


def noise(place: int) -> NDArray[np.float32]:
    return (np.random.default_rng(place).standard_normal((1, VOCAB_SIZE)) * 3).astype(np.float32)


def answers(tables: Resident, slots: Sequence[int]) -> dict[int, list[int]]:
    """The output of each, to its end. The logits are noise that the place decides; a row that fails ends with -1."""
    running = dict.fromkeys(slots, 0)
    found: dict[int, list[int]] = {}
    while running:
        rows = np.array(list(running), np.int64)
        known = tables.num_tokens[rows]
        logits = np.concatenate([noise(place) for place in known.tolist()])
        assert not unready(tables, rows, len(rows))
        edit(logits, tables, rows)
        choice = sample(logits, columns(tables, rows, known - tables.num_prompt[rows])).or_none()
        for slot, token in zip(rows.tolist(), choice, strict=True):
            at = int(tables.num_tokens[slot])
            tables.token_ids[slot, at] = token
            tables.num_tokens[slot] = at + 1
            if token in tables.stop_token_ids[slot] or token < 0 or at == LONGEST:
                found[slot] = tables.token_ids[slot, 1 : at + 1].tolist()
                del running[slot]
    return found


def answer(grammars: Grammars, sequence: NewSequence) -> list[int]:
    return answers(held(grammars, sequence), [0])[0]


def is_json_of(schema: Any) -> Callable[[str], bool]:
    return lambda text: problem(json.loads(text), schema) is None


KINDS: dict[str, tuple[SamplingParams, Callable[[str], bool]]] = {
    "schema": (of("json_schema", PERSON), is_json_of(PERSON)),
    "regex": (of("regex", SERIAL), lambda text: re.fullmatch(SERIAL, text) is not None),
    "choice": (of("lark", 'start: "red" | "reddish" | "grün\\n\\"☃\\""'), {"red", "reddish", 'grün\n"☃"'}.__contains__),
    "lark": (
        of("lark", 'start: item ("," item){2,4}\nitem: /[a-z]{1,3}/ | "(" item ")"'),
        lambda text: 2 <= text.count(",") <= 4 and text.count("(") == text.count(")"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_of_its_grammar_and_ends_when_it_is_complete(
    grammars: Grammars, tokenizer: Tokenizer, kind: str
) -> None:
    sampling, is_right = KINDS[kind]

    for seed in range(5):
        *tokens, end = answer(grammars, told(0, replace(sampling, seed=seed)))
        assert end == EOS
        assert is_right(tokenizer.decode(tokens))


def test_a_batch_of_grammars_and_free_rows_gives_each_what_it_gets_alone(grammars: Grammars) -> None:
    asked = [*(sampling for sampling, _ in KINDS.values()), SamplingParams(temperature=0.0), SamplingParams(seed=3)]
    sequences = [told(slot, sampling) for slot, sampling in enumerate(asked)]

    together = answers(held(grammars, *sequences), range(len(asked)))

    for slot, sampling in enumerate(asked):
        assert together[slot] == answer(grammars, told(0, sampling))


def test_an_answer_goes_on_from_the_known_tokens_as_if_it_had_never_moved(grammars: Grammars) -> None:
    for sampling, _ in KINDS.values():
        whole = answer(grammars, told(0, sampling))
        for cut in range(len(whole)):
            assert answer(grammars, told(0, sampling, whole[:cut])) == whole


def test_what_is_found_out_twice_is_the_same(grammars: Grammars) -> None:
    one, other = (held(grammars, told(0, KINDS["schema"][0], [ord("{") - 33])) for _ in range(2))
    slots = np.array([0])

    assert not unready(one, slots, 1)
    assert not unready(one, slots, 1)
    assert not unready(other, slots, 1)
    rows = [noise(1), noise(1)]
    edit(rows[0], one, slots)
    edit(rows[1], other, slots)

    assert (rows[0] == rows[1]).all()
    assert 0 < np.isfinite(rows[0]).sum() < VOCAB_SIZE


def test_a_slot_that_is_free_again_guides_nobody(grammars: Grammars) -> None:
    tables = held(grammars, told(0, KINDS["regex"][0]))
    tables.apply(StepPlan(step=1, refs=(), num_scheduled=(), released=[slot_ref(0, 0)]))
    tables.apply(StepPlan(step=2, refs=(), num_scheduled=(), new=[told(0, SamplingParams(), ref=slot_ref(0, 1))]))

    logits = noise(1)
    edit(logits, tables, np.array([0]))

    assert (logits == noise(1)).all()


def letters(text: str) -> list[int]:
    """Tokens of ASCII letters and digits in the tokenizer of the fake model."""
    return [ord(letter) - 33 for letter in text]


def test_the_grammar_wins_where_other_rules_leave_none_of_its_tokens(grammars: Grammars) -> None:
    abc = of("regex", "abc", banned_token_ids=tuple(letters("b")))
    assert answer(grammars, told(0, abc)) == [*letters("abc"), EOS]

    assert answer(grammars, told(0, replace(abc, allowed_token_ids=(0, EOS)))) == [*letters("abc"), EOS]
    assert answer(grammars, told(0, of("regex", "abc"), min_tokens=9)) == [*letters("abc"), EOS]
    assert answer(grammars, told(0, of("regex", "abc", bad_words=(tuple(letters("ab")),)))) == [*letters("abc"), EOS]


def test_other_rules_hold_where_the_grammar_leaves_a_choice(grammars: Grammars) -> None:
    banned = answer(grammars, told(0, of("regex", "[a-c]{40}", banned_token_ids=tuple(letters("b")))))
    bad = answer(grammars, told(0, of("regex", "[a-c]{40}", bad_words=(tuple(letters("ab")),))))
    longer = answer(grammars, told(0, of("regex", "a*", logit_bias=((EOS, 50.0),)), min_tokens=9))

    assert set(banned) == {*letters("ac"), EOS}
    assert len(bad) == 41 and letters("ab") not in [bad[n : n + 2] for n in range(40)]
    assert longer == [*letters("a" * 9), EOS]


def test_a_stop_token_may_follow_a_complete_answer(grammars: Grammars) -> None:
    stop = letters("Z")[0]
    asked = of("regex", "abc", logit_bias=((stop, 50.0),))

    assert answer(grammars, told(0, asked, stop_token_ids=(EOS, stop))) == [*letters("abc"), stop]


def test_a_row_whose_output_is_not_of_its_grammar_fails_and_no_other(grammars: Grammars) -> None:
    asked = of("regex", "abc")

    found = answers(held(grammars, told(0, asked, letters("x")), told(1, asked)), [0, 1])

    assert found == {0: [*letters("x"), -1], 1: [*letters("abc"), EOS]}


def test_a_grammar_that_this_executor_cannot_compile_fails_its_row_alone(grammars: Grammars) -> None:
    found = answers(held(grammars, told(0, of("regex", "((")), told(1, of("regex", "abc"))), [0, 1])

    assert found == {0: [-1], 1: [*letters("abc"), EOS]}


def test_a_tokenizer_that_cannot_be_read_fails_rows_that_need_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    grammars = Grammars(tmp_path / "tokenizer.json", vocab_size=VOCAB_SIZE, eos=[EOS])

    assert answer(grammars, told(0, of("regex", "abc"))) == [-1]


@pytest.mark.parametrize(
    ("syntax", "source", "told_of"),
    [
        ("json_schema", "{", "not valid JSON"),
        ("json_schema", "[" * 100_000, "not valid JSON"),
        ("json_schema", "true", "must be a JSON object"),
        ("json_schema", '{"type": "strin"}', "Invalid type"),
        ("json_schema", '{"not": {}}', "not"),
        ("json_schema", '{"type": "string", "const": 3}', "Unsatisfiable"),
        ("json_schema", '{"$ref": "http://example.com/other.json"}', "retrieving it failed"),
        ("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}', "no text can be of it"),
        ("json_schema", '{"type":"array","items":' * 1000 + "{}" + "}" * 1000, "recursion"),
        ("regex", "((", "unclosed group"),
        ("regex", "a(?=b)", "look-around"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", "(" * 3000 + "a" + ")" * 3000, "nest"),
        ("lark", "start: x", "unknown name"),
        ("lark", "start: a\na: b\nb: a", "no text can be of it"),
        ("lark", "start: " + "(" * 2000 + '"a"' + ")" * 2000, "nested"),
    ],
)
def test_a_grammar_that_cannot_be_kept_is_refused_in_one_line(
    folder: Path, syntax: Any, source: str, told_of: str
) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.json", vocab_size=VOCAB_SIZE, eos=[EOS])

    with pytest.raises(GrammarError, match=re.escape(told_of)) as refused:
        compile_grammar(tokenizer, Grammar(syntax, source))

    assert "\n" not in str(refused.value) and len(str(refused.value)) < 260


@pytest.mark.parametrize("seed", range(40))
def test_whatever_the_schema_an_answer_is_valid_by_it(grammars: Grammars, tokenizer: Tokenizer, seed: int) -> None:
    schema = drawn_schema(Random(seed))

    *tokens, end = answer(grammars, told(0, of("json_schema", schema, seed=seed)))

    text = tokenizer.decode(tokens)
    if end == EOS:
        assert problem(json.loads(text), schema) is None, (schema, text)
    else:
        assert len(tokens) + 1 == LONGEST, (schema, text)
