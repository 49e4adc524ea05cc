"""JSON schemas drawn at random, and whether a value is valid by one: the keywords of 2020-12 that are drawn here."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random
from typing import Any

Schema = dict[str, Any] | bool
Defs = dict[str, Any]

_WORDS = ("name", "age", "items", "id", "größe", "a b", "x-1", "kind", "note", "価格", 'quo"te', "deep", "tags", "none")
_PATTERNS = (
    "^[a-z]{2,5}$",
    "^[A-Z][0-9]+$",
    "^(red|green|blue)$",
    "^\\d{3}-\\d{2}$",
    "^[^\\s]{1,8}$",
    "^#?[0-9a-f]{6}$",
)
_FORMATS: dict[str, str] = {
    "date": r"\d{4}-\d{2}-\d{2}",
    "time": r"\d{2}:\d{2}:\d{2}(\.\d+)?([zZ]|[+-]\d{2}:\d{2})",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": r"\d{1,3}(\.\d{1,3}){3}",
}


def drawn_schema(random: Random) -> dict[str, Any]:
    """A schema that has values, none of them deeper than a handful of levels unless it is recursive."""
    defs: Defs = {}
    schema = _draw(random, 3, defs)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, **({"$defs": defs} if defs else {})}


def _draw(random: Random, depth: int, defs: Defs) -> dict[str, Any]:
    kinds: list[Callable[[Random, int, Defs], dict[str, Any]]] = [_string, _string, _number, _enum, _plain]
    if depth:
        kinds += [_object, _object, _object, _array, _array, _any_of, _reference, _recursive]
    schema = random.choice(kinds)(random, depth - 1, defs)
    if random.random() < 0.2:
        schema = {"title": "A title", "description": "What it is for.", **schema}
    return schema


def _plain(random: Random, _: int, __: Defs) -> dict[str, Any]:
    return {"type": random.choice(["boolean", "null", "integer", "number", ["string", "null"], ["integer", "boolean"]])}


def _string(random: Random, _: int, __: Defs) -> dict[str, Any]:
    match random.randrange(4):
        case 0:
            return {"type": "string", "pattern": random.choice(_PATTERNS)}
        case 1:
            return {"type": "string", "format": random.choice(list(_FORMATS))}
        case 2:
            least = random.randrange(6)
            return {"type": "string", "minLength": least, "maxLength": least + random.randrange(12)}
        case _:
            return {"type": "string", "maxLength": 20}


def _number(random: Random, _: int, __: Defs) -> dict[str, Any]:
    least = random.randrange(-50, 50)
    most = least + random.randrange(1, 1000)
    match random.randrange(4):
        case 0:
            return {"type": "integer", "minimum": least, "maximum": most}
        case 1:
            return {"type": "integer", "exclusiveMinimum": least, "exclusiveMaximum": most + 1}
        case 2:
            return {"type": "number", "minimum": least, "maximum": most}
        case _:
            return {"type": "integer", "multipleOf": random.choice([2, 5, 10]), "minimum": 0, "maximum": 10_000}


def _enum(random: Random, _: int, __: Defs) -> dict[str, Any]:
    values: list[Any] = ["red", "green", "", "ü", 'a "b"', 1, -2.5, None, True, [1, "x"], {"k": []}, "red-ish"]
    if random.random() < 0.2:
        return {"const": random.choice(values)}
    return {"enum": random.sample(values, random.randrange(1, 6))}


def _object(random: Random, depth: int, defs: Defs) -> dict[str, Any]:
    names = random.sample(_WORDS, random.randrange(1, 5))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _draw(random, depth, defs) for name in names},
        "required": [name for name in names if random.random() < 0.7],
    }
    match random.randrange(4):
        case 0 | 1:
            schema["additionalProperties"] = False
        case 2:
            schema["additionalProperties"] = {"type": "integer"}
        case _:
            schema["patternProperties"] = {"^x_": {"type": "boolean"}}
            schema["additionalProperties"] = False
    return schema


def _array(random: Random, depth: int, defs: Defs) -> dict[str, Any]:
    least = random.randrange(3)
    schema: dict[str, Any] = {"type": "array", "minItems": least, "maxItems": least + random.randrange(3)}
    if random.random() < 0.3:
        schema["prefixItems"] = [_draw(random, depth, defs) for _ in range(random.randrange(1, 3))]
    schema["items"] = _draw(random, depth, defs)
    return schema


def _any_of(random: Random, depth: int, defs: Defs) -> dict[str, Any]:
    return {"anyOf": [_draw(random, depth, defs) for _ in range(random.randrange(1, 4))]}


def _reference(random: Random, depth: int, defs: Defs) -> dict[str, Any]:
    name = f"part{len(defs)}"
    defs[name] = {}  # the name is taken
    defs[name] = _draw(random, min(depth, 1), defs)
    return {
        "type": "object",
        "properties": {"first": {"$ref": f"#/$defs/{name}"}, "second": {"$ref": f"#/$defs/{name}"}},
        "required": ["first"],
        "additionalProperties": False,
    }


def _recursive(random: Random, depth: int, defs: Defs) -> dict[str, Any]:
    name = f"node{len(defs)}"
    defs[name] = {
        "type": "object",
        "properties": {
            "value": {"type": "integer"},
            "next": {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]},
        },
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    return {"$ref": f"#/$defs/{name}"}


def problem(value: Any, schema: Schema, root: Schema | None = None, path: str = "$") -> str | None:
    """Why the value is not valid by the schema; None where it is."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return None if schema else f"{path}: nothing is allowed"
    if "$ref" in schema:
        assert isinstance(root, dict)
        return problem(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, path)
    for keyword, wanted in schema.items():
        check = _KEYWORDS.get(keyword)
        if check is not None and not check(value, wanted):
            return f"{path}: {value!r} breaks {keyword} {wanted!r}"
    if "anyOf" in schema and all(problem(value, each, root, path) for each in schema["anyOf"]):
        return f"{path}: {value!r} is none of anyOf"
    if isinstance(value, dict):
        for name, part in value.items():
            patterns = schema.get("patternProperties", {})
            if name in schema.get("properties", {}):
                wanted = schema["properties"][name]
            else:
                fitting = [each for pattern, each in patterns.items() if re.search(pattern, name)]
                wanted = fitting[0] if fitting else schema.get("additionalProperties", True)
            if found := problem(part, wanted, root, f"{path}.{name}"):
                return found
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        for number, part in enumerate(value):
            wanted = first[number] if number < len(first) else schema.get("items", True)
            if found := problem(part, wanted, root, f"{path}[{number}]"):
                return found
    return None


