"""The places where a process can be told to break, and that nobody breaks by accident."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import failpoints
from common.failpoints import CLIENT, EXECUTOR, NAMES, SCHEDULER
from services.failpoints import VARIABLE, FailpointError, Injected, arm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def disarm() -> Iterator[None]:
    yield
    failpoints.hit = failpoints.unarmed


def places() -> Counter[str]:
    """Every failpoint in the sources, and how often."""
    found = Counter[str]()
    for package in ("common", "scheduler", "executor", "services", "pagewire"):
        for source in (ROOT / package).rglob("*.py"):
            found.update(re.findall(r'failpoints\.hit\("(\w+)"\)', source.read_text()))
    return found - Counter({"before_commit": 1})  # the example in common/failpoints.py


def test_every_name_has_its_place_in_the_code_and_every_place_its_name() -> None:
    in_every_runner = {"before_block_copy", "after_forward_before_sample"}

    assert places() == Counter({name: 3 if name in in_every_runner else 1 for name in NAMES})
    assert len(NAMES) == len(SCHEDULER) + len(EXECUTOR) + len(CLIENT) >= 29


def test_without_the_variable_nothing_is_armed() -> None:
    arm({})
    arm({VARIABLE: ""})

    assert failpoints.hit is failpoints.unarmed


def test_an_action_strikes_at_the_passage_that_is_named_and_at_no_other() -> None:
    arm({VARIABLE: "before_commit=raise@3; before_plan_send=drop@2+"})

    for passage in range(1, 6):
        if passage == 3:
            with pytest.raises(Injected):
                failpoints.hit("before_commit")
        else:
            assert failpoints.hit("before_commit") == ""
    assert [failpoints.hit("before_plan_send") for _ in range(4)] == ["", "drop", "drop", "drop"]
    assert failpoints.hit("after_plan_send") == ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("before_comit=kill", "there is no failpoint 'before_comit'"),
        ("before_commit=explode", "is not NAME=ACTION"),
        ("before_commit=drop", "before_commit knows no 'drop'"),
        ("before_commit", "is not NAME=ACTION"),
        ("before_commit=kill@", "is not NAME=ACTION"),
    ],
)
def test_a_mistake_is_refused_at_the_start(text: str, problem: str) -> None:
    with pytest.raises(FailpointError, match=problem):
        arm({VARIABLE: text})
    assert failpoints.hit is failpoints.unarmed


def test_a_process_at_work_is_armed_by_a_file_and_tells_what_struck(tmp_path: Path) -> None:
    orders, struck = tmp_path / "orders", tmp_path / "orders.struck"
    before = signal.getsignal(signal.SIGUSR1)
    try:
        arm({VARIABLE: f"@{orders}"})
        assert failpoints.hit("before_plan_send") == ""

        orders.write_text("before_plan_send=drop@2")
        signal.raise_signal(signal.SIGUSR1)
        assert [failpoints.hit("before_plan_send") for _ in range(3)] == ["", "drop", ""]
        assert struck.read_text() == "before_plan_send=drop\n"

        orders.write_text("")
        signal.raise_signal(signal.SIGUSR1)
        assert failpoints.hit is failpoints.unarmed
    finally:
        signal.signal(signal.SIGUSR1, before)
