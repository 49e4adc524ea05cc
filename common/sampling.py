"""How the next token is chosen and when a choice ends: what a caller may ask, and its limits.

The defaults are those of a plain greedy-free sampler (temperature 1, nothing cut off). A request's unset fields are
filled in before this value is built (services/codec.py), so nothing here is optional.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.errors import InvalidRequest

MAX_SEED = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What the sampler needs to know about one sequence. Temperature 0 is greedy."""

    temperature: float = 1.0
    top_k: int = 0  # 0 keeps every token
    top_p: float = 1.0  # in (0, 1]; 1 keeps every token
    min_p: float = 0.0  # in [0, 1]; tokens below min_p * max probability are cut
    seed: int = 0  # unsigned 64 bits; resolved at the edge when the caller gave none

    @property
    def greedy(self) -> bool:
        """True when the token is the argmax and no random number is drawn."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StopConditions:
    """When a choice ends. Token conditions are checked on the executor, and again by the scheduler."""

    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What one request may ask for. Every bound is configuration; these are safe defaults."""

    max_choices: int = 8
    max_stop_strings: int = 8
    max_stop_string_bytes: int = 256
    max_stop_token_ids: int = 64
    max_temperature: float = 100.0
    max_messages: int = 4096  # of a chat


def check_sampling(params: SamplingParams, limits: RequestLimits) -> None:
    """Raise InvalidRequest naming the first field that is out of its range."""
    _check_range("temperature", params.temperature, 0.0, limits.max_temperature)
    if params.top_k < 0:
        raise InvalidRequest("top_k", f"must be 0 (off) or positive, got {params.top_k}")
    if not (math.isfinite(params.top_p) and 0.0 < params.top_p <= 1.0):
        raise InvalidRequest("top_p", f"must be in (0, 1], got {params.top_p}")
    _check_range("min_p", params.min_p, 0.0, 1.0)
    if not 0 <= params.seed <= MAX_SEED:
        raise InvalidRequest("seed", f"must be an unsigned 64-bit number, got {params.seed}")


def check_stop(stop: StopConditions, limits: RequestLimits, vocab_size: int) -> None:
    """Raise InvalidRequest naming the first stop condition that is out of its range."""
    if stop.max_tokens < 1:
        raise InvalidRequest("max_tokens", f"must be at least 1, got {stop.max_tokens}")
    if len(stop.stop_strings) > limits.max_stop_strings:
        raise InvalidRequest("stop", f"at most {limits.max_stop_strings} strings, got {len(stop.stop_strings)}")
    for text in stop.stop_strings:
        if not 0 < len(text.encode()) <= limits.max_stop_string_bytes:
            size = len(text.encode())
            raise InvalidRequest("stop", f"each string must have 1 to {limits.max_stop_string_bytes} bytes, got {size}")
    if len(stop.stop_token_ids) > limits.max_stop_token_ids:
        raise InvalidRequest("stop_token_ids", f"at most {limits.max_stop_token_ids}, got {len(stop.stop_token_ids)}")
    for token in stop.stop_token_ids:
        if not 0 <= token < vocab_size:
            raise InvalidRequest("stop_token_ids", f"must be in [0, {vocab_size}), got {token}")


def _check_range(field: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(field, f"must be in [{low:g}, {high:g}], got {value}")
