"""From arrivals to numbers, by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import pytest

from tests.benchmarks.floors import ModelShape, decode_floor_ms, prefill_floor_ms
from tests.benchmarks.metrics import Spread, percentile, summarize
from tests.benchmarks.playing import Answer, Emit, play
from tests.benchmarks.workloads import Request, Workload

TINY = ModelShape(layers=2, hidden=4, intermediate=8, heads=2, kv_heads=1, head_dim=2, vocabulary=10)


def answer(*arrivals_s: float, submitted_s: float = 0.0, asked: int | None = None, kind: str = "") -> Answer:
    request = Request(prompt=[1] * 10, max_tokens=asked or len(arrivals_s), kind=kind)
    return Answer(request=request, submitted_s=submitted_s, arrivals_s=list(arrivals_s), num_tokens=len(arrivals_s))


def workload(name: str, answers: Sequence[Answer]) -> Workload:
    return Workload(name=name, requests=[a.request for a in answers])


def test_times_are_counted_from_the_submission_of_each_request() -> None:
    answers = [answer(1.5, 1.6, 1.9, submitted_s=1.0), answer(2.0, 2.2, submitted_s=1.0)]
    summary = summarize(workload("w1", answers), answers)

    assert summary.ttft_ms == Spread(p50=500.0, p99=1000.0, longest=1000.0)
    assert summary.tpot_ms == Spread(p50=200.0, p99=200.0, longest=200.0)
    assert summary.itl_ms == Spread(p50=200.0, p99=300.0, longest=300.0)
    assert summary.wall_s == 1.2
    assert summary.output_tokens_per_s == pytest.approx(5 / 1.2, abs=1e-3)
    assert summary.total_tokens_per_s == pytest.approx(25 / 1.2, abs=1e-3)


def test_failed_and_short_answers_are_counted_and_the_rest_still_measured() -> None:
    lost = Answer(request=Request(prompt=[1], max_tokens=4), error="RequestFailed: no room")
    answers = [answer(0.1, 0.2), answer(0.1, asked=5), lost]
    summary = summarize(workload("w1", answers), answers)

    assert (summary.requests, summary.failed, summary.short_of_asked) == (3, 1, 1)
    assert summary.errors == ("RequestFailed: no room",)
    assert summary.output_tokens == 3


def test_a_run_in_which_everything_failed_has_no_times() -> None:
    lost = [Answer(request=Request(prompt=[1], max_tokens=4), error="gone")]
    summary = summarize(workload("w3@1", lost), lost)

    assert summary.ttft_ms is None and summary.output_tokens_per_s == 0
    assert summary.online is not None and summary.online.within_slo == 0


def test_goodput_counts_requests_that_kept_both_promises() -> None:
    late = answer(1.2, 1.21)
    slow = answer(0.5, 0.6)
    good = answer(0.9, 0.94)
    answers = [late, slow, good, Answer(request=late.request, error="gone")]
    summary = summarize(workload("w3@1", answers), answers)

    assert summary.online is not None
    assert summary.online.within_slo == 0.25
    assert summary.online.goodput_per_s == pytest.approx(1 / 1.21, abs=1e-3)


def test_only_gaps_of_short_streams_while_long_prompts_wait_are_the_disturbance() -> None:
    short = answer(0.1, 0.4, 1.0, 1.1, 2.1, 2.15, 4.15, kind="short")  # 0.6 s before, 2 s after: nobody's fault
    long = answer(2.0, 9.0, submitted_s=1.05, kind="long")
    summary = summarize(workload("w5", [short, long]), [short, long])

    assert summary.disturbance is not None
    assert summary.disturbance.longest_ms == 1000.0
    assert summary.disturbance.before_p50_ms == 450.0
    assert summary.disturbance.long_ttft_p50_ms == 950.0


def test_a_percentile_is_a_value_that_was_measured() -> None:
    assert [percentile([30.0, 10.0, 20.0], p) for p in (0, 50, 99, 100)] == [10.0, 20.0, 30.0, 30.0]


class Counting:
    """A client that notes how many requests it has open, and fails those for three tokens."""

    def __init__(self) -> None:
        self.open = self.most_open = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def is_ready(self) -> bool:
        return True

    async def generate(self, request: Request, emit: Emit) -> int:
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        await asyncio.sleep(0)
        self.open -= 1
        if request.max_tokens == 3:
            raise RuntimeError("three is too many")
        for _ in range(request.max_tokens):
            emit()
        return request.max_tokens


@pytest.mark.parametrize(("one_at_a_time", "most_open"), [(True, 1), (False, 4)])
def test_requests_are_played_together_or_one_at_a_time(one_at_a_time: bool, most_open: int) -> None:
    client = Counting()
    requests = [Request(prompt=[1], max_tokens=n) for n in range(4)]
    answers = asyncio.run(play(Workload(name="w", requests=requests, one_at_a_time=one_at_a_time), client))

    assert client.most_open == most_open
    assert [a.request for a in answers] == requests
    assert [len(a.arrivals_s) for a in answers] == [0, 1, 2, 0]
    assert [a.error for a in answers] == ["no token came", "", "", "RuntimeError: three is too many"]


def test_the_memory_floor_reads_all_weights_and_the_keys_and_values_so_far() -> None:
    # a layer: 4 x 8 for QKV, 4 x 4, 4 x 16, 8 x 4; the head 4 x 10; K and V of a token: 2 layers x 2 x 1 x 2
    weights = 2 * (32 + 16 + 64 + 32) + 40

    assert TINY.decode_bytes(5, weight_bits=16, kv_bits=8) == weights * 2 + 8 * 5
    # tokens 2 and 3 of an answer see 11 and 12 tokens
    floor_ms = decode_floor_ms(TINY, 1e-6, prompt=10, output=3, weight_bits=16, kv_bits=16)
    assert floor_ms == pytest.approx(weights * 2 + 16 * 11.5)


def test_the_prefill_floor_multiplies_every_token_and_takes_the_head_once() -> None:
    flop = 2 * (2 * 144 * 3 + 40) + 4 * 2 * 2 * 2 * (1 + 2 + 3)

    assert prefill_floor_ms(TINY, 1e-6, 3) == pytest.approx(flop)
