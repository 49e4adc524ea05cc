"""The load command in small: everybody is served or refused cleanly, and a tenant does not feel another one's crowd."""

from __future__ import annotations

import asyncio

from tests.faults.load import (
    REFUSED,
    SERVED,
    burst,
    burst_table,
    fairness,
    fairness_table,
    overload,
    overload_table,
    quantile,
    servers,
)


def test_of_many_streams_at_once_each_is_served_or_refused_with_a_time_to_come_back() -> None:
    with servers("--max-streams=60", "--max-waiting=40", step_s=0.03, max_running=4) as running:
        result = asyncio.run(burst(running, streams=300, output=4))

    assert result.tally.ends[SERVED] >= 4 and result.tally.ends[REFUSED] > 0
    assert result.tally.ends[SERVED] + result.tally.ends[REFUSED] == 300, result.tally.ends
    assert "| 300 |" in burst_table(300, result)


def test_more_than_can_be_served_is_refused_and_the_rest_is_served() -> None:
    with servers(step_s=0.02, max_running=4) as running:
        result = overload(running, seconds=3.0, peak_s=1.0, factor=10, streams=8, deadline_s=2.0, prompt=8, output=8)

    assert not result.tally.others
    assert result.tally.ends[SERVED] > 0 and result.tally.ends[REFUSED] > 0
    assert "goodput" in overload_table(result)


def test_a_tenant_does_not_wait_behind_another_ones_crowd() -> None:
    results = fairness(factor=100, seconds=10.0)
    alone, beside, unnamed = results.values()

    assert quantile(beside.first_tokens_s, 0.99) <= 2 * quantile(alone.first_tokens_s, 0.99)
    assert not beside.refused.get("light") and beside.refused["heavy"] > 0
    assert unnamed.refused["light"] > len(unnamed.first_tokens_s), "the load is one that would be felt"
    assert fairness_table(results).count("\n") == 4
