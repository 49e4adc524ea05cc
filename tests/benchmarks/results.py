"""What a benchmark has found: written after every run, read again to make tables and plots of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.benchmarks.floors import ModelShape

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """The median of some runs, and how far they lie apart."""

    median: float
    low: float
    high: float
    trusted: bool  # all of these runs had the machine for themselves, and no request failed


@dataclass(slots=True, kw_only=True)
class Results:
    """One benchmark. Rows are JSON objects, as they stand in the file."""

    about: dict[str, Any] = field(default_factory=dict[str, Any])  # date, command, machine, versions
    shape: dict[str, int] | None = None  # of the model; see floors.ModelShape
    engines: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])  # in the order of the command
    left_out: dict[str, str] = field(default_factory=dict[str, str])  # engine and why
    limits: list[list[Row]] = field(
        default_factory=list[list[Row]]
    )  # of each round: limits.Limits, fewest threads first
    starts: list[Row] = field(default_factory=list[Row])
    runs: list[Row] = field(default_factory=list[Row])

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` has written."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        """Write everything; who reads at the same time sees the old file or the new one."""
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(content, indent=1), encoding="utf-8")
        beside.replace(path)

    def names(self, precision: str | None = None) -> list[str]:
        """The engines that were measured, all or those of one precision."""
        return [
            name
            for name, engine in self.engines.items()
            if precision in (None, engine["precision"]) and any(run["engine"] == name for run in self.runs)
        ]

    def workloads(self) -> list[str]:
        """What was played, in order."""
        return list(dict.fromkeys(run["workload"] for run in self.runs))

    def figure(self, engine: str, workload: str, *path: str) -> Figure | None:
        """One number over the trusted runs of a workload, or else over the least disturbed three."""
        runs = [run for run in self.runs if (run["engine"], run["workload"]) == (engine, workload)]
        trusted = [run for run in runs if not run["disturbed"] and not run["summary"]["failed"]]
        chosen = trusted or sorted(runs, key=lambda run: float(run["account"]["foreign"]))[:3]
        return _figure(chosen, ("summary", *path), trusted=bool(trusted))

    def start(self, engine: str, *path: str) -> Figure | None:
        """One number over the starts of an engine."""
        return _figure([start for start in self.starts if start["engine"] == engine], path, trusted=True)

    def cpu_us_per_token(self, engine: str, workload: str, process: str) -> float | None:
        """Processor time of one process, or of the `client`, for each token that came out."""
        spent, tokens = 0.0, 0
        for run in self.runs:
            if (run["engine"], run["workload"]) == (engine, workload):
                account = run["account"]
                spent += account["client_s"] if process == "client" else account["server_s"].get(process, 0.0)
                tokens += run["summary"]["output_tokens"]
        return spent / tokens * 1e6 if tokens else None

    def processes(self, engine: str) -> list[str]:
        """What the engine consists of, leaving out what did next to nothing."""
        spent: dict[str, float] = {}
        for run in self.runs:
            if run["engine"] == engine:
                for name, seconds in run["account"]["server_s"].items():
                    spent[name] = spent.get(name, 0.0) + seconds
        return [name for name, seconds in spent.items() if seconds > 0.01 * sum(spent.values())]

    def read_gb_s(self) -> float | None:
        """The fastest that memory was read, with every thread."""
        return max((limits[-1]["read_gb_s"] for limits in self.limits), default=None)

    def matrix_gflop_s(self) -> float | None:
        """The fastest that matrices were multiplied, with every thread."""
        return max((max(limits[-1]["matrix_gflop_s"].values()) for limits in self.limits), default=None)

    def model_shape(self) -> ModelShape | None:
        """The model's shape, where it is of a known kind."""
        return ModelShape(**self.shape) if self.shape else None


def _figure(rows: Sequence[Row], path: Sequence[str], *, trusted: bool) -> Figure | None:
    found = list(_numbers(rows, path))
    if not found:
        return None
    return Figure(median=statistics.median(found), low=min(found), high=max(found), trusted=trusted)


def _numbers(rows: Sequence[Row], path: Sequence[str]) -> Iterator[float]:
    for row in rows:
        value: Any = row
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, int | float):
            yield value
