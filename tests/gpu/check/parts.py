"""A part of a stage, what it is given, and what it finds. A part that fails is told, and the next one goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch


class Skipped(Exception):
    """The part cannot run here; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """A number that was set as a goal before it was measured."""

    what: str
    measured: float
    bound: float
    at_most: bool = True  # else at least

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


@dataclass(slots=True, kw_only=True)
class Found:
    """What a part brings back: numbers for the JSON, lines for people, aims, and what is wrong."""

    values: dict[str, Any] = field(default_factory=dict[str, Any])
    lines: list[str] = field(default_factory=list[str])
    aims: list[Aim] = field(default_factory=list[Aim])
    problems: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What every part is given."""

    fake: bool  # CPU tensors and tiny sizes: it runs the program, and measures nothing
    folder: Path  # for large files that live as long as the check
    out: Path  # for logs
    earlier: Mapping[str, Mapping[str, Any]]  # "stage/part" → its values
    until_s: float  # time.monotonic() at which the stage should be over

    @property
    def device(self) -> torch.device:
        """Where tensors live."""
        return torch.device("cpu") if self.fake else torch.device("cuda", 0)

    @property
    def bytes_per_s(self) -> float:
        """The memory's measured ceiling; the data sheet's of an H200, were it not measured."""
        return float(self.earlier.get("environment/memory", {}).get("ceiling_gb_s", _ASSUMED_GB_S)) * 1e9

    @property
    def flop_per_s(self) -> float:
        """The measured ceiling of bf16 matrix products; or what H200s usually reach."""
        return float(self.earlier.get("environment/matrix products", {}).get("tflop_s", _ASSUMED_TFLOP_S)) * 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One piece of work that can fail alone."""

    name: str
    work: Callable[[Check], Found]
    takes_s: float = 5.0  # a guess: it is not begun with less left
    limit_s: float = 90.0  # it hangs


_ASSUMED_GB_S: Final = 4300.0
_ASSUMED_TFLOP_S: Final = 790.0
