"""What a beam search costs, beside Transformers' own: `python -m tests.benchmarks.bench_beams`. A minute or two.

Both sides run in this process, in turns, on the same model, prompts, numbers and threads, and the medians are compared.
Ours is the scheduler and the runner that computes, without the sockets between them; Transformers' is
`generate(num_beams=...)` with its cache. The second table says how many blocks of the KV slab the beams held at most,
beside what as many copies would have taken.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from common.blocks import blocks_for
from common.config import DEFAULT_MODEL
from common.sampling import BeamParams, SamplingParams, StopConditions
from executor.model_runner import ModelRunner
from executor.runner import execute
from scheduler.scheduler import Scheduler, SchedulerLimits
from services.model_store import pull

_TEXT = Path(__file__).parent / "text.txt"


class Ours:
    """A scheduler and a runner."""

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        self._runner = ModelRunner(name="bench", model_folder=folder, dtype=dtype, num_threads=threads, num_blocks=2048)
        self._facts = self._runner.load(lambda stage, done, total: None)
        self.most_blocks = 0
        self.block_size = self._facts.block_size

    def search(self, prompts: Sequence[Sequence[int]], params: BeamParams, max_tokens: int) -> list[list[int]]:
        """The best answer to each prompt, all of them at once. No end but the length."""
        scheduler = Scheduler(SchedulerLimits(), model="bench", eos=set(), secret=b"bench")
        self._runner.begin_session()
        scheduler.join(0, self._facts, 0)
        sampling, stop = SamplingParams(temperature=0.0, beams=params), StopConditions(max_tokens=max_tokens)
        answers = [scheduler.add(prompt, sampling, stop, 0)[0] for prompt in prompts]
        pool, self.most_blocks = scheduler.session(0).pool, 0
        while (plan := scheduler.schedule(0, 0)) is not None:
            self.most_blocks = max(self.most_blocks, pool.num_blocks - pool.num_free)
            scheduler.update(0, execute(self._runner, plan), 0)
        return [answer.tokens[answer.num_prompt :].tolist() for answer in answers]


class Theirs:
    """Transformers."""

    def __init__(self, folder: Path, dtype: str) -> None:
        auto: Any = AutoModelForCausalLM
        self._model = auto.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def search(self, prompts: Sequence[Sequence[int]], params: BeamParams, max_tokens: int) -> list[list[int]]:
        """The same. Prompts are equally long."""
        ids = torch.tensor(prompts)
        made = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=params.width,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            eos_token_id=[1 << 30],  # no token: None would be the model's own
            pad_token_id=0,
            do_sample=False,
            max_new_tokens=max_tokens,
        )
        found: list[list[int]] = made[:, ids.shape[1] :].tolist()
        return found


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--widths", default="4")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    folder = pull(options.model, lambda what, done, total: None)
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(_TEXT.read_text(encoding="utf-8")).ids
    ours, theirs = Ours(folder, options.dtype, options.threads), Theirs(folder, options.dtype)
    print(f"{options.dtype}, {options.threads} threads, prompts of {options.prompt}, answers of {options.max_tokens}\n")
    print("| width | searches at once | ours, s | Transformers, s | ratio | same answers | blocks held | of copies |")
    print("|---|---|---|---|---|---|---|---|")
    for width in map(int, options.widths.split(",")):
        for count in (1, 4):
            prompts = [tokens[n * options.prompt : (n + 1) * options.prompt] for n in range(count)]
            params = BeamParams(width)
            seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
            found: dict[str, list[list[int]]] = {}
            for _ in range(options.runs):
                for name, side in (("ours", ours), ("theirs", theirs)):
                    began = time.perf_counter()
                    found[name] = side.search(prompts, params, options.max_tokens)
                    seconds[name].append(time.perf_counter() - began)
            mine, other = (statistics.median(seconds[name]) for name in ("ours", "theirs"))
            same = sum(one == two for one, two in zip(found["ours"], found["theirs"], strict=True))
            copies = count * width * blocks_for(options.prompt + options.max_tokens, ours.block_size)
            share = ours.most_blocks / copies
            print(
                f"| {width} | {count} | {mine:.2f} | {other:.2f} | {other / mine:.1f} | {same} of {count} "
                f"| {ours.most_blocks} | {copies} ({share:.0%}) |"
            )


if __name__ == "__main__":
    main()
