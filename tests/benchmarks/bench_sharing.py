"""What choices that share a prompt save: KV blocks of n choices of one request, beside n copies of it.

Run it with `python -m tests.benchmarks.bench_sharing [--n 8]`; it needs no model, no socket and a few seconds. The real
scheduler plans for a fake executor whose slab is read back through the block tables, so what is shared is shared
rightly; blocks are counted after each step, and the most that were held at once is told. Blocks are the scheduler's to
count: the numbers are exact, the same on every machine and for every model.

Three ways to get n answers to one prompt: `n` choices of one request; n requests one by one in the same step, which the
prefix cache lets share full blocks; and n requests that share nothing, because each has another salt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from common.blocks import blocks_for
from common.sampling import SamplingParams, StopConditions
from executor.fake_runner import FakeRunner, prefix_hash_token
from executor.runner import execute
from scheduler.scheduler import Scheduler, SchedulerLimits

BLOCK_SIZE: Final = 16
SHAPES: Final = ((64, 256), (512, 128), (1024, 128), (1000, 128), (4096, 64))
"""(tokens of the prompt, tokens of each answer)."""

Way = Literal["choices", "cached", "copies"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """What n answers took."""

    blocks: int  # the most that were held at once
    computed: int  # tokens of prompts and answers that went through the model


def measure(way: Way, n: int, prompt: int, answer: int, *, block_size: int = BLOCK_SIZE) -> Used:
    """Let all of them run at once, on an executor with room for n copies."""
    length = prompt + answer
    scheduler = Scheduler(SchedulerLimits(token_budget=n * length), model="fake", eos=set(), secret=b"bench")
    runner = FakeRunner(
        num_blocks=n * blocks_for(length, block_size) + 1,
        block_size=block_size,
        max_step_tokens=n * length,
        max_model_len=length,
        next_token=prefix_hash_token,
        credit=1,
    )
    scheduler.join(0, runner.load(lambda stage, done, total: None), 0)
    tokens = [(7 * i) % 900 for i in range(prompt)]
    stop, sampling = StopConditions(max_tokens=answer), SamplingParams(seed=1)
    if way == "choices":
        scheduler.add(tokens, sampling, stop, 0, choices=n)
    else:
        for i in range(n):
            scheduler.add(tokens, sampling, stop, 0, salt=f"{i}" if way == "copies" else "")
    pool, most, computed = scheduler.sessions[0].pool, 0, 0
    while (plan := scheduler.schedule(0, 0)) is not None:
        most = max(most, pool.num_blocks - pool.num_free)
        computed += plan.num_tokens
        scheduler.update(0, execute(runner, plan), 0)
    assert pool.num_free == pool.num_blocks, "blocks are lost"
    return Used(blocks=most, computed=computed)


def table(n: int, shapes: Sequence[tuple[int, int]] = SHAPES) -> list[str]:
    """The lines of a table: a row for each shape."""
    lines = [
        f"| prompt | answer | blocks: {n} copies | {n} requests, cached | `n={n}` | of the copies | tokens computed |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for prompt, answer in shapes:
        copies, cached, choices = (measure(way, n, prompt, answer) for way in ("copies", "cached", "choices"))
        lines.append(
            f"| {prompt} | {answer} | {copies.blocks} | {cached.blocks} | {choices.blocks} "
            f"| {choices.blocks / copies.blocks:.0%} | {choices.computed} of {copies.computed} |"
        )
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=8)
    print("\n".join(table(parser.parse_args().n)))


if __name__ == "__main__":
    main()
