"""From the arrival of every token to the numbers that are compared."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tests.benchmarks.playing import Answer
from tests.benchmarks.workloads import Workload

SLO_TTFT_S: Final = 1.0
SLO_TPOT_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """One quantity over all requests, or over all gaps, in milliseconds."""

    p50: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread | None:
        """None where there is nothing."""
        if not seconds:
            return None
        return cls(
            p50=_ms(percentile(seconds, 50)), p99=_ms(percentile(seconds, 99)), longest=_ms(percentile(seconds, 100))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Online:
    """How many requests were answered as people want it: the first token soon, then a pace that one can read."""

    within_slo: float  # share of all requests, failed ones included
    goodput_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """What short streams feel of long prompts. Gaps of short streams, in milliseconds."""

    before_p50_ms: float | None
    during_p50_ms: float | None  # while a long prompt was waiting for its first token
    longest_ms: float | None
    long_ttft_p50_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run of one workload. `ttft` is to the first token, `tpot` a token after it, `itl` from arrival to arrival."""

    requests: int
    failed: int
    short_of_asked: int  # answers with fewer tokens than were asked for
    errors: tuple[str, ...]  # a few of them
    prompt_tokens: int
    output_tokens: int
    wall_s: float  # from the first submission to the last token
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    online: Online | None = None
    disturbance: Disturbance | None = None


def summarize(workload: Workload, answers: Sequence[Answer]) -> Summary:
    """Sum up one run."""
    good = [answer for answer in answers if not answer.error]
    wall_s = max(a.arrivals_s[-1] for a in good) - min(a.submitted_s for a in good) if good else 0.0
    output_tokens = sum(answer.num_tokens for answer in good)
    prompt_tokens = sum(len(answer.request.prompt) for answer in good)
    return Summary(
        requests=len(answers),
        failed=len(answers) - len(good),
        short_of_asked=sum(answer.num_tokens < answer.request.max_tokens for answer in good),
        errors=tuple(sorted({answer.error for answer in answers if answer.error})[:3]),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        wall_s=round(wall_s, 4),
        output_tokens_per_s=_rate(output_tokens, wall_s),
        total_tokens_per_s=_rate(output_tokens + prompt_tokens, wall_s),
        ttft_ms=Spread.of([answer.ttft_s for answer in good]),
        tpot_ms=Spread.of([answer.tpot_s for answer in good if answer.num_tokens > 1]),
        itl_ms=Spread.of([gap for answer in good for gap in answer.gaps_s]),
        online=_online(answers, wall_s) if workload.name.startswith("w3@") else None,
        disturbance=_disturbance(good) if workload.name == "w5" else None,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest rank; no value is made up between two."""
    ordered = sorted(values)
    return ordered[round(percent / 100 * (len(ordered) - 1))]


def _online(answers: Sequence[Answer], wall_s: float) -> Online:
    kept = sum(not a.error and a.ttft_s <= SLO_TTFT_S and a.tpot_s <= SLO_TPOT_S for a in answers)
    return Online(within_slo=round(kept / len(answers), 4), goodput_per_s=_rate(kept, wall_s))


def _disturbance(good: Sequence[Answer]) -> Disturbance:
    long = [answer for answer in good if answer.request.kind == "long"]
    gaps = [
        pair for a in good if a.request.kind == "short" for pair in zip(a.arrivals_s, a.arrivals_s[1:], strict=False)
    ]
    begin_s = min((answer.submitted_s for answer in long), default=float("inf"))
    end_s = max((answer.arrivals_s[0] for answer in long), default=float("inf"))
    before = [y - x for x, y in gaps if y < begin_s]
    during = [y - x for x, y in gaps if y >= begin_s and x <= end_s]
    return Disturbance(
        before_p50_ms=_median_ms(before),
        during_p50_ms=_median_ms(during),
        longest_ms=_ms(max(during)) if during else None,
        long_ttft_p50_ms=_median_ms([answer.ttft_s for answer in long]),
    )


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds else 0.0


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _median_ms(seconds: Sequence[float]) -> float | None:
    return _ms(statistics.median(seconds)) if seconds else None
