"""The killing of real processes, in short; the long run and its figures are in RESULTS.md."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.faults import kill_run
from tests.faults.kill_run import Fault, Report


def test_a_dozen_deaths_are_pauses_and_nothing_else(tmp_path: Path) -> None:
    report = asyncio.run(
        kill_run.run(kills=12, streams=8, executors=3, seed=4, folder=tmp_path, history_file=tmp_path / "history.jsonl")
    )

    assert report.broken == []
    assert len(report.real) >= 12, "deaths that at least 20 tokens went before, and 20 came after"
    assert report.answers > 8


def fault(*, tokens_before: int = 100, tokens_after: int = 100) -> Fault:
    return Fault(1.0, "kill", "", standby=True, since_s=0.0, tokens_before=tokens_before, tokens_after=tokens_after)


def test_a_run_whose_faults_nobody_felt_is_red() -> None:
    assert Report(1, 8, faults=[fault()]).is_green
    assert not Report(1, 8).is_green
    assert not Report(1, 8, faults=[fault(), fault(tokens_after=0)]).is_green
    assert not Report(1, 8, faults=[fault(), fault(tokens_before=3)]).is_green


def test_a_run_with_a_broken_stream_is_red() -> None:
    assert not Report(1, 8, faults=[fault()], broken=["stream 7: Violation: I2"]).is_green
