"""Structured output: what an answer must be, compiled by llguidance. Knows no tensor, no wire and no sequence.

A grammar is compiled twice: once in the scheduler's worker, within limits of time and memory, before its request is let
in (services/grammar_worker.py), and again on the executor (executor/guide.py). Both sides do it here, so that what was
let in can be kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from common.sampling import JSON_SPELLING, Grammar

_MAX_STATES: Final = 20_000  # of a lexer, 1 to 2 kB each
# Of one step, which all rows of a batch wait for: about 4 ms at most, by the library's own figures.
_STEP_FUEL: Final = 50_000
_STEP_ITEMS: Final = 10_000
_MAX_TEXT: Final = 200


class GrammarError(Exception):
    """The grammar cannot be compiled. Its text may be shown to who wrote it; it has their own words in it."""


def load_tokenizer(file: Path, *, vocab_size: int, eos: Sequence[int]) -> LLTokenizer:
    """The vocabulary as bytes, in a tree. Takes a third of a second for 50,000 tokens.

    Raises GrammarError for a tokenizer that llguidance cannot read.
    """
    try:
        return LLTokenizer(file.read_text(), n_vocab=vocab_size, eos_token=list(eos) or None)
    except Exception as error:  # the library raises nothing narrower
        raise GrammarError(f"the tokenizer of this model allows no structured output: {_told(str(error))}") from error


def compile_grammar(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """A matcher at the beginning of the grammar, whose first mask was computed. Raises GrammarError."""
    match grammar.syntax:
        case "json_schema":
            try:
                schema = json.loads(grammar.source)
            except (ValueError, RecursionError) as error:
                raise GrammarError(f"is not valid JSON, or too deep: {_told(str(error))}") from None
            if not isinstance(schema, dict):
                raise GrammarError("must be a JSON object")
            spelling: Any = dict(JSON_SPELLING)
            source = LLMatcher.grammar_from_json_schema(grammar.source, overrides=spelling)
        case "regex":
            source = LLMatcher.grammar_from_regex(grammar.source)
        case "lark":
            source = LLMatcher.grammar_from_lark(grammar.source)
    limits = LLParserLimits(
        max_lexer_states=_MAX_STATES, step_lexer_fuel=_STEP_FUEL, step_max_items=_STEP_ITEMS, verbose_errors=False
    )
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits)
    if matcher.is_error():
        raise GrammarError(_told(matcher.get_error()))
    matcher.compute_bitmask()  # the first step is the one in which a lexer is built
    if matcher.is_stopped() and not matcher.is_accepting():
        raise GrammarError("no text can be of it")
    return matcher


def _told(error: str) -> str:
    """The library's words in one short line."""
    _, marker, reason = error.partition("\nerror: ")  # a pattern's error is drawn with arrows; its reason comes last
    text = " ".join((reason.partition("\n")[0] if marker else error.partition("<non-verbose/>")[0]).split())
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "…"
