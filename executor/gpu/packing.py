"""A step's columns to the device: all of them in one buffer of int32, and one copy that nobody waits for.

The buffers of the host are page-locked and taken in turn; one is used again only when what was copied out of it has
arrived. A column begins at a multiple of 16 bytes, so that a kernel is compiled once and not for every alignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from executor.batch import InputBatch
from executor.gpu.device import Device, Event
from executor.gpu.inputs import StepInputs
from executor.gpu.tables import NO_UPDATES, Updates

_ALIGNMENT: Final = 4  # int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How many entries the columns of a step have."""

    num_tokens: int  # T
    num_rows: int  # N
    num_decodes: int  # the first of them
    num_sampled: int  # S
    num_scored: int = 0  # P

    @classmethod
    def of(cls, batch: InputBatch) -> Shape:
        """That of a batch as it is."""
        return cls(
            num_tokens=len(batch.positions),
            num_rows=len(batch.seq_lens),
            num_decodes=batch.num_decodes,
            num_sampled=len(batch.sampled_slots),
            num_scored=len(batch.scored_slots),
        )

    @classmethod
    def of_decodes(cls, num_rows: int) -> Shape:
        """That of rows with one token each, all of which sample."""
        return cls(num_tokens=num_rows, num_rows=num_rows, num_decodes=num_rows, num_sampled=num_rows)

    @property
    def num_prefills(self) -> int:
        """Rows with several tokens."""
        return self.num_rows - self.num_decodes

    def holds(self, other: Shape) -> bool:
        """Whether a step of the other shape, padded, is one of this shape."""
        return (
            self.num_tokens >= other.num_tokens
            and self.num_decodes >= other.num_decodes
            and self.num_prefills >= other.num_prefills
            and self.num_sampled >= other.num_sampled
            and self.num_scored == other.num_scored
        )

    @property
    def lengths(self) -> dict[str, int]:
        """Entries of each column, by its name in `StepInputs`, in the order in which they lie in a buffer."""
        return {
            "token_places": self.num_tokens,
            "positions": self.num_tokens,
            "slot_mapping": self.num_tokens,
            "query_start_loc": self.num_rows + 1,
            "seq_lens": self.num_rows,
            "table_rows": self.num_rows,
            "logits_indices": self.num_sampled + self.num_scored,
            "sampled_slots": self.num_sampled,
            "sampled_places": self.num_sampled,
            "sampled_indices": self.num_sampled,
        }


