"""What a tenant may have. Tenants are the operator's: they come with keys, and nobody without one makes another."""

from __future__ import annotations

from dataclasses import dataclass

from common.types import Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """One tenant's share and bounds."""

    weight: float = 1.0  # share of what is served, against the others that wait; above 0
    tokens_per_s: float = 0.0  # prompt and answer tokens that it may ask for on average; 0: no limit
    burst_tokens: float = 0.0  # of these, what it may have at once after a quiet time; 0: ten seconds of them
    max_priority: Priority = Priority.HIGH  # the best it may ask for
