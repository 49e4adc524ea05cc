"""The Llama family in Triton's kernels against Transformers' own: interpreted, or on a GPU where there is one.

Every position of chunks, whole prompts and single tokens in company, then greedy answers, over a slab of NaN.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.model_folder import read_model_folder
from executor.gpu.inputs import DeviceTables, StepInputs
from executor.gpu.kernels import rotary
from executor.gpu.kernels.skinny import Cut, SkinnyLinears, padded_rows, thumb
from executor.gpu.llama import GpuLlama, MatmulLinear, scratch_bytes, why_not
from executor.llama_folder import open_llama
from executor.paged_model import probe_layers
from executor.weights import load_model
from tests.executor.tiny_models import VOCAB_SIZE, load_plain, save_tiny
from tests.gpu.steps import BLOCK_SIZE, DEVICE, MAX_LEN, Forward, Steps, slab_of_nan
from tests.gpu.watching import Watch

FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with biases and a scaled rotary embedding": (
        "llama",
        {
            "num_hidden_layers": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama of one KV head and its own output matrix": (
        "llama",
        {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False},
    ),
    "mistral in a window": ("mistral", {"num_hidden_layers": 1, "sliding_window": 6}),
    "qwen2, its second layer in a window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "smollm3, its second layer without positions": ("smollm3", {"no_rope_layers": [1, 0]}),
}
PROMPTS = [[5, 9, 13, 21, 34, 55, 8, 7, 3] * 2, [40, 11, 7, 3, 11]]
DTYPES = ["float32", *(["bfloat16"] if DEVICE.type == "cuda" else [])]
MOST = {"float32": 1e-4, "bfloat16": 0.05}


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dozens of parts of a row that has a block or two are for a GPU, and take the interpreter seconds."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr("executor.gpu.kernels.decode.num_splits", lambda *_: 2)


def opened(folder: Path, dtype: str = "float32", kv_dtype: torch.dtype | None = None, **options: Any) -> GpuLlama:
    model = load_model(folder, dtype=dtype, device=DEVICE)
    assert why_not(model) is None
    needs = [replace(each, block_size=BLOCK_SIZE, kv_dtype=kv_dtype) for each in probe_layers(model, VOCAB_SIZE)]
    return GpuLlama(model, slab_of_nan(needs), needs, max_positions=MAX_LEN, max_rows=4, max_tokens=40, **options)


def mixed(steps: Steps) -> list[Tensor]:
    """Logits of every prompt: whole, in chunks, token by token, each in the other's company."""
    found: dict[tuple[int, int], Tensor] = {}
    for counts in ({0: 9, 1: 1}, {0: 1, 1: 1}, {0: 8, 1: 3}):
        found |= {(row, position): logits for row, position, logits in steps.every(counts)}
    return [torch.stack([found[row, position] for position in range(len(p))]) for row, p in enumerate(PROMPTS)]


def plain(folder: Path) -> list[Tensor]:
    model = load_plain(folder)
    with torch.inference_mode():
        return [model(torch.tensor([tokens])).logits[0] for tokens in PROMPTS]


def plain_greedy(folder: Path, count: int) -> list[list[int]]:
    model = load_plain(folder)
    answers = []
    for prompt in PROMPTS:
        mask = torch.ones(1, len(prompt), dtype=torch.int64)
        out = model.generate(
            torch.tensor([prompt]), attention_mask=mask, do_sample=False, max_new_tokens=count, eos_token_id=None
        )
        answers.append(out[0].tolist())
    return answers


