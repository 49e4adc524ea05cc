"""Drafts: guessed, computed along, and kept for as long as they are what is sampled. Streams never show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import erf, sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.config import ExecutorConfig
from common.errors import ModelFolderError
from common.sampling import SamplingParams
from common.step import NewSequence, Scored, StepPlan, StepResult
from common.types import BlockId, SlotRef, slot_of, slot_ref
from executor import devices
from executor.batch import build_batch
from executor.choosing import choose_run
from executor.controls import columns
from executor.model_runner import ModelRunner
from executor.proposers.ngram import lookup
from executor.resident import PlanError, Resident, Rows
from executor.runner import execute
from executor.sampler import keep, sample
from services.executor_process import make_runner
from tests.executor.tiny_models import VOCAB_SIZE

A, B = slot_ref(0, 0), slot_ref(1, 0)
PROMPT = [5, 9, 13, 21, 34, 55, 8]
NUM_NEW = 24
CONTROLS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"seed": 11},
    "cut": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 3},
    "typical": {"temperature": 1.3, "typical_p": 0.5, "seed": 4},
    "penalised": {"temperature": 0.0, "repetition_penalty": 1.5},
    "counted": {"seed": 5, "presence_penalty": 1.0, "frequency_penalty": 0.7},
    "ruled": {"seed": 6, "logit_bias": ((4, 2.0),), "banned_token_ids": (1, 2, 3), "bad_words": ((7, 8), (9,))},
    "scored": {"seed": 7, "logprobs": 3},
}


def silent(_stage: str, _done: int, _total: int) -> None: ...


class Scripted:
    """A proposer that knows the answer, and is wrong at every `wrong_at`-th token of it."""

    def __init__(self, held: Resident, answer: Sequence[int], *, wrong_at: int) -> None:
        self._held = held
        self._answer = answer
        self._wrong_at = wrong_at

    def begin_session(self) -> None: ...

    def begin_step(self, rows: Rows, copies: Sequence[tuple[BlockId, BlockId]]) -> None: ...

    def propose(self, slots: NDArray[np.int64], most: NDArray[np.int64]) -> list[list[int]]:
        guesses: list[list[int]] = []
        for slot, wanted in zip(slots.tolist(), most.tolist(), strict=True):
            first = int(self._held.num_tokens[slot] - self._held.num_prompt[slot])
            right = enumerate(self._answer[first : first + wanted], start=first)
            guesses.append([(token + (i % self._wrong_at == 0)) % VOCAB_SIZE for i, token in right])
        return guesses


class World:
    """A loaded runner and the number of the next step."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        defaults: dict[str, Any] = {"dtype": "float32", "block_size": 16, "num_blocks": 8, "max_sequences": 8}
        self.runner = ModelRunner(name="tiny", model_folder=folder, **{**defaults, **settings})
        self.facts = self.runner.load(silent)
        self.next_step = 0

    def step(self, *rows: tuple[SlotRef, int], **more: Any) -> StepResult:
        plan = StepPlan(step=self.next_step, refs=[r for r, _ in rows], num_scheduled=[n for _, n in rows], **more)
        self.next_step += 1
        return execute(self.runner, plan)

    def guess(self, answer: Sequence[int], *, wrong_at: int) -> None:
        self.runner._proposer = Scripted(self.runner._resident, answer, wrong_at=wrong_at)

    def alone(self, told: NewSequence, max_drafts: int = 0) -> tuple[list[int], list[Scored], int]:
        """One sequence in a session of its own, to its end: its tokens, their scores, and how many steps it took."""
        self.runner.begin_session()
        tokens: list[int] = []
        scored: list[Scored] = []
        new, count, steps = [told], len(told.token_ids), 0
        while len(tokens) < told.max_tokens:
            result = self.step((told.ref, count), new=new, max_drafts=[max_drafts] if max_drafts else ())
            if not result.refs:
                break
            assert list(result.indices) == list(range(len(tokens), len(tokens) + len(result.tokens)))
            tokens += result.tokens
            scored += result.scored
            new, count, steps = [], 1, steps + 1
        return tokens, scored, steps


