"""Triton's modules against those that they stand for; whole models with them; and what is left as it was."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.pytorch_utils import Conv1D

from common.errors import ModelFolderError
from executor.attention.protocol import LayerOptions
from executor.gpu.modules import GatedMlp, MergedLinear, TritonMaker, TritonRmsNorm
from executor.native.library import INT8
from executor.paged_model import run
from executor.swap import swap
from executor.weights import load_model
from tests.executor.tiny_models import load_plain, save_tiny
from tests.gpu.steps import DEVICE

# a large gate: numpy says that e to its power is infinite, which is what is meant
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

PROMPT = [5, 9, 13, 21, 34, 55, 8, 7, 3, 11, 40]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(11)


class Toy(nn.Module):
    """As much of a language model as a swap looks at, around any body from 32 to 32 numbers."""

    dtype = torch.float32
    device = DEVICE

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        self.body = body
        self.head = nn.Linear(32, 20)
        self.requires_grad_(requires_grad=False).to(DEVICE)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.body(self.embedding(input_ids))))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def answers(model: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.arange(6, device=DEVICE)[None]).logits
    return logits


def swapped(body: nn.Module) -> Any:
    """A model around `body` after the swap, whose answers are those before."""
    model: Any = Toy(body)
    before = answers(model)
    swap(model, maker=TritonMaker())
    torch.testing.assert_close(answers(model), before, rtol=1e-4, atol=1e-5)
    return model


class Two(nn.Module):
    """Two layers of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.a(x) * self.b(x)


class ReadsWeights(Two):
    def forward(self, x: Tensor) -> Any:
        return self.a(x) * self.b(x) + nn.functional.linear(x, self.a.weight, self.a.bias)


class ChangesItsInput(Two):
    def forward(self, x: Tensor) -> Any:
        x = x.clone()
        return self.a(x) * self.b(x.mul_(2))


@pytest.mark.parametrize("body", [Two, ReadsWeights])
def test_layers_of_one_input_are_one_product_of_weights_that_are_held_once(body: type[Two]) -> None:
    model = swapped(body())

    a, b = model.body.a, model.body.b
    assert isinstance(a, MergedLinear) and isinstance(b, MergedLinear)
    assert a.shared is b.shared and a.shared.enabled
    assert (a.shared.x, a.shared.y) == (None, None)
    assert a.weight.untyped_storage().data_ptr() == b.weight.untyped_storage().data_ptr()
    assert b.bias is None


def test_what_cannot_be_computed_at_once_is_computed_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    model = swapped(ChangesItsInput())

    assert not model.body.a.shared.enabled
    assert "with it the model computes something else" in caplog.text


def test_a_layer_without_others_of_its_input_stays_torchs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    transposed: nn.Module = Conv1D(48, 32)  # type: ignore[no-untyped-call]

    model = swapped(nn.Sequential(nn.Linear(32, 32), transposed, nn.Linear(48, 32)))

    assert [type(layer) for layer in model.body] == [nn.Linear, Conv1D, nn.Linear]
    assert "0 MLPs and 0 norms are the kernels'; left alone: nothing" in caplog.text


def mlp(like: Any, act: str = "silu") -> nn.Module:
    config = LlamaConfig(hidden_size=32, intermediate_size=48, hidden_act=act)
    made: nn.Module = like(config)
    return made


class ClampedMlp(LlamaMLP):
    def forward(self, x: Tensor) -> Any:
        gate, up = self.gate_proj(x).clamp(max=7), self.up_proj(x).clamp(-7, 7)
        return self.down_proj(self.act_fn(gate) * up)


@pytest.mark.parametrize("like", [LlamaMLP, Phi3MLP])
def test_a_gated_mlp_is_that_of_transformers(like: Any) -> None:
    assert type(swapped(mlp(like)).body) is GatedMlp


@pytest.mark.parametrize(("like", "act"), [(ClampedMlp, "silu"), (LlamaMLP, "gelu"), (Phi3MLP, "gelu")])
def test_an_mlp_that_computes_something_else_keeps_its_own_forward(like: Any, act: str) -> None:
    assert type(swapped(mlp(like, act)).body) is like


def test_norms_are_swapped_by_what_they_compute_not_by_their_names() -> None:
    class OtherEpsilonRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.weight * nn.functional.rms_norm(hidden_states, (32,), eps=1e-4)

    bodies: list[Any] = [LlamaRMSNorm(32), GemmaRMSNorm(32), OtherEpsilonRMSNorm(32)]
    for body in bodies:
        body.weight.data.normal_()

    model = swapped(nn.Sequential(*bodies))

    assert [type(norm) for norm in model.body] == [TritonRmsNorm, TritonRmsNorm, OtherEpsilonRMSNorm]


class Causal:
    """Attention of one sequence, all of whose tokens are there."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions) -> Tensor:
        group = query.shape[1] // key.shape[1]
        q, k, v = query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=options.scale)[0].transpose(0, 1)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("gemma", "10 linear layers merged, 4 products for several of them, 0 MLPs and 5 norms"),
        ("phi3", "0 linear layers merged, 0 products for several of them, 2 MLPs and 5 norms"),
        ("qwen3_moe", "6 linear layers merged, 2 products for several of them, 0 MLPs and 9 norms"),
        ("granite", "10 linear layers merged, 4 products for several of them, 2 MLPs and 5 norms"),
        ("olmo2", "10 linear layers merged, 4 products for several of them, 2 MLPs and 9 norms"),
    ],
)
def test_a_model_with_its_modules_swapped_gives_its_own_logits(
    kind: str, what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = save_tiny(kind, tmp_path)
    model = load_model(folder, dtype="float32", device=DEVICE)
    each = torch.arange(len(PROMPT), device=DEVICE)

    swap(model, maker=TritonMaker())

    with torch.inference_mode():
        wanted = load_plain(folder)(torch.tensor([PROMPT])).logits[0]
    found = run(model, torch.tensor(PROMPT, device=DEVICE), each, each, Causal()).cpu()
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4
    assert what in caplog.text


def test_fewer_bits_are_refused() -> None:
    model: Any = Toy(nn.Identity())

    with pytest.raises(ModelFolderError, match=r"Toy cannot have int8 weights: .* Type: --weights auto"):
        swap(model, INT8, TritonMaker(INT8))
