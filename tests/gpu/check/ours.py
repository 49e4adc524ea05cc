"""A GpuRunner, on a GPU or on the fake device, where kernels are interpreted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.blocks import blocks_for
from tests.gpu.check.parts import Check


def runner_for(
    check: Check, folder: Path, *, graphs: bool, block_size: int, num_blocks: int, max_model_len: int, **settings: Any
) -> Any:
    """A loaded runner over the folder, with `num_blocks`, or as many as one sequence may need."""
    from executor.gpu.runner import GpuRunner  # noqa: PLC0415 - imports triton

    if check.fake:
        from executor import attention  # noqa: PLC0415
        from executor.attention.triton import TritonAttention  # noqa: PLC0415
        from executor.gpu.device import HostDevice  # noqa: PLC0415

        attention.BACKENDS = (TritonAttention(interpreted=True),)
        settings |= {
            "device": "cpu",
            "attention_backend": "triton",
            "make_device": lambda _: HostDevice(),
        }
    runner = GpuRunner(
        name="check",
        model_folder=folder,
        cuda_graphs="auto" if graphs else "off",
        block_size=block_size,
        num_blocks=max(num_blocks, blocks_for(max_model_len, block_size)),
        max_model_len=max_model_len,
        **settings,
    )
    runner.load(lambda _stage, _done, _total: None)
    return runner
