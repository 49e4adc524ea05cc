"""What speculation wins: the same requests with and without drafts, in turns, on one server.

`python -m tests.benchmarks.speculation` copies: the model is to repeat a text, and n-grams of it are the guesses.
`--model FOLDER --draft-model FOLDER` writes programs, and the smaller model guesses. Prompts take no part in the rates.
Tokens must be the same with and without; so the table shows time, and nothing else can have changed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.config import DEFAULT_MODEL
from pagewire import Answer, Client
from services.model_store import resolve
from tests.e2e.cluster import Cluster

_TEXT: Final = Path(__file__).with_name("text.txt")
_PASSAGE_CHARACTERS: Final = 900
_PROGRAMS: Final = (
    "a function that parses a line of CSV with quoted fields",
    "a class for a least-recently-used cache with get and put",
    "a function that returns the n-th prime number by a sieve",
    "a binary search tree with insert, delete and in-order traversal",
    "a command line program that counts words in files",
    "a function that merges overlapping intervals, with tests",
    "a matrix class with addition, multiplication and transposition",
    "a tokenizer and a recursive evaluator for arithmetic expressions",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One batch of requests, all at once."""

    tokens: int
    wall_s: float  # from the first request to the last token, prompts included
    decode_s: float  # of the request that took longest, from its first token on
    drafted: int
    accepted: int

    @property
    def tokens_per_row(self) -> float:
        """What one row of a step brought."""
        return self.tokens / (self.tokens - self.accepted)


def question(number: int, *, copies: bool) -> str:
    """A request that no other one begins like."""
    if not copies:
        return f"({number}) Write {_PROGRAMS[number % len(_PROGRAMS)]} in Python."
    text = _TEXT.read_text(encoding="utf-8")
    begin = number * _PASSAGE_CHARACTERS // 3 % (len(text) - _PASSAGE_CHARACTERS)
    passage = text[begin : begin + _PASSAGE_CHARACTERS]
    return f"({number}) Repeat this text word for word, and say nothing else:\n\n{passage}"


def turn(
    client: Client, numbers: Sequence[int], asked: argparse.Namespace, *, drafts: bool
) -> tuple[Turn, list[Answer]]:
    """Ask for all of them at once."""

    def ask(number: int) -> Answer:
        return client.generate(
            messages=[{"role": "user", "content": question(number, copies=not asked.draft_model)}],
            max_tokens=asked.max_tokens,
            temperature=asked.temperature,
            seed=number,
            ignore_eos=True,
            **({} if drafts else {"max_drafts": 0}),  # type: ignore[arg-type]
        )

    begun_s = time.perf_counter()
    with ThreadPoolExecutor(len(numbers)) as pool:
        answers = list(pool.map(ask, numbers))
    wall_s = time.perf_counter() - begun_s
    usages = [answer.usage for answer in answers]
    return (
        Turn(
            tokens=sum(usage.completion_tokens for usage in usages),
            wall_s=wall_s,
            decode_s=max(usage.decode_s for usage in usages),
            drafted=sum(usage.drafted_tokens for usage in usages),
            accepted=sum(usage.accepted_tokens for usage in usages),
        ),
        answers,
    )


def compare(client: Client, batch: int, first: int, asked: argparse.Namespace) -> tuple[list[Turn], list[Turn]]:
    """Turns without and with drafts, who goes first in turn."""
    without: list[Turn] = []
    with_drafts: list[Turn] = []
    for round_ in range(asked.rounds):
        numbers = range(first + round_ * batch, first + (round_ + 1) * batch)
        told: dict[bool, list[Answer]] = {}
        for drafts in (False, True) if round_ % 2 else (True, False):
            # the other turn of the round finds the prompts in the prefix cache: what is compared is decoding
            done, told[drafts] = turn(client, numbers, asked, drafts=drafts)
            (with_drafts if drafts else without).append(done)
        same = [a.token_ids == b.token_ids for a, b in zip(told[False], told[True], strict=True)]
        if not all(same):
            raise AssertionError(f"{same.count(False)} of {batch} answers differ with drafts")
    return without, with_drafts


def row(batch: int, without: Sequence[Turn], with_drafts: Sequence[Turn]) -> str:
    """One line of the table."""
    plain = statistics.median(t.tokens / t.decode_s for t in without)
    fast = statistics.median(t.tokens / t.decode_s for t in with_drafts)
    drafted, accepted = sum(t.drafted for t in with_drafts), sum(t.accepted for t in with_drafts)
    tokens = sum(t.tokens for t in with_drafts)
    return (
        f"| {batch} | {plain:.1f} | {fast:.1f} | {fast / plain:.2f} | {accepted / max(1, drafted):.0%} "
        f"| {tokens / (tokens - accepted):.2f} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--draft-model", default="")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--executor-flags", default="", help="with spaces between them")
    asked = parser.parse_args(arguments)
    flags = [f"--speculate={'draft' if asked.draft_model else 'ngram'}", *asked.executor_flags.split()]
    if asked.draft_model:
        flags.append(f"--draft-model={resolve(asked.draft_model)}")
    with tempfile.TemporaryDirectory() as folder:
        running = Cluster(resolve(asked.model), Path(folder))
        try:
            running.start_executor(*flags, fake=False)
            with Client(running.address) as client:
                turn(client, [0], asked, drafts=True)  # warm
                print("| batch | tokens/s without | with drafts | times | drafts kept | tokens a row |")
                print("|---|---|---|---|---|---|")
                first = 1
                for batch in map(int, asked.batches.split(",")):
                    print(row(batch, *compare(client, batch, first, asked)), flush=True)
                    first += batch * asked.rounds
        finally:
            running.close()


if __name__ == "__main__":
    main()
