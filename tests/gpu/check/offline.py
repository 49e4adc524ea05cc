"""nano-vLLM's own benchmark: 256 requests at once, prompts and answers of 100 to 1,024 tokens each, drawn by seed 0.

Lengths are drawn in the order in which its bench.py draws them, so they are the same ones. A run after the first has
other words, so that none finds its prompts in a prefix cache.
"""

from __future__ import annotations

import random
from typing import Final

from tests.benchmarks.workloads import Request, Workload

TEMPERATURE: Final = 0.6
NUM_REQUESTS: Final = 256
MAX_MODEL_LEN: Final = 4096
_LENGTHS: Final = (100, 1024)
_LAST_TOKEN: Final = 10_000
_SHORT: Final = 8
_TINY: Final = 16  # how much shorter everything is where it only has to run


def offline(run: int = 0, *, tiny: bool = False, short: bool = False) -> Workload:
    """The requests of one run. Tiny: eight of them, a sixteenth as long. Short: answers of 8 tokens, to warm up."""
    draw = random.Random(0)
    prompts = [[draw.randint(0, _LAST_TOKEN) for _ in range(draw.randint(*_LENGTHS))] for _ in range(NUM_REQUESTS)]
    answers = [draw.randint(*_LENGTHS) for _ in range(NUM_REQUESTS)]
    if run:
        words = random.Random(f"words of run {run}")
        prompts = [[words.randint(0, _LAST_TOKEN) for _ in prompt] for prompt in prompts]
    if tiny:
        prompts = [[3 + token % 300 for token in prompt[: len(prompt) // _TINY]] for prompt in prompts[:8]]
        answers = [answer // _TINY for answer in answers[:8]]
    if short:
        answers = [_SHORT] * len(answers)
    requests = [Request(prompt=p, max_tokens=a) for p, a in zip(prompts, answers, strict=True)]
    return Workload(name=f"offline, run {run}", requests=requests)


def alone(*, tiny: bool = False) -> Workload:
    """One stream after the other, each by itself: the latency of a token through everything."""
    draw = random.Random(1)
    length, answer = (8, 8) if tiny else (128, 256)
    requests = [Request(prompt=[3 + draw.randint(0, 300) for _ in range(length)], max_tokens=answer) for _ in range(3)]
    return Workload(name="alone", requests=requests, one_at_a_time=True)
