"""The KV slab: fixed-size blocks, one K and one V tensor a layer, because some models' layers differ in shape.

Head-major: a head of a block is one contiguous run. What lies inside of a run is the format's: rows of a token each, or
the records of the C++ kernels. Memory is mapped, not touched: a block costs nothing before a token is written to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.blocks import blocks_for
from common.errors import ModelFolderError


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """The part of a layer's shape that the slab and the attention backends depend on."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def group_size(self) -> int:
        """Query heads that share one K and V head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class SlabFormat:
    """What one head of a block is made of."""

    dtype: (
        torch.dtype
    )  # int8 only if packed: each token's numbers then share a float32 scale; float8_e4m3fn only if not
    packed: bool = False  # records of the C++ kernels (executor/native/csrc/types.h), not rows of one token each

    def head_bytes(self, block_size: int, dim: int) -> int:
        """Bytes of one head of a block, of K or of V."""
        scale = 4 if self.dtype is torch.int8 else 0
        return block_size * (dim * self.dtype.itemsize + scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """K and V of one layer, in rows: (num_blocks, num_kv_heads, block_size, dim). Packed: (.., .., bytes) uint8.

    Rows of float8_e4m3fn hold shares of `key_scale` and `value_scale`.
    """

    keys: Tensor
    values: Tensor
    block_size: int
    format: SlabFormat
    key_scale: float = 1.0
    value_scale: float = 1.0


class KvCache:
    """The slab of one model."""

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        num_blocks: int,
        block_size: int,
        format: SlabFormat,
        device: torch.device,
    ) -> None:
        def slab(layer: LayerShape, dim: int) -> Tensor:
            head = format.head_bytes(block_size, dim)
            flat = _zeros((num_blocks, layer.num_kv_heads, head), device)
            return flat if format.packed else flat.view(format.dtype).view(*flat.shape[:2], block_size, dim)

        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layers = [
            LayerCache(
                keys=slab(layer, layer.key_dim),
                values=slab(layer, layer.value_dim),
                block_size=block_size,
                format=format,
            )
            for layer in layers
        ]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination), one after the other: a later copy may read an earlier one."""
        for source, destination in copies:
            for layer in self.layers:
                layer.keys[destination].copy_(layer.keys[source])
                layer.values[destination].copy_(layer.values[source])

    def copy_together(self, sources: Tensor, destinations: Tensor) -> None:
        """Copy C blocks at once, (C,) int64 on the device: none is written twice, or read once it is written."""
        for layer in self.layers:
            for slab in (layer.keys, layer.values):
                # torch knows how to copy any byte, but not every number of 8 bits
                plain = slab.view(torch.uint8) if slab.dtype.itemsize == 1 else slab
                plain.index_copy_(0, destinations, plain.index_select(0, sources))

    def resize(self, num_blocks: int) -> None:
        """Have so many blocks, all of them zero. In place: who holds a layer, or its tensors, has the new ones.

        For a device whose free memory is known only once the model has run. Not of a packed slab.
        """
        slabs = [slab for layer in self.layers for slab in (layer.keys, layer.values)]
        shapes = [slab.shape[1:] for slab in slabs]
        for slab in slabs:
            slab.data = slab.new_empty(0)  # all go before the first one comes
        for slab, shape in zip(slabs, shapes, strict=True):
            zeros = _zeros((num_blocks, *shape[:-1], shape[-1] * slab.dtype.itemsize), slab.device)
            slab.data = zeros.view(slab.dtype)
        self.num_blocks = num_blocks


def copied_together(copies: Sequence[tuple[int, int]]) -> list[slice]:
    """Cut (source, destination) into runs each of which may be copied at once: `KvCache.copy_together`."""
    runs: list[slice] = []
    begin, written = 0, set[int]()
    for place, (source, destination) in enumerate(copies):
        if source in written or destination in written:
            runs.append(slice(begin, place))
            begin, written = place, set()
        written.add(destination)
    return [*runs, slice(begin, len(copies))] if copies else []


def block_bytes(layers: Sequence[LayerShape], block_size: int, format: SlabFormat) -> int:
    """Bytes that one block takes, over all layers."""
    return sum(
        layer.num_kv_heads * format.head_bytes(block_size, dim)
        for layer in layers
        for dim in (layer.key_dim, layer.value_dim)
    )


def fit_slab(
    layers: Sequence[LayerShape],
    *,
    block_size: int,
    format: SlabFormat,
    budget_bytes: int,
    max_sequences: int,
    longest: int,
    max_model_len: int | None = None,
    other_bytes: int = 0,
) -> tuple[int, int]:
    """Return how many blocks to take, and how many tokens one sequence may have.

    `longest` is what the model allows. A wanted `max_model_len` is kept; without it the length is cut to what fits.
    `other_bytes`: what each block takes in another slab of as many blocks.
    Raises ModelFolderError when it is out of range, or one sequence of it does not fit into `budget_bytes`.
    """
    if max_model_len is not None and not 2 <= max_model_len <= longest:
        raise ModelFolderError(f"max_model_len must be in [2, {longest}] for this model, got {max_model_len}")
    each = block_bytes(layers, block_size, format) + other_bytes
    useful = max_sequences * blocks_for(max_model_len or longest, block_size)
    num_blocks = min(budget_bytes // each, useful)
    needed = max_model_len or 2
    if num_blocks * block_size < needed:
        raise ModelFolderError(
            f"{budget_bytes / 2**20:.0f} MiB of KV cache hold {num_blocks * block_size} tokens, one sequence may have "
            f"{needed} ({blocks_for(needed, block_size) * each / 2**20:.0f} MiB); give more memory or a smaller "
            "max_model_len"
        )
    return num_blocks, max_model_len or min(longest, num_blocks * block_size)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`: of the card, or of the machine and its container limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_machine_free_bytes(), _container_free_bytes())


def _machine_free_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable line")


def _container_free_bytes() -> int:
    """What the control group leaves; as good as infinite where there is no limit."""
    unlimited = 1 << 62
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            at_most = Path(limit).read_text(encoding="ascii").strip()
            now = int(Path(used).read_text(encoding="ascii"))
        except OSError:
            continue
        return unlimited if at_most == "max" else max(0, int(at_most) - now)
    return unlimited


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Zero bytes; on the CPU of pages that are mapped but not yet taken (huge ones where the machine has them)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=torch.uint8, device=device)
    return torch.from_numpy(np.zeros(shape, np.uint8))
