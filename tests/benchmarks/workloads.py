"""What is asked of a server: workloads that are the same for every engine and every repetition.

The *shape* of a workload (lengths, times) depends on the seed alone, the *contents* of its prompts on seed and run.
So every run is the same work, and none finds its prompts in a prefix cache that an earlier one has filled. Only the
schedule of w3 is drawn anew for each run.

Prompts are ids of whole words: as text or as ids they are equally long, for every server with this tokenizer.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

RATES: Final = (0.5, 1.0, 2.0, 4.0)  # requests a second that `w3` offers
ONLINE_S: Final = 30.0
PROMPTS: Final = (512, 1024, 2048, 4096)  # tokens, for `prefill`
NUM_PREFILLS: Final = 5

_WORD: Final = re.compile("Ġ[a-z]{3,}")  # in the byte-level alphabet Ġ is a space


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer that is asked for: greedy, `max_tokens` long whatever the model says."""

    prompt: Sequence[int]
    max_tokens: int
    at_s: float = 0.0  # when to submit it, from the start of the run
    kind: str = ""  # tells apart what a workload mixes


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests, submitted when they say or each after the one before."""

    name: str
    requests: Sequence[Request]
    one_at_a_time: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(request.prompt) for request in self.requests)


def words(tokenizer: Path) -> list[int]:
    """Ids of the tokens that are a space and a word, in a byte-level tokenizer.json."""
    vocabulary: dict[str, int] = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    found = sorted(id for token, id in vocabulary.items() if _WORD.fullmatch(token))
    if not found:
        raise ValueError(f"{tokenizer}: no token is a space and a word of three letters or more")
    return found


def spelled_out(names: str) -> list[str]:
    """`w1,w3` with every rate of w3 and every length of prefill as a workload of its own."""
    whole = {"w3": [f"w3@{rate:g}" for rate in RATES], "prefill": [f"prefill@{length}" for length in PROMPTS]}
    return [one for name in names.split(",") for one in whole.get(name, [name])]


def build(name: str, words: Sequence[int], *, seed: int = 0, run: int = 0) -> Workload:
    """The workload of that name: w1, w2, w3@RATE, w4, w5, prefill@LENGTH or warmup. Raises ValueError for another."""
    kind, _, parameter = name.partition("@")
    title = f"w3@{float(parameter)}" if kind == "w3" else name
    shape, contents = random.Random(f"{title}/{seed}"), random.Random(f"{title}/{seed}/{run}")

    def prompt(length: int) -> list[int]:
        return contents.choices(words, k=length)

    match kind:
        case "warmup":  # every path once: a small batch of several lengths, one of them longer
            lengths = [(16, 16), (64, 24), (200, 16), (700, 8)]
            requests = [Request(prompt=prompt(p), max_tokens=o) for p, o in lengths]
        case "w1":  # much work at once, as in nano-vllm's benchmark, scaled to a small machine
            lengths = [(shape.randint(64, 512), shape.randint(64, 256)) for _ in range(32)]
            requests = [Request(prompt=prompt(p), max_tokens=o) for p, o in lengths]
        case "w2":  # one stream alone
            requests = [Request(prompt=prompt(128), max_tokens=256)]
        case "w3":  # people who come when they like
            requests = _poisson(float(parameter), words, contents)
        case "w4":  # one long prefix that all share and nobody has seen before
            prefix = prompt(1024)
            requests = [Request(prompt=prefix + prompt(32), max_tokens=32) for _ in range(32)]
        case "w5":  # long prompts arrive while short streams decode
            requests = [Request(prompt=prompt(64), max_tokens=512, kind="short") for _ in range(4)]
            requests += [Request(prompt=prompt(4096), max_tokens=64, at_s=1.5 + i, kind="long") for i in range(3)]
        case "prefill":  # nothing but the time to the first token
            requests = [Request(prompt=prompt(int(parameter)), max_tokens=1) for _ in range(NUM_PREFILLS)]
        case _:
            raise ValueError(f"there is no workload {name!r}: w1, w2, w3, w3@RATE, w4, w5, prefill, prefill@LENGTH")
    return Workload(name=name, requests=requests, one_at_a_time=kind == "prefill")


def _poisson(rate: float, words: Sequence[int], draw: random.Random) -> list[Request]:
    requests: list[Request] = []
    at_s = 0.0
    for _ in range(max(1, round(rate * ONLINE_S))):
        prompt = draw.choices(words, k=draw.randint(64, 512))
        requests.append(Request(prompt=prompt, max_tokens=draw.randint(32, 128), at_s=at_s))
        at_s += draw.expovariate(rate)
    return requests