def alone(steps: Steps) -> list[Tensor]:
    """Logits of every prompt, its tokens by themselves or in chunks: never in the other's company."""
    found: dict[tuple[int, int], Tensor] = {}
    for counts in ({0: 16}, {0: 1}, {0: 1}, {1: 1}, {1: 1}, {1: 3}):
        found |= {(row, position): logits for row, position, logits in steps.every(counts)}
    return [torch.stack([found[row, position] for position in range(len(p))]) for row, p in enumerate(PROMPTS)]


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference relative to the largest logit."""
    return max(float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILY)
def test_the_fused_logits_are_those_of_transformers(name: str, dtype: str, tmp_path: Path) -> None:
    kind, changes = FAMILY[name]
    folder = save_tiny(kind, tmp_path, **changes)

    assert worst(mixed(Steps(opened(folder, dtype).forward, PROMPTS)), plain(folder)) < MOST[dtype]


def test_a_slab_of_8_bits_gives_the_logits_of_keys_and_values_that_were_rounded_to_8_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("qwen3", tmp_path, head_dim=32, num_hidden_layers=1)
    found = mixed(Steps(opened(folder, kv_dtype=torch.float8_e4m3fn).forward, PROMPTS))
    stored = rotary.rope_and_store

    def rounding(*given: Any, **told: Any) -> Tensor:
        query = stored(*given, **told)
        for slab in given[4:6]:
            slab.copy_(slab.to(torch.float8_e4m3fn))
        return query

    monkeypatch.setattr(rotary, "rope_and_store", rounding)

    rounded = mixed(Steps(opened(folder).forward, PROMPTS))

    assert worst(found, rounded) < 1e-4
    assert 1e-3 < worst(rounded, plain(folder)) < 0.1


@pytest.mark.parametrize("name", ["llama with biases and a scaled rotary embedding", "qwen3"])
def test_our_own_products_give_the_same_logits_with_norms_and_additions_inside(name: str, tmp_path: Path) -> None:
    kind, changes = FAMILY[name]
    folder = save_tiny(kind, tmp_path, **changes)
    model = opened(folder, linear=SkinnyLinears(DEVICE, cuts=up_to_16).make)

    assert model._fuses_one
    assert worst(alone(Steps(telling_hidden(model, folder), PROMPTS)), plain(folder)) < MOST["float32"]


def telling_hidden(model: GpuLlama, folder: Path) -> Forward:
    """Its forward, in which every row embeds: what it tells of each is what the logits are made of."""
    head = load_plain(folder).lm_head

    def forward(inputs: StepInputs, tables: DeviceTables) -> Tensor:
        rows = torch.arange(len(inputs.logits_indices), device=DEVICE)
        logits = model.forward(inputs, tables, rows)
        assert model.hidden is not None
        with torch.inference_mode():
            assert worst([head(model.hidden.cpu())], [logits.cpu()]) < MOST["float32"]
        return logits

    return forward


def test_rows_that_embed_tell_what_their_logits_are_made_of_in_any_company(tmp_path: Path) -> None:
    folder = save_tiny("qwen3", tmp_path, num_hidden_layers=1)

    Steps(telling_hidden(opened(folder), folder), PROMPTS).every({0: 9, 1: 1})


def in_splits(_outputs: int, _inputs: int, _rows: int) -> Cut:
    return Cut(block_n=16, block_k=16, splits=2)


def up_to_16(outputs: int, inputs: int, rows: int) -> Cut | None:
    return thumb(outputs, inputs, rows) if rows <= 16 else None


def test_products_whose_parts_the_norms_behind_them_add_give_the_same_logits(tmp_path: Path) -> None:
    folder = save_tiny("qwen3", tmp_path, num_hidden_layers=1)

    found = mixed(Steps(opened(folder, linear=SkinnyLinears(DEVICE, cuts=in_splits).make).forward, PROMPTS))

    assert worst(found, plain(folder)) < MOST["float32"]


@pytest.mark.parametrize(
    ("rows", "which", "kept"),
    [
        ((), slice(None), {1, 16}),
        ((1,), slice(None), {16}),
        ((16,), slice(15, 16), {1}),
    ],
    ids=["none", "one row", "the last of sixteen"],
)
def test_own_products_that_compute_something_else_here_are_left_to_torch(
    rows: tuple[int, ...],
    which: slice,
    kept: set[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    launch = SkinnyLinears.launch

    def miscompiled(
        self: SkinnyLinears, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, **told: Any
    ) -> None:
        launch(self, x, weight, bias, out, **told)
        if padded_rows(len(x)) in rows:
            out[which] *= 1.5

    monkeypatch.setattr(SkinnyLinears, "launch", miscompiled)
    folder = save_tiny("llama", tmp_path, num_hidden_layers=1)
    model = opened(folder, linear=SkinnyLinears(DEVICE, cuts=up_to_16).make)

    tables = Steps(model.forward, PROMPTS).tables()
    model.check_products(replace(tables, block_tables=torch.zeros_like(tables.block_tables)))

    assert all(linear.own_rows == kept for linear in model._linears())
    assert model._fuses_one is (1 in kept)
    assert [f"of up to {count} rows" in caplog.text for count in (1, 16)] == [count not in kept for count in (1, 16)]
    assert worst(alone(Steps(model.forward, PROMPTS)), plain(folder)) < MOST["float32"]


def test_greedy_answers_are_those_of_transformers(tmp_path: Path) -> None:
    folder = save_tiny("mistral", tmp_path, num_hidden_layers=1)
    steps = Steps(opened(folder).forward, PROMPTS)

    steps.every({0: 12})  # a chunk
    steps.greedy({0: 6, 1: 5})
    for _ in range(3):
        steps.greedy({0: 1, 1: 1})

    assert steps.tokens == plain_greedy(folder, 4)


def test_the_last_layer_is_computed_for_the_wanted_rows_alone_and_they_are_the_same(tmp_path: Path) -> None:
    folder = save_tiny("qwen3", tmp_path)
    every, some = (Steps(opened(folder).forward, PROMPTS) for _ in range(2))
    of_every = {(row, position): logits for row, position, logits in every.every({0: 5, 1: 4})}
    inputs, _ = some.inputs({0: 5, 1: 4}, every=True)
    model = opened(folder)
    wanted = torch.tensor([7, 3], dtype=torch.int32, device=DEVICE)

    found = model.forward(replace(inputs, logits_indices=wanted), some.tables()).cpu()

    torch.testing.assert_close(found, torch.stack([of_every[1, 2], of_every[0, 3]]))
    assert len(model.forward(replace(inputs, logits_indices=wanted[:0]), some.tables())) == 0


def test_a_row_of_nobody_changes_nothing(tmp_path: Path) -> None:
    """What pads a captured graph's rows: no slot, no tokens to attend to, a token that may be none."""
    folder = save_tiny("qwen2", tmp_path, num_hidden_layers=1)
    alone, padded = (Steps(opened(folder).forward, PROMPTS) for _ in range(2))
    for steps in (alone, padded):
        steps.every({0: 17, 1: 4})
    wanted = [logits for _, _, logits in alone.every({0: 1, 1: 1})]
    inputs, _ = padded.inputs({0: 1, 1: 1}, every=True)
    nobody = len(PROMPTS)
    more = {
        "token_places": [nobody * MAX_LEN] * 2, "positions": [0, 0], "slot_mapping": [-1, -1],
        "query_start_loc": [3, 4], "seq_lens": [0, 0], "table_rows": [nobody] * 2, "logits_indices": [2, 3],
    }  # fmt: skip
    columns: dict[str, Any] = {
        name: torch.cat([getattr(inputs, name), torch.tensor(values, dtype=torch.int32, device=DEVICE)])
        for name, values in more.items()
    }
    tables = padded.tables()
    tables.token_ids[nobody] = -1

    found = padded.forward(replace(inputs, num_decodes=4, **columns), tables).cpu()

    torch.testing.assert_close(found[:2], torch.stack(wanted))
    assert torch.isfinite(found[2:]).all()


