"""A kernel that begins while the one before it still runs: Hopper's programmatic dependent launch.

Each kernel of a decode step says at its beginning that the next one may come, which it does as soon as all programs of
this one have begun and there is room. It prepares what depends on no other kernel, weights above all, and then waits
until the one before it is complete and all that it wrote is to be seen.

The rule that makes it right: **every program waits before it reads what a kernel wrote and before it writes anything.**
A kernel that is complete has waited for the one before it, so that was complete too, and so on: nobody reads too early,
and nobody overwrites what an earlier kernel still reads. What may be read before the wait: weights, and what lay on the
device before the step's first kernel, which is launched without this.

In the interpreter, and on a GPU older than Hopper, it is switched off (`overlap`). Where the kernel before is not ours,
the wait is that of any other launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import triton
import triton.language as tl

_HOPPER = (9, 0)
_switch = {"on": True}


def overlap(device: torch.device) -> dict[str, bool]:
    """The arguments of a launch that may begin before the kernel before it has ended."""
    if _switch["on"] and _is_able(device):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@contextmanager
def without_overlap() -> Iterator[None]:
    """Launch each kernel when the one before it has ended: to measure the difference."""
    _switch["on"] = False
    try:
        yield
    finally:
        _switch["on"] = True


@lru_cache
def _is_able(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER


@triton.jit
def begin_next(OVERLAP: tl.constexpr):
    """Let the next kernel come when all programs of this one have said so."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Wait until the kernel before is complete and its writes are to be seen."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(pointers, wanted):
    """Call the lines of memory of `pointers` to the second-level cache."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r",
        [pointers.to(tl.int64), tl.broadcast_to(wanted, pointers.shape).to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
