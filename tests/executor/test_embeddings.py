"""Vectors of every forward against the last hidden state of Transformers' own model, however they are computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from common.model_folder import read_model_folder
from common.sampling import SamplingParams, StopConditions
from common.types import FinishReason
from executor.llama import LlamaModel
from executor.model_runner import ModelRunner
from scheduler.sequence import Sequence as CoreSequence
from scheduler.suspicion import End
from tests.executor.test_beams import Cluster, make_runner
from tests.executor.tiny_models import save_tiny

HIDDEN = 64
PROMPTS = [[5, 9, 13, 21, 34, 55, 8], [7], [5, 9, 13, 21, 34, 3, 4, 6, 11, 12, 60, 61, 62], [90, 2, 33, 40]]
GREEDY = SamplingParams(temperature=0.0)
LAST_TOKEN = {
    "word_embedding_dimension": HIDDEN,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_lasttoken": True,
}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def fused(qwen3: Path) -> ModelRunner:
    return make_fused(qwen3)


def make_fused(folder: Path, **settings: Any) -> ModelRunner:
    runner = make_runner(folder, block_size=16, **settings)  # a smaller one is none of the kernels'
    assert isinstance(runner._model, LlamaModel)
    return runner


@pytest.fixture(scope="module")
def truth(qwen3: Path) -> list[np.ndarray[Any, Any]]:
    return last_states(qwen3, PROMPTS)


def last_states(folder: Path, prompts: Sequence[Sequence[int]]) -> list[np.ndarray[Any, Any]]:
    """What sentence-transformers pools: the last token's state behind the last norm, by Transformers alone."""
    auto: Any = AutoModel
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).last_hidden_state[0, -1].numpy() for prompt in prompts]


def embed(cluster: Cluster, prompt: Sequence[int]) -> CoreSequence:
    stop = StopConditions(max_tokens=1, ignore_eos=True)
    [sequence] = cluster.scheduler.add(prompt, GREEDY, stop, 0, dimensions=HIDDEN)
    return sequence


def check(sequences: Sequence[CoreSequence], truth: Sequence[np.ndarray[Any, Any]]) -> None:
    for sequence, expected in zip(sequences, truth, strict=True):
        assert sequence.reason is FinishReason.EMBEDDED
        found = np.frombuffer(sequence.vector, "<f4")
        assert float(np.abs(found - expected).max() / np.abs(expected).max()) < 1e-4


@pytest.mark.parametrize("make", [make_fused, make_runner], ids=["fused", "Transformers' own"])
@pytest.mark.parametrize("most", [256, 3])
def test_vectors_are_the_last_hidden_states_of_transformers(
    qwen3: Path, truth: list[np.ndarray[Any, Any]], make: Callable[..., ModelRunner], most: int
) -> None:
    cluster = Cluster(make(qwen3, max_step_tokens=most))
    sequences = [embed(cluster, prompt) for prompt in PROMPTS]
    cluster.run()

    check(sequences, truth)


def test_rows_that_generate_beside_it_change_nothing_and_are_not_changed(
    fused: ModelRunner, truth: list[np.ndarray[Any, Any]]
) -> None:
    cluster = Cluster(fused)
    [alone] = cluster.ask(GREEDY, ignore_eos=True)
    cluster.run()
    alone_vector = embed(cluster, PROMPTS[2])
    cluster.run()

    cluster = Cluster(fused)
    [talks] = cluster.ask(GREEDY, ignore_eos=True)
    cluster.step()
    sequences = [embed(cluster, prompt) for prompt in PROMPTS]
    cluster.run()

    check(sequences, truth)
    assert talks.tokens == alone.tokens
    assert sequences[2].vector == alone_vector.vector  # bit for bit: the fused forward is the same in any company


def test_a_prefix_that_is_cached_is_not_computed_and_changes_no_vector(
    fused: ModelRunner, truth: list[np.ndarray[Any, Any]]
) -> None:
    cluster = Cluster(fused)
    first = embed(cluster, PROMPTS[0])
    cluster.run()
    again, longer = embed(cluster, PROMPTS[0]), embed(cluster, PROMPTS[2])
    cluster.run()

    check([first, again, longer], [truth[0], truth[0], truth[2]])
    assert (again.num_cached_prompt, longer.num_cached_prompt) == (6, 5)  # parts of a block are found, too


def test_what_a_lost_executor_had_begun_is_computed_by_another(
    fused: ModelRunner, qwen3: Path, truth: list[np.ndarray[Any, Any]]
) -> None:
    cluster = Cluster(make_fused(qwen3, max_step_tokens=3), fused)
    cluster.scheduler.leave(1)
    sequence = embed(cluster, PROMPTS[2])
    cluster.step()
    cluster.scheduler.lose(0, 0, End.LOST)
    del cluster.runners[0]
    fused.begin_session()
    cluster.scheduler.lose(1, 0, End.CLEAN)
    cluster.scheduler.join(1, fused.facts, 0)  # type: ignore[attr-defined]
    cluster.run()

    check([sequence], [truth[2]])


@pytest.mark.parametrize("make", [make_fused, make_runner], ids=["fused", "Transformers' own"])
def test_a_folder_without_an_output_matrix_makes_vectors_alone(
    tmp_path: Path, make: Callable[..., ModelRunner]
) -> None:
    auto: Any = AutoModel
    body = auto.from_pretrained(save_tiny("qwen3", tmp_path / "whole"), dtype=torch.float32)
    folder = tmp_path / "body"
    body.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(LAST_TOKEN))
    (folder / "modules.json").write_text(json.dumps(MODULES))
    assert not read_model_folder(folder).makes_text

    cluster = Cluster(make(folder))
    sequences = [embed(cluster, prompt) for prompt in PROMPTS]
    cluster.run()

    check(sequences, last_states(folder, PROMPTS))
