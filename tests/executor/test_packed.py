"""Memory for weights: of a kind that the system makes huge pages of."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from executor.native.packed import Pages


def flags_of(address: int) -> set[str]:
    """What the system knows of the mapping that holds an address: see proc(5), VmFlags."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return set(line.split()[1:])
    raise AssertionError(f"{address:#x} is not mapped")


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
def test_weights_lie_where_huge_pages_can_be() -> None:
    taken = Pages().take(1 << 20)
    flags = flags_of(taken.data_ptr())

    assert "hg" in flags, "huge pages were not asked for"
    assert "sh" not in flags, "shared memory gets none unless the whole machine is set so"
