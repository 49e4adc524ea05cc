"""The killing of real processes, in short; the long run and its figures are in RESULTS.md."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.faults import striking
from tests.faults.kill_report import Fault, Report
from tests.faults.kill_run import Run, Stage
from tests.faults.strikes import Strike

ONE_OF_EACH = [
    Strike("executor", "kill"),
    Strike("executor", "raise", "after_sample_before_send", 5),
    Strike("executor link", "reset"),
    Strike("scheduler", "kill", "after_commit_before_outbox", 20),
    Strike("client", "kill"),
    Strike("client link", "reset"),
    Strike("executor", "kill", "before_hello"),
]


def test_the_death_of_any_process_is_a_pause_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(striking, "_PASSED_WITHIN_S", 20.0)  # a process starts in that time on a busy machine, too
    run = Run(
        kills=len(ONE_OF_EACH),
        streams=8,
        seed=4,
        folder=tmp_path,
        history_file=tmp_path / "history.jsonl",
        stages=[Stage(sites=1, executors=2, deck=lambda draw: list(ONE_OF_EACH))],
    )

    report = asyncio.run(asyncio.wait_for(run.play(), timeout=300))  # what cannot be struck is tried for ever

    assert report.broken == []
    assert {fault.kind for fault in report.real} == {strike.kind for strike in ONE_OF_EACH}
    assert report.answers > 8
    assert report.exact > report.inexact == 0


def fault(
    *, kind: str = "executor killed", pause_s: float = 0.1, held: int = 3, before: int = 99, after: int = 99
) -> Fault:
    return Fault(1.0, kind, standby="yes", held=held, tokens_before=before, tokens_after=after, pause_s=pause_s)


def test_a_fault_that_nobody_felt_does_not_count() -> None:
    assert Report(1, 8, 2, faults=[fault(), fault()]).is_green
    assert not Report(1, 8, 1).is_green
    assert not Report(1, 8, 2, faults=[fault(), fault(after=0)]).is_green
    assert not Report(1, 8, 2, faults=[fault(), fault(before=3)]).is_green
    assert not Report(1, 8, 2, faults=[fault(), fault(held=0)]).is_green
    assert Report(1, 8, 2, faults=[fault(), fault(held=0), fault()]).is_green


def test_a_run_with_a_broken_stream_is_red() -> None:
    assert not Report(1, 8, faults=[fault()], broken=["stream 7: Violation: I2"]).is_green


def test_a_run_whose_pauses_are_too_long_is_red_unless_its_faults_overlap() -> None:
    slow = [fault(pause_s=1.2)] * 2 + [fault()] * 90

    assert not Report(1, 8, faults=slow).is_green
    assert Report(1, 8, faults=slow, overlapping=True).is_green
    assert Report(1, 8, faults=[fault(kind="executor frozen", pause_s=3.0)]).is_green


def test_a_long_run_that_leaves_a_failpoint_out_is_red() -> None:
    assert Report(1, 8, faults=[fault()], unstruck=["on_preempt"]).is_green
    assert not Report(1, 8, faults=[fault()] * 300, unstruck=["on_preempt"]).is_green
