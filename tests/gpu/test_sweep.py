"""The sweep of products on the fake device: it runs, and what dies or is wrong is told and never chosen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from executor.gpu.kernels.skinny import Cut
from tests.gpu.check.sweep import Notes, best_cuts, candidates, faster, told

ROOT = Path(__file__).resolve().parents[2]


def test_it_runs_on_the_fake_device(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.check.sweep", "--device", "fake", "--budget", "2000", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, dict[str, Any]] = json.loads((tmp_path / "sweep.json").read_text())
    assert {task: each["problem"] for task, each in found.items() if "problem" in each} == {}
    assert {task.split()[0] for task in found} == {"overlap", "cut", "torch", "model", "step"}
    assert "CUTS = {" in done.stdout


def test_a_task_that_took_its_process_down_is_a_problem_and_the_fastest_that_is_right_is_chosen(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "sweep.jsonl")
    for place, result in enumerate([{"us": 3.0, "cut": {"block_n": 8}}, {"us": 1.0, "problem": "wrong", "cut": {}}]):
        notes.write(task=f"cut 64 32 1 {place}", began=True)
        notes.write(task=f"cut 64 32 1 {place}", **result)
    notes.write(task="cut 64 32 1 2", began=True)
    notes.write(task="torch 64 32 1", us=4.0)
    found = notes.read()

    assert found["cut 64 32 1 2"] == {"problem": "its process died"}
    assert {case: each["us"] for case, each in best_cuts(found).items()} == {(64, 32, 1): 3.0}
    assert faster(found) == {(64, 32, 1)}
    text = "\n".join(told(found))
    assert "PROBLEM cut 64 32 1 2: its process died" in text
    assert "(64, 32, 1): Cut(block_n=8)," in text


@pytest.mark.parametrize("rows", [1, 16, 32, 64])
@pytest.mark.parametrize("shape", [(1024, 2048), (4096, 14336), (151936, 1024)], ids=str)
def test_every_candidate_is_another_one_whose_splits_all_have_work(shape: tuple[int, int], rows: int) -> None:
    outputs, inputs = shape
    found: list[Cut] = candidates(outputs, inputs, rows)

    assert len(found) == len(set(found)) > 3
    for cut in found:
        assert (
            (cut.splits - 1) * cut.steps(inputs) * cut.block_k < inputs <= cut.splits * cut.steps(inputs) * cut.block_k
        )
