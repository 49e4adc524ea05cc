"""K and V in 8 bits (e4m3): what is stored is as near as 8 bits allow, and attention is that over what is stored.

The interpreter is helped to round, and knows no NaN of 8 bits: the cast itself is for a GPU to show.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from executor.attention.protocol import LayerNeeds, LayerOptions
from executor.attention.triton import TritonAttention
from executor.gpu.kernels.decode import decode
from executor.gpu.kernels.paged import PagedRows
from executor.gpu.kernels.prefill import prefill
from executor.gpu.kernels.rotary import rope_and_store
from executor.gpu.kernels.store import store
from executor.kv_cache import LayerCache, LayerShape, SlabFormat
from tests.gpu.paged_scene import Layer, PagedScene
from tests.gpu.test_attention_decode import in_shares

FP8 = torch.float8_e4m3fn
SCALE = 0.5
LARGEST = 448.0
EVERY = torch.arange(256).to(torch.uint8).view(FP8).float()
EVERY = EVERY[EVERY.isfinite()]  # all numbers of 8 bits


def slab_of(numbers: Tensor, *, by_rotary: bool, scale: float = SCALE) -> Tensor:
    """What lies in the slab where `numbers` (T, 64) were stored as K and as V of one head: (2, T, 64)."""
    device, count = numbers.device, len(numbers)
    keys, values = (torch.zeros(-(-count // 16), 1, 16, 64, device=device).to(FP8) for _ in "kv")
    slots = torch.arange(count, dtype=torch.int32, device=device)
    if by_rotary:
        rope_and_store(
            numbers.repeat(1, 3), slots, None, slots, keys, values,
            num_heads=1, num_kv_heads=1, key_scale=scale, value_scale=scale,
        )  # fmt: skip
    else:
        cache = LayerCache(
            keys=keys, values=values, block_size=16, format=SlabFormat(dtype=FP8), key_scale=scale, value_scale=scale
        )
        store(numbers[:, None], numbers[:, None], cache, slots)
    return torch.stack([keys.view(-1, 64)[:count], values.view(-1, 64)[:count]])


@pytest.fixture(params=[False, True], ids=["store", "rope_and_store"])
def by_rotary(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_number_of_8_bits_is_stored_as_it_is_and_what_is_larger_as_the_largest(
    device: torch.device, dtype: torch.dtype, by_rotary: bool
) -> None:
    beyond = torch.tensor([449.0, 460.0, 7e3, 3e4, torch.inf])
    numbers = torch.nn.functional.pad(torch.cat([EVERY, beyond, -beyond]), (0, 56)).view(-1, 64)

    stored = slab_of((numbers * SCALE).to(dtype).to(device), by_rotary=by_rotary).float().cpu()

    assert torch.equal(stored, numbers.clamp(-LARGEST, LARGEST).expand_as(stored))


def test_numbers_are_rounded_as_torch_rounds_them(device: torch.device, by_rotary: bool) -> None:
    numbers = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(device)
    numbers[1::2] /= 64  # also those that have fewer bits
    numbers[0, :2] = torch.tensor([1.0625, 1.1875])  # half way: the even one is taken

    stored = slab_of(numbers, by_rotary=by_rotary, scale=1.0).float()

    assert torch.equal(stored, numbers.to(FP8).float().expand_as(stored))


@pytest.mark.gpu
def test_nan_stays_nan(device: torch.device, by_rotary: bool) -> None:
    numbers = torch.ones(2, 64, dtype=torch.bfloat16, device=device)
    numbers[1, 3] = torch.nan

    stored = slab_of(numbers, by_rotary=by_rotary).float()

    assert torch.equal(stored.isnan(), numbers.isnan().expand_as(stored))


@pytest.mark.parametrize(("dtype", "splits"), [(torch.bfloat16, 1), (torch.float16, 3), (torch.float32, 1)])
def test_rows_of_one_token_attend_to_what_is_stored(device: torch.device, dtype: torch.dtype, splits: int) -> None:
    layer = Layer(num_kv_heads=1, key_dim=128, dtype=dtype, slab=FP8, key_scale=0.5, value_scale=3.0)
    scene = PagedScene([(0, 1), (63, 1), (150, 1)], layer, device)

    scene.check(in_shares(scene, splits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_prompts_and_chunks_attend_to_what_is_stored(device: torch.device, dtype: torch.dtype) -> None:
    layer = Layer(num_kv_heads=1, dtype=dtype, slab=FP8, key_scale=0.5, value_scale=3.0, softcap=2.0, sinks=True)
    scene = PagedScene([(40, 1), (20, 7), (0, 80)], layer, device)

    scene.check(scene.attend())


def attended(query: Tensor, keys: Tensor, values: Tensor, *, as_prompt: bool) -> Tensor:
    """One row of one token, one head, over K and V (T, 64) in 8 bits; the same row twice. (2, 64)."""
    count, device = len(keys), query.device
    blocks = -(-count // 16)

    def slab(numbers: Tensor) -> Tensor:
        return torch.nn.functional.pad(numbers, (0, 0, 0, 16 * blocks - count)).view(blocks, 1, 16, 64).to(FP8)

    cache = LayerCache(keys=slab(keys), values=slab(values), block_size=16, format=SlabFormat(dtype=FP8))
    rows = PagedRows(
        num_decodes=0 if as_prompt else 2,
        query_start_loc=torch.arange(3, dtype=torch.int32, device=device),
        seq_lens=torch.full((2,), count, dtype=torch.int32, device=device),
        block_tables=torch.arange(blocks, dtype=torch.int32, device=device).repeat(2, 1),
    )
    out, options = torch.empty_like(query), LayerOptions(scale=1.0)
    nothing = torch.empty(0, device=device)
    decode(query, cache, rows, options, out, nothing, nothing, splits=1)
    prefill(query, cache, rows, options, out)
    return out[:, 0].float().cpu()


@pytest.mark.parametrize("as_prompt", [False, True], ids=["a token", "a prompt"])
def test_many_small_weights_beside_a_large_one_are_not_lost(device: torch.device, as_prompt: bool) -> None:
    keys, values = torch.zeros(512, 64, device=device), torch.full((512, 64), 448.0, device=device)
    keys[0, 0], values[0] = 16.0, 0.0
    query = torch.zeros(2, 1, 64, dtype=torch.bfloat16, device=device)
    query[:, :, 0] = 1.1875  # times 16: e ** -19, for each of the others

    found = attended(query, keys, values, as_prompt=as_prompt)

    torch.testing.assert_close(found, torch.full((2, 64), 448 * 511 * math.exp(-19)), rtol=1e-2, atol=0)


@pytest.mark.parametrize("as_prompt", [False, True], ids=["a token", "a prompt"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter is numpy
def test_a_query_that_is_not_finite_shows_in_its_row_alone(
    device: torch.device, number: float, as_prompt: bool
) -> None:
    draw = torch.Generator().manual_seed(1)
    query, keys, values = (torch.randn(n, 64, generator=draw).to(device) for n in (1, 40, 40))
    query = query.bfloat16().expand(2, 1, 64).clone()
    alone = attended(query, keys, values, as_prompt=as_prompt)
    query[1, 0, 5] = number

    found = attended(query, keys, values, as_prompt=as_prompt)

    assert torch.equal(found[0], alone[0]) and bool(found[1].isnan().all())


@pytest.mark.gpu
@pytest.mark.parametrize("as_prompt", [False, True], ids=["a token", "a prompt"])
def test_keys_and_values_that_are_not_numbers_show(device: torch.device, as_prompt: bool) -> None:
    query, keys, values = (torch.ones(n, 64, device=device) for n in (2, 40, 40))
    query, spoiled = query.bfloat16()[:, None], torch.ones(40, 64, device=device)
    spoiled[7, 9] = torch.nan

    assert attended(query, spoiled, values, as_prompt=as_prompt).isnan().all()
    assert attended(query, keys, spoiled, as_prompt=as_prompt)[:, 9].isnan().all()


@pytest.mark.parametrize(
    ("capability", "says"), [((8, 0), "need compute capability 8.9"), ((8, 9), None), ((9, 0), None)]
)
def test_a_gpu_that_knows_no_numbers_of_8_bits_is_refused(
    capability: tuple[int, int], says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    shape = LayerShape(num_heads=4, num_kv_heads=2, key_dim=64, value_dim=64)
    needs = LayerNeeds(shape=shape, dtype=torch.bfloat16, device=torch.device("cuda"), kv_dtype=FP8)

    found = TritonAttention().why_not(needs)

    assert found is None if says is None else says in str(found)
