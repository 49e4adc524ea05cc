"""Who makes the call that is being handled. Set once, where the call comes in; read wherever it matters."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """One tenant, as its API key tells."""

    tenant: str  # part of every key of the prefix cache; empty where no keys are asked for
    weight: float = 1.0  # its share among tenants
    digest: bytes = field(default=b"", repr=False, compare=False)  # of the key that was shown; empty without keys


ANONYMOUS: Final = Caller(tenant="")
"""Everybody, where the scheduler has no API keys."""

_current: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """Who makes this call. Raises LookupError where nobody was let in: there is no tenant by default."""
    return _current.get()


def let_in(caller: Caller) -> None:
    """The rest of this task acts for `caller`."""
    _current.set(caller)
