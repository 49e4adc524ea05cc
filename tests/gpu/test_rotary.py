"""Head norms, rotary embedding and the way into the slab, against the same arithmetic in float32."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from executor.gpu.kernels.rotary import rope_and_store

NUM_BLOCKS, BLOCK_SIZE = 5, 4
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    num_heads: int = 4
    num_kv_heads: int = 2
    dim: int = 64
    rotary_dim: int = 64
    norms: bool = False


HALF = (torch.float16, torch.bfloat16)
CASES = [
    Case(),
    Case(norms=True),
    Case(num_heads=9, num_kv_heads=3),
    Case(num_heads=20, num_kv_heads=1, dim=16, rotary_dim=16),
    Case(num_heads=2, num_kv_heads=2, dim=80, rotary_dim=80, norms=True),
    Case(dim=80, rotary_dim=32),
    Case(dim=24, rotary_dim=12, norms=True),
    Case(dim=32, rotary_dim=0),
    Case(dim=32, rotary_dim=0, norms=True),
]


class World:
    """A few tokens and a slab of NaN."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        self.case = case
        self.slots = [3, 17, -1, 8, 0]
        self.positions = [0, 7, 2, 1, 63]
        width = (case.num_heads + 2 * case.num_kv_heads) * case.dim
        self.qkv = torch.randn((len(self.slots), width), generator=draw).to(dtype).to(device)
        angles = torch.arange(64)[:, None] / 100 ** torch.linspace(0, 1, case.rotary_dim // 2)
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).to(device) if case.rotary_dim else None
        weights = (1 + torch.randn((2, case.dim), generator=draw) / 4).to(dtype).to(device)
        self.q_norm = weights[0] if case.norms else None
        self.k_norm = weights[1] if case.norms else None
        shape = (NUM_BLOCKS, case.num_kv_heads, BLOCK_SIZE, case.dim)
        self.keys, self.values = (torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2))

    def run(self, out_query: Tensor | None = None) -> Tensor:
        return rope_and_store(
            self.qkv,
            torch.tensor(self.positions, dtype=torch.int32, device=self.qkv.device),
            self.cos_sin,
            torch.tensor(self.slots, dtype=torch.int32, device=self.qkv.device),
            self.keys,
            self.values,
            num_heads=self.case.num_heads,
            num_kv_heads=self.case.num_kv_heads,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            epsilon=1e-6,
            out_query=out_query,
        )

    def wanted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q (T, num_heads, D), K and V (T, num_kv_heads, D), in float32."""
        kv = self.case.num_kv_heads
        heads = self.qkv.float().view(len(self.slots), -1, self.case.dim)
        query, key, value = torch.split(heads, [self.case.num_heads, kv, kv], dim=1)
        return self._turned(query, self.q_norm), self._turned(key, self.k_norm), value

    def _turned(self, heads: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            heads = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()
        if self.cos_sin is None:
            return heads
        half = self.case.rotary_dim // 2
        cos, sin = self.cos_sin[self.positions, None].chunk(2, dim=2)
        first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in CASES),
        *((case, dtype) for case in (Case(norms=True), Case(dim=80, rotary_dim=32)) for dtype in HALF),
    ],
    ids=str,
)
def test_queries_are_turned_and_keys_and_values_lie_in_their_slots(
    case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    world = World(case, dtype, device)
    query, key, value = world.wanted()
    near = TOLERANCE[dtype]

    found = world.run()

    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), query, rtol=near, atol=near)  # also that of the token without a slot
    stored = torch.tensor([slot >= 0 for slot in world.slots], device=device)
    blocks, places = torch.tensor(
        [divmod(slot, BLOCK_SIZE) for slot in world.slots if slot >= 0], device=device
    ).unbind(1)
    torch.testing.assert_close(world.keys[blocks, :, places].float(), key[stored], rtol=near, atol=near)
    assert torch.equal(world.values[blocks, :, places].float(), value[stored])
    for slab in (world.keys, world.values):
        assert (~slab.isnan()).sum() == stored.sum() * case.num_kv_heads * case.dim, "something else was written"


def test_a_token_is_the_same_alone_and_in_a_crowd(device: torch.device) -> None:
    crowd, alone = (World(Case(norms=True), torch.float16, device) for _ in range(2))
    alone.qkv, alone.positions, alone.slots = alone.qkv[1:2], alone.positions[1:2], alone.slots[1:2]

    assert torch.equal(crowd.run()[1:2], alone.run())
    assert torch.equal(crowd.keys[4].nan_to_num(9), alone.keys[4].nan_to_num(9))


def test_queries_go_where_they_are_told_to(device: torch.device) -> None:
    world = World(Case(), torch.float32, device)
    out = torch.full((5, 4, 64), float("nan"), device=device)

    assert world.run(out) is out
    assert torch.equal(out, World(Case(), torch.float32, device).run())


def test_rows_of_a_wider_product_are_read_where_they_lie(device: torch.device) -> None:
    world, other = (World(Case(), torch.float32, device) for _ in range(2))
    other.qkv = torch.nn.functional.pad(other.qkv, (0, 64), value=float("nan"))[:, :-64]

    assert torch.equal(world.run(), other.run())
