"""Graphs of steps: which there are, which one a step takes, and that a captured step keeps its addresses."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from executor.gpu.device import Graph, HostDevice, Work
from executor.gpu.graphs import BUCKETS, StepGraph, StepGraphs, buckets_for, mixed_shapes
from executor.gpu.inputs import StepInputs
from executor.gpu.packing import NO_ROWS, Layout, Padding, Shape
from executor.gpu.tables import Updates

PADDING = Padding(line=300, place=300 * 64)


class Doubling:
    """A forward whose tokens are twice the positions; the logits are the positions."""

    def __init__(self) -> None:
        self.seen: list[StepInputs] = []

    def __call__(self, inputs: StepInputs, tokens: Tensor) -> Tensor:
        self.seen.append(inputs)
        positions = inputs.positions[inputs.logits_indices.long()]
        tokens.copy_(2 * positions)
        return positions[:, None].float()

    @property
    def decodes(self) -> list[int]:
        """Rows of what was computed of decode rows alone, each but once."""
        return list(dict.fromkeys(len(i.seq_lens) for i in self.seen if i.num_decodes == len(i.seq_lens)))

    @property
    def mixed(self) -> list[tuple[int, int]]:
        """Tokens and decode rows of what else was computed."""
        return list(dict.fromkeys((len(i.positions), i.num_decodes) for i in self.seen if i.max_query_len > 1))


def graphs_for(
    max_rows: int, device: HostDevice | None = None, compute: Doubling | None = None, *, max_tokens: int = 64
) -> StepGraphs:
    return StepGraphs(
        device or HostDevice(),
        compute or Doubling(),
        max_rows=max_rows,
        max_tokens=max_tokens,
        padding=PADDING,
        max_seq_len=64,
    )


def rows_of(graph: StepGraph | None) -> int | None:
    return None if graph is None else graph.shape.num_rows


def step(num_tokens: int, *, decodes: int, prompts: int) -> Shape:
    """Of a step in which all rows sample."""
    rows = decodes + prompts
    return Shape(num_tokens=num_tokens, num_rows=rows, num_decodes=decodes, num_sampled=rows)


def tokens_and_decodes(graph: StepGraph | None) -> tuple[int, int] | None:
    return None if graph is None else (graph.shape.num_tokens, graph.shape.num_decodes)


def decodes(num_rows: int) -> Shape:
    return Shape.of_decodes(num_rows)


def capture_all(graphs: StepGraphs) -> None:
    while graphs.capture_next():
        pass


def test_the_buckets_are_few_rows_and_then_every_eighth() -> None:
    assert BUCKETS[:6] == (1, 2, 4, 8, 16, 24) and BUCKETS[-2:] == (248, 256) and len(BUCKETS) == 35


@pytest.mark.parametrize(("max_rows", "largest"), [(1, 1), (2, 2), (3, 4), (20, 24), (256, 256), (1000, 256)])
def test_there_are_no_more_graphs_than_steps_can_fill(max_rows: int, largest: int) -> None:
    assert buckets_for(max_rows)[-1] == largest
    assert buckets_for(max_rows) == sorted(set(buckets_for(max_rows)))


@pytest.mark.parametrize(("max_tokens", "max_rows"), [(8192, 256), (2048, 64), (48, 6), (16384, 512), (700, 8)])
def test_every_step_with_prompts_finds_a_graph_that_is_hardly_larger(max_tokens: int, max_rows: int) -> None:
    shapes = mixed_shapes(max_tokens, max_rows)

    assert len(shapes) < 48
    for tokens in range(2, max_tokens + 1):
        rows = min(max_rows, tokens - 1)  # one of two tokens, and all the others decode
        fitting = next(shape for shape in shapes if shape.holds(step(tokens, decodes=rows - 1, prompts=1)))
        assert fitting.num_tokens <= max(384, 1.25 * (tokens - 1)) or tokens in range(385, 513)
    for shape in shapes:
        assert shape.num_decodes <= shape.num_tokens  # a decode row reads the token of its own number
        assert shape.num_sampled <= max_rows


def test_a_step_takes_the_smallest_graph_that_holds_it() -> None:
    graphs = graphs_for(24)
    capture_all(graphs)

    assert [rows_of(graphs.fitting(decodes(rows))) for rows in (1, 2, 3, 8, 9, 17, 24)] == [1, 2, 4, 8, 16, 24, 24]
    assert graphs.fitting(decodes(25)) is None


@pytest.mark.parametrize(
    ("of_the_step", "graph"),
    [
        (step(30, decodes=0, prompts=1), (64, 16)),
        (step(64, decodes=16, prompts=8), (64, 16)),
        (step(64, decodes=17, prompts=8), (64, 64)),
        (step(65, decodes=0, prompts=1), (128, 16)),
        (step(64, decodes=0, prompts=9), (256, 16)),  # room for more rows of several tokens
        (step(513, decodes=1, prompts=1), (640, 16)),
        (step(600, decodes=60, prompts=1), (640, 64)),
        (step(600, decodes=100, prompts=1), (640, 256)),
        (step(1100, decodes=60, prompts=1), (1280, 256)),
        (step(2100, decodes=1, prompts=1), (2560, 256)),
        (step(8192, decodes=192, prompts=64), (8192, 256)),
        (step(4096, decodes=0, prompts=129), (5120, 256)),
        (step(8192, decodes=0, prompts=256), (8192, 256)),
        (step(8193, decodes=0, prompts=1), None),
    ],
)
def test_a_step_with_prompts_takes_the_cheapest_that_holds_all_of_it(
    of_the_step: Shape, graph: tuple[int, int] | None
) -> None:
    graphs = graphs_for(256, max_tokens=8192)
    capture_all(graphs)

    assert tokens_and_decodes(graphs.fitting(of_the_step)) == graph


def test_prompts_that_are_scored_take_no_graph() -> None:
    graphs = graphs_for(24)
    capture_all(graphs)

    assert graphs.fitting(replace(step(30, decodes=0, prompts=1), num_scored=3)) is None
    assert graphs.fitting(replace(decodes(2), num_scored=1)) is None


def test_the_largest_graphs_are_captured_first_then_the_most_useful_ones() -> None:
    device, compute = HostDevice(), Doubling()
    graphs = graphs_for(40, device, compute, max_tokens=400)

    graphs.capture_first()
    assert compute.decodes == [40, 32, 16, 8, 4, 2, 1]
    assert compute.mixed == [(400, 40), (256, 40), (256, 16), (128, 40), (128, 16), (64, 40), (64, 16)]
    assert rows_of(graphs.fitting(decodes(20))) == 32

    capture_all(graphs)
    assert rows_of(graphs.fitting(decodes(20))) == 24
    assert device.num_graphs == len(buckets_for(40)) + len(mixed_shapes(400, 40))


def test_to_see_what_memory_they_take_the_largest_of_each_kind_do() -> None:
    compute = Doubling()

    graphs_for(40, compute=compute, max_tokens=100).capture_largest()

    assert (compute.decodes, compute.mixed) == ([40], [(100, 40)])


def test_until_the_fitting_graph_is_there_a_step_takes_the_next_larger_one() -> None:
    graphs = graphs_for(256, max_tokens=8192)
    assert graphs.fitting(decodes(1)) is None and graphs.fitting(step(30, decodes=0, prompts=1)) is None

    graphs.capture_first()

    assert rows_of(graphs.fitting(decodes(33))) == 64
    assert tokens_and_decodes(graphs.fitting(step(600, decodes=0, prompts=1))) == (1024, 16)
    assert graphs.fitting(step(2100, decodes=0, prompts=1)) is None  # not one of 8192
    capture_all(graphs)
    assert rows_of(graphs.fitting(decodes(33))) == 40
    assert tokens_and_decodes(graphs.fitting(step(600, decodes=0, prompts=1))) == (640, 16)


@pytest.mark.parametrize("shape", [decodes(4), Shape(num_tokens=20, num_rows=7, num_decodes=4, num_sampled=6)])
def test_a_captured_step_keeps_its_addresses(shape: Shape) -> None:
    device, compute = HostDevice(), Doubling()
    graph = StepGraph(device, compute, shape, padding=PADDING, max_seq_len=64)
    addresses: list[list[int]] = []
    for turn in range(3):
        layout = Layout(shape, num_updates=turn)
        updates = Updates(np.zeros(turn, np.int32), np.zeros(turn, np.int32))
        numbers = np.zeros(layout.size, np.int32)
        layout.write(numbers, NO_ROWS, PADDING, updates)
        graph.buffer[: layout.size].copy_(torch.from_numpy(numbers))
        device.queue(graph.replay)
        device.synchronize()
        inputs = compute.seen[-1]
        columns = [getattr(inputs, field.name) for field in fields(inputs)]
        addresses.append([column.data_ptr() for column in columns if isinstance(column, Tensor)])

    assert addresses[0] == addresses[1] == addresses[2]
    assert compute.seen[0] is compute.seen[-1]


def test_a_replay_computes_what_lies_in_the_buffer_then() -> None:
    device = HostDevice()
    graph = StepGraph(device, Doubling(), decodes(2), padding=PADDING, max_seq_len=64)
    inputs = Layout(graph.shape).inputs(graph.buffer, max_query_len=1, max_seq_len=64)
    inputs.logits_indices.copy_(torch.tensor([1, 0]))

    for first in (5, 9):
        inputs.positions.copy_(torch.tensor([first, first + 1]))
        device.queue(graph.replay)
        device.synchronize()
        assert graph.tokens.tolist() == [2 * first + 2, 2 * first]


class Refusing(HostDevice):
    """Captures so many graphs, and no more."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def capture(self, work: Work, /) -> Graph:
        if self.num_graphs == self.most:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().capture(work)


def test_a_graph_that_cannot_be_captured_is_the_last_that_is_tried() -> None:
    graphs = graphs_for(40, Refusing(3))

    graphs.capture_first()

    assert not graphs.capture_next()
    assert [rows_of(graphs.fitting(decodes(rows))) for rows in (1, 33)] == [32, 40]
    assert tokens_and_decodes(graphs.fitting(step(9, decodes=3, prompts=1))) == (64, 40)


def test_where_steps_with_prompts_cannot_be_captured_decode_steps_still_are() -> None:
    device = Refusing(1)
    graphs = graphs_for(40, device)

    graphs.capture_largest()  # of decode rows, then a mixed one
    device.most = 100
    capture_all(graphs)

    assert rows_of(graphs.fitting(decodes(20))) == 24
    assert graphs.fitting(step(9, decodes=3, prompts=1)) is None