def _has_type(value: Any, wanted: str | list[str]) -> bool:
    if isinstance(wanted, list):
        return any(_has_type(value, each) for each in wanted)
    if wanted in ("integer", "number") and isinstance(value, bool):
        return False
    if wanted == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    kinds: dict[str, Any] = {
        "string": str, "number": (int, float), "boolean": bool, "null": type(None), "array": list, "object": dict,
    }  # fmt: skip
    return isinstance(value, kinds[wanted])


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _of(kind: Any, check: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """A keyword that speaks of one type, and of nothing else."""
    return lambda value, wanted: not isinstance(value, kind) or isinstance(value, bool) or check(value, wanted)


_NUMBER = (int, float)
_KEYWORDS: dict[str, Callable[[Any, Any], bool]] = {
    "type": _has_type,
    "enum": lambda value, wanted: any(_same(value, each) for each in wanted),
    "const": _same,
    "minimum": _of(_NUMBER, lambda value, least: value >= least),
    "maximum": _of(_NUMBER, lambda value, most: value <= most),
    "exclusiveMinimum": _of(_NUMBER, lambda value, least: value > least),
    "exclusiveMaximum": _of(_NUMBER, lambda value, most: value < most),
    "multipleOf": _of(_NUMBER, lambda value, step: value % step == 0),
    "minLength": _of(str, lambda value, least: len(value) >= least),
    "maxLength": _of(str, lambda value, most: len(value) <= most),
    "pattern": _of(str, lambda value, pattern: re.search(pattern, value) is not None),
    "format": _of(str, lambda value, name: re.fullmatch(_FORMATS[name], value) is not None),
    "minItems": _of(list, lambda value, least: len(value) >= least),
    "maxItems": _of(list, lambda value, most: len(value) <= most),
    "required": _of(dict, lambda value, names: all(name in value for name in names)),
}
