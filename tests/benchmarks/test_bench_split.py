"""Both sides of the split, with the fake model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks import bench_split
from tests.benchmarks.bench_split import Pair, Turn, table
from tests.e2e import fake_model


def turn(step_ms: float, tokens: str = "a") -> Turn:
    return Turn(step_ms=step_ms, idle=0.01, tokens=tokens)


def test_both_sides_do_the_same_work_and_make_the_same_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = fake_model.write(tmp_path / "model"), tmp_path / "out" / "split.json"
    told = bench_split.main(
        ["--fake", "--model", str(folder), "--rounds", "2", "--batches", "1,4", "--prompt-tokens", "20",
         "--output-tokens", "9", "--out", str(out)]
    )  # fmt: skip

    assert told == 0
    pairs = json.loads(out.read_text())
    assert [pair["batch"] for pair in pairs] == [1, 4, 1, 4]
    for pair in pairs:
        assert pair["whole"]["tokens"] == pair["split"]["tokens"]
        assert pair["whole"]["step_ms"] > 0 and pair["split"]["step_ms"] > 0
    assert "round 2 of 2: batch 4: " in capsys.readouterr().out


def test_the_cost_is_compared_within_a_pair_and_disturbed_pairs_are_left_out() -> None:
    pairs = [
        Pair(batch=1, whole=turn(10.0), split=turn(11.0), foreign=0.0),
        Pair(batch=1, whole=turn(20.0), split=turn(21.0), foreign=0.0),
        Pair(batch=1, whole=turn(20.0), split=turn(60.0), foreign=0.5),
    ]

    assert "| 1 | 15.00 | 16.00 | +7.5% | +5.0% to +10.0% | 1.0% | yes | 2 of 3 |" in table(pairs)


def test_different_tokens_are_told() -> None:
    pairs = [Pair(batch=1, whole=turn(10.0), split=turn(11.0, "b"), foreign=0.5)]

    assert "| +10.0%* | +10.0% to +10.0% | 1.0% | NO | 1 of 1 |" in table(pairs)
