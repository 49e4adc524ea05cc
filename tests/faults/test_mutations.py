"""A checker that never complains proves nothing: every bug that is planted must be seen by some story."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.faults.mutations import MUTATIONS, catch


def first_seed(number: int) -> tuple[int, str] | None:
    return catch(MUTATIONS[number], seeds=1500)


@pytest.fixture(scope="module")
def catches() -> dict[str, tuple[int, str] | None]:
    """For every bug, the first seed that sees it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.map(first_seed, range(len(MUTATIONS)))
        return dict(zip((mutation.name for mutation in MUTATIONS), found, strict=True))


@pytest.mark.parametrize("name", [mutation.name for mutation in MUTATIONS])
def test_a_story_is_broken_when(name: str, catches: dict[str, tuple[int, str] | None]) -> None:
    assert catches[name] is not None


def test_there_are_enough_bugs_and_no_two_of_a_name() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 80
