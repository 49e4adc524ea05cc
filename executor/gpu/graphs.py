"""Decode steps as CUDA graphs: forward and sampling of a number of rows, launched as one piece.

A graph is its launches with their addresses, so all that a step has of its own is copied into the graph's buffer. There
is one graph for each of some numbers of rows; a step takes the smallest that holds it, and the rest are rows of nobody.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor

from common.log import without_texts
from executor.gpu.device import Device
from executor.gpu.inputs import StepInputs
from executor.gpu.packing import NO_ROWS, Layout, Padding, Shape

_log = logging.getLogger(__name__)

BUCKETS: Final = (1, 2, 4, *range(8, 257, 8))
"""Rows of the graphs. Above them the device computes for so long that launching one by one costs nothing."""

_FIRST: Final = frozenset({1, 2, 4, 8, 16, 32, 64, 128, 256})
_LEAST_UPDATES: Final = 16  # entries of the tables that may change in a step of one row

Compute = Callable[[StepInputs, Tensor], Tensor]
"""compute(inputs, tokens): forward and sampling, the tokens (S,) int32 to `tokens`; returns the logits (S, V)."""


class DecodeGraph:
    """One step of `num_rows` decode rows that all sample."""

    def __init__(self, device: Device, compute: Compute, num_rows: int, *, padding: Padding, max_seq_len: int) -> None:
        """Run it once over rows of nobody, and capture it. Sequences may be as long as `max_seq_len`."""
        self.num_rows = num_rows
        self.max_updates = max(num_rows, _LEAST_UPDATES)
        shape = Shape.of_decodes(num_rows)
        where = device.torch_device
        self.buffer = torch.zeros(Layout(shape, num_updates=self.max_updates).size, dtype=torch.int32, device=where)
        self.tokens = torch.empty(num_rows, dtype=torch.int32, device=where)
        self.logits: Tensor  # (num_rows, V), void once another step is computed
        layout = self.layout(0)
        numbers = np.empty(layout.size, np.int32)
        layout.write(numbers, NO_ROWS, padding)
        self.buffer[: layout.size].copy_(torch.from_numpy(numbers))
        self._inputs = layout.inputs(self.buffer, num_decodes=num_rows, max_query_len=1, max_seq_len=max_seq_len)

        def work() -> None:
            self.logits = compute(self._inputs, self.tokens)

        device.queue(work)
        device.synchronize()
        self._graph = device.capture(work)

    def layout(self, num_updates: int) -> Layout:
        """Where a step's columns lie in `buffer`, and behind them as many updates, at most `max_updates`."""
        return Layout(Shape.of_decodes(self.num_rows), num_updates=num_updates)

    def replay(self) -> None:
        """Compute what is in `buffer`: tokens to `tokens`, logits to `logits`. Inside of queued work."""
        self._graph.replay()


class DecodeGraphs:
    """The graphs there are, and those that are still to be captured: the most useful first, then the largest.

    Those that come later find the memory of the larger ones in the pool, and take none of their own.
    """

    def __init__(self, device: Device, compute: Compute, *, max_rows: int, padding: Padding, max_seq_len: int) -> None:
        """None is captured yet. `max_rows` is how many rows a step can have."""
        self._device = device
        self._compute = compute
        self._padding = padding
        self._max_seq_len = max_seq_len
        self._graphs: dict[int, DecodeGraph] = {}
        self._rows: list[int] = []  # of the graphs there are, in order
        self._missing = _in_order(buckets_for(max_rows))
        self._first = {*_FIRST, self._missing[0]}
        self._seconds, self._bytes = 0.0, 0

    def fitting(self, num_rows: int) -> DecodeGraph | None:
        """The smallest graph that holds so many rows."""
        place = bisect.bisect_left(self._rows, num_rows)
        return self._graphs[self._rows[place]] if place < len(self._rows) else None

    def capture_first(self) -> None:
        """Capture those without which a step could not be served well by any graph."""
        while self._missing and self._missing[0] in self._first:
            self.capture_next()

    def capture_next(self) -> bool:
        """Capture one graph, if one is missing; return whether more are. Nothing may be in flight.

        Where that fails there will be no more: steps without a graph are launched one kernel at a time.
        """
        if not self._missing:
            return False
        rows = self._missing.pop(0)
        began_s, free = time.perf_counter(), self._device.free_bytes()
        try:
            graph = DecodeGraph(
                self._device, self._compute, rows, padding=self._padding, max_seq_len=self._max_seq_len
            )  # fmt: skip
        except RuntimeError as error:
            if self._device.is_lost():
                raise
            _log.warning("no graph of %d decode rows, nor more after it\n%s", rows, "".join(without_texts(error)))
            self._missing.clear()
            return False
        self._graphs[rows] = graph
        bisect.insort(self._rows, rows)
        self._seconds += time.perf_counter() - began_s
        self._bytes += free - self._device.free_bytes()
        if not self._missing or (self._missing[0] not in self._first and rows in self._first):
            _log.info("%s", self.summary())
        return bool(self._missing)

    def summary(self) -> str:
        """What there is, and what it took."""
        later = f", {len(self._missing)} more when there is nothing to do" if self._missing else ""
        return (
            f"decode graphs: {len(self._rows)}, up to {max(self._rows, default=0)} rows, "
            f"{self._seconds:.1f} s, {self._bytes / 2**20:.0f} MiB{later}"
        )


def buckets_for(max_rows: int) -> list[int]:
    """Rows of the graphs that serve steps of up to `max_rows` rows, in order."""
    return [rows for place, rows in enumerate(BUCKETS) if not place or BUCKETS[place - 1] < max_rows]


def _in_order(buckets: list[int]) -> list[int]:
    """The largest, whose memory all others share; then the most useful ones; then the rest. Larger ones first."""
    return sorted(buckets, key=lambda rows: (rows != buckets[-1] and rows not in _FIRST, -rows))
