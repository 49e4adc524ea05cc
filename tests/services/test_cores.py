"""The number of threads that a forward gets where nobody says it."""

from __future__ import annotations

from pathlib import Path

from services.cores import usable_cores


def write(root: Path, file: str, text: str) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(text + "\n")


def test_every_cpu_is_a_core_where_nothing_else_is_known(tmp_path: Path) -> None:
    assert usable_cores(cpus={0, 1, 2}, root=tmp_path) == 3


def test_two_threads_of_a_core_count_once(tmp_path: Path) -> None:
    for cpu in range(8):
        write(tmp_path, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}")

    assert usable_cores(cpus=set(range(8)), root=tmp_path) == 4
    assert usable_cores(cpus={1, 5, 6}, root=tmp_path) == 2


def test_a_quota_of_the_cgroup_or_of_one_above_it_is_the_bound(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/kubepods/pod/box")
    write(tmp_path, "sys/fs/cgroup/kubepods/pod/box/cpu.max", "max 100000")
    write(tmp_path, "sys/fs/cgroup/kubepods/pod/cpu.max", "350000 100000")

    assert usable_cores(cpus=set(range(16)), root=tmp_path) == 3


def test_a_container_that_sees_only_the_top_of_the_tree_finds_its_quota_there(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/../../host/path")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "200000 100000")

    assert usable_cores(cpus=set(range(16)), root=tmp_path) == 2


def test_a_quota_of_the_old_kind_counts_too(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "5:cpu,cpuacct:/box\n3:memory:/box")
    write(tmp_path, "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "250000")
    write(tmp_path, "sys/fs/cgroup/cpu/box/cpu.cfs_period_us", "100000")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")

    assert usable_cores(cpus=set(range(16)), root=tmp_path) == 2


def test_less_than_a_core_is_still_one_thread(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "50000 100000")

    assert usable_cores(cpus={0, 1}, root=tmp_path) == 1


def test_this_machine_has_a_core() -> None:
    assert usable_cores() >= 1
