"""What keeps processes alive, with processes that are played."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.children import Child, ChildFailed, keep_alive

ROOT = Path(__file__).resolve().parents[2]


class Played(Child):
    """Ends with each of `codes` in turn, and never gets so far as to be ready."""

    def __init__(self, codes: list[int]) -> None:
        super().__init__("played", [])
        self.starts = 0
        self._codes = codes

    async def start(self) -> str:
        self.starts += 1
        raise ChildFailed(self.name, self._codes[0])

    async def wait(self) -> int:
        return self._codes.pop(0)


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was slept, in no time."""
    slept: list[float] = []

    async def sleep(delay_s: float) -> None:
        slept.append(delay_s)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return slept


def test_a_child_that_fails_all_night_is_still_started_in_the_morning(delays: list[float]) -> None:
    """2 ** failures outgrows a float after 1,023 of them."""
    child = Played([1] * 1100 + [os.EX_CONFIG])
    asyncio.run(keep_alive(child, max_backoff_s=10.0))
    assert child.starts == 1100
    assert delays[0] == 0
    assert delays == sorted(delays)
    assert delays[-1] == 10.0


def test_a_child_that_only_an_operator_can_mend_is_not_started_again(delays: list[float]) -> None:
    child = Played([1, os.EX_CONFIG])
    asyncio.run(keep_alive(child))
    assert child.starts == 1, "the start after which it ended with 78 was the last"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
@pytest.mark.parametrize(("parent", "told", "code"), [(1, 1, 0), (1, 7, -15), (7, 7, 0)])
def test_a_child_goes_with_its_parent_even_where_that_is_the_first_process(parent: int, told: int, code: int) -> None:
    """A container's first process has the id 1; a parent that is another one than was told has died."""
    program = (
        "import os, signal; from services.lifecycle import die_with_parent;"
        f"os.getppid = lambda: {parent}; die_with_parent({told})"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == code
