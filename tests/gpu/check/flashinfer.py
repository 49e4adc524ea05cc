"""FlashInfer beside our kernels: not needed, and looked at only where it is installed."""

from __future__ import annotations

import torch

from executor.attention.flashinfer import FlashInferAttention
from executor.attention.protocol import LayerNeeds
from executor.kv_cache import LayerShape
from tests.gpu.check.parts import Check, Skipped


def served_by_flashinfer(check: Check, *, prompts: str = "fa2") -> FlashInferAttention:
    """The backend; without a GPU one that torch stands in for. Raises Skipped where it cannot run."""
    if check.fake:
        from tests.gpu.flashinfer_stand_in import StandIn  # noqa: PLC0415 - for the fake device alone

        return FlashInferAttention(StandIn(), prompts=prompts)
    served = FlashInferAttention(prompts=prompts)
    reason = served.why_not(
        LayerNeeds(
            shape=LayerShape(num_heads=16, num_kv_heads=8, key_dim=128, value_dim=128),
            dtype=torch.bfloat16,
            device=check.device,
        )
    )
    if reason is not None:
        raise Skipped(reason)
    return served
