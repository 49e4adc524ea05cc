"""The gate of an MLP on the device."""

from __future__ import annotations

import pytest
import torch

from executor.gpu.kernels.activation import silu_mul
from executor.gpu.triton_case import is_interpreted
from tests.gpu.rounding import steps_apart

# The exponential's last digit. The interpreter cuts digits off where bfloat16 would be rounded, twice.
STEPS = {torch.float32: 16, torch.float16: 2, torch.bfloat16: 4 if is_interpreted() else 2}


@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize("width", [1, 96, 1024, 1500])
def test_silu_of_the_gate_times_up_is_what_torch_gives(width: int, dtype: torch.dtype, device: torch.device) -> None:
    rows = torch.randn((3, 2 * width), generator=torch.Generator().manual_seed(0)).mul(4).to(dtype).to(device)

    found = silu_mul(rows)

    wanted = torch.nn.functional.silu(rows[:, :width]) * rows[:, width:]
    steps = steps_apart(found, wanted)
    assert steps.max() <= STEPS[dtype]
    if not (dtype is torch.bfloat16 and is_interpreted()) and dtype is not torch.float32:
        assert (steps == 0).float().mean() > 0.97


@pytest.mark.filterwarnings("ignore:overflow")  # exp(1e4) is infinite, and the quotient 0: as it should be
def test_large_gates_neither_overflow_nor_lose_their_sign(device: torch.device) -> None:
    rows = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]], device=device)

    assert silu_mul(rows).tolist()[0] == pytest.approx([0, 0, 0, 90, 1e4], abs=1e-30)


def test_the_result_goes_where_it_is_told_to(device: torch.device) -> None:
    wide = torch.randn((2, 100), generator=torch.Generator().manual_seed(0)).to(device)
    out = torch.full((2, 16), float("nan"), device=device)

    assert silu_mul(wide[:, 4:36], out) is out
    assert torch.equal(out, silu_mul(wide[:, 4:36].contiguous()))
    assert silu_mul(wide[:0]).shape == (0, 50)
