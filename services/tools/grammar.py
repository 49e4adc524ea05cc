"""What an answer may be that may call tools: a grammar in Lark's syntax, in which each tool's schema is embedded.

Where the model may choose, its text is free up to the opening of calls, and from there on everything is as strict as
where it must call. Where its text must be of a form, an answer is that alone, or calls alone. Behind the calls the
answer ends. See executor/grammar.py for who compiles this, and where.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from common.sampling import Grammar
from services.tools.format import ToolFormat
from services.tools.text_form import CALL_SPELLING, in_lexemes, rule_of
from services.tools.values import Tool, Tools


def grammar_of(format: ToolFormat, tools: Tools, *, tokens: Mapping[str, int], in_text: Sequence[int]) -> Grammar:
    """The grammar of an answer. Raises InvalidRequest where its text must be of a form that calls cannot be told from.

    `tokens`: of the format's markers, those that are a token of their own. `in_text`: other such tokens that may be in
    text; a character of text they are not, so that a pattern does not match them.
    """
    rules = _Rules(format, tokens)
    rules.add("calls", _calls(rules, format, tools))
    opened = f"{rules.spelled(format.opening + format.first)} calls"
    if tools.required:
        rules.add("start", opened)
    elif tools.text is not None:
        name, body = rule_of(format, tools.text)
        rules.add(name, body)
        rules.add("start", f"{opened} | {name}")
    else:
        _add_choice(rules, format, in_text)
    return Grammar("lark", str(rules))


def _calls(rules: _Rules, format: ToolFormat, tools: Tools) -> str:
    is_beside_json = format.is_json and tools.text is not None and tools.text.grammar.syntax == "json_schema"
    for number, tool in enumerate(tools.callable):
        head, tail = format.head(tool.name), rules.spelled(format.after_arguments)
        head = in_lexemes(head) if is_beside_json else rules.spelled(head)
        rules.add(f"call_{number}", f"{head} arguments_{number} {tail}")
        rules.add(f"arguments_{number}", f"%json {json.dumps(_schema(tool))}")
    rules.add("call", " | ".join(f"call_{number}" for number in range(len(tools.callable))))
    more = f"({rules.spelled(format.between)} call)*" if tools.parallel and format.between else ""
    return f"call {more} {rules.spelled(format.closing)}"


def _add_choice(rules: _Rules, format: ToolFormat, in_text: Sequence[int]) -> None:
    """Text, calls, or text and then calls."""
    others = "".join(f" | <[{token}]>" for token in in_text)
    rules.add("text", f"(TEXT{others})*")
    rules.add("TEXT", r"/(.|\n)+/")
    if format.at_beginning:
        first = json.dumps(format.before_name[0])[1:-1]
        rules.add("start", f"calls | (FIRST{others}) text |")
        rules.add("FIRST", rf"/[^{first}](.|\n)*/")
        return
    ways = ["words"]
    rules.add("words[lazy]", rf"/(.|\n)*/ {json.dumps(format.opening)}")
    if format.opening in rules.tokens:
        ways.append(rules.spelled(format.opening))
    rules.add("start", f"text (({' | '.join(ways)}) {rules.spelled(format.first)} calls)?")


def _schema(tool: Tool) -> dict[str, Any]:
    """What the arguments are valid by: an object, in our spelling."""
    guidance = dict(CALL_SPELLING) if tool.strict else {**CALL_SPELLING, "lenient": True, "coerce_one_of": True}
    return {"type": "object", **tool.parameters, "x-guidance": guidance}


class _Rules:
    """Rules of a grammar, and how literal text is written in them."""

    def __init__(self, format: ToolFormat, tokens: Mapping[str, int]) -> None:
        self._format = format
        self.tokens = tokens
        self._lines: list[str] = ["%llguidance {}"]

    def add(self, name: str, body: str) -> None:
        """A rule."""
        self._lines.append(f"{name}: {body}")

    def spelled(self, text: str) -> str:
        """Literal text. A marker that is a token is that token; a string of Lark is written as one of JSON."""
        return " ".join(
            f"<[{self.tokens[piece]}]>" if piece in self.tokens else json.dumps(piece, ensure_ascii=False)
            for piece in self._format.split(text)
        )

    def __str__(self) -> str:
        return "\n".join(self._lines)
