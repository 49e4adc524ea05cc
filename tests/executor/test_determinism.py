"""Which executors promise to compute the same bits, and that the promise has another name where they would not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.determinism import determinism_class, is_determinism_class
from executor.fake_runner import FakeRunner, prefix_hash_token
from executor.model_runner import ModelRunner
from executor.native.library import native
from tests.executor.tiny_models import save_tiny


def class_of(folder: Path, **settings: Any) -> str:
    defaults: dict[str, Any] = {"dtype": "float32", "num_blocks": 16, "max_sequences": 2}
    runner = ModelRunner(name="tiny", model_folder=folder, **{**defaults, **settings})
    return runner.load(lambda stage, done, total: None).determinism


def test_the_fused_forward_has_a_class_and_it_is_the_same_at_every_start(folder: Path) -> None:
    first = class_of(folder)

    assert first and is_determinism_class(first)
    assert class_of(folder) == first


def test_how_many_threads_blocks_or_sequences_there_are_changes_no_bit_and_no_class(folder: Path) -> None:
    try:
        assert class_of(folder, num_blocks=32, max_sequences=4, max_step_tokens=64, num_threads=1) == class_of(folder)
    finally:
        native().use_threads(torch.get_num_threads())


@pytest.mark.parametrize(
    "settings",
    [{"dtype": "bfloat16"}, {"weights": "int8"}, {"weights": "int4"}, {"kv_cache_dtype": "int8"}, {"block_size": 32}],
    ids=str,
)
def test_other_formats_are_another_class(settings: dict[str, Any], folder: Path) -> None:
    assert class_of(folder, **settings) not in ("", class_of(folder))


def test_another_instruction_set_is_another_class(folder: Path) -> None:
    found = native().isa
    before = class_of(folder)
    native().use_isa("baseline")
    try:
        assert class_of(folder) not in ("", before)
    finally:
        native().use_isa(found)


def test_weights_of_the_same_shapes_and_other_values_are_another_class(folder: Path, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path)
    file = other / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})

    assert class_of(other) not in ("", class_of(folder))


@pytest.mark.parametrize(
    "settings", [{"attention_backend": "torch"}, {"attention_backend": "reference"}, {"block_size": 4}], ids=str
)
def test_what_torch_computes_promises_nothing(settings: dict[str, Any], folder: Path) -> None:
    assert class_of(folder, **settings) == ""


def test_a_model_of_another_family_promises_nothing(tmp_path: Path) -> None:
    assert class_of(save_tiny("gemma", tmp_path)) == ""


def test_fake_executors_promise_the_tokens_of_their_model() -> None:
    def class_of(runner: FakeRunner) -> str:
        return runner.load(lambda stage, done, total: None).determinism

    assert class_of(FakeRunner(name="a")) == class_of(FakeRunner(name="b", num_blocks=9)) != ""
    assert class_of(FakeRunner()) != class_of(FakeRunner(next_token=prefix_hash_token))


def test_the_parts_of_a_class_cannot_be_moved_into_each_other() -> None:
    assert determinism_class("ab", "c") != determinism_class("a", "bc")
    assert not is_determinism_class("0123456789ABCDEF")
    assert not is_determinism_class("0123456789abcdef\n")
