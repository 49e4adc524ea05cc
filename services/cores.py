"""How many cores this process may use. A machine has more than a container gets, and threads beyond it only wait."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Set
from pathlib import Path


def usable_cores(*, cpus: Set[int] | None = None, root: Path = Path("/")) -> int:
    """Physical cores of this process: those of its affinity, no second thread of any, within its cgroup's quota.

    The forward is bound by memory and by vector units, and two threads of one core share both. `root` is for tests.
    """
    if cpus is None:
        cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu, root) for cpu in cpus}
    quota = min(_quotas(root), default=len(cores))
    return max(1, min(len(cores), int(quota)))


def _siblings(cpu: int, root: Path) -> str:
    """The hardware threads of a core, the same text for each of them; the cpu itself where nobody says."""
    return _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """CPU seconds a second that this process's cgroup and those above it are given, where they are bounded."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            for folder in _upwards(root / "sys/fs/cgroup", path):
                quota, _, period = _read(folder / "cpu.max").partition(" ")
                if quota.isdigit():
                    yield int(quota) / int(period)
        elif "cpu" in controllers.split(","):
            for folder in _upwards(root / "sys/fs/cgroup/cpu", path):
                quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
                if quota.isdigit() and period.isdigit():  # -1 is no bound
                    yield int(quota) / int(period)


def _upwards(top: Path, path: str) -> Iterable[Path]:
    """The cgroup's folder and those above it. In a container the path may be the host's, and only the top is there."""
    folder = top / path.lstrip("/")
    return (folder, *(parent for parent in folder.parents if parent.is_relative_to(top)))


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
