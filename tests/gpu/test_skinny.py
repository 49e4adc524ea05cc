"""The product of a few rows against torch's, cut in every way that a table may say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from executor.gpu.kernels.norm import add_rms_norm, rms_norm
from executor.gpu.kernels.skinny import MAX_ROWS, Cut, SkinnyLinears, cut_of, padded_rows, thumb
from tests.gpu.steps import DEVICE

# Few outputs and many inputs are cut into splits; sizes that are no multiple of a block have an edge.
SHAPES = [(64, 96), (40, 1024), (16, 1300), (70, 33)]
CUTS = {
    "in a loop": Cut(block_n=16, block_k=64),
    "in splits": Cut(block_n=16, block_k=32, splits=3),
    "turned": Cut(block_n=64, block_k=64, turned=True),
    "turned, in splits": Cut(block_n=64, block_k=32, splits=2, turned=True),
    "held in one block": Cut(block_n=16, block_k=128, held=True),
    "held in four blocks": Cut(block_n=16, block_k=32, held=True),
    "held in slices": Cut(block_n=8, block_k=128, slices=4, held=True),
    "held in slices of two blocks, in splits": Cut(block_n=8, block_k=32, slices=2, splits=2, held=True),
    "held in splits of two blocks": Cut(block_n=8, block_k=32, splits=2, held=True),
}


def wanted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_that_of_torch(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(1)
    outputs, inputs = shape
    weight, shift = torch.randn(outputs, inputs, device=DEVICE), torch.randn(outputs, device=DEVICE)
    linear = SkinnyLinears(DEVICE, cuts=thumb).make(weight, shift if bias else None)
    for count in (1, 3, 16, 17, 40, MAX_ROWS + 1):
        x = torch.randn(count, inputs, device=DEVICE)
        for _ in range(2):  # what one product leaves behind must not be in the next one
            out = torch.full((count, outputs), torch.nan, device=DEVICE)

            linear(x, out)

            torch.testing.assert_close(out.double(), wanted(x, weight, shift if bias else None), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("shape", [(128, 128), (70, 100)], ids=str)
def test_every_cut_gives_the_same(shape: tuple[int, int], name: str) -> None:
    torch.manual_seed(4)
    (outputs, inputs), cut = shape, CUTS[name]
    weight, bias = torch.randn(outputs, inputs, device=DEVICE), torch.randn(outputs, device=DEVICE)
    linears = SkinnyLinears(DEVICE)
    for count in (5, 30) if cut.slices > 1 else (1, 5, 30):
        linears.reserve(outputs, padded_rows(count), cut)
        x = torch.randn(count, inputs, device=DEVICE)
        out = torch.full((count, outputs), torch.nan, device=DEVICE)

        linears.launch(x, weight, bias, out, cut=cut)

        torch.testing.assert_close(out.double(), wanted(x, weight, bias), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("count", [1, 4, 20])
@pytest.mark.parametrize("name", ["in a loop", "in splits", "held in splits of two blocks"])
def test_the_norm_behind_a_product_adds_the_parts_of_its_sums(name: str, count: int) -> None:
    torch.manual_seed(5)
    (outputs, inputs), cut = (40, 100), CUTS[name]
    weight, norm = torch.randn(outputs, inputs, device=DEVICE).half(), torch.randn(outputs, device=DEVICE).half()
    x, before = torch.randn(count, inputs, device=DEVICE).half(), torch.randn(count, outputs, device=DEVICE).half()
    linears = SkinnyLinears(DEVICE)
    linears.reserve(outputs, padded_rows(count), cut)
    product, residual, room = before.clone(), before.clone(), before.new_full(before.shape, torch.nan)
    linears.launch(x, weight, None, product, cut=cut)
    wanted = before.clone()
    normed = add_rms_norm(product, wanted, norm, 1e-5)
    out = torch.empty_like(before)
    linears._parts.fill_(torch.nan)

    linears.launch_normed(x, weight, None, residual, norm, 1e-5, room=room, out=out, cut=cut)

    assert torch.equal(residual, wanted) and torch.equal(out, normed)
    assert bool(room.isnan().all()) == (cut.splits > 1)


@pytest.mark.parametrize("name", ["in a loop", "in splits", "held in one block", "held in splits of two blocks"])
@pytest.mark.parametrize("shape", [(48, 128), (40, 100)], ids=str)
def test_one_row_is_normed_on_the_way_in_and_added_to_another(shape: tuple[int, int], name: str) -> None:
    torch.manual_seed(6)
    (outputs, inputs), cut = shape, CUTS[name]
    weight, norm = torch.randn(outputs, inputs, device=DEVICE).half(), torch.randn(inputs, device=DEVICE).half()
    x, residual = torch.randn(1, inputs, device=DEVICE).half(), torch.randn(1, outputs, device=DEVICE).half()
    linears = SkinnyLinears(DEVICE)
    linears.reserve(outputs, 1, cut)
    normed = rms_norm(x, norm, 1e-5)
    apart = torch.empty_like(residual)
    linears.launch(normed, weight, None, apart, cut=cut)
    out, added = torch.empty_like(apart), residual.clone()

    linears.launch(x, weight, None, out, norm=norm, epsilon=1e-5, cut=cut)
    linears.launch(normed, weight, None, added, adds=True, cut=cut)

    assert torch.equal(out, apart)
    assert torch.equal(added, residual + apart)


def test_products_of_one_device_share_their_memory() -> None:
    torch.manual_seed(2)
    linears = SkinnyLinears(DEVICE, cuts=thumb)
    weights = [torch.randn(outputs, 1024, device=DEVICE) for outputs in (16, 48, 32)]
    made = [linears.make(weight, None) for weight in weights]
    x = torch.randn(2, 1024, device=DEVICE)

    for weight, linear in zip(weights, made, strict=True):
        out = torch.empty(2, len(weight), device=DEVICE)
        linear(x, out)
        torch.testing.assert_close(out, x @ weight.t(), rtol=1e-4, atol=1e-3)


def test_half_precision_is_summed_in_float32() -> None:
    torch.manual_seed(3)
    weight = torch.randn(24, 2048, device=DEVICE).half()
    linear = SkinnyLinears(DEVICE, cuts=thumb).make(weight, None)
    for count in (1, 5):
        x = torch.randn(count, 2048, device=DEVICE).half()
        out = torch.empty(count, 24, dtype=torch.float16, device=DEVICE)

        linear(x, out)

        torch.testing.assert_close(out.double(), wanted(x, weight), rtol=2e-3, atol=2e-2)


def test_more_rows_than_one_of_a_matrix_that_nobody_measured_are_left_to_torch() -> None:
    assert [cut_of(1000, 1000, rows) is None for rows in (1, 16, 32, 64)] == [False, True, True, True]
    assert SkinnyLinears(DEVICE).make(torch.zeros(1000, 1000, device=DEVICE).half(), None).own_rows == {1}


@pytest.mark.parametrize("rows", [1, 16, 32, 64])
@pytest.mark.parametrize("shape", [(4096, 1024), (1024, 3072), (4096, 14336), (151936, 1024), (576, 1536)], ids=str)
def test_every_program_of_a_cut_has_work(shape: tuple[int, int], rows: int) -> None:
    outputs, inputs = shape
    cut = cut_of(outputs, inputs, rows) or thumb(outputs, inputs, rows)
    a_split = cut.steps(inputs) * cut.block_k

    assert (cut.splits - 1) * a_split < inputs <= cut.splits * a_split
