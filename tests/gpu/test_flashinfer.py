"""The backend over FlashInfer: everything but its kernels, for which torch stands in where there is no GPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import shutil
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import ModelFolderError
from executor import attention
from executor.attention import choose
from executor.attention.flashinfer import FlashInferAttention, RowPages, _Kind, _Plan
from executor.attention.protocol import AttentionStep, LayerNeeds
from executor.attention.reference import ReferenceAttention
from executor.gpu.models import PagedForward
from executor.kv_cache import LayerShape
from executor.paged_model import PagedModel
from tests.executor.test_attention import CASES, Case, Scene, needs_of
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny
from tests.gpu.flashinfer_stand_in import DecodeWrapper, PrefillWrapper, StandIn
from tests.gpu.story import Story
from tests.gpu.test_runner import PLAIN, Host, plain_for, play

SERVED = LayerNeeds(
    shape=LayerShape(num_heads=4, num_kv_heads=2, key_dim=64, value_dim=64),
    dtype=torch.bfloat16,
    device=torch.device("cuda"),
)
INSTALL = "pip install flashinfer-python==0.6.9"
REFUSED = {
    "head dimension 80": "head dimension 80 is none of 64, 128, 256",
    "values narrower than keys": "values of another width than keys (64, 96)",
    "sinks": "sinks",
    "sinks in a window": "sinks",
    "choices of one request": "sinks",
}
# in 16 bits like another one; and one that takes seconds to write
LEFT_OUT = {"float64", "int8 K and V", "int8 K and V for float32", "float32 over long rows", "256 rows"}
is_there = torch.cuda.is_available() and importlib.util.find_spec("flashinfer") is not None


def in_16_bits(case: Case) -> Case:
    return replace(case, dtype=torch.bfloat16, kv_dtype=None)


@pytest.fixture
def library() -> StandIn:
    return StandIn()


@pytest.fixture
def backend(library: StandIn) -> FlashInferAttention:
    return FlashInferAttention(None if is_there else library)


@pytest.mark.parametrize("name", [name for name in CASES if name not in LEFT_OUT])
def test_it_agrees_with_the_reference_or_says_why_it_does_not_serve(backend: FlashInferAttention, name: str) -> None:
    case = in_16_bits(CASES[name])
    assert backend.why_not(needs_of(case, SERVED.device)) == REFUSED.get(name)
    if name in REFUSED:
        return
    scene = Scene(case, backend)
    slabs = (scene.cache.keys, scene.cache.values)
    before = [slab.clone() for slab in slabs]

    out, stored = scene.attend(), [slab.clone() for slab in slabs]

    for slab, was in zip(slabs, before, strict=True):
        slab.copy_(was)
    scene.backend = ReferenceAttention()
    torch.testing.assert_close(out, scene.attend(), rtol=1e-2, atol=1e-2)
    for slab, ours in zip(slabs, stored, strict=True):
        assert torch.equal(ours.nan_to_num(7.5), slab.nan_to_num(7.5))


def test_float16_is_served_too(backend: FlashInferAttention) -> None:
    case = replace(CASES["chunks, prompts and decodes mixed"], dtype=torch.float16)

    torch.testing.assert_close(
        Scene(case, backend).attend(), Scene(case, ReferenceAttention()).attend(), rtol=2e-3, atol=2e-3
    )


# ---- what FlashInfer is told


def test_rows_are_told_by_their_pages() -> None:
    scene = Scene(Case(rows=((14, 1), (15, 1), (16, 1), (0, 5), (20, 13)), block_size=16), ReferenceAttention())
    tables = scene.batch.block_tables

    decodes = RowPages.of(scene.batch, slice(0, 3), 16)
    prompts = RowPages.of(scene.batch, slice(3, 5), 16)

    assert decodes.query_start_loc.tolist() == [0, 1, 2, 3]
    assert decodes.page_start_loc.tolist() == [0, 1, 2, 4]
    assert decodes.pages.tolist() == [tables[0, 0], tables[1, 0], *tables[2, :2]]
    assert decodes.last_page_len.tolist() == [15, 16, 1]
    assert prompts.query_start_loc.tolist() == [0, 5, 18]
    assert prompts.page_start_loc.tolist() == [0, 1, 4]
    assert prompts.pages.tolist() == [tables[3, 0], *tables[4, :3]]
    assert prompts.last_page_len.tolist() == [5, 1]
    assert prompts.seq_lens.tolist() == [5, 33]
    assert {column.dtype for column in (prompts.query_start_loc, prompts.pages, prompts.last_page_len)} == {
        np.dtype(np.int32)
    }


def attend(scene: Scene, step: AttentionStep, **options: Any) -> torch.Tensor:
    """One layer of a step whose K and V are stored already."""
    backend = scene.backend
    assert isinstance(backend, FlashInferAttention)
    query = scene.query.to(scene.device)
    out = torch.full_like(query, torch.nan)
    backend.attend_stored(query, scene.cache, step, replace(scene.options, **options), out)
    assert not out.isnan().any()
    return out


def test_layers_that_are_alike_share_the_plan_of_a_step(library: StandIn) -> None:
    case = in_16_bits(CASES["chunks, prompts and decodes mixed"])
    scene = Scene(case, FlashInferAttention(library))
    scene.attend()
    library.num_planned = {"decode": 0, "prefill": 0}

    for _ in range(2):
        step = AttentionStep.of(scene.batch, scene.device)
        for _ in range(3):
            attend(scene, step)
            attend(scene, step, window=9)

    assert library.num_planned == {"decode": 2 * 2, "prefill": 2 * 2}


def test_a_step_that_comes_between_does_not_leave_its_plan_to_the_other(library: StandIn) -> None:
    case = in_16_bits(CASES["chunks, prompts and decodes mixed"])
    backend = FlashInferAttention(library)
    scenes = [Scene(case, backend), Scene(replace(case, rows=((3, 1), (50, 2), (8, 8))), backend)]
    expected = [scene.attend() for scene in scenes]
    steps = [AttentionStep.of(scene.batch, scene.device) for scene in scenes]

    for _ in range(2):
        for scene, step, wanted in zip(scenes, steps, expected, strict=True):
            assert torch.equal(attend(scene, step).cpu(), wanted)


def test_a_plan_waits_until_the_one_before_it_has_left_the_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Told:
        """An event, and a wrapper."""

        def synchronize(self) -> None:
            told.append("wait")

        def record(self) -> None:
            told.append("copied")

        def plan(self, *_: object, **__: object) -> None:
            told.append("plan")

        def run(self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor], *, out: torch.Tensor) -> None:
            told.append("run")

    monkeypatch.setattr(torch.cuda, "Event", Told)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    kind = _Kind(
        shape=SERVED.shape, dtype=SERVED.dtype, block_size=16, scale=1.0, window=None, softcap=None, decoding=True
    )
    plan = _Plan(kind, Told(), SERVED.device)
    scene = Scene(Case(rows=((20, 1), (5, 1))), ReferenceAttention())

    for step in [AttentionStep.of(scene.batch, scene.device) for _ in range(2)]:
        for _ in range(3):
            plan.of(step, slice(0, 2))

    assert told == ["wait", "plan", "copied"] * 2


@pytest.mark.parametrize(("group", "kind"), [(1, "decode"), (3, "decode"), (4, "prefill"), (7, "prefill")])
def test_rows_of_one_token_go_to_tensor_cores_once_a_group_is_large(library: StandIn, group: int, kind: str) -> None:
    Scene(Case(rows=((20, 1), (5, 1)), group=group, dtype=torch.bfloat16), FlashInferAttention(library)).attend()

    assert library.num_planned == {"decode": 0, "prefill": 0} | {kind: 1}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(DecodeWrapper, "BatchDecodeWithPagedKVCacheWrapper"), (PrefillWrapper, "BatchPrefillWithPagedKVCacheWrapper")],
)
def test_the_stand_in_is_called_as_flashinfer_is(ours: type, theirs: str) -> None:
    real = getattr(pytest.importorskip("flashinfer", reason="flashinfer is not installed"), theirs)
    made = inspect.signature(getattr(StandIn, theirs)).parameters
    for mine, its in (
        (made, inspect.signature(real.__init__).parameters),
        *((inspect.signature(getattr(ours, name)).parameters, inspect.signature(getattr(real, name)).parameters)
          for name in ("plan", "run")),
    ):  # fmt: skip
        in_order = [name for name, each in mine.items() if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        assert list(its)[: len(in_order)] == in_order
        assert set(mine) <= set(its)


# ---- who chooses it


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cpu")}, "FlashInfer's kernels are for CUDA, not for cpu"),
        ({}, f"flashinfer is not installed: {INSTALL}"),
    ],
)
def test_where_it_cannot_run_it_says_so(changes: dict[str, Any], reason: str) -> None:
    if importlib.util.find_spec("flashinfer") is not None and not changes:
        pytest.skip("it is installed")

    assert FlashInferAttention().why_not(replace(SERVED, **changes)) == reason


def unimportable(name: str) -> object:
    raise ImportError(f"{name} needs tvm_ffi")


@pytest.mark.parametrize(
    ("there", "can"),
    [
        (["flashinfer"], False),
        (["flashinfer", "bin/nvcc"], False),
        (["flashinfer", "bin/nvcc", "ninja"], True),
        (["flashinfer", "flashinfer_jit_cache"], True),
        (["flashinfer", "data/aot/decode/decode.so"], True),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_where_there_are_no_kernels_and_nothing_to_make_them_it_says_so(
    there: list[str], can: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in there:
        if "/" in name:
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).touch()
    spec = ModuleSpec("flashinfer", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name in there else None)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.6.9")
    monkeypatch.setattr(importlib, "import_module", lambda _: object())
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))

    reason = FlashInferAttention().why_not(SERVED)

    assert reason is not None
    assert ("finds no nvcc or no ninja" in reason, "compute capability" in reason) == (not can, can)


@pytest.mark.parametrize(
    ("version", "capability", "imported", "reason"),
    [
        ("0.7.2", (9, 0), object, f"flashinfer 0.7.2 is installed, 0.6.x is needed: {INSTALL}"),
        ("0.6.9", (7, 5), object, "FlashInfer needs compute capability 8.0 (Ampere), the GPU's is 7.5"),
        ("0.6.9", (9, 0), unimportable, "flashinfer cannot be imported: flashinfer needs tvm_ffi"),
        ("0.6.9", (9, 0), object, None),
    ],
)  # fmt: skip
def test_where_it_is_installed_it_looks_whether_it_can_run(
    version: str, capability: tuple[int, int], imported: Any, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    monkeypatch.setattr(importlib, "import_module", lambda name: imported(name) if imported is not object else object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    assert FlashInferAttention().why_not(SERVED) == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "torch.float32"),
        ({"kv_dtype": torch.float8_e4m3fn}, "K and V in torch.float8_e4m3fn"),
        ({"window": 9, "softcap": 30.0, "block_size": 48}, None),
        ({"shape": LayerShape(num_heads=29, num_kv_heads=1, key_dim=256, value_dim=256)}, None),
    ],
)
def test_it_refuses_what_its_kernels_cannot_do(library: StandIn, changes: dict[str, Any], reason: str | None) -> None:
    assert FlashInferAttention(library).why_not(replace(SERVED, **changes)) == reason


def test_it_is_chosen_by_name_alone(library: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(SERVED, device=torch.device("cpu"))
    monkeypatch.setattr(attention, "BY_NAME", (FlashInferAttention(library),))

    assert {each.name for each in choose([here] * 2)} == {"native"}
    assert {each.name for each in choose([here] * 2, "flashinfer")} == {"flashinfer"}
    with pytest.raises(ModelFolderError, match="layer 1: flashinfer: sinks"):
        choose([here, replace(here, sinks=True)], "flashinfer")
    with pytest.raises(ModelFolderError, match=r"there are: auto, .*, flashinfer"):
        choose([here], "fast")


class _Everything(FlashInferAttention):
    """Tiny models have smaller heads, and float32."""

    def why_not(self, layer: LayerNeeds, /) -> str | None:
        return None


def test_with_steps_in_flight_the_tokens_are_those_of_the_other_runner(
    library: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama", tmp_path)
    monkeypatch.setattr(attention, "BY_NAME", (_Everything(library),))

    def open_paged(loaded: Any, cache: Any, backends: Any, **_: object) -> PagedForward:
        return PagedForward(PagedModel(loaded.model, cache, backends), backends)

    host = Host(folder, attention_backend="flashinfer", open_forward=open_paged)
    library.num_planned = {"decode": 0, "prefill": 0}

    assert play(Story(seed=5, samplings=PLAIN, lag=1, vocab_size=VOCAB_SIZE), plain_for(folder), host.runner,
                num_steps=24, depth=2) > 24  # fmt: skip
    assert 0 < library.num_planned["decode"] <= 24
    assert 0 < library.num_planned["prefill"] <= 24
    assert host.device.num_graphs == 0 and not host.runner.idle()
