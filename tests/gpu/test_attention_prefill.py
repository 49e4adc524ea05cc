"""Rows with several tokens: prompts, chunks and prefixes, any mixture of lengths, decode rows before them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from executor.gpu.kernels.prefill import prefill
from tests.gpu.paged_scene import Layer, PagedScene

GPU = torch.cuda.is_available()
MIXED = [(0, 1), (40, 1), (20, 7), (0, 9), (16, 16), (15, 2), (0, 70), (63, 66)]


def test_prompts_chunks_and_decodes_in_one_step(device: torch.device) -> None:
    more = [(0, 700), (511, 513), (3000, 40), (8, 1000)] if GPU else []
    scene = PagedScene(MIXED + more, Layer(num_kv_heads=2 if GPU else 1), device)

    scene.check(scene.attend())


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 29])
def test_every_group_size(device: torch.device, group: int) -> None:
    scene = PagedScene([(20, 7), (0, 35)], Layer(num_kv_heads=1, group=group, dtype=torch.float16), device)

    scene.check(scene.attend())


@pytest.mark.parametrize(
    ("key_dim", "value_dim", "dtype"),
    [
        *((*dims, torch.float16) for dims in [(16, 16), (64, 64), (80, 80), (128, 128), (192, 128), (48, 64)]),
        *((80, 80, dtype) for dtype in (torch.bfloat16, torch.float32)),
    ],
)
def test_every_head_dimension_and_dtype(device: torch.device, key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    layer = Layer(key_dim=key_dim, value_dim=value_dim, num_kv_heads=1, dtype=dtype)
    scene = PagedScene([(20, 7), (0, 35)], layer, device)

    scene.check(scene.attend())


@pytest.mark.parametrize("block_size", [4, 16, 32, 48, 256])
def test_every_block_size(device: torch.device, block_size: int) -> None:
    layer = Layer(block_size=block_size, num_kv_heads=1, dtype=torch.float16)
    scene = PagedScene([(47, 2), (250, 30)], layer, device)

    scene.check(scene.attend())


@pytest.mark.parametrize("window", [1, 5, 16, 40, 1000])
def test_a_window_may_begin_anywhere_in_a_block_and_nothing_before_that_block_is_read(
    device: torch.device, window: int
) -> None:
    layer = Layer(window=window, num_kv_heads=1, dtype=torch.float16)
    scene = PagedScene([(40, 3), (0, 70), (150, 9)], layer, device)

    scene.check(scene.attend())


def test_sinks_and_soft_caps_change_the_scores(device: torch.device) -> None:
    scene = PagedScene([(20, 7), (0, 35)], Layer(sinks=True, softcap=2.0, window=13, dtype=torch.float16), device)

    scene.check(scene.attend())


def test_more_rows_than_are_counted_at_once(device: torch.device) -> None:
    layer = Layer(num_kv_heads=1, group=1, key_dim=16, dtype=torch.float16)
    scene = PagedScene([(3, 1), (9, 1)] + [(n % 5, 2 + n % 3) for n in range(130)], layer, device)

    scene.check(scene.attend())


def test_rows_of_one_token_are_left_to_others(device: torch.device) -> None:
    scene = PagedScene(MIXED[:5], Layer(dtype=torch.float16), device)
    out = scene.poisoned_out()

    prefill(scene.query.to(device), scene.cache, scene.paged_rows, scene.options, out)

    assert out[:2].isnan().all()
    torch.testing.assert_close(out[2:].cpu().double(), scene.expected()[2:], rtol=2e-3, atol=2e-3)


def test_a_row_of_one_token_may_also_go_with_the_others(device: torch.device) -> None:
    scene = PagedScene([(40, 1), (7, 1), (20, 7)], Layer(dtype=torch.float16), device)
    scene.inputs = replace(scene.inputs, num_decodes=0)

    scene.check(scene.attend())


def test_a_row_gets_the_same_bits_in_any_company(device: torch.device) -> None:
    layer = Layer(num_kv_heads=1, dtype=torch.float16)
    crowd = PagedScene([(5, 1), (0, 30), (17, 75), (40, 3)], layer, device)
    alone = replace(
        crowd.inputs,
        num_decodes=0,
        query_start_loc=torch.tensor([0, 75], dtype=torch.int32, device=device),
        seq_lens=crowd.inputs.seq_lens[2:3],
        table_rows=crowd.inputs.table_rows[2:3],
    )
    wanted = crowd.attend()[31:106]

    crowd.query, crowd.inputs = crowd.query[31:106], alone

    assert torch.equal(crowd.attend(), wanted)


def test_empty_rows_behind_the_decodes_and_at_the_end_change_nothing(device: torch.device) -> None:
    scene = PagedScene([*MIXED[:6], (0, 70)], Layer(num_kv_heads=1, group=1, dtype=torch.float16), device)
    expected, inputs, num_tokens = scene.expected(), scene.inputs, len(scene.query)

    def padded(column: torch.Tensor, decode: int, last: int) -> torch.Tensor:
        parts = column[:2], torch.full_like(column[:3], decode), column[2:], torch.full_like(column[:2], last)
        return torch.cat(parts)

    scene.inputs = replace(
        inputs,
        num_decodes=5,  # the last three of them are rows of nobody, whose places are those of the rows behind them
        seq_lens=padded(inputs.seq_lens, 0, 0),
        table_rows=padded(inputs.table_rows, 0, 0),
        query_start_loc=torch.cat((inputs.query_start_loc[:1], padded(inputs.query_start_loc[1:], 2, num_tokens))),
    )
    scene.query = torch.cat((scene.query, scene.query[:40]))

    out = scene.attend()

    torch.testing.assert_close(out[:num_tokens].double(), expected, rtol=2e-3, atol=2e-3)
    assert out[num_tokens:].isnan().all()
