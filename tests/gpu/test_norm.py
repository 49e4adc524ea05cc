"""RMS norms on the device: what Transformers computes, and the sum that goes with it."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from executor.gpu.kernels.norm import add_rms_norm, rms_norm
from executor.gpu.triton_case import is_interpreted
from tests.gpu.rounding import steps_apart

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A sum in another order moves a last digit. The interpreter cuts digits off where bfloat16 would be rounded, twice.
STEPS = {torch.float32: 16, torch.float16: 2, torch.bfloat16: 4 if is_interpreted() else 2}


def noise(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def assert_nearly(found: torch.Tensor, wanted: torch.Tensor) -> None:
    steps = steps_apart(found, wanted)
    assert steps.max() <= STEPS[found.dtype]
    if found.dtype is torch.float16 or (found.dtype is torch.bfloat16 and not is_interpreted()):
        assert (steps == 0).float().mean() > 0.98


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 64, 576, 1000])
def test_a_norm_is_that_of_llama(hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    norm = LlamaRMSNorm(hidden, 1e-5).to(dtype).to(device)
    norm.weight.data = 1 + noise(hidden, dtype=dtype, device=device, seed=1) / 4
    x = noise(5, hidden, dtype=dtype, device=device)

    assert_nearly(rms_norm(x, norm.weight, 1e-5), norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_with_an_offset_is_that_of_gemma(dtype: torch.dtype, device: torch.device) -> None:
    norm = Gemma2RMSNorm(96, 1e-6).to(dtype).to(device)
    norm.weight.data = noise(96, dtype=dtype, device=device, seed=1) / 4
    x = noise(5, 96, dtype=dtype, device=device)

    assert_nearly(rms_norm(x, norm.weight, 1e-6, offset=1.0), norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_residual_takes_up_x_and_the_norm_is_that_of_the_rounded_sum(
    offset: float, dtype: torch.dtype, device: torch.device
) -> None:
    x, residual = (noise(3, 200, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    weight = noise(200, dtype=dtype, device=device, seed=3)
    before = residual.clone()

    normed = add_rms_norm(x, residual, weight, 1e-6, offset=offset)

    assert steps_apart(residual, before + x).max() <= (1 if dtype is torch.bfloat16 and is_interpreted() else 0)
    assert torch.equal(normed, rms_norm(residual, weight, 1e-6, offset=offset))


def test_a_residual_may_be_finer_than_the_rows(device: torch.device) -> None:
    x = noise(2, 32, dtype=torch.float16, device=device)
    residual = noise(2, 32, dtype=torch.float32, device=device, seed=1)
    wanted = residual + x
    weight = torch.ones(32, dtype=torch.float16, device=device)

    normed = add_rms_norm(x, residual, weight, 1e-6)

    assert torch.equal(residual, wanted)
    assert normed.dtype is torch.float16


def test_rows_may_lie_apart_and_be_normed_in_place(device: torch.device) -> None:
    wide = noise(4, 96, dtype=torch.float32, device=device)
    x = wide[:, 32:64]
    weight = noise(32, dtype=torch.float32, device=device, seed=1)
    whole = x.contiguous()
    wanted = rms_norm(whole, weight, 1e-6)

    assert torch.equal(rms_norm(x, weight, 1e-6), wanted)
    assert torch.equal(rms_norm(x[:, None], weight, 1e-6), wanted[:, None])
    rms_norm(whole, weight, 1e-6, out=whole)
    assert torch.equal(whole, wanted)


def test_no_rows_are_no_work(device: torch.device) -> None:
    none = torch.empty(0, 32, device=device)

    assert rms_norm(none, torch.ones(32, device=device), 1e-6).shape == (0, 32)
