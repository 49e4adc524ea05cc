"""What sampling controls cost: `python -m tests.benchmarks.bench_sampling`. Seconds, one thread, no model.

The first table is paired: the same rows are sampled as they were before there were controls, and as they are now, in
turn, and the medians compared. A plain batch pays for asking whether anybody has a control. The second says what each
control costs a batch in which every row has it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from common.config import DEFAULT_MODEL
from common.model_folder import read_model_folder
from common.sampling import Grammar, SamplingParams
from common.step import NewSequence, StepPlan
from common.types import BlockId, slot_ref
from executor.controls import columns, edit, unready
from executor.guide import Grammars
from executor.logprobs import score
from executor.resident import Resident
from executor.sampler import sample
from services.model_store import pull

_GREEDY = SamplingParams(temperature=0.0)
_DRAWN = SamplingParams(temperature=1.0, top_p=0.95, seed=3)
_CONTROLS = {
    "logit_bias, 300": replace(_GREEDY, logit_bias=tuple((id, 1.0) for id in range(300))),
    "repetition_penalty": replace(_GREEDY, repetition_penalty=1.2),
    "presence and frequency": replace(_GREEDY, presence_penalty=0.5, frequency_penalty=0.5),
    "bad_words, 64": replace(_GREEDY, bad_words=tuple((id, id + 1) for id in range(64))),
    "banned_token_ids, 1024": replace(_GREEDY, banned_token_ids=tuple(range(1024))),
    "allowed_token_ids, 1024": replace(_GREEDY, allowed_token_ids=tuple(range(1024))),
    "typical_p": replace(_DRAWN, typical_p=0.9),
}
_SCHEMA = json.dumps(
    {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "kind": {"enum": ["one", "other"]}},
            "required": ["name", "age", "kind"],
            "additionalProperties": False,
        },
    }
)


def resident(rows: int, sampling: SamplingParams, *, vocab_size: int, known: int) -> Resident:
    """Tables with so many sequences of `known` tokens, half of them output."""
    held = Resident(
        num_blocks=rows,
        block_size=2 * known,
        max_sequences=256,
        max_step_tokens=1,
        max_model_len=2 * known,
        vocab_size=vocab_size,
    )
    tokens = np.random.default_rng(0).integers(0, vocab_size, known).tolist()
    new = [
        NewSequence(
            ref=slot_ref(row, 0),
            attempt=0,
            token_ids=tokens,
            num_prompt=known // 2,
            num_computed=0,
            block_table=[BlockId(row)],
            sampling=sampling,
            choice=0,
            max_tokens=2 * known,
            stop_token_ids=(2,),
        )
        for row in range(rows)
    ]
    held.apply(StepPlan(step=0, refs=(), num_scheduled=(), new=new))
    return held


def in_turn(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of each, one after the other, so that both meet the same machine."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(2 * rounds):
        which = (number + number // 2) % 2  # who goes first changes, too
        began = time.perf_counter()
        (first, second)[which]()
        times[which].append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def compare(rows: int, sampling: SamplingParams, *, vocab_size: int, known: int, rounds: int) -> tuple[float, float]:
    """Seconds of sampling a batch without looking for controls and log-probabilities, and with it."""
    held = resident(rows, sampling, vocab_size=vocab_size, known=known)
    slots = np.arange(rows)
    logits = (np.random.default_rng(1).standard_normal((rows, vocab_size)) * 3).astype(np.float32)

    def before() -> None:
        sample(logits, columns(held, slots, held.num_tokens[slots]))

    def now() -> None:
        assert not held.scored and not held.scored_prompts  # what the runner and build_batch ask
        edit(logits, held, slots)
        sample(logits, columns(held, slots, held.num_tokens[slots]))

    return in_turn(before, now, rounds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab-size", type=int, default=49_152)
    parser.add_argument("--known", type=int, default=1000, help="tokens of each sequence, half of them output")
    parser.add_argument("--rows", type=int, default=32, help="of the second table")
    parser.add_argument("--rounds", type=int, default=200)
    asked = parser.parse_args(arguments)
    shape = {"vocab_size": asked.vocab_size, "known": asked.known, "rounds": asked.rounds}

    print("| plain batch | rows | before, µs | now, µs | more, µs |\n|---|---|---|---|---|")
    for name, sampling in (("greedy", _GREEDY), ("drawn, top_p", _DRAWN)):
        for rows in (1, 32, 256) if sampling is _GREEDY else (1, 32):
            before, now = compare(rows, sampling, **shape)
            print(f"| {name} | {rows} | {before * 1e6:.1f} | {now * 1e6:.1f} | {(now - before) * 1e6:.1f} |")

    print(f"\n| every one of {asked.rows} rows has | without, µs | with, µs | a row, µs |\n|---|---|---|---|")
    for name, sampling in _CONTROLS.items():
        plain = _GREEDY if sampling.greedy else replace(sampling, typical_p=1.0)
        without, with_it = compare_controls(asked.rows, plain, sampling, **shape)
        told = (without * 1e6, with_it * 1e6, (with_it - without) * 1e6 / asked.rows)
        print(f"| {name} | {told[0]:.0f} | {told[1]:.0f} | {told[2]:.1f} |")
    logits = np.random.default_rng(1).standard_normal(asked.vocab_size).astype(np.float32)
    alone, top = in_turn(lambda: score(logits, 5, 0), lambda: score(logits, 5, 20), asked.rounds)
    usual, worst = grammar_cost(asked.rows, steps=asked.rounds)
    print(f"| a JSON schema (a step at worst {worst * 1e3:.1f} ms) | | | {usual * 1e6 / asked.rows:.1f} |")
    print(f"| logprobs=0 | | | {alone * 1e6:.1f} |\n| logprobs=20 | | | {top * 1e6:.1f} |")


def compare_controls(
    rows: int, plain: SamplingParams, sampling: SamplingParams, *, vocab_size: int, known: int, rounds: int
) -> tuple[float, float]:
    """Seconds of sampling a batch without and with the control. The logits are copied anew for both."""
    slots = np.arange(rows)
    logits = (np.random.default_rng(1).standard_normal((rows, vocab_size)) * 3).astype(np.float32)

    def of(params: SamplingParams) -> Callable[[], None]:
        held = resident(rows, params, vocab_size=vocab_size, known=known)

        def run() -> None:
            values = logits.copy()
            edit(values, held, slots)
            sample(values, columns(held, slots, held.num_tokens[slots]))

        return run

    return in_turn(of(plain), of(sampling), max(10, rounds // 10))


def grammar_cost(rows: int, *, steps: int) -> tuple[float, float]:
    """Seconds that `edit` takes in a step in which each of the rows has a grammar: the median, and the worst.

    Over the default model's vocabulary, each row at a place of its own; the tokens that are sampled are taken in.
    """
    folder = read_model_folder(pull(DEFAULT_MODEL, lambda what, done, total: None))
    held = Resident(
        num_blocks=rows,
        block_size=4096,
        max_sequences=256,
        max_step_tokens=1,
        max_model_len=4096,
        vocab_size=folder.vocab_size,
        grammars=Grammars(folder.path / "tokenizer.json", vocab_size=folder.vocab_size, eos=folder.eos_token_ids),
    )
    new = [
        NewSequence(
            ref=slot_ref(row, 0),
            attempt=0,
            token_ids=[5],
            num_prompt=1,
            num_computed=0,
            block_table=[BlockId(row)],
            sampling=replace(_DRAWN, seed=row, grammar=Grammar("json_schema", _SCHEMA)),
            choice=0,
            max_tokens=4000,
            stop_token_ids=(),
        )
        for row in range(rows)
    ]
    held.apply(StepPlan(step=0, refs=(), num_scheduled=(), new=new))
    slots = np.arange(rows)
    while unready(held, slots, rows):
        pass  # it waits a moment itself
    noise = np.random.default_rng(1)
    found: list[float] = []
    for _ in range(steps):
        logits = (noise.standard_normal((rows, folder.vocab_size)) * 3).astype(np.float32)
        logits[:, list(folder.eos_token_ids)] -= 100  # nobody ends
        began = time.perf_counter()
        assert not unready(held, slots, rows)
        edit(logits, held, slots)
        found.append(time.perf_counter() - began)
        tokens = sample(logits, columns(held, slots, held.num_tokens[slots])).tokens
        held.token_ids[slots, held.num_tokens[slots]] = tokens
        held.num_tokens[slots] += 1
    return statistics.median(found[1:]), max(found[1:])  # in the first, the grammars are compiled


if __name__ == "__main__":
    main()
