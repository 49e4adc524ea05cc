"""Beam search in the engine is Transformers': a scheduler and the runner that computes, against `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.sampling import BeamParams, EarlyStopping, SamplingParams, StopConditions
from common.types import SlotRef
from executor.model_runner import ModelRunner
from executor.ranking import Ranking, rank, to_logprobs
from executor.runner import execute
from scheduler.scheduler import Scheduler, SchedulerLimits
from scheduler.sequence import Sequence as CoreSequence
from scheduler.suspicion import End
from tests.executor.tiny_models import load_plain

PROMPT = [5, 9, 13, 21, 34, 55, 8]
ENDS = (2, 40, 41)
MAX_TOKENS = 14


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return load_plain(folder)


@pytest.fixture(scope="module")
def runner(folder: Path) -> ModelRunner:
    return make_runner(folder)


def make_runner(folder: Path, **settings: Any) -> ModelRunner:
    defaults: dict[str, Any] = {"dtype": "float32", "block_size": 4, "num_blocks": 64, "max_sequences": 16}
    made = ModelRunner(name="tiny", model_folder=folder, num_threads=1, **{**defaults, **settings})
    made.facts = made.load(lambda stage, done, total: None)  # type: ignore[attr-defined]
    return made


class Cluster:
    """A scheduler, and runners in this thread."""

    def __init__(self, *runners: ModelRunner) -> None:
        self.scheduler = Scheduler(SchedulerLimits(watermark=0.0), model="tiny", eos={2}, secret=b"test")
        self.runners: dict[int, ModelRunner] = {}
        for session, runner in enumerate(runners):
            runner.begin_session()
            self.scheduler.join(session, runner.facts, 0)  # type: ignore[attr-defined]
            self.runners[session] = runner

    def ask(self, sampling: SamplingParams, prompt: Sequence[int] = PROMPT, **stop: Any) -> list[CoreSequence]:
        conditions = StopConditions(**{"max_tokens": MAX_TOKENS, "stop_token_ids": ENDS[1:], **stop})
        width = sampling.beams.width if sampling.beams is not None else 1
        return self.scheduler.add(prompt, sampling, conditions, 0, choices=width)

    def step(self) -> bool:
        busy = False
        for session, runner in self.runners.items():
            plan = self.scheduler.schedule(session, 0)
            if plan is not None:
                self.scheduler.update(session, execute(runner, plan), 0)
                busy = True
            self.scheduler.check()
        return busy

    def run(self) -> None:
        while self.step():
            pass
        assert not self.scheduler.num_sequences


def transformers_answers(
    plain: Any, params: BeamParams, prompt: Sequence[int] = PROMPT, **controls: Any
) -> list[tuple[list[int], float]]:
    """What `generate` returns, the best first: tokens and score."""
    made = plain.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=params.width,
        num_return_sequences=params.width,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        eos_token_id=list(ENDS),
        pad_token_id=0,
        do_sample=False,
        max_new_tokens=MAX_TOKENS,
        output_scores=True,
        return_dict_in_generate=True,
        **controls,
    )
    found: list[tuple[list[int], float]] = []
    for sequence, score in zip(made.sequences.tolist(), made.sequences_scores.tolist(), strict=True):
        output = sequence[len(prompt) :]
        end = next((n for n, token in enumerate(output, start=1) if token in ENDS), MAX_TOKENS)
        found.append((output[:end], score))
    return found


def check(answers: list[CoreSequence], expected: list[tuple[list[int], float]]) -> None:
    assert [answer.tokens[answer.num_prompt :].tolist() for answer in answers] == [tokens for tokens, _ in expected]
    assert [answer.score for answer in answers] == pytest.approx([score for _, score in expected], abs=1e-4)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(("width", "length_penalty"), [(2, 1.0), (4, 0.0), (4, 2.0), (8, -1.0)])
def test_it_finds_what_transformers_finds(
    runner: ModelRunner, plain: Any, width: int, length_penalty: float, early_stopping: EarlyStopping
) -> None:
    params = BeamParams(width, length_penalty, early_stopping)
    cluster = Cluster(runner)
    answers = cluster.ask(SamplingParams(temperature=0.0, beams=params))
    cluster.run()

    check(answers, transformers_answers(plain, params))


CONTROLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "logit_bias": (
        {"logit_bias": ((2, 2.0), (7, -3.0), (40, 1.5))},
        {"sequence_bias": {(2,): 2.0, (7,): -3.0, (40,): 1.5}},
    ),
    "repetition_penalty": ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
    "bad_words": ({"bad_words": ((45,), (29, 80), (8, 61))}, {"bad_words_ids": [[45], [29, 80], [8, 61]]}),
    "banned_token_ids": ({"banned_token_ids": tuple(range(45, 97))}, {"suppress_tokens": list(range(45, 97))}),
    "min_tokens": ({"logit_bias": ((40, 4.0),)}, {"sequence_bias": {(40,): 4.0}, "min_new_tokens": 6}),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_change_what_it_adds_up_as_they_do_in_transformers(runner: ModelRunner, plain: Any, name: str) -> None:
    ours, theirs = CONTROLS[name]
    params = BeamParams(4)
    cluster = Cluster(runner)
    answers = cluster.ask(
        SamplingParams(temperature=0.0, beams=params, **ours), min_tokens=theirs.get("min_new_tokens", 0)
    )
    cluster.run()

    expected = transformers_answers(plain, params, **theirs)
    assert expected != transformers_answers(plain, params), "the control has an effect"
    check(answers, expected)


def test_log_probabilities_are_those_of_the_model_whatever_the_controls_make_of_them(
    runner: ModelRunner, plain: Any
) -> None:
    cluster = Cluster(runner)
    answers = cluster.ask(SamplingParams(temperature=0.0, beams=BeamParams(4), logprobs=2, repetition_penalty=1.8))
    cluster.run()

    for answer in answers:
        with torch.inference_mode():
            rows = plain(torch.tensor([answer.tokens.tolist()])).logits[0].log_softmax(-1)[answer.num_prompt - 1 :]
        assert len(answer.logprobs) == answer.num_output > 1
        for token, told, row in zip(answer.tokens[answer.num_prompt :], answer.logprobs, rows, strict=False):
            assert told.token == pytest.approx(float(row[token]), abs=1e-4)
            assert list(told.top_ids) == row.topk(2).indices.tolist()
            assert list(told.top) == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)


def test_nothing_changes_when_blocks_run_out_and_an_executor_is_lost(folder: Path, plain: Any) -> None:
    prompts = [[*PROMPT, own] for own in (11, 12, 13)]
    cluster = Cluster(*(make_runner(folder, num_blocks=36) for _ in range(2)))
    params = BeamParams(4, 1.0)
    asked = [cluster.ask(SamplingParams(temperature=0.0, beams=params), prompt) for prompt in prompts]
    other = cluster.ask(SamplingParams(temperature=0.0), max_tokens=40)
    for _ in range(8):
        cluster.step()
    cluster.scheduler.lose(0, 0, End.LOST)
    del cluster.runners[0]
    cluster.run()

    assert cluster.scheduler.counters.moved > 0
    assert len(other) == 1 and other[0].num_output > 0
    for prompt, answers in zip(prompts, asked, strict=True):
        check(answers, transformers_answers(plain, params, prompt))


def test_the_likeliest_are_ranked_and_what_is_ruled_out_is_not() -> None:
    row = np.array([1.0, 3.0, -np.inf, 3.0, 2.0], np.float32)
    assert to_logprobs(row)

    found = rank(row, Ranking(0, SlotRef(9), 3, 3, -1))

    expected = torch.tensor([1.0, 3.0, -torch.inf, 3.0, 2.0]).log_softmax(0)
    assert (found.ref, found.output_index, list(found.token_ids)) == (9, 3, [1, 3, 4])
    assert list(found.logprobs) == pytest.approx(expected[[1, 3, 4]].tolist(), abs=1e-6)
    assert list(rank(row, Ranking(0, SlotRef(9), 3, 9, -1)).token_ids) == [1, 3, 4, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_not_ranked(value: float) -> None:
    assert not to_logprobs(np.array([1.0, value], np.float32))
