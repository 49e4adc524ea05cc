"""How far two tensors of one dtype lie apart, counted in numbers of that dtype."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def steps_apart(found: Tensor, wanted: Tensor) -> Tensor:
    """How many steps, from one number of the dtype to the next, lead from each found to each wanted number."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    return (_order(found.cpu()) - _order(wanted.cpu())).abs()


def _order(numbers: Tensor) -> Tensor:
    assert not numbers.isnan().any()
    bits = numbers.contiguous().view(_BITS[numbers.dtype]).long()
    lowest = -(1 << (8 * numbers.dtype.itemsize - 1))
    return torch.where(bits < 0, lowest - bits, bits)
