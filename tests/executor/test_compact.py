"""bfloat16 in 12 bits a weight: the same products, bit for bit, as of the weights as they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from executor.native.library import BFLOAT16, native
from executor.native.modules import Product
from executor.native.packed import PackedLinear, Pages, pack

ROWS = (1, 2, 3, 4, 7, 12, 13, 16, 30, 50)  # every way to deal rows to tiles


def packed(weight: Tensor, *, compact: bool | None) -> PackedLinear:
    return pack(native(), Pages(), weight, kind=BFLOAT16, compact=compact)


def product(linear: PackedLinear, x: Tensor) -> Tensor:
    y = torch.empty(len(x), linear.struct.n)
    native().linear(linear.struct, x, y)
    return y


def spread(outputs: int, inputs: int) -> Tensor:
    """Weights of every size: far more exponents than there are codes, zeros of both signs and subnormal numbers."""
    weight = torch.randn(outputs, inputs) * 10.0 ** torch.randint(-30, 3, (outputs, inputs))
    weight[torch.rand(outputs, inputs) < 0.1] = 0.0
    weight[torch.rand(outputs, inputs) < 0.05] = -0.0
    weight[torch.rand(outputs, inputs) < 0.05] = 1e-40
    return weight.bfloat16()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("outputs", [1, 45, 256])
def test_the_products_are_those_of_plain_weights(isa: str, rows: int, outputs: int) -> None:
    torch.manual_seed(rows)
    x = torch.randn(rows, 96).bfloat16()
    for weight in ((0.02 * torch.randn(outputs, 96)).bfloat16(), spread(outputs, 96)):
        plain, compact = packed(weight, compact=False), packed(weight, compact=True)

        assert compact.struct.exponents
        assert not plain.struct.exponents
        assert torch.equal(product(compact, x), product(plain, x))


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize(
    "weight", [spread(160, 96), (0.02 * torch.randn(160, 96)).bfloat16()], ids=["spread", "trained"]
)
def test_a_part_of_the_outputs_is_that_part(isa: str, compact: bool, weight: Tensor) -> None:
    x = torch.randn(5, 96).bfloat16()
    whole = packed(weight, compact=compact)

    for first, n in [(0, 64), (64, 96), (128, 7)]:
        assert torch.equal(Product(native(), whole, first, n)(x), Product(native(), whole)(x)[:, first : first + n])


def test_a_weight_that_is_no_number_is_kept(isa: str) -> None:
    weight = torch.randn(40, 32).bfloat16()
    weight[3, 5], weight[7, 1], weight[39, 31] = math.nan, math.inf, -math.inf

    found = product(packed(weight, compact=True), torch.ones(2, 32).bfloat16())

    assert found[:, [3]].isnan().all()
    assert found[0, [7, 39]].tolist() == [math.inf, -math.inf]
    assert found.isfinite().sum() == 2 * 37


def test_trained_weights_take_a_quarter_less() -> None:
    weight = (0.02 * torch.randn(512, 512)).bfloat16()

    bits = packed(weight, compact=True).num_bytes * 8 / weight.numel()

    assert 12 < bits < 12.1


def test_weights_that_would_not_gain_stay_as_they_are() -> None:
    linear = packed(spread(64, 64), compact=None)

    assert not linear.struct.exponents
    assert linear.num_bytes == 2 * 64 * 64
