"""Drawn schemas through a server with the default model: `python -m tests.benchmarks.structured --schemas 500`.

Every answer that is whole must be valid by its schema. Those that max_tokens cut short are counted apart: a model may
write a string, or a list of itself, for as long as its schema lets it.

With `--store`, the schemas are real ones (tests/benchmarks/schema_store.py says where from). Answers to those are
looked at by the package `jsonschema`, which must be there then: `pip install --target build/jsonschema jsonschema`,
and PYTHONPATH=build/jsonschema.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, Final

from common.config import DEFAULT_MODEL
from common.errors import InvalidRequest
from pagewire import Client, FinishReason
from services.model_store import pull
from tests.benchmarks.schema_store import stored
from tests.e2e.cluster import Cluster
from tests.executor.schemas import drawn_schema, problem

Schema = dict[str, Any]
Problem = Callable[[Any], str | None]

_SHOWN: Final = 2000  # characters of a schema


def drawn(schemas: int) -> dict[str, tuple[Schema, Problem]]:
    """So many schemas of ours, and how to look at an answer to each."""

    def look_with(schema: Schema) -> Problem:
        return lambda value: problem(value, schema)

    made = {f"{number}": drawn_schema(Random(number)) for number in range(schemas)}
    return {name: (schema, look_with(schema)) for name, schema in made.items()}


def of_store(store: Path, schemas: int) -> dict[str, tuple[Schema, Problem]]:
    """So many of a public store, and how to look at an answer to each. Raises ImportError where nothing can."""
    validators = importlib.import_module("jsonschema.validators")
    names = list(found := stored(store))
    Random(0).shuffle(names)

    def look_with(schema: Schema) -> Problem:
        validator = validators.validator_for(schema)(schema)
        return lambda value: next((error.message for error in validator.iter_errors(value)), None)

    picked = {name: json.loads(found[name]) for name in names[:schemas]}
    return {name: (schema, look_with(schema)) for name, schema in picked.items()}


def outcome(client: Client, name: str, schema: Schema, look: Problem, max_tokens: int) -> tuple[str, int]:
    """What became of the schema, and of how many tokens."""
    number = zlib.crc32(name.encode()) if not name.isdigit() else int(name)
    question = [{"role": "user", "content": f"Give an example, as JSON, of this schema: {json.dumps(schema)[:1500]}"}]
    try:
        answer = client.generate(messages=question, json_schema=schema, max_tokens=max_tokens, seed=number)
    except InvalidRequest as refused:
        print(f"{name}: refused: {refused}\n  {json.dumps(schema)[:_SHOWN]}")
        return "refused", 0
    if answer.finish.reason is not FinishReason.EOS:
        return f"cut short ({answer.finish.reason.value})", answer.usage.completion_tokens
    try:
        wrong = look(json.loads(answer.text))
    except Exception as error:  # noqa: BLE001  a schema of strangers: its patterns may be none to Python, and so on
        print(f"{name}: whole, and cannot be looked at: {type(error).__name__}: {str(error)[:100]}")
        return "whole, not looked at", answer.usage.completion_tokens
    if wrong:
        print(f"{name}: {wrong}\n  {json.dumps(schema)[:_SHOWN]}\n  {answer.text}")
    return "invalid" if wrong else "valid", answer.usage.completion_tokens


def main(arguments: Sequence[str] | None = None) -> None:
    """Print how many were valid, refused, cut short; what is wrong is printed as it is found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--store", type=Path, help="take real schemas from this wheel or folder")
    asked = parser.parse_args(arguments)
    schemas = drawn(asked.schemas) if asked.store is None else of_store(asked.store, asked.schemas)
    with tempfile.TemporaryDirectory() as folder:
        running = Cluster(pull(DEFAULT_MODEL, lambda what, done, total: None), Path(folder))
        try:
            running.start_executor(fake=False)
            with Client(running.address) as client, ThreadPoolExecutor(asked.at_once) as pool:
                found = list(
                    pool.map(lambda name: outcome(client, name, *schemas[name], asked.max_tokens), schemas)
                )  # fmt: skip
        finally:
            running.close()
    for what, count in Counter(what for what, _ in found).most_common():
        print(f"{what}: {count}")
    print(f"tokens: {sum(tokens for _, tokens in found)}")


if __name__ == "__main__":
    main()
