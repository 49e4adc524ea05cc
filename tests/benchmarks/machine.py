"""Who uses the machine: processor time and memory of a server with all its processes, of us, and of strangers.

A benchmark on a machine that others use too is worth little unless it says what they took. Linux only: reads /proc.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

FOREIGN_SHARE: Final = 0.05  # of the machine; a run in which strangers took more is disturbed

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_CPUS: Final = os.cpu_count() or 1
_PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of several processes together. What they share counts once for each in `rss`, and once in all in `pss`."""

    rss_mib: int
    pss_mib: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Who used the processors during a run, in seconds of processor time."""

    wall_s: float
    server_s: dict[str, float]  # by process
    client_s: float
    foreign: float  # share of the whole machine that others used
    stolen: float  # share that the hypervisor kept

    @property
    def disturbed(self) -> bool:
        """Whether the run should not be trusted."""
        return self.foreign > FOREIGN_SHARE


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """All counters at one moment. Subtract two to get an Account."""

    at_s: float
    busy_s: float
    stolen_s: float
    server_s: dict[str, float]
    client_s: float

    @classmethod
    def now(cls, server: int | None = None) -> Self:
        """`server` is the first process of a server; its descendants count as the server too. It may be this one."""
        with (_PROC / "stat").open() as stat:
            user, nice, system, _idle, _io, interrupts, soft, stolen = (
                int(ticks) / _TICKS_PER_S for ticks in stat.readline().split()[1:9]
            )
        own = os.times()
        return cls(
            at_s=time.monotonic(),
            busy_s=user + nice + system + interrupts + soft,
            stolen_s=stolen,
            server_s=_cpu_by_process(server) if server else {},
            client_s=0.0 if server == os.getpid() else own.user + own.system,
        )

    def since(self, before: Reading) -> Account:
        """What happened between the two."""
        wall_s = self.at_s - before.at_s
        server_s = {  # of both: what one that has ended took is its parent's now
            name: self.server_s.get(name, 0.0) - before.server_s.get(name, 0.0)
            for name in self.server_s.keys() | before.server_s.keys()
        }
        client_s = self.client_s - before.client_s
        foreign_s = self.busy_s - before.busy_s - sum(server_s.values()) - client_s
        return Account(
            wall_s=round(wall_s, 3),
            server_s={name: round(cpu_s, 2) for name, cpu_s in server_s.items()},
            client_s=round(client_s, 2),
            foreign=round(max(0.0, foreign_s) / wall_s / _CPUS, 4),
            stolen=round((self.stolen_s - before.stolen_s) / wall_s / _CPUS, 4),
        )


async def quiet(server: int | None, patience_s: float) -> None:
    """Return once strangers leave the machine alone for a second, or when patience ends."""
    give_up_s = time.monotonic() + patience_s
    while time.monotonic() < give_up_s:
        before = Reading.now(server)
        await asyncio.sleep(1.0)
        if not Reading.now(server).since(before).disturbed:
            return


def memory(server: int) -> Memory:
    """Of a server with all its processes."""
    rss = pss = 0
    for pid in processes(server):
        try:
            lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines[1:])}
        rss += kib["Rss"]
        pss += kib["Pss"]
    return Memory(rss_mib=rss // 1024, pss_mib=pss // 1024)


def processes(root: int) -> list[int]:
    """`root`, its descendants, and what else is in the session that it leads."""
    everyone = {int(entry.name): found for entry in _PROC.iterdir() if entry.name.isdigit() and (found := _stat(entry))}
    family = {root}
    while grown := {
        pid
        for pid, process in everyone.items()
        if pid not in family and (process.parent in family or process.session == root)
    }:
        family |= grown
    return sorted(family & everyone.keys())


def describe() -> dict[str, str | int]:
    """The machine, in words that name no person and no folder."""
    lines = (_PROC / "cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    memory_gib = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    return {"cpu": cpu, "cores": _CPUS, "memory_gib": memory_gib, "kernel": os.uname().release}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Process:
    parent: int
    session: int
    cpu_s: float  # its own, and that of its children that have ended


def _stat(folder: Path) -> _Process | None:
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return None
    return _Process(
        parent=int(fields[1]),
        session=int(fields[3]),
        cpu_s=sum(int(ticks) for ticks in fields[11:15]) / _TICKS_PER_S,
    )


def _cpu_by_process(root: int) -> dict[str, float]:
    taken: dict[str, float] = {}
    for pid in processes(root):
        if (process := _stat(_PROC / str(pid))) is not None:
            name = _name(pid)
            taken[name] = taken.get(name, 0.0) + process.cpu_s
    return taken


def _name(pid: int) -> str:
    """What runs there: the program, or for Python the module and its command: `services executor`."""
    try:
        words = (_PROC / str(pid) / "cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return "ended"
    if "-m" in words[:-1]:
        module = words.index("-m") + 1
        return " ".join(word for word in words[module : module + 2] if word and not word.startswith("-"))
    return Path(words[0].split(" ")[0]).name
