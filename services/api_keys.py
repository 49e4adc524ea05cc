"""API keys: what a caller presents, what the operator's file holds of it, and whose it is.

The file has a line for each key: the tenant, the key's hash, and options that say what the tenant may have (`weight=2`,
`tokens_per_s=500`, `burst_tokens=9000`, `max_priority=normal`). A tenant may have several keys, so that one is replaced
while the other works. Keys are 256 random bits that are made here, never chosen by a person:
there is nothing to guess, so the hash needs neither salt nor slowness.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from common.tenant import TenantLimits
from common.types import Priority
from services.caller import Caller
from services.lifecycle import StartupError

_KEY: Final = re.compile(r"pw-[A-Za-z0-9_-]{43}")
_TENANT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH: Final = re.compile(r"blake2b:[0-9a-f]{64}")
_NUMBERS: Final = {"weight": (1e-6, 1e6), "tokens_per_s": (0, 1e12), "burst_tokens": (0, 1e12)}  # least and most
_PRIORITIES: Final = {priority.name.lower(): priority for priority in Priority}


_ANY: Final = TenantLimits()


class KeyFileError(StartupError):
    """The file of API keys cannot be used. The message says which line, why, and what to type next."""


class ApiKeys:
    """Whose key is whose, and what each tenant may have. Holds hashes only."""

    def __init__(self, callers: Mapping[bytes, Caller], limits: Mapping[str, TenantLimits]) -> None:
        self._limits = limits
        # Looked up by a hash under a secret of this process, so that the time a lookup takes says nothing of any key.
        self._secret = secrets.token_bytes(32)
        self._callers = {self._blind(digest): (digest, caller) for digest, caller in callers.items()}

    def __len__(self) -> int:
        return len(self._callers)

    def find(self, key: str) -> Caller | None:
        """Who presents `key`; None when nobody has it."""
        if _KEY.fullmatch(key) is None:
            return None
        presented = _digest(key)
        digest, caller = self._callers.get(self._blind(presented), (b"", None))
        return caller if hmac.compare_digest(digest, presented) else None

    def limits_of(self, tenant: str) -> TenantLimits | None:
        """What the tenant may have; None where nothing is known of it."""
        return self._limits.get(tenant)

    def holds(self, caller: Caller) -> bool:
        """Whether the key that `caller` was found by is still there, and its tenant's."""
        _, found = self._callers.get(self._blind(caller.digest), (b"", None))
        return found is not None and found.tenant == caller.tenant

    def _blind(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._secret, digest_size=32).digest()


def new_key() -> str:
    """A key that nobody has yet."""
    return "pw-" + secrets.token_urlsafe(32)


def line_of(tenant: str, key: str, *, weight: float = 1.0) -> str:
    """The line of the file for a key. Raises KeyFileError for a tenant or a weight that can be none."""
    line = f"{tenant} blake2b:{_digest(key).hex()}" + (f" weight={weight:g}" if weight != 1 else "")
    _parse_line("the new line", line, _ANY)
    return line


def read_api_keys(path: Path, defaults: TenantLimits = _ANY) -> ApiKeys:
    """The keys in the operator's file; there may be none. `defaults`: what a tenant may have where its line is silent.

    Raises KeyFileError.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}. Make a key: pagewire api-key TENANT >> {path}") from error
    except UnicodeDecodeError:
        raise KeyFileError(f"{path}: not a text file") from None
    callers: dict[bytes, Caller] = {}
    limits: dict[str, TenantLimits] = {}
    for where, line in _lines(path, lines):
        digest, caller, its_limits = _parse_line(where, line, defaults)
        if digest in callers:
            raise KeyFileError(f"{where}: the key of {caller.tenant} is there already")
        if limits.setdefault(caller.tenant, its_limits) != its_limits:
            raise KeyFileError(f"{where}: {caller.tenant} has other options in a line above")
        callers[digest] = caller
    return ApiKeys(callers, limits)


def _lines(path: Path, lines: list[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, start=1):
        line = line.partition("#")[0].strip()  # noqa: PLW2901
        if line:
            yield f"{path}, line {number}", line


def _parse_line(where: str, line: str, defaults: TenantLimits) -> tuple[bytes, Caller, TenantLimits]:
    """A line without its comment. Raises KeyFileError, which never repeats what may be a key."""
    tenant, *rest = line.split()
    if _TENANT.fullmatch(tenant) is None or _KEY.fullmatch(tenant):
        raise KeyFileError(f"{where}: a tenant is 1 to 64 letters, digits, '.', '_' or '-', and begins with neither")
    if not rest or _HASH.fullmatch(rest[0]) is None:
        raise KeyFileError(
            f"{where}: after {tenant} a hash is needed, blake2b: and 64 digits. Make a line: pagewire api-key {tenant}"
        )
    limits = _limits(where, rest[1:], defaults)
    digest = bytes.fromhex(rest[0].partition(":")[2])
    return digest, Caller(tenant=tenant, weight=limits.weight, digest=digest), limits


def _limits(where: str, options: Sequence[str], defaults: TenantLimits) -> TenantLimits:
    """What the options say, and of the rest the defaults."""
    changes: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition("=")
        least, most = _NUMBERS.get(name, (1, 0))
        try:
            changes[name] = _PRIORITIES[value] if name == "max_priority" else float(value)
        except (KeyError, ValueError):
            name = ""
        if name != "max_priority" and not (name and least <= changes[name] <= most):
            raise KeyFileError(
                f"{where}: after the hash only weight=NUMBER (over 0), tokens_per_s=NUMBER, burst_tokens=NUMBER and "
                "max_priority=high, normal or low may stand"
            )
    return replace(defaults, **changes)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=32, person=b"pagewire api key").digest()
