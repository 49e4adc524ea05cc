"""Steps as CUDA graphs: forward and sampling of a number of rows and tokens, launched as one piece.

A graph is its launches with their addresses, so all that a step has of its own is copied into the graph's buffer. Our
kernels find on the device how long each row is, so a graph serves every step that its shape holds: a step takes the
smallest that does, and what is left over is rows, tokens and samples of nobody. There are graphs of two kinds: of
decode rows alone, and mixed ones, of tokens of prompts and of decode rows beside them.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Sequence
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
"""Rows of the decode graphs. Above them the device computes for so long that launching one by one costs nothing."""

_FIRST_ROWS: Final = frozenset({1, 2, 4, 8, 16, 32, 64, 128, 256})
_FIRST_TOKENS: Final = frozenset({64, 128, 256, 512, 1024, 2048})
_LEAST_UPDATES: Final = 64  # entries of the tables that may change in a step of few tokens, and still be one copy

_SMALL_MIXED: Final = (64, 128, 256, 384)  # tokens: the device waits for weights and launches, and padding is free
_FEW_DECODES: Final = {16: 2048, 64: 1024}
"""Decode rows that there is room for in graphs of up to so many tokens, beside those for all rows.

More rows mean more programs and logits of nobody, and fewer shares for each row's keys. In larger steps the rest takes
so long that it makes no difference.
"""
_PREFILLS: Final = (8, 64)  # rows with several tokens that a mixed graph has: at least, and for a row each 16 tokens
_TOKENS_A_PREFILL: Final = (16, 32)  # then one each 32: what an empty row costs is nothing beside so many tokens

_PADDED_ANYWAY: Final = 512  # tokens
_MOST_PADDING: Final = 2.0  # times its tokens that a larger step may compute until its own graph is there

Compute = Callable[[StepInputs, Tensor], Tensor]
"""compute(inputs, tokens): forward and sampling, the tokens (S,) int32 to `tokens`; returns the logits (S, V)."""


class StepGraph:
    """One step of a shape."""

    def __init__(self, device: Device, compute: Compute, shape: Shape, *, padding: Padding, max_seq_len: int) -> None:
        """Capture it over rows of nobody. Sequences may be as long as `max_seq_len`."""
        self.shape = shape
        where = device.torch_device
        size = Layout(shape, num_updates=max(2 * shape.num_tokens, _LEAST_UPDATES)).size
        self.buffer = torch.zeros(size, dtype=torch.int32, device=where)  # the columns, and room for most updates
        self.tokens = torch.empty(shape.num_sampled, dtype=torch.int32, device=where)
        self.logits: Tensor  # (S, V), void once another step is computed
        layout = Layout(shape)
        numbers = np.empty(layout.size, np.int32)
        layout.write(numbers, NO_ROWS, padding)
        self.buffer[: layout.size].copy_(torch.from_numpy(numbers))
        self._inputs = layout.inputs(
            self.buffer, max_query_len=shape.num_tokens if shape.num_prefills else 1, max_seq_len=max_seq_len
        )

        def work() -> None:
            self.logits = compute(self._inputs, self.tokens)

        self._graph = device.capture(work)

    def replay(self) -> None:
        """Compute what is in `buffer`: tokens to `tokens`, logits to `logits`. Inside of queued work."""
        self._graph.replay()


class StepGraphs:
    """The graphs there are, and those that are still to be captured: the most useful first.

    Those that come later find the memory of the largest ones in the pool, and take none of their own.
    """

    def __init__(
        self, device: Device, compute: Compute, *, max_rows: int, max_tokens: int, padding: Padding, max_seq_len: int
    ) -> None:
        """None is captured yet. `max_rows` and `max_tokens` are how many a step can have."""
        self._device = device
        self._compute = compute
        self._padding = padding
        self._max_seq_len = max_seq_len
        self._decodes: list[StepGraph] = []  # the cheapest first
        self._mixed: list[StepGraph] = []
        self._first, later = _in_order(buckets_for(max_rows), mixed_shapes(max_tokens, max_rows))
        self._missing = self._first + later
        self._seconds, self._bytes = 0.0, 0

    def fitting(self, shape: Shape) -> StepGraph | None:
        """The cheapest graph that a step of this shape should take, if there is one."""
        if not shape.num_prefills:
            place = bisect.bisect_left(self._decodes, shape.num_rows, key=lambda graph: graph.shape.num_rows)
            if shape.num_scored or shape.num_rows <= BUCKETS[-1]:
                return self._decodes[place] if place < len(self._decodes) and not shape.num_scored else None
        most = max(_PADDED_ANYWAY, _MOST_PADDING * shape.num_tokens)
        for graph in self._mixed:
            if graph.shape.holds(shape):
                return graph if graph.shape.num_tokens <= most else None
        return None

    def capture_largest(self) -> None:
        """Capture the largest graph of each kind: to see what memory they take."""
        for _ in range(2):
            self.capture_next()

    def capture_first(self) -> None:
        """Capture those without which a step could not be served well by any graph."""
        while self._missing and self._missing[0] in self._first:
            self.capture_next()

    def capture_next(self) -> bool:
        """Capture one graph, if one is missing; return whether more are. Nothing may be in flight.

        Where that fails there will be no more: steps without a graph are launched one kernel at a time. That a mixed
        one fails says nothing of those of decode rows alone.
        """
        if not self._missing:
            return False
        shape = self._missing.pop(0)
        began_s, free = time.perf_counter(), self._device.free_bytes()
        try:
            graph = StepGraph(
                self._device, self._compute, shape, padding=self._padding, max_seq_len=self._max_seq_len
            )  # fmt: skip
        except RuntimeError as error:
            if self._device.is_lost():
                raise
            _log.warning("no graph of %s, nor more like it\n%s", _named(shape), "".join(without_texts(error)))
            self._missing = [each for each in self._missing if shape.num_prefills and not each.num_prefills]
            return bool(self._missing)
        bisect.insort(
            self._mixed if shape.num_prefills else self._decodes,
            graph,
            key=lambda graph: (graph.shape.num_tokens, graph.shape.num_decodes),
        )
        self._seconds += time.perf_counter() - began_s
        self._bytes += free - self._device.free_bytes()
        if not self._missing or (self._missing[0] not in self._first and shape in self._first):
            _log.info("%s", self.summary())
        return bool(self._missing)

    def summary(self) -> str:
        """What there is, and what it took."""
        later = f", {len(self._missing)} more when there is nothing to do" if self._missing else ""
        decodes = [graph.shape.num_rows for graph in self._decodes]
        mixed = [graph.shape.num_tokens for graph in self._mixed]
        return (
            f"graphs: {len(decodes)} of decode rows, up to {max(decodes, default=0)}; "
            f"{len(mixed)} with prompts, up to {max(mixed, default=0)} tokens; "
            f"{self._seconds:.1f} s, {self._bytes / 2**20:.0f} MiB{later}"
        )


def buckets_for(max_rows: int) -> list[int]:
    """Rows of the decode graphs that serve steps of up to `max_rows` rows, in order."""
    return [rows for place, rows in enumerate(BUCKETS) if not place or BUCKETS[place - 1] < max_rows]


def mixed_shapes(max_tokens: int, max_rows: int) -> list[Shape]:
    """The shapes of the mixed graphs for steps of up to so many tokens and rows, the cheapest first.

    From 512 tokens on there are four to a doubling, so that a fifth of a step is padding at most, a tenth on average;
    below that a step takes as long as its weights do. Rows that are left over cost an empty program a head each.
    """
    shapes = []
    for num_tokens in _mixed_tokens(max_tokens):
        least, most = _PREFILLS
        dense, sparse = (num_tokens // each for each in _TOKENS_A_PREFILL)
        num_prefills = min(max_rows, max(least, min(most, dense), sparse))
        widest = min(max_rows, num_tokens)
        few = {min(widest, rows) for rows, most_tokens in _FEW_DECODES.items() if num_tokens <= most_tokens}
        for num_decodes in sorted({widest, *few}):
            shape = Shape(
                num_tokens=num_tokens,
                num_rows=num_decodes + num_prefills,
                num_decodes=num_decodes,
                num_sampled=min(max_rows, num_tokens, num_decodes + num_prefills),  # each row has a token
            )
            shapes.append(shape)
    return shapes


def _mixed_tokens(most: int) -> list[int]:
    sizes, octave = list(_SMALL_MIXED), 512
    while octave <= most:
        sizes += [octave * quarters // 4 for quarters in (4, 5, 6, 7)]
        octave *= 2
    return [size for size in sizes if size < most] + [most]


def _in_order(decode_rows: Sequence[int], mixed: Sequence[Shape]) -> tuple[list[Shape], list[Shape]]:
    """Those to begin with and those for later. First the largest of each kind, whose memory all others share."""
    decodes = [Shape.of_decodes(rows) for rows in reversed(decode_rows)]
    mixed = list(reversed(mixed))
    largest = [decodes.pop(0), mixed.pop(0)]
    useful = [shape for shape in decodes if shape.num_rows in _FIRST_ROWS]
    useful += [shape for shape in mixed if shape.num_tokens in _FIRST_TOKENS]
    first = largest + useful
    return first, [shape for shape in decodes + mixed if shape not in first]


def _named(shape: Shape) -> str:
    if not shape.num_prefills:
        return f"{shape.num_rows} decode rows"
    return f"{shape.num_tokens} tokens, with up to {shape.num_decodes} decode rows"
