"""The kernels' modules against those they stand for, on every instruction set; and what is left as it was."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from common.errors import ModelFolderError
from executor.attention.protocol import LayerOptions
from executor.native.library import INT4, INT8, native
from executor.native.modules import GatedMlp, NativeLinear, NativeRmsNorm, Product, SharedLinear
from executor.native.packed import Pages, pack
from executor.paged_model import run
from executor.swap import swap
from executor.weights import load_model
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny

CPU = torch.device("cpu")
# How far a row may be from float64, relative to the row: float32 sums; one rounding to bfloat16 (at most 2^-9); a step
# of 1/127 of the largest of 32 weights and as much of the inputs; a step of 1/15 of the range of 32 weights.
BOUNDS = {
    "float32": (torch.float32, None, 1e-6),
    "bfloat16": (torch.bfloat16, None, 4e-3),
    "int8": (torch.bfloat16, INT8, 1.5e-2),
    "int8 of float32": (torch.float32, INT8, 1.5e-2),
    "int4": (torch.bfloat16, INT4, 0.12),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(11)


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest error of a row, relative to the row."""
    assert found.shape == wanted.shape
    return float(((found.double() - wanted.double()).norm(dim=-1) / wanted.double().norm(dim=-1)).max())


def product(layer: nn.Linear, kind: int | None = None) -> Product:
    return Product(native(), pack(native(), Pages(), layer.weight, layer.bias, kind=kind))


@torch.inference_mode()
@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 3), (1, 40)], ids=str)
def test_a_linear_layer_is_that_of_torch(isa: str, name: str, shape: tuple[int, ...]) -> None:
    dtype, kind, bound = BOUNDS[name]
    for outputs, bias in [(64, False), (45, True), (1, True)]:
        layer = nn.Linear(96, outputs, bias=bias, dtype=dtype)
        ours = NativeLinear(product(layer, kind), dtype)
        x = torch.randn(*shape, 96, dtype=dtype)

        found = ours(x)

        assert found.dtype == dtype
        if outputs > 1:  # one number can be close to nothing
            assert error(found, layer.double()(x.double())) < bound
        else:
            torch.testing.assert_close(found.double(), layer.double()(x.double()), rtol=0.1, atol=0.1)


@torch.inference_mode()
def test_a_layer_takes_inputs_that_are_not_dense() -> None:
    layer = nn.Linear(32, 32)
    x = torch.randn(4, 64).t()[:32].t()

    assert not x.is_contiguous()
    assert error(NativeLinear(product(layer), torch.float32)(x), layer(x)) < 1e-6


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_that_of_transformers(isa: str, dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(48, eps=1e-5).to(dtype)
    norm.weight.normal_()
    ours = NativeRmsNorm(native(), norm.weight, 1e-5, dtype)
    for x in (torch.randn(1, 5, 48, dtype=dtype), 1e-3 * torch.randn(3, 2, 48, dtype=dtype).transpose(0, 1)):
        assert error(ours(x), norm(x)) < (1e-6 if dtype is torch.float32 else 1e-2)


class Toy(nn.Module):
    """As much of a language model as a swap looks at, around any body from 32 to 32 numbers."""

    device, dtype = CPU, torch.float32

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        self.body = body
        self.head = nn.Linear(32, 20)
        self.requires_grad_(requires_grad=False)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.body(self.embedding(input_ids))))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def answers(model: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.arange(20)[None]).logits
    return logits


