"""Rows with one token: any length, in any number of shares, through tables with rubbish where nothing may be read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from executor.attention.triton import Workspace
from executor.gpu.kernels.decode import MAX_SPLITS, decode, num_splits
from executor.gpu.kernels.paged import num_multiprocessors
from tests.gpu.paged_scene import Layer, PagedScene

GPU = torch.cuda.is_available()
LENS = (1, 15, 16, 17, 63, 64, 65, 130, 200)
MORE = (1, 31, 300, 511, 512, 513, 1000, 4097) if GPU else ()


def decodes(lens: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(length - 1, 1) for length in lens]


def in_shares(scene: PagedScene, splits: int) -> Tensor:
    out = scene.poisoned_out()
    num_rows, num_heads, dim = out.shape
    parts = torch.full((num_rows * num_heads * splits * dim,), torch.nan, device=scene.device)
    lse = torch.full((num_rows * num_heads * splits,), torch.nan, device=scene.device)
    query = scene.query.to(scene.device)
    decode(query, scene.cache, scene.paged_rows, scene.options, out, parts, lse, splits=splits)
    return out.cpu()


def test_rows_of_every_length_around_blocks_and_tiles(device: torch.device) -> None:
    scene = PagedScene(decodes((*LENS, *MORE)), Layer(num_kv_heads=1), device)

    scene.check(scene.attend())


EVERYTHING = Layer(window=100, sinks=True, softcap=3.0)


@pytest.mark.parametrize(
    ("splits", "layer"), [*((splits, Layer()) for splits in (1, 2, 3, MAX_SPLITS)), (1, EVERYTHING), (3, EVERYTHING)]
)
def test_any_number_of_shares_gives_the_same(device: torch.device, splits: int, layer: Layer) -> None:
    scene = PagedScene(decodes((1, 65, 300)), replace(layer, num_kv_heads=1), device)

    scene.check(in_shares(scene, splits))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 29])
def test_every_group_size(device: torch.device, group: int) -> None:
    scene = PagedScene(decodes((90,)), Layer(num_kv_heads=1, group=group), device)

    scene.check(scene.attend())


@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (64, 64), (80, 80), (128, 128), (192, 128), (48, 64)])
def test_every_head_dimension(device: torch.device, key_dim: int, value_dim: int) -> None:
    scene = PagedScene(decodes((90,)), Layer(key_dim=key_dim, value_dim=value_dim, num_kv_heads=1), device)

    scene.check(scene.attend())


@pytest.mark.parametrize("block_size", [4, 16, 32, 48, 256])
def test_every_block_size(device: torch.device, block_size: int) -> None:
    scene = PagedScene(decodes((48, 49, 257)), Layer(block_size=block_size, num_kv_heads=1), device)

    scene.check(scene.attend())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype(device: torch.device, dtype: torch.dtype) -> None:
    scene = PagedScene(decodes((1, 150)), Layer(dtype=dtype, key_dim=128, num_kv_heads=1), device)

    scene.check(scene.attend())


@pytest.mark.parametrize("window", [1, 5, 16, 40, 1000])
def test_a_window_may_begin_anywhere_in_a_block_and_nothing_before_that_block_is_read(
    device: torch.device, window: int
) -> None:
    scene = PagedScene(decodes((3, 41, 170)), Layer(window=window, num_kv_heads=1), device)

    scene.check(scene.attend())


def test_sinks_and_soft_caps_change_the_scores(device: torch.device) -> None:
    scene = PagedScene(decodes((1, 100)), Layer(sinks=True, softcap=2.0), device)

    scene.check(scene.attend())


@pytest.mark.parametrize("splits", [1, 4])
def test_padding_rows_give_zeros(device: torch.device, splits: int) -> None:
    scene = PagedScene(decodes((5, 70)), Layer(sinks=True, num_kv_heads=1), device, padding=3)

    out = in_shares(scene, splits)

    assert torch.equal(out[2:], torch.zeros_like(out[2:]))
    scene.check(out)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_gets_the_same_bits_at_any_place_of_the_batch(device: torch.device, splits: int) -> None:
    scene = PagedScene(decodes((70, 5, 130, 16)), Layer(dtype=torch.bfloat16, num_kv_heads=1), device)
    wanted = in_shares(scene, splits)
    order = torch.tensor([2, 0, 3, 1])
    scene.query = scene.query[order]
    inputs = scene.inputs
    scene.inputs = replace(
        inputs, seq_lens=inputs.seq_lens[order.to(device)], table_rows=inputs.table_rows[order.to(device)]
    )

    assert torch.equal(in_shares(scene, splits), wanted[order])


def test_queries_and_outputs_may_be_slices_of_larger_rows(device: torch.device) -> None:
    scene = PagedScene(decodes((20, 40)), Layer(), device)
    wide = torch.full((2, 7, 64), torch.nan, device=device)  # as a product of Q, K and V leaves them
    wide[:, 1:5] = scene.query.to(device)
    out = torch.full((2, 4, 80), torch.nan, device=device)
    nothing = torch.empty(0, device=device)

    decode(
        wide[:, 1:5], scene.cache, scene.paged_rows, scene.options, out[:, :, :64], nothing, nothing, splits=1
    )  # fmt: skip

    scene.check(out[:, :, :64])
    assert out[:, :, 64:].isnan().all()


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8, 128])
def test_few_rows_are_read_in_shares_and_many_in_one_piece(device: torch.device, num_kv_heads: int) -> None:
    splits = [num_splits(rows, num_kv_heads, device) for rows in range(1, 1025)]

    assert splits == sorted(splits, reverse=True)
    assert splits[0] == max(1, min(MAX_SPLITS, 4 * num_multiprocessors(device) // num_kv_heads))
    assert splits[-1] == 1


def test_a_workspace_has_room_for_any_number_of_rows_up_to_its_own(device: torch.device) -> None:
    shape = Layer(num_kv_heads=2, group=3, key_dim=128, value_dim=64).shape

    workspace = Workspace([shape], max_rows=64, device=device)

    splits = {rows: num_splits(rows, shape.num_kv_heads, device) for rows in range(1, 65)}
    needed = max(rows * shape.num_heads * each for rows, each in splits.items() if each > 1)
    assert workspace.parts_lse.numel() == needed
    assert workspace.parts.numel() == needed * shape.value_dim


@pytest.mark.gpu
def test_a_captured_graph_serves_other_lengths_than_it_was_captured_with(device: torch.device) -> None:
    scene = PagedScene(decodes((100, 300, 1000)), Layer(dtype=torch.bfloat16, key_dim=128), device, padding=1)
    query, out = scene.query.to(device), scene.poisoned_out()
    seq_lens = scene.inputs.seq_lens.clone()
    workspace = Workspace([scene.layer.shape], max_rows=4, device=device)

    def step() -> None:
        decode(query, scene.cache, scene.paged_rows, scene.options, out, workspace.parts, workspace.parts_lse)

    scene.inputs.seq_lens.clamp_(max=1)  # the padding row stays empty: its table names no block
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    out.fill_(torch.nan)
    scene.inputs.seq_lens.copy_(seq_lens)
    graph.replay()

    scene.check(out)
