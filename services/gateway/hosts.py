"""The names that a gateway may be called by, as the Host of a request has them.

A page of any site can have its own name mean 127.0.0.1 ("DNS rebinding"; Ollama's CVE-2024-28224). To its browser it is
then of one origin with what this machine alone can reach, and may ask it anything. But it asks by that site's name.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

from starlette.types import Scope

from common.addresses import is_loopback, name_of
from common.errors import PagewireError

ANY: Final = "*"

_OF_PROBES: Final = frozenset({"/health", "/live", "/ready"})
"""Answered whatever the gateway is called: a probe calls what it probes as it likes, and hears a word in all."""

_NAME: Final = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """`names` in lower case, and always those of loopback; None: any."""

    names: frozenset[str] | None = None

    def allow(self, scope: Scope) -> bool:
        """Whether this request calls the gateway by one of them, or by none at all, which no browser does."""
        if self.names is None or scope["path"] in _OF_PROBES:
            return True
        called = (name_of(value.decode("latin-1")) for header, value in scope["headers"] if header == b"host")
        return all(name in self.names or is_loopback(name) for name in called)


def read_hosts(setting: str, *, is_local: bool) -> Hosts:
    """As `--http-hosts` says. Empty: loopback's alone where the gateway `is_local`, else any. Raises PagewireError."""
    if not setting:
        return Hosts(names=frozenset() if is_local else None)
    parts = [part.strip() for part in setting.split(",")]
    return Hosts(names=None if ANY in parts else frozenset(map(_read, parts)))


def _read(part: str) -> str:
    name = part.lower().removesuffix(".")
    if _NAME.fullmatch(name):
        return name
    try:
        return f"[{ipaddress.IPv6Address(name.strip('[]'))}]"  # as browsers write it
    except ValueError:
        raise PagewireError(
            f"--http-hosts: {part!r} is no name. Give those that callers type, without scheme and port, divided by "
            f"commas: gpu.example,10.0.0.7; or {ANY} for any"
        ) from None
