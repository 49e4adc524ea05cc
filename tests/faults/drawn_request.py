"""A request that a story draws, and what its answer must be when nothing disturbs it."""

from __future__ import annotations

import functools
import math
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from common.model_folder import ModelFolder, read_model_folder
from common.sampling import BeamParams, SamplingParams, StopConditions
from common.types import FinishReason
from executor.fake_runner import Prefix, digests_of
from protos import inference_pb2 as pb
from scheduler.stopping import finish_reason, stop_tokens
from services.text import IncrementalDecoder, Tokenizer
from tests.e2e import fake_model
from tests.faults.checker import Expected, undisturbed
from tests.faults.virtual_executor import true_token
from tests.faults.virtual_scheduler import TENANTS
from tests.scheduler.searched import searched

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
    made: list[Expected]  # every choice that is made
    expected: list[Expected]  # those that are told, in their order

    @property
    def prompt(self) -> list[int]:
        """Its tokens."""
        return list(self.message.token_ids.ids)

    def places(self, choice: int) -> Iterator[Prefix]:
        """What the model is asked for one choice, token by token."""
        prompt, tokens, sampling = self.prompt, self.made[choice].tokens, self.message.sampling
        digests = digests_of([*prompt, *tokens])
        for num_tokens in range(len(prompt), len(prompt) + len(tokens)):
            yield Prefix(
                num_tokens=num_tokens,
                digest=digests[num_tokens - 1],
                greedy=sampling.temperature == 0,
                seed=sampling.seed,
                choice=0 if sampling.HasField("beams") else choice,
            )

    @property
    def num_pinned(self) -> int:
        """Tokens that it pins."""
        cache = self.message.cache
        return (cache.pin_tokens or len(self.prompt)) if cache.pin_seconds else 0

    def shared_with(self, other: DrawnRequest) -> int:
        """Tokens of the prompt that it may find because the other request, and any of its answers, begin with them."""
        ours, theirs = self.message.cache, other.message.cache
        if ours.no_cache or theirs.no_cache or (self.tenant, ours.cache_salt) != (other.tenant, theirs.cache_salt):
            return 0
        return max(_common([*other.prompt, *e.tokens], self.prompt) for e in other.made)


def draw_request(draw: random.Random, number: int, *, long: bool, pins: bool, ranks: bool) -> DrawnRequest:
    """One request; `long` ones need all the memory that there is.

    `pins`: it may pin its prompt. `ranks`: it may ask for the best of several, because none of them can fail.
    """
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
    structured = None
    if not stop.ignore_eos and random.Random(f"grammar of {number} {prompt}").random() < 0.2:
        structured = pb.StructuredOutput(regex=".*")  # the fake model keeps none, but has it compiled
    apart = random.Random(f"best {number} {prompt}")
    best_of = apart.randint(max(n, 2), 4) if ranks and apart.random() < 0.15 else None
    made = [replace(_alone(prompt, sampling, choice, stop), logprobs=logprobs) for choice in range(best_of or n)]
    drawn = DrawnRequest(
        tenant=draw.choice(list(TENANTS)),
        message=pb.GenerateStreamRequest(
            request_id=f"{number}",
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(
                temperature=sampling.temperature,
                seed=sampling.seed,
                n=n,
                logprobs=logprobs,
                structured=structured,
                best_of=best_of,
            ),
            stopping=pb.StopConditions(
                max_tokens=stop.max_tokens,
                stop=stop.stop_strings,
                stop_token_ids=stop.stop_token_ids,
                ignore_eos=stop.ignore_eos,
            ),
            cache=_draw_cache(random.Random(f"cache {number} {prompt}"), len(prompt), pins=pins),
            max_drafts=max_drafts,
        ),
        made=made,
        expected=sorted(made, key=_badness)[:n] if best_of else made,
    )
    searches = not long and best_of is None and random.Random(f"beams {number} {prompt}").random() >= 0.9
    return _with_beams(drawn) if searches else drawn


def _with_beams(drawn: DrawnRequest) -> DrawnRequest:
    """A beam search instead, which every executor can hold."""
    message = pb.GenerateStreamRequest()
    message.CopyFrom(drawn.message)
    stopping, asked = message.stopping, message.sampling
    stopping.max_tokens = min(stopping.max_tokens, 16)
    del stopping.stop[:]
    asked.n, asked.beams.width = min(asked.n, 2), 2
    asked.ClearField("temperature")
    stop = StopConditions(
        max_tokens=stopping.max_tokens,
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
    )
    sampling = SamplingParams(temperature=0.0, seed=asked.seed, beams=BeamParams(2))
    model, tokenizer = fake_folder()
    eos = frozenset(model.eos_token_ids)
    ends = frozenset(stop_tokens(stop, eos))
    found = searched(
        drawn.prompt, sampling, stop.max_tokens, ends=ends, vocab_size=model.vocab_size, model=true_token
    )  # fmt: skip
    logprobs = drawn.expected[0].logprobs
    expected = [Expected(tokens=[], reason=FinishReason.ERROR)] * asked.n
    for choice, hypothesis in enumerate((found or [])[: asked.n]):
        tokens = hypothesis.tokens.tolist()
        reason = finish_reason(tokens[-1], len(tokens), stop, eos)
        decoder = IncrementalDecoder(tokenizer, drawn.prompt, skip_special_tokens=True)
        text = decoder.push(tokens[:-1] if tokens[-1] in ends else tokens) + decoder.finish()
        expected[choice] = Expected(tokens=tokens, reason=reason, text=text, logprobs=logprobs)
    return replace(drawn, message=message, made=expected, expected=expected)


def _badness(choice: Expected) -> tuple[bool, float]:
    """The less, the better. The fake model says of a token that it is minus itself."""
    tokens = choice.tokens
    return choice.reason is FinishReason.ERROR, sum(tokens) / len(tokens) if tokens else math.inf


def _draw_cache(draw: random.Random, num_prompt: int, *, pins: bool) -> pb.CacheControl | None:
    """What is said of the prefix cache: nothing in most requests."""
    cache = pb.CacheControl()
    if draw.random() < 0.2:
        cache.cache_salt = draw.choice(["", "salt"])
    if draw.random() < 0.15:
        cache.no_cache = True
    elif pins and draw.random() < 0.4:
        cache.pin_seconds = draw.choice([1, 2, 30])
        if draw.random() < 0.3:
            cache.pin_tokens = draw.randint(1, num_prompt)
    return cache if cache.ByteSize() else None


def _alone(prompt: list[int], sampling: SamplingParams, choice: int, stop: StopConditions) -> Expected:
    model, tokenizer = fake_folder()
    return undisturbed(
        prompt, sampling, choice, stop,
        model=true_token, tokenizer=tokenizer, vocab_size=model.vocab_size, eos=frozenset(model.eos_token_ids),
    )  # fmt: skip


def _common(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
