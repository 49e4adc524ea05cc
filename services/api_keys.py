"""API keys: what a caller presents, what the operator's file holds of it, and whose it is.

The file has a line for each key: the tenant, the key's hash, and options (`weight=2`). A tenant may have several keys,
so that one is replaced while the other works. Keys are 256 random bits that are made here, never chosen by a person:
there is nothing to guess, so the hash needs neither salt nor slowness.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from services.caller import Caller
from services.lifecycle import StartupError

_KEY: Final = re.compile(r"pw-[A-Za-z0-9_-]{43}")
_TENANT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH: Final = re.compile(r"blake2b:[0-9a-f]{64}")
_MAX_WEIGHT: Final = 1e6


class KeyFileError(StartupError):
    """The file of API keys cannot be used. The message says which line, why, and what to type next."""


class ApiKeys:
    """Whose key is whose. Holds hashes only."""

    def __init__(self, callers: Mapping[bytes, Caller]) -> None:
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
    _parse_line("the new line", line)
    return line


def read_api_keys(path: Path) -> ApiKeys:
    """The keys in the operator's file; there may be none. Raises KeyFileError."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}. Make a key: pagewire api-key TENANT >> {path}") from error
    except UnicodeDecodeError:
        raise KeyFileError(f"{path}: not a text file") from None
    callers: dict[bytes, Caller] = {}
    weights: dict[str, float] = {}
    for where, line in _lines(path, lines):
        digest, caller = _parse_line(where, line)
        if digest in callers:
            raise KeyFileError(f"{where}: the key of {caller.tenant} is there already")
        if weights.setdefault(caller.tenant, caller.weight) != caller.weight:
            raise KeyFileError(f"{where}: {caller.tenant} has weight {weights[caller.tenant]:g} in a line above")
        callers[digest] = caller
    return ApiKeys(callers)


def _lines(path: Path, lines: list[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, start=1):
        line = line.partition("#")[0].strip()  # noqa: PLW2901
        if line:
            yield f"{path}, line {number}", line


def _parse_line(where: str, line: str) -> tuple[bytes, Caller]:
    """A line without its comment. Raises KeyFileError, which never repeats what may be a key."""
    tenant, *rest = line.split()
    if _TENANT.fullmatch(tenant) is None or _KEY.fullmatch(tenant):
        raise KeyFileError(f"{where}: a tenant is 1 to 64 letters, digits, '.', '_' or '-', and begins with neither")
    if not rest or _HASH.fullmatch(rest[0]) is None:
        raise KeyFileError(
            f"{where}: after {tenant} a hash is needed, blake2b: and 64 digits. Make a line: pagewire api-key {tenant}"
        )
    weight = 1.0
    for option in rest[1:]:
        name, _, value = option.partition("=")
        try:
            weight = float(value)
        except ValueError:
            name = ""
        if name != "weight" or not 0 < weight <= _MAX_WEIGHT:
            raise KeyFileError(f"{where}: after the hash only weight=NUMBER may stand, over 0, at most {_MAX_WEIGHT:g}")
    digest = bytes.fromhex(rest[0].partition(":")[2])
    return digest, Caller(tenant=tenant, weight=weight, digest=digest)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=32, person=b"pagewire api key").digest()