class Alone:
    """Attention of tokens that are each the first of a sequence."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions) -> Tensor:
        return value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def first_answers(model: Any) -> Tensor:
    """What a real model says of tokens that begin sequences."""
    tokens = torch.arange(12)
    return run(model, tokens, torch.zeros_like(tokens), torch.arange(12), Alone())


def swapped(body: nn.Module, kind: int | None = None) -> tuple[Any, float]:
    """A model around `body` after the swap, and how far its answers are from those before."""
    model: Any = Toy(body)
    before = answers(model)
    swap(model, kind)
    return model, error(answers(model), before)


class Two(nn.Module):
    """Two layers of one input."""

    def __init__(self, outputs: int = 32) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, outputs), nn.Linear(32, outputs, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.a(x) * self.b(x)


class ChangesItsInput(Two):
    def forward(self, x: Tensor) -> Any:
        x = x.clone()
        return self.a(x) * self.b(x.mul_(2))


class WantsDenseOutputs(Two):
    def forward(self, x: Tensor) -> Any:
        return (self.a(x).view(-1) * self.b(x).view(-1)).view(x.shape)


class ReadsWeights(Two):
    def forward(self, x: Tensor) -> Any:
        return self.a(x) * nn.functional.linear(x, self.b.weight)


def test_layers_of_one_input_are_computed_at_once_and_nothing_is_kept() -> None:
    model, distance = swapped(Two())

    assert isinstance(model.body.a, SharedLinear)
    assert model.body.a.shared is model.body.b.shared
    assert (model.body.a.shared.x, model.body.a.shared.y) == (None, None)
    assert distance < 1e-5


@torch.inference_mode()
def test_layers_of_one_product_are_right_in_any_order_and_for_any_input() -> None:
    body = Two()
    a, b = body.a, body.b
    swapped(body)
    x, y = torch.randn(2, 3, 32).unbind()

    for layer, plain, given in [
        (body.b, b, x), (body.a, a, x), (body.b, b, y), (body.b, b, x.clone()), (body.b, b, x), (body.a, a, y),
        (body.a, a, x), (body.b, b, x),
    ]:  # fmt: skip
        assert error(layer(given), plain(given)) < 1e-6


@pytest.mark.parametrize("body", [ChangesItsInput, WantsDenseOutputs])
def test_what_cannot_be_computed_at_once_is_computed_one_by_one(
    body: type[Two], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    model, distance = swapped(body())

    assert isinstance(model.body.a, NativeLinear)
    assert distance < 1e-5
    assert "with it the model computes something else" in caplog.text


def test_parts_that_would_cut_a_panel_are_computed_one_by_one() -> None:
    class Uneven(Two):
        def forward(self, x: Tensor) -> Any:
            return x * self.a(x).sum(-1, keepdim=True) * self.b(x).sum(-1, keepdim=True)

    model, distance = swapped(Uneven(outputs=20))

    assert (type(model.body.a), type(model.body.b)) == (NativeLinear, NativeLinear)
    assert distance < 1e-5


def test_a_layer_whose_weights_are_read_otherwise_is_left_alone() -> None:
    model, distance = swapped(ReadsWeights())

    assert (type(model.body.a), type(model.body.b)) == (NativeLinear, nn.Linear)
    assert distance < 1e-5


def test_a_model_that_reads_the_weights_of_a_layer_that_it_also_calls_is_refused() -> None:
    class ReadsAndCalls(Two):
        def forward(self, x: Tensor) -> Any:
            return self.a(x) * nn.functional.linear(x, self.a.weight)

    with pytest.raises(ModelFolderError, match="Toy reads weights of layers that were packed"):
        swapped(ReadsAndCalls())


def test_only_plain_layers_that_fit_the_kernels_are_swapped(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).abs()

    caplog.set_level(logging.INFO)
    transposed: nn.Module = Conv1D(48, 32)  # type: ignore[no-untyped-call]

    model, distance = swapped(nn.Sequential(Odd(32, 40), nn.Linear(40, 32), transposed, nn.Linear(48, 32)))

    assert [type(layer) for layer in model.body] == [Odd, nn.Linear, NativeLinear, NativeLinear]
    assert distance < 1e-5
    assert "left alone: Odd with 20.4% of the weights" in caplog.text
    assert "a linear layer: 40 inputs are no multiple of 16" in caplog.text


class ClampedMlp(LlamaMLP):
    def forward(self, x: Tensor) -> Any:
        gate, up = self.gate_proj(x).clamp(max=7), self.up_proj(x).clamp(-7, 7)
        return self.down_proj(self.act_fn(gate) * up)


class UpFirstMlp(LlamaMLP):
    def forward(self, x: Tensor) -> Any:
        return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))


class HalvesMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(32, 96), nn.Linear(48, 32)
        self.activation_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Any:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


class OtherHalvesMlp(HalvesMlp):
    def forward(self, x: Tensor) -> Any:
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


def mlp(like: Any, act: str = "silu") -> nn.Module:
    made: nn.Module = like(LlamaConfig(hidden_size=32, intermediate_size=64, hidden_act=act))
    return made


@pytest.mark.parametrize("kind", [None, INT8, INT4])
def test_a_gated_mlp_is_that_of_transformers(isa: str, kind: int | None) -> None:
    for body in (mlp(LlamaMLP), mlp(UpFirstMlp), HalvesMlp()):
        model, distance = swapped(body, kind)

        assert type(model.body) is GatedMlp
        assert distance < {None: 1e-5, INT8: 4e-2, INT4: 0.4}[kind]


def test_an_mlp_that_computes_something_else_keeps_its_own_forward(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for body in (mlp(ClampedMlp), OtherHalvesMlp(), mlp(LlamaMLP, "gelu")):
        model, distance = swapped(body)

        assert type(model.body) is type(body)
        assert isinstance(model.body.down_proj, NativeLinear)
        assert distance < 1e-5
    assert "ClampedMlp computes something else; " in caplog.text.replace("\n", "; ")


def test_norms_are_swapped_by_what_they_compute_not_by_their_names() -> None:
    class MeanFreeRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))

    class OtherEpsilonRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.weight * nn.functional.rms_norm(hidden_states, (32,), eps=1e-4)

    class ScaledRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
            return scale * super().forward(hidden_states)

    strange = [MeanFreeRMSNorm(32), OtherEpsilonRMSNorm(32), ScaledRMSNorm(32)]
    bodies: list[Any] = [LlamaRMSNorm(32), GemmaRMSNorm(32), *strange]
    for body in bodies:
        body.weight.data.normal_()

    model, distance = swapped(nn.Sequential(*bodies))

    assert [type(norm) for norm in model.body] == [NativeRmsNorm, NativeRmsNorm, *(type(norm) for norm in strange)]
    assert distance < 1e-5


def test_the_weights_are_held_once_and_the_embedding_survives(tmp_path: Path) -> None:
    model: Any = load_model(save_tiny("gemma", tmp_path), dtype="float32", device=CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight

    swap(model)

    assert [name for name, _ in model.named_parameters()] == ["model.embed_tokens.weight"]
    assert model.model.embed_tokens.weight.shape == (VOCAB_SIZE, 64)


@pytest.mark.parametrize(("kind", "most"), [(INT8, 0.06), (INT4, 0.6)])
@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "qwen2_moe"])
def test_fewer_bits_stay_near_float32_in_any_architecture(
    architecture: str, kind: int, most: float, tmp_path: Path
) -> None:
    model: Any = load_model(save_tiny(architecture, tmp_path), dtype="float32", device=CPU)
    before = first_answers(model)

    swap(model, kind)

    found = first_answers(model)
    assert 1e-4 < float((found - before).abs().max() / before.abs().max()) < most


def test_layers_that_cannot_have_fewer_bits_keep_theirs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    swapped(nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 8), nn.Linear(8, 32)), INT8)

    assert "4 linear layers, 1 of them int8" in caplog.text
    assert "not int8: 48 inputs are no multiple of 32" in caplog.text


def test_fewer_bits_for_a_model_without_a_layer_that_can_have_them_are_refused() -> None:
    model: Any = Toy(nn.Identity())

    with pytest.raises(ModelFolderError, match="Toy cannot have int8 weights: no layer of it can have them"):
        swap(model, INT8)


def test_fewer_bits_without_the_kernels_dtype_are_refused() -> None:
    model: Any = Toy(nn.Identity())
    model.dtype = torch.float16

    swap(model)
    with pytest.raises(ModelFolderError, match=r"Toy cannot have int4 weights: torch\.float16"):
        swap(model, INT4)
