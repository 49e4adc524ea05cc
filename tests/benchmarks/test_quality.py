"""Fewer bits, judged by what the default model makes of a text; and the instruments of that judgement."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from executor.weights import load_model
from tests.benchmarks.quality import (
    BFLOAT16,
    CPU,
    FLOAT32,
    INT4_WEIGHTS,
    INT8_WEIGHTS,
    TEXT,
    Quality,
    Reader,
    compare,
    mix_inputs,
    table,
)
from tests.executor.tiny_models import load_plain, save_tiny

TOKENS = [5, 9, 13, 21, 34, 55, 8, 2] * 40  # longer than a step


def test_eight_and_four_bits_read_a_text_nearly_as_bfloat16_does(default_model: Path) -> None:
    tokens = Tokenizer.from_file(str(default_model / "tokenizer.json")).encode(TEXT.read_text(encoding="utf-8")).ids

    first, *others = compare(default_model, tokens[:321], [BFLOAT16, INT8_WEIGHTS, INT4_WEIGHTS])

    assert 28 < first.perplexity < 40
    for each in others:  # this model's weights were 4 bits before: see the README
        assert abs(each.perplexity / first.perplexity - 1) < 0.01, each
        assert each.agreement > 0.9, each
        assert each.divergence < 0.01, each


def test_the_figures_are_those_of_their_definitions(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, max_position_embeddings=512)
    with torch.inference_mode():
        logits = load_plain(folder)(torch.tensor([TOKENS[:-1]])).logits[0]
    surprise = torch.nn.functional.cross_entropy(logits, torch.tensor(TOKENS[1:]))

    mine, same, rounded = compare(folder, TOKENS, [FLOAT32, FLOAT32, BFLOAT16])

    assert mine.perplexity == pytest.approx(math.exp(surprise), rel=1e-4)
    assert same == mine
    assert (same.agreement, same.divergence, same.logit_error) == (1, 0, 0)
    assert 0 < rounded.divergence < 1e-3
    assert 1e-4 < rounded.logit_error < 3e-2


def test_a_model_of_another_family_is_read_too(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path, n_positions=512, max_position_embeddings=512)

    _, fewer = compare(folder, TOKENS, [FLOAT32, INT8_WEIGHTS])

    assert 0 < fewer.divergence < 0.01


def test_mixing_inputs_changes_the_weights_and_not_the_answers(tmp_path: Path) -> None:
    model: Any = load_model(save_tiny("llama", tmp_path), dtype="float32", device=CPU)
    before = model.model.layers[1].mlp.down_proj.weight.clone()
    plain = Reader(tmp_path, FLOAT32, 64).read(TOKENS[:64])

    mixed = Reader(tmp_path, replace(FLOAT32, mixes=True), 64).read(TOKENS[:64])
    mix_inputs(model)

    torch.testing.assert_close(mixed, plain, rtol=1e-4, atol=1e-4)
    assert not torch.equal(model.model.layers[1].mlp.down_proj.weight, before)


def test_the_table_compares_with_the_first() -> None:
    def row(name: str, perplexity: float) -> Quality:
        return Quality(name=name, perplexity=perplexity, agreement=0.5, divergence=0.25, logit_error=0.125)

    lines = table([row("whole", 20), row("half", 25)]).splitlines()

    assert "against whole" in lines[0]
    assert lines[-1] == "| half | 25.000 | +25.00% | 50.0% | 0.25000 | 0.1250 |"
