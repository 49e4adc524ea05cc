"""A Llama folder without Transformers: the same model, bit for bit. What is not Llama to the letter is left to it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.model_folder import read_model_folder
from executor.batch import InputBatch
from executor.kv_cache import KvCache, SlabFormat
from executor.llama import LlamaModel
from executor.llama_folder import FolderLlama, open_llama
from executor.native.library import native
from executor.paged_model import probe_layers
from executor.weights import load_model
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path)
    return tmp_path


def opened(folder: Path, dtype: str = "auto") -> FolderLlama | None:
    return open_llama(read_model_folder(folder), dtype)


def change_config(folder: Path, change: Change) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, change: Change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def logits(model: Any, needs: list[Any], dtype: torch.dtype) -> Tensor:
    """Of 20 tokens at once."""
    shapes = [layer.shape for layer in needs]
    slab = SlabFormat(dtype=dtype, packed=True)
    cache = KvCache(shapes, num_blocks=4, block_size=16, format=slab, device=torch.device("cpu"))
    forward = LlamaModel(native(), model, cache, needs, max_positions=64).forward
    each = np.arange(20)
    nothing = np.zeros(20, np.int64)
    batch = InputBatch(
        token_places=nothing, positions=each, slot_mapping=each, query_start_loc=np.array([0, 20]),
        seq_lens=np.array([20]), block_tables=np.array([[0, 1]], np.int32), num_decodes=0, logits_indices=each,
        sampled_slots=nothing, sampled_places=nothing, sampled_indices=nothing,
    )  # fmt: skip
    return forward(batch, torch.arange(20) % VOCAB_SIZE).clone()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_model_is_that_of_transformers(tmp_path: Path, dtype: str, tied: bool, bias: bool) -> None:
    save_tiny("llama", tmp_path, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    theirs = load_model(tmp_path, dtype=dtype, device=torch.device("cpu"))
    needs = probe_layers(theirs, VOCAB_SIZE)

    ours = opened(tmp_path, dtype)

    assert ours is not None
    assert ours.needs() == needs
    assert torch.equal(logits(ours, ours.needs(), ours.dtype), logits(theirs, needs, ours.dtype))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(architectures=["MistralForCausalLM"]),
        lambda config: config.update(model_type="mistral"),
        lambda config: config.update(hidden_act="gelu"),
        lambda config: config.update(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        lambda config: config.update(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        lambda config: config.update(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        lambda config: config.update(quantization_config={"quant_method": "awq"}),
        lambda config: config.update(attention_bias=True),
        lambda config: config.update(hidden_size="64"),
        lambda config: config.update(num_key_value_heads=3),
        lambda config: config.update(head_dim=16.0),
        lambda config: config.update(rms_norm_eps=None),
        lambda config: config.update(rope_parameters={"rope_type": "default", "rope_theta": None}),
        lambda config: config.update(dtype="float16"),
    ],
)
def test_what_the_configuration_says_beyond_that_is_left_to_transformers(folder: Path, change: Change) -> None:
    assert opened(folder) is not None

    change_config(folder, change)

    assert opened(folder) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop("model.norm.weight"),
        lambda weights: weights.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}),
        lambda weights: weights.update({"model.norm.weight": torch.ones(3)}),
        lambda weights: weights.update({"model.norm.weight": weights["model.norm.weight"].to(torch.int8)}),
    ],
)
def test_weights_that_do_not_fit_are_left_to_transformers(folder: Path, change: Change) -> None:
    change_weights(folder, change)

    assert opened(folder) is None


def test_the_default_model_is_served_without_importing_transformers(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from executor.model_runner import ModelRunner;"
        f"runner = ModelRunner(name='x', model_folder=Path({str(folder)!r}), num_blocks=8, max_sequences=2);"
        "runner.load(lambda *_: None); print('transformers' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert answer.stdout == "False\n"
