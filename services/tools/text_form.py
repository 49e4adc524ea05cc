"""Text that must be of a form, beside calls: how a grammar has it, so that it is never taken for calls.

Calls are known by what they begin with, `format.mark`. A pattern does not match what begins so; no choice may, nor any
JSON. Where calls are JSON themselves (Llama 3's), a schema is refused that could be valid for what looks like one, and
both are written as json.dumps does: of two ways to write a brace, the library would follow one alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from common.errors import InvalidRequest
from common.sampling import JSON_SPELLING
from services.tools.format import ToolFormat
from services.tools.values import TextForm

CALL_SPELLING: Final[Mapping[str, Any]] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""JSON as Python's json.dumps writes it, which is what models see in their templates."""

_LEXEME: Final = re.compile(r'"[^"]*"|[{}]|[^"{}]+')
_KEY: Final = re.compile(r'"(\w+)": ')
_SPECIAL: Final = re.compile(r"\\.|/|\n", re.DOTALL)
_OTHER_WORDS: Final = frozenset(
    {"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "if", "const", "enum", "patternProperties"}
)


def rule_of(format: ToolFormat, form: TextForm) -> tuple[str, str]:
    """The rule of text that is of the form: its name, and its body in Lark. Raises InvalidRequest naming the field."""
    syntax, source = form.grammar
    if form.choices:
        if any(choice.startswith(format.mark) for choice in form.choices):
            problem = f"beside chat.tools, none may begin with {format.mark}, as this model's calls do"
            raise InvalidRequest(form.field, problem)
        return "text", source.removeprefix("start: ")
    if syntax == "regex":
        return "TEXT", f"/{_SPECIAL.sub(_escaped, source)}/ & ~({json.dumps(format.mark)} /(.|\\n)*/)"
    assert syntax == "json_schema", syntax
    schema = _object(form)
    if format.is_json and _could_be_a_call(schema, format):
        problem = (
            f"beside chat.tools, could be taken for a call, which this model writes as {format.head('NAME')}{{…}}}}:"
            ' take a schema with "type": "object" whose first property is required and has another name'
        )
        raise InvalidRequest(form.field, problem)
    guidance = CALL_SPELLING if format.is_json else JSON_SPELLING
    return "text", f"%json {json.dumps({**schema, 'x-guidance': dict(guidance)})}"


def in_lexemes(text: str) -> str:
    """Literal text that is the beginning of JSON, in the pieces in which the library reads JSON."""
    return " ".join(json.dumps(piece) for piece in _LEXEME.findall(text))


def _escaped(found: re.Match[str]) -> str:
    """Between slashes, on one line."""
    if found[0] in ("\n", "\\\n"):
        return r"\n"
    return r"\/" if found[0] == "/" else found[0]


def _object(form: TextForm) -> dict[str, Any]:
    try:
        schema = json.loads(form.grammar.source)
        json.dumps(schema)
    except (ValueError, RecursionError):
        raise InvalidRequest(form.field, "is not valid JSON, or too deep") from None
    if not isinstance(schema, dict):
        raise InvalidRequest(form.field, "must be a JSON object")
    return schema


def _could_be_a_call(schema: Mapping[str, Any], format: ToolFormat) -> bool:
    """Whether JSON of the schema may begin as a call does. Properties are written in the order that they have there."""
    kind = schema.get("type")
    if kind is not None and "object" not in (kind if isinstance(kind, list) else [kind]):
        return False
    properties, required = schema.get("properties"), schema.get("required")
    if kind != "object" or _OTHER_WORDS & schema.keys() or not isinstance(properties, dict):
        return True
    name, arguments = _KEY.findall(format.head(""))
    first = next(iter(properties), name)
    if first != name and isinstance(required, list) and first in required:
        return False
    return schema.get("additionalProperties") is not False or {name, arguments} <= properties.keys()