class Layout:
    """Where in a buffer a step's columns lie, and behind them what changes in the tables and is copied in the slab.

    A step may be smaller than the shape: then its decode rows are followed by empty ones up to `shape.num_decodes`, and
    so are its other rows. The tokens of all rows still lie one behind the other; those at the end belong to no row.
    """

    def __init__(self, shape: Shape, *, num_updates: int = 0, num_copies: int = 0) -> None:
        self._num_decodes = shape.num_decodes
        self._columns: dict[str, slice] = {}
        self.size = 0  # int32
        for name, length in shape.lengths.items():
            self._columns[name] = self._take(length)
        self.columns_size = self.size  # of that, what is not updates and copies
        self._places, self._values = self._take(num_updates), self._take(num_updates)
        self._copies = self._take(2 * num_copies)

    def inputs(self, buffer: Tensor, *, max_query_len: int, max_seq_len: int) -> StepInputs:
        """The columns, as views of `buffer`."""
        columns = {name: buffer[where] for name, where in self._columns.items()}
        return StepInputs(
            num_decodes=self._num_decodes, max_query_len=max_query_len, max_seq_len=max_seq_len, **columns
        )  # fmt: skip

    def updates(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Places and values, as views of `buffer`."""
        return buffer[self._places], buffer[self._values]

    def copies(self, buffer: Tensor) -> Tensor:
        """Blocks (C, 2), sources and destinations, as a view of `buffer`."""
        return buffer[self._copies].view(-1, 2)

    def write(
        self,
        buffer: NDArray[np.int32],
        batch: InputBatch,
        padding: Padding,
        updates: Updates = NO_UPDATES,
        copies: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Fill `buffer` with a batch that the shape holds, and what is left of the shape with what is nobody's."""
        columns = {
            "token_places": (batch.token_places, padding.place),
            "positions": (batch.positions, 0),
            "slot_mapping": (batch.slot_mapping, -1),
            "logits_indices": (batch.logits_indices, 0),  # any token's: nobody reads what is sampled from them
            "sampled_slots": (batch.sampled_slots, padding.line),
            "sampled_places": (batch.sampled_places, padding.place),
            "sampled_indices": (batch.sampled_indices, 0),
        }
        for name, (values, filler) in columns.items():
            column = buffer[self._columns[name]]
            column[: len(values)] = values
            if len(values) < len(column):
                column[len(values) :] = filler
        self._write_rows(buffer[self._columns["seq_lens"]], batch.seq_lens, batch.num_decodes, 0, 0)
        self._write_rows(
            buffer[self._columns["table_rows"]], batch.table_rows, batch.num_decodes, padding.line, padding.line
        )
        loc = batch.query_start_loc
        place = buffer[self._columns["query_start_loc"]]
        place[0] = 0
        self._write_rows(place[1:], loc[1:], batch.num_decodes, loc[batch.num_decodes], loc[-1])  # where each row ends
        buffer[self._places] = updates.places
        buffer[self._values] = updates.values
        if copies:
            buffer[self._copies] = np.asarray(copies).reshape(-1)

    def _write_rows(
        self, column: NDArray[np.int32], values: NDArray[np.int64], num_decodes: int, empty_decode: int, empty: int
    ) -> None:
        """Write a value a row, those of decode rows first, and behind each of the two parts what empty rows have."""
        if len(values) == len(column):
            column[:] = values
            return
        begin = self._num_decodes
        end = begin + len(values) - num_decodes
        column[:num_decodes] = values[:num_decodes]
        column[num_decodes:begin] = empty_decode
        column[begin:end] = values[num_decodes:]
        column[end:] = empty

    def _take(self, length: int) -> slice:
        begin, self.size = self.size, _aligned(self.size + length)
        return slice(begin, begin + length)


class Padding(NamedTuple):
    """What rows read and write that belong to nobody."""

    line: int  # of the tables
    place: int  # in the flattened token pool: the first of that line


_NO_COLUMN: Final = np.zeros(0, np.int64)
NO_ROWS: Final = InputBatch(
    token_places=_NO_COLUMN,
    positions=_NO_COLUMN,
    slot_mapping=_NO_COLUMN,
    query_start_loc=np.zeros(1, np.int64),
    seq_lens=_NO_COLUMN,
    block_tables=np.zeros((0, 0), np.int32),
    num_decodes=0,
    logits_indices=_NO_COLUMN,
    sampled_slots=_NO_COLUMN,
    sampled_places=_NO_COLUMN,
    sampled_indices=_NO_COLUMN,
)
"""Padded, it is a step of nobody."""


class StagingBuffer:
    """What one step needs of the host: what is copied to the device, what comes back, and when.

    In use from `Staging.take` to `Staging.give_back`.
    """

    def __init__(self, device: Device, size: int, max_sampled: int) -> None:
        self._device = device
        self._take(size)
        self.tokens = device.pinned(max_sampled)  # (max_sampled,) int32, what the step sampled
        self.begun: Event = device.event()
        self.done: Event = device.event()

    def room(self, size: int) -> NDArray[np.int32]:
        """The memory to fill, (size,) at least. Taken anew if it is too small: pinning takes a while."""
        if size > len(self._host):
            self._take(max(size, 2 * len(self._host)))
        return self._numbers

    def copy_to(self, buffer: Tensor) -> None:
        """Queue the copy of the first entries, as many as `buffer` has. Inside of queued work."""
        buffer.copy_(self._host[: len(buffer)], non_blocking=True)

    def _take(self, size: int) -> None:
        self._host = self._device.pinned(size)
        self._numbers: NDArray[np.int32] = self._host.numpy()


class Staging:
    """The staging buffers of all steps in flight. One that was taken is nobody else's until it is given back."""

    def __init__(self, device: Device, *, count: int, size: int, max_sampled: int) -> None:
        """`count` buffers of `size` int32 to begin with; more, and larger ones, are made when they are needed."""
        self._device = device
        self._size = size
        self._max_sampled = max_sampled
        self._all = [self._new() for _ in range(count)]
        self._free = list(self._all)

    def take(self) -> StagingBuffer:
        """A buffer that no step in flight uses."""
        if not self._free:
            self._all.append(self._new())
            return self._all[-1]
        return self._free.pop(0)  # the one that was used longest ago

    def give_back(self, buffer: StagingBuffer) -> None:
        """What was copied out of it has arrived, and what came back was read."""
        assert buffer.done.is_done(), "a staging buffer is given back while its step runs"
        self._free.append(buffer)

    def reset(self) -> None:
        """Take all back. Nothing is in flight any more."""
        self._free = list(self._all)

    def _new(self) -> StagingBuffer:
        return StagingBuffer(self._device, self._size, self._max_sampled)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
