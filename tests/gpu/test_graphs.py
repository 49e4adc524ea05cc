"""Decode graphs: which there are, which one a step takes, and that a captured step keeps its addresses."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from executor.gpu.device import Graph, HostDevice, Work
from executor.gpu.graphs import BUCKETS, DecodeGraph, DecodeGraphs, buckets_for
from executor.gpu.inputs import StepInputs
from executor.gpu.packing import NO_ROWS, Padding
from executor.gpu.tables import Updates

PADDING = Padding(line=300, place=300 * 64)


class Doubling:
    """A forward whose tokens are twice the positions; the logits are the positions."""

    def __init__(self) -> None:
        self.seen: list[StepInputs] = []

    def __call__(self, inputs: StepInputs, tokens: Tensor) -> Tensor:
        self.seen.append(inputs)
        tokens.copy_(2 * inputs.positions)
        return inputs.positions[:, None].float()


def graphs_for(max_rows: int, device: HostDevice | None = None, compute: Doubling | None = None) -> DecodeGraphs:
    return DecodeGraphs(
        device or HostDevice(), compute or Doubling(), max_rows=max_rows, padding=PADDING, max_seq_len=64
    )


def rows_of(graph: DecodeGraph | None) -> int | None:
    return None if graph is None else graph.num_rows


def capture_all(graphs: DecodeGraphs) -> None:
    while graphs.capture_next():
        pass


def test_the_buckets_are_few_rows_and_then_every_eighth() -> None:
    assert BUCKETS[:6] == (1, 2, 4, 8, 16, 24) and BUCKETS[-2:] == (248, 256) and len(BUCKETS) == 35


@pytest.mark.parametrize(("max_rows", "largest"), [(1, 1), (2, 2), (3, 4), (20, 24), (256, 256), (1000, 256)])
def test_there_are_no_more_graphs_than_steps_can_fill(max_rows: int, largest: int) -> None:
    assert buckets_for(max_rows)[-1] == largest
    assert buckets_for(max_rows) == sorted(set(buckets_for(max_rows)))


def test_a_step_takes_the_smallest_graph_that_holds_it() -> None:
    graphs = graphs_for(24)
    capture_all(graphs)

    assert [rows_of(graphs.fitting(rows)) for rows in (1, 2, 3, 8, 9, 17, 24)] == [1, 2, 4, 8, 16, 24, 24]
    assert graphs.fitting(25) is None


def test_the_largest_graph_is_captured_first_then_the_most_useful_ones() -> None:
    device, compute = HostDevice(), Doubling()
    graphs = graphs_for(40, device, compute)

    graphs.capture_first()
    first = list(dict.fromkeys(len(inputs.seq_lens) for inputs in compute.seen))
    assert first == [40, 32, 16, 8, 4, 2, 1]
    assert rows_of(graphs.fitting(20)) == 32

    assert not graphs.capture_next()
    assert rows_of(graphs.fitting(20)) == 24
    assert device.num_graphs == len(buckets_for(40))


def test_until_the_fitting_graph_is_there_a_step_takes_the_next_larger_one() -> None:
    graphs = graphs_for(256)
    assert graphs.fitting(1) is None

    graphs.capture_first()

    assert rows_of(graphs.fitting(33)) == 64
    capture_all(graphs)
    assert rows_of(graphs.fitting(33)) == 40


def test_a_captured_step_keeps_its_addresses() -> None:
    device, compute = HostDevice(), Doubling()
    graph = DecodeGraph(device, compute, 4, padding=PADDING, max_seq_len=64)
    addresses: list[list[int]] = []
    for turn in range(3):
        layout = graph.layout(turn)
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
    graph = DecodeGraph(device, Doubling(), 2, padding=PADDING, max_seq_len=64)
    positions = graph.layout(0).inputs(graph.buffer, num_decodes=2, max_query_len=1, max_seq_len=64).positions

    for first in (5, 9):
        positions.copy_(torch.tensor([first, first + 1]))
        device.queue(graph.replay)
        device.synchronize()
        assert graph.tokens.tolist() == [2 * first, 2 * first + 2]


def test_a_graph_that_cannot_be_captured_is_the_last_that_is_tried() -> None:
    class Refusing(HostDevice):
        def capture(self, work: Work, /) -> Graph:
            if self.num_graphs == 2:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().capture(work)

    graphs = graphs_for(40, Refusing())

    graphs.capture_first()

    assert not graphs.capture_next()
    assert [rows_of(graphs.fitting(rows)) for rows in (1, 33)] == [32, 40]
