"""Threads that lose their core: what they do late, when others have done it for them, changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.model_folder import read_model_folder
from executor.batch import InputBatch
from executor.kv_cache import KvCache, SlabFormat
from executor.llama import LlamaModel
from executor.llama_folder import open_llama
from executor.native.library import INT4, INT8, native
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny

BEFORE = 300  # tokens of each row in the cache: three stretches of attention
BLOCKS = -(-(BEFORE + 1) // 16)
KINDS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("bfloat16", INT8),
    "int4": ("bfloat16", INT4),
}


@pytest.fixture
def two_threads() -> Iterator[None]:
    native().use_threads(2)
    yield
    native().rehearse(on=False)
    native().use_threads(1)


def step(rows: int, start: int, count: int) -> InputBatch:
    """So many tokens of each row, from `start` on."""
    positions = np.tile(np.arange(start, start + count), rows)
    tables = np.arange(rows * BLOCKS, dtype=np.int32).reshape(rows, BLOCKS)
    slots = np.repeat(np.arange(rows) * BLOCKS * 16, count) + positions
    unused = np.zeros(rows, np.int64)
    return InputBatch(
        token_places=positions, positions=positions, slot_mapping=slots, query_start_loc=np.arange(rows + 1) * count,
        seq_lens=np.full(rows, start + count), block_tables=tables, num_decodes=rows if count == 1 else 0,
        logits_indices=np.arange(1, rows + 1) * count - 1, sampled_slots=unused, sampled_places=unused,
        sampled_indices=unused,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3])
def test_work_that_is_done_twice_gives_the_same_bits(tmp_path: Path, two_threads: None, kind: str, rows: int) -> None:
    dtype, weights = KINDS[kind]
    model = open_llama(read_model_folder(save_tiny("llama", tmp_path)), dtype)
    assert model is not None
    shapes = [layer.shape for layer in model.needs()]
    cache = KvCache(
        shapes, num_blocks=rows * BLOCKS, block_size=16, format=SlabFormat(dtype=model.dtype, packed=True),
        device=model.device,
    )  # fmt: skip
    forward = LlamaModel(native(), model, cache, model.needs(), max_positions=512, kind=weights).forward
    tokens = torch.arange(rows * BEFORE) * 7 % VOCAB_SIZE
    forward(step(rows, 0, BEFORE), tokens)

    def decode() -> Tensor:
        return forward(step(rows, BEFORE, 1), tokens[:rows]).clone()

    wanted = decode()
    native().rehearse(on=True)

    for _ in range(300):
        assert torch.equal(decode(), wanted)
