"""Which class of executors this one belongs to: those whose tokens are the same, bit for bit, whatever the batch.

Only the fused forward promises that. Of torch's own operations some round differently with the number of rows, so a
model that needs any of them has no class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
import torch

from common.determinism import determinism_class
from common.model_folder import ModelFolder
from executor.kv_cache import SlabFormat
from executor.llama import LlamaModel
from executor.loading import Forward
from executor.native.library import native

_PIECES: Final = 64
_PIECE_BYTES: Final = 256


def class_of(
    model: Forward, folder: ModelFolder, *, loaded_as: str, weights: str, slab: SlabFormat, block_size: int
) -> str:
    """The class, or nothing for a forward that makes no promise. `loaded_as` names what read the weights.

    The compiled kernels count, not their sources: another compiler may order a sum differently. torch computes the
    rotary tables, and numpy the probabilities that a random number is held against; both round as the CPU allows.
    """
    if not isinstance(model, LlamaModel):
        return ""
    kernels = native()
    return determinism_class(
        folder.digest,
        _sample(folder.weight_files),
        loaded_as,
        weights,
        str(slab.dtype),
        str(block_size),
        hashlib.sha256(kernels.path.read_bytes()).hexdigest(),
        kernels.isa,
        f"torch {torch.__version__} for {torch.backends.cpu.get_cpu_capability()}",
        f"numpy {np.__version__} for {_numpy_features()}",
        _libm(),
    )


def _sample(files: Iterable[Path]) -> str:
    """A hash of some weights from everywhere in the files: of their values the folder's digest knows nothing."""
    hashed = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            for piece in range(_PIECES):
                file.seek(size * piece // _PIECES)
                hashed.update(file.read(_PIECE_BYTES))
    return hashed.hexdigest()


def _numpy_features() -> str:
    """The instructions that numpy has found here, of those that it was built to use."""
    simd = np.show_config(mode="dicts")["SIMD Extensions"]
    return ",".join([*simd["baseline"], *simd["found"]])


def _libm() -> str:
    """The C library, whose functions are rounded its own way: its file, as this process has it open."""
    with Path("/proc/self/maps").open(encoding="utf-8") as lines:
        paths = {line.split()[-1] for line in lines if "/libm.so" in line or "/libm-" in line}
    return ",".join(hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in sorted(paths))
