"""Planting a bug: production code is exchanged while it is looked for, and put back."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

_ABSENT: Final = object()
_ROOT: Final = Path(__file__).resolve().parents[2]

Patch = Callable[[Any, str, Any], None]


class Mutation(NamedTuple):
    """One bug: `plant` exchanges attributes of production code."""

    plant: Callable[[Patch], None]
    witness: str = ""  # the test that must fail, where no story can show the bug

    @property
    def name(self) -> str:
        """What it does, in words."""
        return self.plant.__name__.replace("_", " ")


def mutations_in(namespace: Mapping[str, Any]) -> Iterator[Mutation]:
    """Every function of the module that plants something."""
    for name, value in list(namespace.items()):
        if callable(value) and getattr(value, "__module__", "") == namespace["__name__"] and not name.startswith("_"):
            annotations = getattr(value, "__annotations__", {})
            if list(annotations) == ["patch", "return"]:
                plant: Any = value
                yield Mutation(plant)


@contextmanager
def planted(mutation: Mutation) -> Iterator[None]:
    """The bug is in the code meanwhile."""
    undo: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    try:
        mutation.plant(patch)
        yield
    finally:
        for owner, name, value in reversed(undo):
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def fails(test: str) -> bool:
    """Run one test in this process, with what is planted here. Raises AssertionError when it could not be run."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = pytest.main(["-q", "-p", "no:cacheprovider", f"--rootdir={_ROOT}", str(_ROOT / test)])
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), said.getvalue()
    return code is pytest.ExitCode.TESTS_FAILED