@pytest.fixture(scope="module")
def world(folder: Path) -> World:
    return World(folder)


def sequence(ref: SlotRef = A, first_block: int = 1, **changes: Any) -> NewSequence:
    blocks = [BlockId(first_block + block) for block in range(3)]
    told = NewSequence(
        ref=ref,
        attempt=0,
        token_ids=PROMPT,
        num_prompt=len(PROMPT),
        num_computed=0,
        block_table=blocks,
        sampling=SamplingParams(temperature=0.0),
        choice=0,
        max_tokens=NUM_NEW,
        stop_token_ids=(),
    )
    return replace(told, **changes)


@pytest.mark.parametrize("name", CONTROLS)
def test_an_answer_is_the_same_with_drafts_whatever_it_asks_for(name: str, world: World) -> None:
    told = sequence(sampling=SamplingParams(**CONTROLS[name]))
    plain, scores, steps = world.alone(told)
    world.guess(plain, wrong_at=5)

    found, found_scores, found_steps = world.alone(told, max_drafts=4)

    assert (found, found_scores) == (plain, scores)
    assert found_steps < steps / 2


@pytest.mark.parametrize("wrong_at", [1, 2, 100])
def test_drafts_that_are_wrong_cost_steps_and_nothing_else(wrong_at: int, world: World) -> None:
    plain, _, _ = world.alone(sequence())
    world.guess(plain, wrong_at=wrong_at)

    found, _, steps = world.alone(sequence(), max_drafts=3)

    assert found == plain
    # a step brings as many tokens as drafts are right, and one more; the very first draft is wrong
    assert steps == {1: NUM_NEW, 2: NUM_NEW // 2 + 1, 100: NUM_NEW // 4 + 1}[wrong_at]


def test_a_stop_token_among_the_drafts_ends_the_answer_there(world: World) -> None:
    plain, _, _ = world.alone(sequence())
    stop = next(token for token in plain[4:] if plain.index(token) > 3)
    world.guess(plain, wrong_at=1000)

    found, _, _ = world.alone(sequence(stop_token_ids=(stop,)), max_drafts=8)

    assert found == plain[: plain.index(stop) + 1]


def test_drafts_never_go_beyond_max_tokens_and_the_room_of_a_sequence(folder: Path, world: World) -> None:
    plain, _, _ = world.alone(sequence())
    world.guess(plain, wrong_at=1000)
    assert world.alone(sequence(max_tokens=6), max_drafts=8)[0] == plain[:6]

    small = World(folder, max_model_len=12)
    small.guess(plain, wrong_at=1000)
    assert small.alone(sequence(block_table=[BlockId(0)]), max_drafts=4)[0] == plain[:5]


def test_the_first_result_tells_how_many_drafts_there_were(world: World) -> None:
    plain, _, _ = world.alone(sequence())
    world.guess(plain, wrong_at=3)  # the first draft is for output 1
    world.runner.begin_session()

    result = world.step((A, 7), new=[sequence()], max_drafts=[4])

    assert (list(result.refs), list(result.tokens)) == ([A] * 1, plain[:1])
    assert result.drafted == [(A, 4)]


def test_rows_with_and_without_drafts_share_a_step(world: World) -> None:
    sampled = SamplingParams(seed=9)
    plain, _, _ = world.alone(sequence())
    other, _, _ = world.alone(sequence(B, 4, sampling=sampled))
    world.guess(plain, wrong_at=4)
    world.runner.begin_session()
    found: dict[SlotRef, list[int]] = {A: [], B: []}

    def take(result: StepResult) -> None:
        for ref, token in zip(result.refs, result.tokens, strict=True):
            found[ref].append(token)

    take(world.step((A, 7), (B, 3), new=[sequence(), sequence(B, 4, sampling=sampled)], max_drafts=[3, 0]))
    take(world.step((B, 4), (A, 1), max_drafts=[0, 3]))
    take(world.step((A, 1), (B, 1), max_drafts=[3, 0]))
    take(world.step((B, 1), (A, 1)))

    assert found[A] == plain[: len(found[A])] and len(found[A]) > 6
    assert found[B] == other[:3]


def test_what_was_wrong_is_written_over(world: World) -> None:
    """Many wrong drafts, then a plain run over the same blocks: it reads nothing of them."""
    plain, _, _ = world.alone(sequence())
    world.guess(plain, wrong_at=1)
    assert world.alone(sequence(), max_drafts=8)[0] == plain


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"max_drafts": [1, 1]}, "1 rows, 2 numbers of drafts"),
        ({"max_drafts": [10], "blocks": 1}, "may carry 10 drafts behind position 7"),
        ({"max_drafts": [2], "count": 6}, "may carry 2 drafts behind position 6"),
        ({"max_drafts": [2], "num_candidates": 4}, "may carry 2 drafts behind position 7"),
        ({"max_drafts": [300]}, "in a step of at most 256"),
    ],
)
def test_a_plan_whose_drafts_do_not_fit_is_refused(world: World, plan: dict[str, Any], says: str) -> None:
    world.runner.begin_session()
    new = sequence()
    new = replace(
        new, block_table=new.block_table[: plan.get("blocks", 3)], num_candidates=plan.get("num_candidates", 0)
    )
    with pytest.raises(PlanError, match=says):
        world.step((A, plan.get("count", 7)), new=[new], max_drafts=plan["max_drafts"])


