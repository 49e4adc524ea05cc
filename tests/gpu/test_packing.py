"""A step's columns in one buffer, and the staging buffers of the steps in flight."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from common.sampling import SamplingParams
from common.step import NewSequence, StepPlan
from common.types import BlockId, slot_ref
from executor.batch import InputBatch, build_batch
from executor.gpu.device import HostDevice
from executor.gpu.inputs import StepInputs
from executor.gpu.packing import NO_ROWS, Layout, Padding, Shape, Staging
from executor.gpu.tables import Updates
from executor.resident import Resident

PADDING = Padding(line=8, place=8 * 32)
UPDATES = Updates(np.array([7, 90, 1000], np.int32), np.array([-5, 6, 1 << 30], np.int32))


def batch_of(*counts: int, computed: int = 0) -> InputBatch:
    """Prompts of 12 tokens, each with so many of them in this step."""
    held = Resident(
        num_blocks=32, block_size=4, max_sequences=8, max_step_tokens=64, max_model_len=32, vocab_size=100
    )  # fmt: skip
    told = [
        NewSequence(
            ref=slot_ref(slot, 0),
            attempt=0,
            token_ids=list(range(12)),
            num_prompt=12,
            num_computed=12 - count - computed,
            block_table=[BlockId(3 * slot + block) for block in range(3)],
            sampling=SamplingParams(temperature=0.0),
            choice=0,
            max_tokens=9,
            stop_token_ids=(),
        )
        for slot, count in enumerate(counts)
    ]
    plan = StepPlan(step=0, refs=[each.ref for each in told], num_scheduled=list(counts), new=told)
    return build_batch(held, held.apply(plan), gathers_tables=False)


def packed(layout: Layout, batch: InputBatch) -> tuple[Tensor, StepInputs]:
    numbers = np.full(layout.size, -77, np.int32)
    layout.write(numbers, batch, PADDING, UPDATES)
    buffer = torch.from_numpy(numbers)
    return buffer, layout.inputs(buffer, max_query_len=5, max_seq_len=12)


def test_the_columns_of_a_batch_come_out_as_they_went_in() -> None:
    batch = batch_of(1, 5, 1, 12)
    _, inputs = packed(Layout(Shape.of(batch), num_updates=3), batch)

    columns = [field.name for field in fields(inputs) if isinstance(getattr(inputs, field.name), Tensor)]
    assert len(columns) == 10
    for name in columns:
        assert getattr(inputs, name).dtype is torch.int32
        assert getattr(inputs, name).tolist() == getattr(batch, name).tolist(), name
    assert inputs.table_rows.tolist() == [0, 2, 1, 3]  # decode rows first
    assert inputs.num_decodes == 2


def test_updates_and_copies_lie_behind_the_columns() -> None:
    batch = batch_of(3)
    layout = Layout(Shape.of(batch), num_updates=3, num_copies=2)
    numbers = np.zeros(layout.size, np.int32)

    layout.write(numbers, batch, PADDING, UPDATES, [(BlockId(4), BlockId(9)), (BlockId(1), BlockId(2))])

    places, values = layout.updates(torch.from_numpy(numbers))
    assert (places.tolist(), values.tolist()) == ([7, 90, 1000], [-5, 6, 1 << 30])
    assert layout.copies(torch.from_numpy(numbers)).tolist() == [[4, 9], [1, 2]]


def test_what_is_left_of_a_larger_step_is_rows_of_nobody() -> None:
    _, inputs = packed(Layout(Shape.of_decodes(4), num_updates=3), batch_of(1, 1))

    assert inputs.seq_lens.tolist() == [12, 12, 0, 0]
    assert inputs.slot_mapping.tolist()[2:] == [-1, -1]
    assert inputs.query_start_loc.tolist() == [0, 1, 2, 2, 2]  # they have no token; the last two tokens have no row
    assert inputs.logits_indices.tolist() == [0, 1, 0, 0]
    assert inputs.table_rows.tolist() == inputs.sampled_slots.tolist() == [0, 1, 8, 8]
    assert inputs.token_places.tolist()[2:] == inputs.sampled_places.tolist()[2:] == [8 * 32, 8 * 32]


def test_a_step_of_nobody_is_all_padding() -> None:
    _, inputs = packed(Layout(Shape.of_decodes(2), num_updates=3), NO_ROWS)

    assert inputs.seq_lens.tolist() == [0, 0]
    assert inputs.query_start_loc.tolist() == [0, 0, 0]


def test_decode_rows_and_prompts_are_padded_each_behind_its_own() -> None:
    shape = Shape(num_tokens=12, num_rows=7, num_decodes=4, num_sampled=6)
    batch = batch_of(1, 5, 1, 3)

    _, inputs = packed(Layout(shape, num_updates=3), batch)

    assert inputs.num_decodes == 4
    assert inputs.table_rows.tolist() == [0, 2, 8, 8, 1, 3, 8]
    assert inputs.seq_lens.tolist() == [12, 12, 0, 0, 12, 12, 0]
    assert inputs.query_start_loc.tolist() == [0, 1, 2, 2, 2, 7, 10, 10]
    assert inputs.positions.tolist() == [11, 11, *range(7, 12), 9, 10, 11, 0, 0]
    assert inputs.slot_mapping.tolist()[-2:] == [-1, -1] and -1 not in inputs.slot_mapping.tolist()[:-2]
    assert inputs.token_places.tolist()[-2:] == [8 * 32] * 2
    assert inputs.logits_indices.tolist() == [0, 6, 1, 9, 0, 0]  # in the plan's order
    assert inputs.sampled_slots.tolist() == [0, 1, 2, 3, 8, 8]
    assert inputs.sampled_places.tolist()[4:] == [8 * 32] * 2


@pytest.mark.parametrize(
    ("counts", "fits"),
    [
        ((1, 1, 5, 3), True),
        ((5, 3), True),
        ((1,) * 4, True),
        ((1,) * 5, False),
        ((2, 2, 2, 2), False),
        ((1, 12), False),
    ],
)
def test_a_shape_holds_what_is_smaller_in_everything(counts: tuple[int, ...], fits: bool) -> None:
    shape = Shape(num_tokens=12, num_rows=7, num_decodes=4, num_sampled=6)

    assert shape.holds(Shape.of(batch_of(*counts))) is fits


def test_columns_lie_where_they_lay_however_many_updates_there_are() -> None:
    buffer = torch.zeros(Layout(Shape.of_decodes(3), num_updates=20).size, dtype=torch.int32)

    def addresses(num_updates: int) -> list[int]:
        inputs = Layout(Shape.of_decodes(3), num_updates=num_updates).inputs(buffer, max_query_len=1, max_seq_len=32)
        columns = [getattr(inputs, field.name) for field in fields(inputs)]
        return [column.data_ptr() for column in columns if isinstance(column, Tensor)]

    assert addresses(0) == addresses(20)


def test_every_column_begins_where_16_bytes_can_be_read_at_once() -> None:
    batch = batch_of(1, 5, 1)
    buffer, inputs = packed(Layout(Shape.of(batch), num_updates=3), batch)

    for field in fields(inputs):
        column = getattr(inputs, field.name)
        if isinstance(column, Tensor):
            assert (column.data_ptr() - buffer.data_ptr()) % 16 == 0, field.name


def test_a_staging_buffer_is_nobody_elses_while_its_step_is_in_flight() -> None:
    device = HostDevice()
    staging = Staging(device, count=2, size=4, max_sampled=1)
    arrived = torch.zeros(5, 4, dtype=torch.int32)

    taken = []
    for step in range(5):  # more than there are: none of them is done
        buffer = staging.take()
        buffer.room(4)[:] = step
        device.queue(lambda buffer=buffer, step=step: buffer.copy_to(arrived[step]))  # type: ignore[misc]
        buffer.done.record()
        taken.append(buffer)
    device.synchronize()

    assert arrived.tolist() == [[step] * 4 for step in range(5)]
    assert len({id(buffer) for buffer in taken}) == 5


def test_a_staging_buffer_that_was_given_back_is_used_again() -> None:
    device = HostDevice()
    staging = Staging(device, count=2, size=4, max_sampled=1)
    first, second = staging.take(), staging.take()

    first.done.record()
    first.done.wait()
    staging.give_back(first)

    assert staging.take() is first
    staging.reset()
    assert {staging.take(), staging.take()} == {first, second}


def test_a_staging_buffer_is_not_given_back_before_its_step_is_done() -> None:
    staging = Staging(HostDevice(), count=1, size=4, max_sampled=1)
    buffer = staging.take()
    buffer.done.record()

    with pytest.raises(AssertionError, match="while its step runs"):
        staging.give_back(buffer)


def test_a_staging_buffer_grows_with_a_step_that_is_larger() -> None:
    buffer = Staging(HostDevice(), count=1, size=4, max_sampled=1).take()

    room = buffer.room(1000)
    room[:1000] = np.arange(1000)
    arrived = torch.zeros(1000, dtype=torch.int32)
    buffer.copy_to(arrived)

    assert arrived.tolist() == list(range(1000))
