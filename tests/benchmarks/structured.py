"""Drawn schemas through a server with the default model: `python -m tests.benchmarks.structured --schemas 500`.

Every answer that is whole must be valid by its schema. Those that max_tokens cut short are counted apart: a model may
write a string, or a list of itself, for as long as its schema lets it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

from common.config import DEFAULT_MODEL
from common.errors import InvalidRequest
from pagewire import Client, FinishReason
from services.model_store import pull
from tests.e2e.cluster import Cluster
from tests.executor.schemas import drawn_schema, problem


def outcome(client: Client, number: int, max_tokens: int) -> tuple[str, int]:
    """What became of the schema of that number, and of how many tokens."""
    schema = drawn_schema(Random(number))
    question = [{"role": "user", "content": f"Give an example, as JSON, of this schema: {json.dumps(schema)[:1500]}"}]
    try:
        answer = client.generate(messages=question, json_schema=schema, max_tokens=max_tokens, seed=number)
    except InvalidRequest as refused:
        print(f"{number}: refused: {refused}\n  {json.dumps(schema)}")
        return "refused", 0
    if answer.finish.reason is not FinishReason.EOS:
        return f"cut short ({answer.finish.reason.value})", answer.usage.completion_tokens
    wrong = problem(json.loads(answer.text), schema)
    if wrong:
        print(f"{number}: {wrong}\n  {json.dumps(schema)}\n  {answer.text}")
    return "invalid" if wrong else "valid", answer.usage.completion_tokens


def main(arguments: Sequence[str] | None = None) -> None:
    """Print how many were valid, refused, cut short; what is wrong is printed as it is found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=256)
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        running = Cluster(pull(DEFAULT_MODEL, lambda what, done, total: None), Path(folder))
        try:
            running.start_executor(fake=False)
            with Client(running.address) as client, ThreadPoolExecutor(asked.at_once) as pool:
                found = list(pool.map(lambda n: outcome(client, n, asked.max_tokens), range(asked.schemas)))
        finally:
            running.close()
    for what, count in Counter(what for what, _ in found).most_common():
        print(f"{what}: {count}")
    print(f"tokens: {sum(tokens for _, tokens in found)}")


if __name__ == "__main__":
    main()
