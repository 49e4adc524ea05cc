"""Weights of 8 and 4 bits: a row has the same products, bit for bit, alone and among as many as there may be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from executor.native.library import INT4, INT8, native
from executor.native.packed import PackedLinear, Pages, pack

ROWS = (2, 6, 7, 15, 16, 17, 32, 50, 64, 130, 400)  # every way to deal rows to tiles, and more than go through at once
INPUTS = (32, 64, 96, 128, 160, 288)  # one group to nine: four of them lie in tiles at a time


def product(linear: PackedLinear, x: Tensor) -> Tensor:
    y = torch.empty(len(x), linear.struct.n)
    native().linear(linear.struct, x, y)
    return y


@pytest.mark.parametrize("kind", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("inputs", INPUTS)
def test_a_row_among_many_has_the_bits_that_it_has_alone(isa: str, inputs: int, kind: int) -> None:
    torch.manual_seed(inputs)
    x = torch.randn(max(ROWS), inputs) * torch.rand(max(ROWS), 1) * 10
    linear = pack(native(), Pages(), torch.randn(70, inputs), torch.randn(70), kind=kind)  # the last panel is padded

    alone = torch.cat([product(linear, x[row : row + 1]) for row in range(len(x))])

    for rows in ROWS:
        assert torch.equal(product(linear, x[:rows]), alone[:rows]), rows


@pytest.mark.parametrize(("kind", "most"), [(INT8, 0.02), (INT4, 0.15)], ids=["int8", "int4"])
def test_the_products_are_nearly_those_of_the_weights_as_they_were(isa: str, kind: int, most: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 320), torch.randn(96, 320)

    found, wanted = product(pack(native(), Pages(), weight, kind=kind), x), x @ weight.T

    assert (found - wanted).norm() / wanted.norm() < most


@pytest.mark.parametrize(("kind", "most"), [(INT8, 0.67), (INT4, 1.01)], ids=["int8", "int4"])
def test_a_weight_is_the_same_on_every_path_to_the_last_bit_of_bfloat16(isa: str, kind: int, most: float) -> None:
    """AMX multiplies them as bfloat16: wrong by two thirds of the last bit at most, and by nothing on average."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(64, 96)
    weight[3, :32] = 0
    linear = pack(native(), Pages(), weight, kind=kind)

    native().use_isa("baseline")
    wanted = product(linear, torch.eye(96))
    native().use_isa(isa)
    found = product(linear, torch.eye(96))

    last_bit = 2.0 ** (wanted.abs().clamp_min(2**-8).log2().floor() - 7)
    errors = (found - wanted) / last_bit
    assert errors.abs().max() < most
    assert (errors * wanted.sign()).mean().abs() < 0.03
    assert found[:32, 3].eq(0).all()


@pytest.mark.parametrize("rows", [1, 40])
def test_a_row_that_is_no_number_spoils_no_other(isa: str, rows: int) -> None:
    torch.manual_seed(0)
    x, linear = torch.randn(rows, 64), pack(native(), Pages(), torch.randn(32, 64), kind=INT8)
    spoiled = x.clone()
    spoiled[-1] = torch.nan

    found = product(linear, spoiled)

    assert found[-1].isnan().all()
    assert torch.equal(found[:-1], product(linear, x)[:-1])
