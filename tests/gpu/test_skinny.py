"""The product of a few rows against torch's."""

from __future__ import annotations

import pytest
import torch

from executor.gpu.kernels.skinny import SkinnyLinears
from tests.gpu.steps import DEVICE

# Few outputs and many inputs are cut into splits; sizes that are no multiple of a block have an edge.
SHAPES = [(64, 96), (40, 1024), (16, 1300), (70, 33)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_that_of_torch(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(1)
    outputs, inputs = shape
    weight, shift = torch.randn(outputs, inputs, device=DEVICE), torch.randn(outputs, device=DEVICE)
    linear = SkinnyLinears(DEVICE).make(weight, shift if bias else None)
    for count in (1, 3, 16, 17):
        x = torch.randn(count, inputs, device=DEVICE)
        wanted = torch.nn.functional.linear(x.double(), weight.double(), shift.double() if bias else None)
        for _ in range(2):  # what one product leaves behind must not be in the next one
            out = torch.full((count, outputs), torch.nan, device=DEVICE)

            linear(x, out)

            torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-4)


def test_products_of_one_device_share_their_memory() -> None:
    torch.manual_seed(2)
    linears = SkinnyLinears(DEVICE)
    weights = [torch.randn(outputs, 1024, device=DEVICE) for outputs in (16, 48, 32)]
    made = [linears.make(weight, None) for weight in weights]
    x = torch.randn(2, 1024, device=DEVICE)

    for weight, linear in zip(weights, made, strict=True):
        out = torch.empty(2, len(weight), device=DEVICE)
        linear(x, out)
        torch.testing.assert_close(out, x @ weight.t(), rtol=1e-4, atol=1e-3)


def test_half_precision_is_summed_in_float32() -> None:
    torch.manual_seed(3)
    weight, x = (torch.randn(count, 2048, device=DEVICE).half() for count in (24, 5))
    out = torch.empty(5, 24, dtype=torch.float16, device=DEVICE)

    SkinnyLinears(DEVICE).make(weight, None)(x, out)

    torch.testing.assert_close(out.double(), x.double() @ weight.double().t(), rtol=2e-3, atol=2e-2)
