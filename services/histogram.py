"""How often what was measured lay in each bucket. Only ever counted up.

The buckets are those that OpenTelemetry's conventions for generative AI name: gen_ai.server.time_to_first_token,
gen_ai.server.time_per_output_token and gen_ai.server.request.duration.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

FIRST_TOKEN_S: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
TOKEN_S: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
REQUEST_S: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)


class Histogram:
    """Seconds. `bounds` are the upper ends of the buckets, in order; what is above the last is in one more."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """One more. A value that is a bound is in the bucket below it."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum_s += seconds
