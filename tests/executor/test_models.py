"""Architectures through the paged forward: the logits of Transformers' own forward, and its greedy tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.sampling import SamplingParams
from common.step import NewSequence, StepPlan
from common.types import BlockId, SlotRef, slot_ref
from executor.attention import choose
from executor.attention.protocol import AttentionBackend, AttentionStep, LayerNeeds, LayerOptions
from executor.attention.reference import ReferenceAttention
from executor.batch import build_batch
from executor.kv_cache import KvCache, LayerCache, SlabFormat
from executor.model_runner import ModelRunner
from executor.paged_model import PagedModel, probe_layers
from executor.resident import Resident
from executor.runner import execute
from executor.swap import swap
from executor.weights import load_model
from tests.executor.tiny_models import TINY, VOCAB_SIZE, load_plain, save_tiny

CPU = torch.device("cpu")
BLOCK_SIZE = 16
LENGTHS = (30, 17, 23)  # all longer than the sliding windows
GRANTS = ((5, 1, 1, 9, 1, 13), (17,), (8, 8, 1, 1, 5))  # chunks, a whole prompt, decodes: mixed in every step
GREEDY = SamplingParams(temperature=0.0)


def sequence(ref: SlotRef, tokens: list[int], blocks: list[int], max_tokens: int = 12) -> NewSequence:
    return NewSequence(
        ref=ref,
        attempt=0,
        token_ids=tokens,
        num_prompt=len(tokens),
        num_computed=0,
        block_table=[BlockId(block) for block in blocks],
        sampling=GREEDY,
        choice=0,
        max_tokens=max_tokens,
        stop_token_ids=(),
    )


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    random = np.random.default_rng(3)
    return [[int(token) for token in random.integers(3, VOCAB_SIZE, length)] for length in lengths]


def tables(lengths: tuple[int, ...], num_blocks: int) -> list[list[int]]:
    """Blocks for each length, none neighbours, none ascending."""
    names = [int(block) for block in np.random.default_rng(5).permutation(num_blocks)]
    return [[names.pop() for _ in range(-(-length // BLOCK_SIZE))] for length in lengths]


def paged_logits(folder: Path, backend: AttentionBackend | None = None) -> list[Tensor]:
    """The logits of every position of every prompt, computed in chunks over a slab whose free blocks are NaN.

    As on a CPU, with the kernels' modules and attention; or with the model's own modules and `backend`, as on a GPU.
    """
    model = load_model(folder, dtype="float32", device=CPU)
    if backend is None:
        swap(model)
    needs = [replace(layer, block_size=BLOCK_SIZE) for layer in probe_layers(model, VOCAB_SIZE)]
    backends = [backend] * len(needs) if backend else choose(needs)
    slab = SlabFormat(dtype=torch.float32, packed=backends[0].packed)
    cache = KvCache([n.shape for n in needs], num_blocks=40, block_size=BLOCK_SIZE, format=slab, device=CPU)
    for layer in cache.layers:
        for which in (layer.keys, layer.values):
            which.fill_(255 if slab.packed else torch.nan)  # all bits set is NaN too
    paged = PagedModel(model, cache, backends)
    held = Resident(
        num_blocks=40,
        block_size=BLOCK_SIZE,
        max_sequences=3,
        max_step_tokens=99,
        max_model_len=64,
        vocab_size=VOCAB_SIZE,
    )
    logits: list[list[Tensor]] = [[], [], []]
    refs = [slot_ref(row, 0) for row in range(3)]
    new = [sequence(*told) for told in zip(refs, prompts(LENGTHS), tables(LENGTHS, 40), strict=True)]
    for step in range(max(len(grants) for grants in GRANTS)):
        running = [row for row in range(3) if step < len(GRANTS[row])]
        plan = StepPlan(
            step=step,
            refs=[refs[row] for row in running],
            num_scheduled=[GRANTS[row][step] for row in running],
            new=new if step == 0 else (),
        )
        rows = held.apply(plan)
        batch = build_batch(held, rows)
        every = replace(batch, logits_indices=np.arange(len(batch.positions)))
        tokens = torch.from_numpy(held.token_ids).view(-1)[torch.from_numpy(batch.token_places)].long()
        for place, row_logits in zip(batch.token_places.tolist(), paged.forward(every, tokens), strict=True):
            logits[place // held.max_model_len].append(row_logits)
        held.advance(rows, [0] * int(rows.samples.sum()))
    return [torch.stack(row) for row in logits]


def plain_logits(model: Any) -> list[Tensor]:
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0] for prompt in prompts(LENGTHS)]


def worst_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference relative to the largest logit."""
    return max(float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", TINY)
def test_paged_logits_and_greedy_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path)

    plain = load_plain(folder)

    assert worst_error(paged_logits(folder), plain_logits(plain)) < 1e-4
    assert greedy_tokens(folder, prompts((19, 4))) == [plain_greedy(plain, prompt) for prompt in prompts((19, 4))]


def greedy_tokens(folder: Path, starts: list[list[int]]) -> list[list[int]]:
    runner = ModelRunner(
        name="tiny", model_folder=folder, dtype="float32", block_size=BLOCK_SIZE, num_blocks=16, max_sequences=2
    )
    runner.load(lambda _stage, _done, _total: None)
    runner.begin_session()
    refs = [slot_ref(row, 0) for row in range(len(starts))]
    blocks = tables(tuple(len(start) + 12 for start in starts), 16)
    new = [sequence(*told) for told in zip(refs, starts, blocks, strict=True)]
    tokens: dict[SlotRef, list[int]] = {ref: [] for ref in refs}
    plans = [
        StepPlan(step=0, refs=refs[:1], num_scheduled=[7], new=new[:1]),
        StepPlan(step=1, refs=refs, num_scheduled=[len(starts[0]) - 7, len(starts[1])], new=new[1:]),
        *(StepPlan(step=step, refs=refs, num_scheduled=[1, 1]) for step in range(2, 13)),
    ]
    for plan in plans:
        result = execute(runner, plan)
        assert list(result.failed) == []
        for ref, token in zip(result.refs, result.tokens, strict=True):
            tokens[ref].append(token)
    return list(tokens.values())


def plain_greedy(model: Any, prompt: list[int]) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=None,
    )
    return [int(token) for token in out[0, len(prompt) :]]


class Without(ReferenceAttention):
    """The reference, deaf to one option."""

    def __init__(self, option: str) -> None:
        self._dropped: dict[str, Any] = {option: None}

    def why_not(self, layer: LayerNeeds, /) -> str | None:
        return None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, step: AttentionStep, options: LayerOptions
    ) -> Tensor:
        return super().attend(query, key, value, cache, step, replace(options, **self._dropped))


@pytest.mark.parametrize(
    ("kind", "option"),
    [("mistral", "window"), ("gemma3_text", "window"), ("gemma2", "softcap"), ("gpt_oss", "sinks")],
)
def test_the_comparison_notices_when_an_option_is_dropped(kind: str, option: str, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path)
    plain = plain_logits(load_plain(folder))

    assert worst_error(paged_logits(folder, ReferenceAttention()), plain) < 1e-4
    assert worst_error(paged_logits(folder, Without(option)), plain) > 1e-3
