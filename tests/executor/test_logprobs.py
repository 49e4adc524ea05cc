"""Log-probabilities are Transformers', of the model's own logits, however the work is cut and whatever is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.sampling import SamplingParams
from common.step import Scored
from common.types import slot_ref
from executor import scoring
from executor.logprobs import score
from tests.executor.test_model_runner import PROMPT, World, sequence
from tests.executor.tiny_models import VOCAB_SIZE, load_plain, save_tiny

A, B, C = (slot_ref(slot, 0) for slot in range(3))
SCORED = SamplingParams(temperature=0.0, logprobs=3, prompt_logprobs=2)


@pytest.fixture(scope="module", params=["llama", "gpt2"])  # fused, and Transformers' own forward
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind: str = request.param
    return save_tiny(kind, tmp_path_factory.mktemp(kind))


def transformers_logprobs(folder: Path, tokens: list[int]) -> torch.Tensor:
    """(tokens, vocabulary): of what comes behind each token."""
    with torch.inference_mode():
        logits: torch.Tensor = load_plain(folder)(torch.tensor([tokens])).logits[0]
    return logits.log_softmax(-1)


def check(scored: list[Scored], expected: torch.Tensor, tokens: list[int], num_top: int) -> None:
    """Every one is what Transformers says of that position."""
    for _, position, told in scored:
        row = expected[position - 1]
        assert told.token == pytest.approx(float(row[tokens[position]]), abs=1e-4)
        top = row.topk(num_top)
        assert list(told.top_ids) == top.indices.tolist()
        assert list(told.top) == pytest.approx(top.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("chunks", [[7], [3, 4], [1, 1, 2, 3]], ids=str)
def test_prompt_and_output_are_scored_as_transformers_does(folder: Path, chunks: list[int]) -> None:
    world = World(folder)
    scored: list[Scored] = []
    tokens = [*PROMPT]
    for n, count in enumerate(chunks):
        new = [sequence(A, PROMPT, [3, 9, 4], sampling=SCORED)] if n == 0 else []
        result = world.step((A, count), new=new)
        scored += result.scored
        tokens += result.tokens
    for _ in range(3):
        result = world.step((A, 1))
        scored += result.scored
        tokens += result.tokens

    expected = transformers_logprobs(folder, tokens)
    prompt = [each for each in scored if each.position < len(PROMPT)]
    output = [each for each in scored if each.position >= len(PROMPT)]
    assert [each.position for each in prompt] == list(range(1, len(PROMPT)))
    assert [each.position for each in output] == list(range(len(PROMPT), len(tokens)))
    check(prompt, expected, tokens, 2)
    check(output, expected, tokens, 3)


def test_what_is_asked_of_the_sampler_changes_no_score(folder: Path) -> None:
    world = World(folder)
    (first,) = world.step((A, 7), new=[sequence(A, PROMPT, [3, 9], sampling=SCORED)]).tokens
    asked = replace(SCORED, temperature=3.0, repetition_penalty=2.0, banned_token_ids=(first,), seed=1)
    world.runner.begin_session()

    result = world.step((A, 7), new=[sequence(A, PROMPT, [3, 9], sampling=asked)])

    (token,) = result.tokens
    expected = transformers_logprobs(folder, PROMPT)[-1]
    told = result.scored[0].logprobs
    assert token != first and first in told.top_ids
    assert told.token == pytest.approx(float(expected[token]), abs=1e-4)


def test_only_who_asks_is_scored_in_a_batch(folder: Path) -> None:
    world = World(folder)
    rows = [
        sequence(A, PROMPT, [3, 9], sampling=SamplingParams(temperature=0.0)),
        sequence(B, PROMPT[1:], [4, 5], sampling=replace(SCORED, prompt_logprobs=None, logprobs=0)),
        sequence(C, PROMPT[2:], [6, 7], sampling=replace(SCORED, logprobs=None)),
    ]

    result = world.step((A, 7), (B, 6), (C, 5), new=rows)

    assert [(each.ref, each.position) for each in result.scored] == [(B, 6), (C, 1), (C, 2), (C, 3), (C, 4)]
    assert result.scored[0].logprobs.top == ()
    alone = World(folder)
    assert alone.step((A, 7), new=rows[:1]).tokens == result.tokens[:1]


@given(
    values=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=200),
    at=st.integers(0, 199),
    num_top=st.integers(0, 20),
)
def test_a_score_is_the_log_softmax_and_the_lower_id_goes_first_among_equals(
    values: list[float], at: int, num_top: int
) -> None:
    token = at % len(values)
    expected = torch.tensor(values, dtype=torch.float64).log_softmax(0).tolist()

    told = score(np.array(values, np.float32), token, num_top)

    best = sorted(range(len(values)), key=lambda id: (-values[id], id))[:num_top]
    assert told.token == pytest.approx(expected[token], abs=1e-5)
    assert list(told.top_ids) == best
    assert list(told.top) == pytest.approx([expected[id] for id in best], abs=1e-5)


def test_a_token_that_cannot_be_is_minus_infinity() -> None:
    logits = np.zeros(VOCAB_SIZE, np.float32)
    logits[3] = -np.inf

    assert score(logits, 3, 0).token == -np.inf


def test_rows_that_are_scored_on_their_device_are_scored_as_on_the_host() -> None:
    logits = torch.randn(7, 500, generator=torch.Generator().manual_seed(3)) * 4
    tokens, num_top = np.arange(7, dtype=np.int32) * 31, np.array([0, 1, 5, 20, 0, 500, 600])

    there = scoring._score_there(logits, tokens, num_top)

    for found, wanted in zip(there, scoring._score_here(logits, tokens, num_top), strict=True):
        assert found.top_ids == wanted.top_ids
        assert found.token == pytest.approx(wanted.token, abs=1e-4)
        assert found.top == pytest.approx(wanted.top, abs=1e-4)
