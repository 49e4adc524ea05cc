"""The parts of the budgets that do not depend on the machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.benchmarks.bench_scheduler import MAX_DECODE_PLAN_BYTES, SCENARIOS, Scenario, measure


def test_a_decode_plan_for_256_rows_fits_in_4_kb() -> None:
    (scenario,) = [s for s in SCENARIOS if s.name == "decode" and s.rows == 256]
    report = measure(scenario, num_steps=40)

    assert report.rows == 256
    assert 4 * 256 < report.plan_bytes.worst <= MAX_DECODE_PLAN_BYTES


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s.rows == 32], ids=lambda s: s.name)
def test_the_benchmark_holds_its_number_of_rows(scenario: Scenario) -> None:
    report = measure(replace(scenario, warm_up=60), num_steps=40)
    assert 30 <= report.rows <= 32
