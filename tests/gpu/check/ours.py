"""A GpuRunner, on a GPU or on the fake device, where kernels are interpreted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.gpu.check.parts import Check


def runner_for(check: Check, folder: Path, *, graphs: bool, **settings: Any) -> Any:
    """A loaded runner over the folder."""
    from executor.gpu.runner import GpuRunner  # noqa: PLC0415 - imports triton

    if check.fake:
        from executor.attention.triton import TritonAttention  # noqa: PLC0415
        from executor.gpu.device import HostDevice  # noqa: PLC0415

        from executor import attention  # noqa: PLC0415

        attention.BACKENDS = (TritonAttention(interpreted=True),)
        settings |= {
            "device": "cpu",
            "attention_backend": "triton",
            "make_device": lambda _: HostDevice(),
        }
    runner = GpuRunner(name="check", model_folder=folder, cuda_graphs="auto" if graphs else "off", **settings)
    runner.load(lambda _stage, _done, _total: None)
    return runner
