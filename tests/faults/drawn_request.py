"""A request that a story draws, and what its answer must be when nothing disturbs it."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from common.model_folder import ModelFolder, read_model_folder
from common.sampling import SamplingParams, StopConditions
from executor.fake_runner import Prefix, digests_of
from protos import inference_pb2 as pb
from services.text import Tokenizer
from tests.e2e import fake_model
from tests.faults.checker import Expected, undisturbed
from tests.faults.virtual_executor import true_token
from tests.faults.virtual_scheduler import TENANTS

_FAMILIES: Final = [[(11 * family + 7 * i) % 300 + 1 for i in range(40)] for family in range(2)]


@functools.cache
def fake_folder() -> tuple[ModelFolder, Tokenizer]:
    """The model that everybody here serves."""
    with tempfile.TemporaryDirectory() as folder:
        model = read_model_folder(fake_model.write(Path(folder) / "fake"))
        return model, Tokenizer(model.path / "tokenizer.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnRequest:
    """What is asked, by whom, and what every choice must be."""

    tenant: str
    message: pb.GenerateStreamRequest
    expected: list[Expected]

    @property
    def prompt(self) -> list[int]:
        """Its tokens."""
        return list(self.message.token_ids.ids)

    def places(self, choice: int) -> Iterator[Prefix]:
        """What the model is asked for one choice, token by token."""
        prompt, tokens, sampling = self.prompt, self.expected[choice].tokens, self.message.sampling
        digests = digests_of([*prompt, *tokens])
        for num_tokens in range(len(prompt), len(prompt) + len(tokens)):
            yield Prefix(
                num_tokens=num_tokens,
                digest=digests[num_tokens - 1],
                greedy=sampling.temperature == 0,
                seed=sampling.seed,
                choice=choice,
            )

    def shared_with(self, other: DrawnRequest) -> int:
        """Tokens of the prompt that the other request, and any of its answers, begin with too."""
        return max(_common([*other.prompt, *e.tokens], self.prompt) for e in other.expected)


def draw_request(draw: random.Random, number: int, *, long: bool) -> DrawnRequest:
    """One request; `long` ones need all the memory that there is."""
    own = [draw.randrange(300) for _ in range(draw.choice([1, 2, 5]))]
    shared = _FAMILIES[draw.randrange(2)][: draw.randrange(0, 34)]
    before = [draw.randrange(300)] * 8 if draw.random() < 0.2 else []  # equal blocks after other ones
    prompt = [*before, *shared, *own]
    sampling = SamplingParams(temperature=float(draw.random() < 0.7), seed=draw.randrange(3))
    n = draw.choice([1, 1, 1, 2, 3])
    stop = StopConditions(
        max_tokens=32 if long else draw.choice([1, 3, 8, 16, 24, 32]),
        stop_token_ids=() if long else draw.choice([(), (), (), tuple(range(0, 300, 29))]),
        ignore_eos=draw.random() < 0.5,
    )
    if not long and draw.random() < 0.35:  # a string that the undisturbed text does hold, as a rule
        text = _alone(prompt, sampling, 0, stop).text or "?"
        at = draw.randrange(max(1, len(text)))
        stop = replace(stop, stop_strings=(text[at : at + draw.randint(1, 4)] or "?",))
    # drawn apart, so that the stories are otherwise what they were
    apart = random.Random(f"{number} {prompt}")
    logprobs = apart.choice([None, None, 0, 2])
    max_drafts = apart.choice([None, None, None, 0, 1])
    return DrawnRequest(
        tenant=draw.choice(list(TENANTS)),
        message=pb.GenerateStreamRequest(
            request_id=f"{number}",
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(temperature=sampling.temperature, seed=sampling.seed, n=n, logprobs=logprobs),
            stopping=pb.StopConditions(
                max_tokens=stop.max_tokens,
                stop=stop.stop_strings,
                stop_token_ids=stop.stop_token_ids,
                ignore_eos=stop.ignore_eos,
            ),
            max_drafts=max_drafts,
        ),
        expected=[replace(_alone(prompt, sampling, choice, stop), logprobs=logprobs) for choice in range(n)],
    )


def _alone(prompt: list[int], sampling: SamplingParams, choice: int, stop: StopConditions) -> Expected:
    model, tokenizer = fake_folder()
    return undisturbed(
        prompt, sampling, choice, stop,
        model=true_token, tokenizer=tokenizer, vocab_size=model.vocab_size, eos=frozenset(model.eos_token_ids),
    )  # fmt: skip


def _common(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
