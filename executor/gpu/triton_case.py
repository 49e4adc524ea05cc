"""What all Triton kernels here have in common: whether Triton can run, and how a kernel is compiled without a GPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: for tests. Read by Triton when a kernel is declared."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device) -> str | None:
    """Return why no Triton kernel can run on `device`, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and not is_interpreted():
        return f"Triton's kernels are for CUDA, not for {device.type}"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileCase:
    """One kernel as it is launched in serving, to be compiled ahead of time for a GPU that is not here.

    `signature` gives each argument's type in Triton's words: "*bf16", "*i32", "i32", "fp32", "constexpr".
    """

    name: str
    kernel: Any  # triton.JITFunction
    signature: Mapping[str, str]
    constants: Mapping[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    targets: tuple[int, ...] = (90,)  # compute capabilities: 80 is Ampere, 90 Hopper
    instructions: tuple[str, ...] = ()  # one of these must be in the machine code: ("HGMMA", "HMMA")