def test_a_runner_that_guesses_says_so(folder: Path, world: World) -> None:
    speculating = World(folder, speculate="ngram", max_drafts=5, step_overhead_tokens=9).facts

    assert (speculating.max_drafts, speculating.step_overhead_tokens) == (5, 9)
    assert world.facts.max_drafts == 0


def test_what_repeats_itself_is_guessed_from_itself(folder: Path, world: World) -> None:
    only = SamplingParams(temperature=0.0, allowed_token_ids=(40, 41))  # it soon repeats itself
    plain, _, _ = world.alone(sequence(sampling=only))
    found, _, steps = World(folder, speculate="ngram").alone(sequence(sampling=only), max_drafts=6)

    assert found == plain
    assert steps < NUM_NEW / 2


# ---- looking up


@pytest.mark.parametrize(
    ("tokens", "most", "guess"),
    [
        ([1, 2, 3, 4, 1, 2], 3, [3, 4, 1]),
        ([1, 2, 3, 4, 1, 2], 1, [3]),
        ([1, 2, 9, 1, 2, 8, 1, 2], 2, [8, 1]),  # the newest
        ([5, 1, 2, 9, 6, 1, 2, 8, 5, 1, 2], 2, [9, 6]),  # the longest before the newest
        ([7, 7, 7], 4, [7, 7, 7, 7]),
        ([1, 2, 3, 1, 2, 3, 1, 2], 5, [3, 1, 2, 3, 1]),  # on from its own beginning
        ([1, 2, 3, 2], 3, []),  # one token alone agrees everywhere
        ([1, 2, 3, 4], 3, []),
        ([4], 3, []),
    ],
)
def test_the_guess_is_what_followed_the_newest_tokens_before(tokens: list[int], most: int, guess: list[int]) -> None:
    assert lookup(np.array(tokens, np.int32), most) == guess


# ---- chances


def crowd(count: int, drafts: Sequence[int], sampling: SamplingParams) -> tuple[Resident, Any]:
    """So many sequences, each with a seed of its own and one draft; and the batch of the step that they are in."""
    held = Resident(
        num_blocks=count, block_size=4, max_sequences=count, max_step_tokens=4 * count, max_model_len=4, vocab_size=6
    )
    new = [
        sequence(slot_ref(n, 0), token_ids=[0], num_prompt=1, block_table=[BlockId(n)], max_tokens=3,
                 sampling=replace(sampling, seed=n))
        for n in range(count)
    ]  # fmt: skip
    refs = [told.ref for told in new]
    rows = held.apply(StepPlan(step=0, refs=refs, num_scheduled=[1] * count, new=new, max_drafts=[1] * count))
    return held, build_batch(held, held.draft(rows, [[draft] for draft in drafts]))