def test_a_decode_step_waits_for_nothing_takes_no_memory_and_writes_where_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph needs. The interpreter's own operations are not the forward's, so kernels do nothing here."""
    for kernel in (
        "embedding.embed",
        "norm.rms_norm",
        "norm.add_rms_norm",
        "activation.silu_mul",
        "rotary.rope_and_store",
    ):
        monkeypatch.setattr(f"executor.gpu.kernels.{kernel}", lambda *_, **__: None)
    monkeypatch.setattr("executor.attention.triton.attend_stored", lambda *_, **__: None)
    steps = Steps(opened(save_tiny("llama", tmp_path, attention_bias=True)).forward, PROMPTS)
    inputs, _ = steps.inputs({0: 1, 1: 1}, every=False)
    tables = steps.tables()
    watches = [Watch(), Watch()]

    for watch in watches:
        with watch:
            steps.forward(inputs, tables)

    assert {"mm", "addmm", "index_select"} <= set(watches[0].names)
    assert (watches[0].waiting, watches[0].taking) == (set(), set())
    assert watches[0].addresses == watches[1].addresses


def test_the_watch_sees_what_a_graph_cannot_have() -> None:
    with Watch() as watch:
        x = torch.zeros(3)
        x[x > 0].sum().item()
        x.nonzero()

    assert watch.waiting == {"index by a mask", "nonzero", "_local_scalar_dense"}
    assert "zeros" in watch.taking


def test_a_folder_opened_without_transformers_gives_the_same_logits(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, num_hidden_layers=1, attention_bias=True)
    step = {0: 5, 1: 1}
    theirs = Steps(opened(folder).forward, PROMPTS).every(step)
    model = open_llama(read_model_folder(folder), "auto", DEVICE)
    assert model is not None and why_not(model) is None
    needs = model.needs()
    seen: list[tuple[int, int]] = []

    ours = GpuLlama(
        model, slab_of_nan(needs), needs, max_positions=MAX_LEN, max_rows=4, max_tokens=40,
        report=lambda done, total: seen.append((done, total)),
    )  # fmt: skip

    for (*_, found), (*_, wanted) in zip(Steps(ours.forward, PROMPTS).every(step), theirs, strict=True):
        torch.testing.assert_close(found, wanted)
    assert seen == [(1, 1)]


def test_the_products_can_be_another_kernels(tmp_path: Path) -> None:
    made: list[tuple[int, ...]] = []

    def linear(weight: Tensor, bias: Tensor | None) -> MatmulLinear:
        made.append(tuple(weight.shape))
        return MatmulLinear(weight, bias)

    opened(save_tiny("llama", tmp_path, num_hidden_layers=1), linear=linear)

    assert made == [(128, 64), (64, 64), (192, 64), (64, 96), (VOCAB_SIZE, 64)]


def test_the_weights_are_held_once(tmp_path: Path) -> None:
    model = load_model(save_tiny("llama", tmp_path), dtype="float32", device=DEVICE)
    needs = probe_layers(model, VOCAB_SIZE)

    GpuLlama(model, slab_of_nan(needs), needs, max_positions=MAX_LEN, max_rows=4, max_tokens=40)

    left = [name for name, each in model.named_parameters() if each.dim() > 1 and each.numel()]
    assert left == ["model.embed_tokens.weight", "lm_head.weight"]  # which the forward uses as they are


def test_the_memory_between_the_kernels_is_as_much_as_is_said(tmp_path: Path) -> None:
    model = load_model(save_tiny("llama", tmp_path), dtype="float32", device=DEVICE)
    needs = probe_layers(model, VOCAB_SIZE)
    said = scratch_bytes(model, 40)

    with Watch() as watch:
        GpuLlama(model, slab_of_nan(needs), needs, max_positions=MAX_LEN, max_rows=4, max_tokens=40)

    # the residual, what is added and what is normed; gate, up and their product, which are more than attention needs
    assert said == 128 * (3 * 64 + 3 * 96) * 4
    assert said in watch.sizes


def test_what_the_forward_cannot_serve_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = load_model(save_tiny("gemma", tmp_path / "gemma"), dtype="float32", device=DEVICE)
    gelu = load_model(save_tiny("llama", tmp_path / "gelu", hidden_act="gelu"), dtype="float32", device=DEVICE)
    double = load_model(save_tiny("llama", tmp_path / "double"), dtype="float32", device=DEVICE).double()

    assert why_not(gemma) == "GemmaForCausalLM is not of the Llama family"
    assert why_not(gelu) == "activation gelu"
    assert why_not(double) == "torch.float64"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_without_the_interpreter_a_cpu_is_no_device_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(save_tiny("llama", tmp_path), dtype="float32", device=DEVICE)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    assert why_not(model) == "Triton's kernels are for CUDA, not for cpu"
