"""The least time that a step can take, from the shape and from what this device was measured to do.

Three phases that cannot overlap, because each needs what the one before it made: the matrices of the layers (bound by
reading them or by multiplying), attention (reading K and V where a token is decoded, multiplying where a prompt is
read), and the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.gpu.check.shapes import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Milliseconds of each phase."""

    matrices_ms: float
    attention_ms: float
    logits_ms: float

    @property
    def ms(self) -> float:
        """Of the step."""
        return self.matrices_ms + self.attention_ms + self.logits_ms


def step_floor(shape: Shape, rows: Sequence[tuple[int, int]], *, bytes_per_s: float, flop_per_s: float) -> Floor:
    """Of a bfloat16 step of rows (tokens computed before, tokens computed now), each of which is sampled."""
    size, tokens, sampled = shape.size, sum(now for _, now in rows), len(rows)
    seen = sum(now * before + now * (now + 1) / 2 for before, now in rows)  # pairs of a query and a key
    kv_bytes = shape.kv_token_bytes * sum(before + now for before, now in rows)
    attention_flop = 4 * size.layers * size.heads * size.head_dim * seen
    logits_bytes = 2 * size.head_weights + 2 * 2 * sampled * size.vocabulary  # written, and read by the sampler
    return Floor(
        matrices_ms=1e3 * max(2 * size.body_weights / bytes_per_s, 2 * size.body_weights * tokens / flop_per_s),
        attention_ms=1e3 * max(kv_bytes / bytes_per_s, attention_flop / flop_per_s),
        logits_ms=1e3 * max(logits_bytes / bytes_per_s, 2 * size.head_weights * sampled / flop_per_s),
    )
