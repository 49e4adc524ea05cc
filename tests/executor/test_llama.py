"""The fused forward of the Llama family against Transformers' own, on every instruction set of this machine."""

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
from common.types import BlockId, slot_ref
from executor.attention import choose
from executor.batch import InputBatch, build_batch
from executor.kv_cache import KvCache, SlabFormat
from executor.llama import LlamaModel, why_not
from executor.native.library import INT4, INT8, native
from executor.paged_model import probe_layers
from executor.resident import Resident
from executor.weights import load_model
from tests.executor.tiny_models import VOCAB_SIZE, load_plain, save_tiny

CPU = torch.device("cpu")
FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "llama with scaled rotary embedding": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama of one KV head": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16}),
    "llama with its own output matrix": ("llama", {"tie_word_embeddings": False}),
    "mistral in a window": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "smollm3, some layers without positions": ("smollm3", {"no_rope_layers": [1, 0]}),
}
PROMPTS = [[5, 9, 13, 21, 34, 55, 8] * 6, [7, 3, 11] * 7, [40, 41, 42, 43, 44]]


class Steps:
    """A model over a slab of noise, and the plans that it is given."""

    def __init__(
        self, folder: Path, *, dtype: str = "float32", kv: torch.dtype | None = None, kind: int | None = None
    ) -> None:
        model = load_model(folder, dtype=dtype, device=CPU)
        assert why_not(model, kind) is None
        needs = probe_layers(model, VOCAB_SIZE)
        assert all(backend.packed for backend in choose(needs))
        slab = SlabFormat(dtype=kv or model.dtype, packed=True)
        cache = KvCache([each.shape for each in needs], num_blocks=16, block_size=16, format=slab, device=CPU)
        for layer in cache.layers:
            layer.keys.fill_(255)  # NaN, whatever the dtype
            layer.values.fill_(255)
        self.model = LlamaModel(native(), model, cache, needs, max_positions=128, kind=kind)
        self.resident = Resident(
            num_blocks=16, block_size=16, max_sequences=4, max_step_tokens=99, max_model_len=128, vocab_size=VOCAB_SIZE
        )
        self.blocks = iter(np.random.default_rng(5).permutation(16).tolist())

    def run(self, step: int, rows: dict[int, int], new: list[int]) -> list[tuple[int, int, Tensor]]:
        """Compute so many tokens of each row; return (row, position, logits) of every token."""
        plan = StepPlan(
            step=step,
            refs=[slot_ref(row, 0) for row in rows],
            num_scheduled=list(rows.values()),
            new=[self._admission(row) for row in new],
        )
        ran = self.resident.apply(plan)
        batch = build_batch(self.resident, ran)
        every: InputBatch = replace(batch, logits_indices=np.arange(len(batch.positions)))
        tokens = torch.from_numpy(self.resident.token_ids).view(-1)[torch.from_numpy(batch.token_places)].long()
        logits = self.model.forward(every, tokens).clone()
        self.resident.advance(ran, [0] * int(ran.samples.sum()))
        return [
            (place // 128, place % 128, row) for place, row in zip(batch.token_places.tolist(), logits, strict=True)
        ]

    def _admission(self, row: int) -> NewSequence:
        tokens = PROMPTS[row]
        return NewSequence(
            ref=slot_ref(row, 0),
            attempt=0,
            token_ids=tokens,
            num_prompt=len(tokens),
            num_computed=0,
            block_table=[BlockId(next(self.blocks)) for _ in range(-(-len(tokens) // 16))],
            sampling=SamplingParams(),
            choice=0,
            max_tokens=5,
            stop_token_ids=(),
        )


def mixed(steps: Steps) -> list[Tensor]:
    """Logits of every prompt, computed in chunks, whole, and token by token, in company."""
    found: dict[tuple[int, int], Tensor] = {}
    for number, (rows, new) in enumerate(
        [({0: 17, 1: 1}, [0, 1]), ({0: 20, 1: 1, 2: 5}, [2]), ({0: 1, 1: 18}, []), ({0: 4, 1: 1}, [])]
    ):
        found |= {(row, position): logits for row, position, logits in steps.run(number, rows, new)}
    return [torch.stack([found[row, position] for position in range(len(p))]) for row, p in enumerate(PROMPTS)]


def whole(steps: Steps) -> list[Tensor]:
    """The same, each prompt at once and alone."""
    return [
        torch.stack([logits for _, _, logits in steps.run(row, {row: len(tokens)}, [row])])
        for row, tokens in enumerate(PROMPTS)
    ]


def plain(folder: Path) -> list[Tensor]:
    model = load_plain(folder)
    with torch.inference_mode():
        return [model(torch.tensor([tokens])).logits[0] for tokens in PROMPTS]


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference relative to the largest logit."""
    return max(float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", FAMILY)
def test_the_fused_logits_are_those_of_transformers(isa: str, name: str, tmp_path: Path) -> None:
    kind, changes = FAMILY[name]
    folder = save_tiny(kind, tmp_path, **changes)

    assert worst(mixed(Steps(folder)), plain(folder)) < 1e-4


@pytest.mark.parametrize(
    ("dtype", "kind", "kv"),
    [
        ("float32", None, None),
        ("bfloat16", None, None),
        ("bfloat16", INT8, None),
        ("bfloat16", INT4, None),
        ("bfloat16", None, torch.int8),
    ],
)
def test_a_token_has_the_same_logits_bit_for_bit_in_any_company(
    isa: str, dtype: str, kind: int | None, kv: torch.dtype | None, tmp_path: Path
) -> None:
    folder = save_tiny("llama", tmp_path)

    crowd, alone = (run(Steps(folder, dtype=dtype, kind=kind, kv=kv)) for run in (mixed, whole))

    for in_company, by_itself in zip(crowd, alone, strict=True):
        assert torch.equal(in_company, by_itself)


@pytest.mark.parametrize(
    ("kind", "kv", "most"),
    [(None, None, 0.03), (INT8, None, 0.06), (INT4, None, 0.6), (None, torch.int8, 0.06)],
    ids=["bfloat16", "int8", "int4", "int8 KV"],
)
def test_fewer_bits_stay_near_float32(
    isa: str, kind: int | None, kv: torch.dtype | None, most: float, tmp_path: Path
) -> None:
    folder = save_tiny("llama", tmp_path)

    error = worst(mixed(Steps(folder, dtype="bfloat16", kind=kind, kv=kv)), plain(folder))

    assert 1e-5 < error < most


def test_what_is_not_of_the_family_is_named(tmp_path: Path) -> None:
    gemma = load_model(save_tiny("gemma", tmp_path / "gemma"), dtype="float32", device=CPU)
    odd = load_model(save_tiny("llama", tmp_path / "odd", head_dim=24), dtype="float32", device=CPU)
    gelu = load_model(save_tiny("llama", tmp_path / "gelu", hidden_act="gelu"), dtype="float32", device=CPU)
    half = load_model(save_tiny("llama", tmp_path / "half", hidden_size=48, head_dim=16), dtype="float32", device=CPU)

    assert why_not(gemma) == "GemmaForCausalLM is not of the Llama family"
    assert why_not(odd) == "head dimension 24 is no multiple of 16"
    assert why_not(gelu) == "activation gelu"
    assert why_not(half, INT8) == "48 inputs are no multiple of 32"
