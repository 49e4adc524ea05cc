"""What a kill run has shown: each fault with its pause, what broke, and whether that is good enough."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

FEW_TOKENS: Final = 20  # before and after a fault, of all streams together
MANY: Final = 300  # faults, among which every failpoint must be

BARS_S: Final[Mapping[tuple[str, str], float]] = {
    ("executor killed", "yes"): 1.0,
    ("executor killed as it starts", "yes"): 1.0,
    ("executor raised", "yes"): 1.0,
    ("executor link reset", "yes"): 1.0,
    ("executor frozen", "yes"): 4.0,
    ("executor link dark", "yes"): 4.0,
    ("client link dark", "yes"): 4.0,
    ("scheduler killed", "yes"): 5.0,
    ("scheduler killed", "no"): 5.0,
    ("scheduler frozen", "yes"): 4.0,
    ("client killed, resumed", ""): 1.0,
    ("client killed, gone", ""): 1.0,
}
"""What the 99th percentile of the pauses may be, by kind of fault and whether somebody else was there to go on."""


@dataclass(slots=True)
class Fault:
    """One fault that happened. Times in seconds since the beginning of the run."""

    at_s: float
    kind: str
    failpoint: str = ""
    standby: str = ""  # yes or no: whether another was there to go on; empty where that is no question
    held: int = 1  # sequences that the victim had when it was chosen
    tokens_before: int = 0  # since all was well again after the fault before
    tokens_after: int = 0  # until all was well again after this one
    pause_s: float = 0.0  # the longest that any open stream said nothing

    @property
    def is_void(self) -> bool:
        """Nobody was there to feel it."""
        return min(self.tokens_before, self.tokens_after) < FEW_TOKENS or not self.held


@dataclass(slots=True)
class Report:
    """What a run has shown."""

    seed: int
    streams: int
    wanted: int = 1  # faults that somebody was there to feel
    seconds: float = 0.0
    asked: int = 0
    answers: int = 0
    tokens: int = 0
    exact: int = 0  # choices that the server called exact
    inexact: int = 0
    overlapping: bool = False
    model: str = ""  # empty: the fake one
    faults: list[Fault] = field(default_factory=list[Fault])
    broken: list[str] = field(default_factory=list[str])
    missed: dict[str, int] = field(default_factory=dict[str, int])  # failpoints that were armed and not passed in time
    unstruck: list[str] = field(default_factory=list[str])  # failpoints that the run should have struck and did not

    @property
    def real(self) -> list[Fault]:
        """Faults that somebody was there to feel."""
        return [fault for fault in self.faults if not fault.is_void]

    @property
    def is_sound(self) -> bool:
        """Nothing broke, and so many faults as were wanted were real."""
        return not self.broken and len(self.real) >= self.wanted

    @property
    def late(self) -> list[str]:
        """Kinds of faults whose pauses are longer than they may be.

        Faults that overlap are not judged, nor a real model's, which computes again what was lost.
        """
        if self.overlapping or self.model:
            return []
        found: list[str] = []
        for (kind, standby), pauses in self._groups().items():
            bar_s = BARS_S.get((kind, standby))
            if bar_s is not None and _p99(pauses) > bar_s:
                found.append(f"{kind}: p99 {_p99(pauses):.2f} s, may be {bar_s:g} s")
        return found

    @property
    def is_green(self) -> bool:
        """Sound, in time, and in a long run no failpoint was left out."""
        left_out = self.unstruck and len(self.real) >= MANY
        return self.is_sound and not self.late and not left_out

    def markdown(self) -> str:
        """The tables, and what they come to."""
        lines = [
            "| fault | standby | times | pause p50 | p99 | longest | may be |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        for (kind, standby), pauses in sorted(self._groups().items()):
            bar_s = BARS_S.get((kind, standby))
            bar = f"{bar_s:g} s" if bar_s is not None else ""
            lines.append(
                f"| {kind} | {standby} | {len(pauses)} | {statistics.median(pauses):.2f} s | {_p99(pauses):.2f} s | "
                f"{pauses[-1]:.2f} s | {bar} |"
            )
        places = Counter(fault.failpoint or "at random" for fault in self.real)
        lines += ["", "Where: " + ", ".join(f"{place} {count}" for place, count in sorted(places.items())) + ".", ""]
        lines.append(f"Failpoints never struck: {', '.join(self.unstruck) or 'none'}.")
        if self.missed:
            missed = ", ".join(f"{place} {count}" for place, count in sorted(self.missed.items()))
            lines.append(f"Armed and not passed in time, so tried again later: {missed}.")
        for what in self.late:
            lines.append(f"Too late: {what}.")
        manner = "overlapping" if self.overlapping else "one at a time"
        lines.append("")
        lines.append(
            f"{len(self.real)} faults {manner} ({len(self.faults) - len(self.real)} that nobody felt are not counted), "
            f"{self.seconds:.0f} s with {self.streams} streams live, seed {self.seed}: {self.answers} answers, "
            f"{self.tokens} tokens; {len(self.broken)} streams lost, gapped, repeated, changed or without an end; "
            f"{self.exact} of {self.exact + self.inexact} choices exact."
        )
        return "\n".join([*lines, *(f"- {what}" for what in self.broken[:20])])

    def _groups(self) -> dict[tuple[str, str], list[float]]:
        groups: dict[tuple[str, str], list[float]] = {}
        for fault in self.real:
            groups.setdefault((fault.kind, fault.standby), []).append(fault.pause_s)
        for pauses in groups.values():
            pauses.sort()
        return groups


def _p99(pauses: Sequence[float]) -> float:
    """Of sorted times."""
    return pauses[min(len(pauses) - 1, int(0.99 * len(pauses)))]
