"""A bar on the terminal for work that takes longer than a person likes to wait in the dark."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

Progress = Callable[[str, int, int], None]
"""Told what is going on, how many bytes are done, and how many there are in all (0: not known)."""


class ProgressBar:
    """A Progress that draws on standard error; where that is no terminal, it writes one line for each thing."""

    def __init__(self) -> None:
        self._what = ""
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Draw, or write the line when the thing is new."""
        if not sys.stderr.isatty():
            if what != self._what:
                sys.stderr.write(f"{what}\n")
            self._what = what
            return
        bar = self._bar or self._start()
        if what != self._what or self._task is None:
            self._finish_task(bar)
            self._task = bar.add_task(what, total=total or None)
            self._what = what
        bar.update(self._task, completed=done, total=total or None)

    def _start(self) -> RichProgress:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._bar.start()
        return self._bar

    def _finish_task(self, bar: RichProgress) -> None:
        if self._task is not None:
            task = next(task for task in bar.tasks if task.id == self._task)
            bar.update(self._task, total=task.total or task.completed, completed=task.total or task.completed)
