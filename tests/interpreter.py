"""Where there is no GPU, Triton's kernels run in its interpreter, on the CPU. Triton looks when it is imported."""

from __future__ import annotations

import os

import torch


def interpret_without_gpu() -> None:
    """Say so to Triton. No server is changed by that: backends for a GPU still refuse the CPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
