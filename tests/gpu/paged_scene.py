"""Rows over a slab in which everything that may not be read is NaN, and what attention over them has to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from executor.attention.protocol import LayerOptions
from executor.attention.reference import attend_one
from executor.attention.triton import Workspace, attend_stored
from executor.gpu.inputs import StepInputs
from executor.gpu.kernels.paged import PagedRows
from executor.kv_cache import LayerCache, LayerShape, SlabFormat

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
NOBODY = -1  # what block tables hold where they hold nothing: a read through it is a read before the slab


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What the kernels are compiled for."""

    num_kv_heads: int = 2
    group: int = 2
    key_dim: int = 64
    value_dim: int | None = None  # as key_dim unless said
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    slab: torch.dtype | None = None  # of K and V, as dtype unless said
    key_scale: float = 1.0  # what K in the slab are shares of
    value_scale: float = 1.0

    @property
    def shape(self) -> LayerShape:
        return LayerShape(
            num_heads=self.num_kv_heads * self.group,
            num_kv_heads=self.num_kv_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim or self.key_dim,
        )


class PagedScene:
    """A step of rows (tokens before, tokens now), those with one token first; then padding rows. All K and V stored.

    A row's line of the block tables is drawn, its blocks too. Blocks that a window has left behind are given away:
    their table entries say NOBODY.
    """

    def __init__(
        self,
        rows: Sequence[tuple[int, int]],
        layer: Layer,
        device: torch.device,
        *,
        padding: int = 0,
        seed: int = 0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        self.rows, self.layer, self.device = list(rows), layer, device
        self.lens = [before + now for before, now in rows]
        counts = [now for _, now in rows]
        num_decodes = sum(now == 1 for now in counts) + padding
        assert all(now == 1 for now in counts[: num_decodes - padding]), "decode rows lie first"
        assert padding == 0 or num_decodes == len(rows) + padding, "padding is for decode steps"
        num_rows = len(rows) + padding
        shape, size = layer.shape, layer.block_size

        def noise(*dims: int) -> Tensor:
            return torch.randn(dims, generator=random, dtype=torch.float64).to(layer.dtype)

        each = [-(-length // size) for length in self.lens]
        blocks = torch.randperm(sum(each) + 3, generator=random)
        lines = torch.randperm(num_rows + 2, generator=random)[:num_rows].int()
        tables = torch.full((num_rows + 2, max(each) + 2), NOBODY, dtype=torch.int32)
        slab = layer.slab or layer.dtype
        keys = torch.full((len(blocks), shape.num_kv_heads, size, shape.key_dim), torch.nan, dtype=slab)
        values = torch.full((len(blocks), shape.num_kv_heads, size, shape.value_dim), torch.nan, dtype=slab)
        self.keys = [noise(length, shape.num_kv_heads, shape.key_dim).to(slab) for length in self.lens]
        self.values = [noise(length, shape.num_kv_heads, shape.value_dim).to(slab) for length in self.lens]
        for row, own in enumerate(torch.split(blocks[: sum(each)], each)):
            first_new = self.lens[row] - counts[row]
            first = 0 if layer.window is None else max(0, first_new + 1 - layer.window) // size
            tables[lines[row], first : len(own)] = own[first:].int()
            for position in range(first * size, self.lens[row]):
                block, inside = own[position // size], position % size
                keys[block, :, inside] = self.keys[row][position]
                values[block, :, inside] = self.values[row][position]
        self.cache = LayerCache(
            keys=keys.to(device),
            values=values.to(device),
            block_size=size,
            format=SlabFormat(dtype=slab),
            key_scale=layer.key_scale,
            value_scale=layer.value_scale,
        )
        self.block_tables = tables.to(device)
        self.query = noise(sum(counts) + padding, shape.num_heads, shape.key_dim)
        self.options = LayerOptions(
            scale=0.3,
            window=layer.window,
            softcap=layer.softcap,
            sinks=noise(shape.num_heads).to(device) if layer.sinks else None,
        )

        def column(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int32, device=device)

        counts += [1] * padding
        self.inputs = StepInputs(
            num_decodes=num_decodes,
            max_query_len=max(counts),
            max_seq_len=max(self.lens),
            token_places=column([]),
            positions=column([]),
            slot_mapping=column([]),
            query_start_loc=column([0, *torch.tensor(counts).cumsum(0).tolist()]),
            seq_lens=column([*self.lens, *[0] * padding]),
            table_rows=lines.to(device),
            logits_indices=column([]),
            sampled_slots=column([]),
            sampled_places=column([]),
            sampled_indices=column([]),
        )

    @property
    def paged_rows(self) -> PagedRows:
        """As the kernels are given them."""
        return PagedRows(
            num_decodes=self.inputs.num_decodes,
            query_start_loc=self.inputs.query_start_loc,
            seq_lens=self.inputs.seq_lens,
            block_tables=self.block_tables,
            table_rows=self.inputs.table_rows,
        )

    def poisoned_out(self) -> Tensor:
        """Where outputs go: NaN until they are written."""
        size = (*self.query.shape[:2], self.layer.shape.value_dim)
        return torch.full(size, torch.nan, dtype=self.layer.dtype, device=self.device)

    def attend(self) -> Tensor:
        """By the kernels, as a forward calls them."""
        options = self.options
        return attend_stored(
            self.query.to(self.device),
            self.cache,
            self.inputs,
            self.block_tables,
            scale=options.scale,
            window=options.window,
            softcap=options.softcap,
            sinks=options.sinks,
            out=self.poisoned_out(),
            workspace=Workspace([self.layer.shape], max_rows=len(self.inputs.seq_lens), device=self.device),
        ).cpu()

    def expected(self) -> Tensor:
        """By the oracle, in float64: (T, num_heads, value_dim). Zeros for padding."""
        options = LayerOptions(
            scale=self.options.scale,
            window=self.options.window,
            softcap=self.options.softcap,
            sinks=None if self.options.sinks is None else self.options.sinks.cpu(),
        )
        out = torch.zeros((*self.query.shape[:2], self.layer.shape.value_dim), dtype=torch.float64)
        first = 0
        for row, (_, now) in enumerate(self.rows):
            query = self.query[first : first + now].double()
            keys = self.keys[row].double() * self.layer.key_scale
            values = self.values[row].double() * self.layer.value_scale
            out[first : first + now] = attend_one(query, keys, values, options)
            first += now
        return out

    def check(self, out: Tensor) -> None:
        """Assert that `out` is what it has to be."""
        tolerance = TOLERANCE[self.layer.dtype]
        torch.testing.assert_close(out.cpu().double(), self.expected(), rtol=tolerance, atol=tolerance)
