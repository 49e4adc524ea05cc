"""The choosing of a beam search against Transformers' own, over the logits of a tiny model."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.sampling import BeamParams, EarlyStopping
from scheduler.beam_search import BeamSearch, Hypothesis, num_kept

VOCAB_SIZE, PROMPT = 24, [3, 5, 7]
NO_ENDS, ONE_END, MANY_ENDS = (), (2,), (2, 9, 13)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    auto: Any = AutoModelForCausalLM
    return auto.from_config(config, dtype=torch.float32).eval()


def set_weights(model: Any, seed: int) -> None:
    """Other logits, and clearly different ones."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3, generator=generator)


def transformers_answers(
    model: Any, params: BeamParams, ends: tuple[int, ...], max_tokens: int
) -> list[tuple[list[int], float]]:
    """What `generate` returns, the best first: tokens and score."""
    made = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        num_beams=params.width,
        num_return_sequences=params.width,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        eos_token_id=list(ends) or [VOCAB_SIZE],  # which none is; None would be the model's own
        pad_token_id=0,
        do_sample=False,
        max_new_tokens=max_tokens,
        output_scores=True,
        return_dict_in_generate=True,
    )
    found: list[tuple[list[int], float]] = []
    for sequence, score in zip(made.sequences.tolist(), made.sequences_scores.tolist(), strict=True):
        output = sequence[len(PROMPT) :]
        end = next((n for n, token in enumerate(output, start=1) if token in ends), max_tokens)
        found.append((output[:end], score))
    return found


def our_answers(model: Any, params: BeamParams, ends: tuple[int, ...], max_tokens: int) -> list[Hypothesis]:
    search = BeamSearch(params, num_ends=len(ends), max_tokens=max_tokens)
    beams = [array("I")]
    while beams:
        with torch.inference_mode():
            logits = model(torch.tensor([[*PROMPT, *beam] for beam in beams])).logits[:, -1]
        best = logits.log_softmax(-1).topk(min(search.num_kept, VOCAB_SIZE))
        ranked = [
            list(zip(ids, values, strict=True))
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        going_on = search.choose(ranked, beams, lambda _, token: token in ends)
        beams = [beams[each.parent] + array("I", [each.token]) for each in going_on]
    return search.answers


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_it_finds_what_transformers_finds_with_the_same_scores(
    model: Any, width: int, length_penalty: float, early_stopping: EarlyStopping
) -> None:
    params = BeamParams(width, length_penalty, early_stopping)
    for seed, ends, max_tokens in ((3, ONE_END, 12), (2, MANY_ENDS, 9)):
        set_weights(model, seed)

        found = our_answers(model, params, ends, max_tokens)

        expected = transformers_answers(model, params, ends, max_tokens)
        assert [each.tokens.tolist() for each in found] == [tokens for tokens, _ in expected]
        assert [each.score for each in found] == pytest.approx([score for _, score in expected], rel=1e-5)


def test_without_an_end_it_finds_the_best_of_full_length(model: Any) -> None:
    set_weights(model, 0)
    found = our_answers(model, BeamParams(4), NO_ENDS, 4)

    assert [each.tokens.tolist() for each in found] == [
        tokens for tokens, _ in transformers_answers(model, BeamParams(4), NO_ENDS, 4)
    ]


def test_the_cases_are_different(model: Any) -> None:
    """Else the comparison would show less than it seems to."""
    set_weights(model, 2)
    found = {
        str([each.tokens for each in our_answers(model, BeamParams(4, length_penalty, early_stopping), MANY_ENDS, 9)])
        for length_penalty in (-1.0, 0.0, 1.0, 2.0)
        for early_stopping in (False, True, "never")
    }

    assert len(found) == 5


def answers(rows: list[list[tuple[int, float]]], width: int, **changes: Any) -> list[Hypothesis]:
    """A search whose every beam has these continuations; token 0 ends."""
    search = BeamSearch(BeamParams(width, **changes), num_ends=1, max_tokens=len(rows))
    beams = [array("I")]
    for row in rows:
        going_on = search.choose([row] * len(beams), beams, lambda _, token: token == 0)
        beams = [beams[each.parent] + array("I", [each.token]) for each in going_on]
        if not beams:
            break
    return search.answers


def test_where_less_can_be_said_there_are_fewer_beams_and_fewer_answers() -> None:
    found = answers([[(5, -1.0)], [(5, -1.0), (0, -2.0)], [(0, -1.0)]], 4, length_penalty=0.0)

    assert [(each.tokens.tolist(), each.score) for each in found] == [([5, 0], -3.0), ([5, 5, 0], -3.0)]


def test_nothing_can_be_said() -> None:
    assert answers([[], []], 2) == []


def test_of_equals_the_first_beam_goes_on() -> None:
    found = answers([[(1, -1.0), (2, -1.0), (3, -1.0)], [(4, -1.0)]], 2)

    assert [each.tokens.tolist() for each in found] == [[1, 4], [2, 4]]


def test_as_many_continuations_are_looked_at_as_leave_enough_that_go_on() -> None:
    assert (num_kept(4, 0), num_kept(4, 1), num_kept(4, 3)) == (8, 8, 16)
