"""Seconds since the machine started, suspended ones too: what a process says of its age must not stand still."""

from __future__ import annotations

import time


def boot_s() -> float:
    """Of no use but for differences."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
