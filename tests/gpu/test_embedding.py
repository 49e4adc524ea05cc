"""The embedding kernel: the rows of the tokens that lie at some places of the pool."""

from __future__ import annotations

import pytest
import torch

from executor.gpu.kernels.embedding import embed
from tests.gpu.steps import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [48, 1536])
def test_each_token_has_its_row_bit_for_bit(hidden: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = torch.randn(9, hidden, dtype=dtype, device=DEVICE)
    pool = torch.randint(0, 9, (3, 5), dtype=torch.int32, device=DEVICE)
    places = torch.tensor([14, 0, 7, 7], dtype=torch.int32, device=DEVICE)
    out = torch.full((4, hidden), torch.nan, dtype=dtype, device=DEVICE)

    assert embed(pool, places, table, out) is out

    assert torch.equal(out, table[pool.view(-1)[places.long()].long()])


def test_what_is_no_token_has_a_row_of_zeros() -> None:
    table = torch.ones(9, 32, device=DEVICE)
    pool = torch.tensor([[-1, 9, 8]], dtype=torch.int32, device=DEVICE)
    places = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
    out = torch.full((3, 32), torch.nan, device=DEVICE)

    embed(pool, places, table, out)

    assert out.sum(1).tolist() == [0, 0, 32]