def chances(logits: NDArray[np.float32], sampling: SamplingParams) -> NDArray[np.float64]:
    """The distribution that a token is drawn from."""
    ids, weights = keep(
        logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p
    )
    whole = np.zeros(len(logits))
    whole[slice(None) if ids is None else ids] = weights
    shares: NDArray[np.float64] = whole / whole.sum()
    return shares


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.7, top_k=4, top_p=0.95)])
def test_tokens_behind_drafts_have_the_distribution_that_they_have_without(sampling: SamplingParams) -> None:
    count, vocab = 3000, 6
    draw = np.random.default_rng(1)
    first = draw.normal(0, 1.5, vocab).astype(np.float32)
    behind = draw.normal(0, 1.5, (vocab, vocab)).astype(np.float32)  # logits behind each first token
    drafts = draw.integers(0, vocab, count)  # as bad as guesses can be: right or wrong has nothing to do with the seed
    held, batch = crowd(count, drafts.tolist(), sampling)
    logits = np.concatenate((np.tile(first, (count, 1)), behind[drafts[batch.draft_rows]]))

    run = choose_run(logits, held, batch)

    tokens = np.array(run.first.tokens)
    seconds = {slot_of(ref): more for ref, more in run.more.items()}
    assert sorted(seconds) == np.flatnonzero(tokens == drafts).tolist()
    pairs = np.zeros((vocab, vocab))
    for slot, (second,) in seconds.items():
        pairs[tokens[slot], second] += 1
    assert surprise(np.bincount(tokens, minlength=vocab), chances(first, sampling)) < 0.999
    for token in range(vocab):
        if pairs[token].sum() >= 40:
            assert surprise(pairs[token], chances(behind[token], sampling)) < 0.999


def surprise(counts: NDArray[Any], expected: NDArray[np.float64]) -> float:
    """How surely the counts are not of this distribution: the chi-square test, by Wilson and Hilferty's formula."""
    possible = expected > 0
    assert not counts[~possible].any(), "a token that was cut was drawn"
    wanted = expected[possible] * counts.sum()
    statistic, freedom = ((counts[possible] - wanted) ** 2 / wanted).sum(), possible.sum() - 1
    cut = 2 / (9 * freedom)
    return 0.5 * (1 + erf(((statistic / freedom) ** (1 / 3) - 1 + cut) / sqrt(cut) / sqrt(2)))


def test_who_draws_the_same_random_numbers_guesses_better_than_by_chance() -> None:
    count, vocab = 2000, 6
    draw = np.random.default_rng(2)
    logits = np.tile(draw.normal(0, 1, vocab).astype(np.float32), (count, 1))
    almost = logits + draw.normal(0, 0.2, vocab).astype(np.float32)  # what a smaller model says
    held, batch = crowd(count, [0] * count, SamplingParams())
    same = columns(held, batch.sampled_slots, batch.sampled_indices)
    assert same is not None

    tokens = np.array(sample(logits.copy(), same).tokens)
    coupled = np.array(sample(almost.copy(), same).tokens)
    by_chance = np.array(sample(almost.copy(), replace(same, seed=same.seed + np.uint64(count))).tokens)

    assert (coupled == tokens).mean() > 0.85
    assert (by_chance == tokens).mean() < 0.5


def test_a_device_that_cannot_have_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "device_of", lambda _: torch.device("cuda"))
    folder: Any = SimpleNamespace(path=Path())
    with pytest.raises(ModelFolderError, match="speculation is for CPUs so far, not for cuda"):
        make_runner(ExecutorConfig(speculate="ngram"), folder, "gpu")
