"""What a request shares through the prefix cache with others of its tenant, and what it asks to stay there.

The words are the field's: `cache_salt` is vLLM's; a pin is what Anthropic's `cache_control` with its time to live and
TensorRT-LLM's retention priorities are for. None of it changes the answer.
"""

from __future__ import annotations

from typing import NamedTuple

from common.errors import InvalidRequest
from common.sampling import RequestLimits


class CacheControl(NamedTuple):
    """The defaults are those of a request that says nothing of it."""

    salt: str = ""  # shares with requests of the same salt alone, in addition to the tenant
    no_cache: bool = False  # reads nothing from the cache, and leaves nothing there
    pin_seconds: int = 0  # the prompt's blocks stay for so long; 0: as long as others are reused sooner
    pin_tokens: int = 0  # only those of so many first tokens; 0: all


def check_cache_control(cache: CacheControl, limits: RequestLimits) -> None:
    """Raise InvalidRequest naming the first field that is beyond its limit, or contradicts another."""
    size, most = len(cache.salt.encode()), limits.max_cache_salt_bytes
    if size > most:
        raise InvalidRequest("cache_salt", f"at most {most} bytes, got {size}")
    if cache.pin_seconds > limits.max_pin_seconds:
        raise InvalidRequest("pin_seconds", f"must be in [1, {limits.max_pin_seconds}], got {cache.pin_seconds}")
    if cache.pin_seconds and cache.no_cache:
        raise InvalidRequest("pin_seconds", "must not be set with no_cache, which leaves nothing to pin")
    if cache.pin_tokens and not cache.pin_seconds:
        raise InvalidRequest("pin_tokens", "needs pin_seconds, which says for how long")
