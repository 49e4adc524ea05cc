"""What happened so far, a line of JSON at a time: it outlives a process that dies, and a check that is cut short."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.gpu.check.stages import Stage

OK: Final = "ok"
FAILED: Final = "failed"
SKIPPED: Final = "skipped"
NO_DEVICE: Final = "no device"


class Journal:
    """The file. Several processes write to it, never two at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: str, **values: Any) -> None:
        """Add a line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "at_s": time.monotonic(), **values}, default=str) + "\n")

    def read(self) -> History:
        """All of it; a line that is still being written is not there yet."""
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        return History.of([json.loads(line) for line in text.split("\n")[:-1]])


@dataclass(slots=True)
class Told:
    """One stage's part of the journal."""

    parts: list[str] = field(default_factory=list[str])  # all that it has, done or not
    ended: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])  # part → its last line
    problem: dict[str, Any] | None = None  # the stage as a whole could not run
    is_over: bool = False

    @property
    def status(self) -> str:
        """The worst of its parts; skipped only if none ran."""
        each = {end["status"] for end in self.ended.values()}
        if self.problem is not None or FAILED in each:
            return FAILED
        return OK if OK in each else SKIPPED


@dataclass(slots=True)
class History:
    """The journal, read."""

    stages: dict[int, Told] = field(default_factory=dict[int, Told])
    running: tuple[int, str, float] | None = None  # stage, part, since when
    limit_s: float = 0.0  # of what is running
    no_device: str = ""

    @classmethod
    def of(cls, lines: Sequence[Mapping[str, Any]]) -> History:
        """Go through all lines."""
        history = cls()
        for line in lines:
            stage = history.stages.setdefault(line["stage"], Told()) if "stage" in line else Told()
            match line["event"]:
                case "stage":
                    stage.parts = line["parts"]
                case "begin":
                    history.running = (line["stage"], line["part"], line["at_s"])
                    history.limit_s = line["limit_s"]
                case "end":
                    stage.ended[line["part"]] = dict(line)
                    history.running = None
                case "stage over":
                    stage.is_over = True
                    stage.problem = dict(line) if "problem" in line else stage.problem
                case _:
                    history.no_device = line["problem"]
        return history

    def is_over(self, stage: Stage) -> bool:
        """Whether nothing of it is left to run."""
        return stage.number in self.stages and self.stages[stage.number].is_over

    def values(self, stages: Sequence[Stage]) -> dict[str, dict[str, Any]]:
        """What was found: "stage/part" → its values."""
        return {
            f"{stage.name}/{part}": end["values"]
            for stage in stages
            if stage.number in self.stages
            for part, end in self.stages[stage.number].ended.items()
            if end.get("values")
        }
