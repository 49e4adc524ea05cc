"""Tickets: proof that we sent these tokens, so that any scheduler with the key goes on behind them. No clock inside.

A ticket does not hold the tokens; its bearer brings them. Its MAC is over whose request it is, what was asked, the
prompt, the seed, the choice and every token so far. So nobody can go on from tokens that were not given to them, and a
scheduler that knows nothing of the request can trust all that it is told.

The MAC is one keyed BLAKE2b that is fed a choice's tokens as they are sent, and copied for each ticket. A chain of
hashes, a link for each token, would prove the same and cost a hash for each token when it is checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from common.errors import TicketRefused, TicketStale
from common.sampling import SamplingParams

_VERSION: Final = 1
_PERSON: Final = b"pagewire ticket"
_MAC_BYTES: Final = 16
_HEAD: Final = struct.Struct("<B8sII8s8s")  # version, key id, expiry (Unix seconds), index, model, determinism class
TICKET_BYTES: Final = _HEAD.size + _MAC_BYTES

MAX_KEY_ID_BYTES: Final = 8
KEY_BYTES: Final = 32

_NO_CLASS: Final = bytes(8)
# what is told apart, or changes no token
_NOT_OF_THE_REQUEST: Final = frozenset({"request_id", "model", "input", "sampling", "resumable", "max_drafts"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketKey:
    """A secret that schedulers share."""

    id: str  # 1 to MAX_KEY_ID_BYTES characters of ASCII; travels in every ticket
    secret: bytes = dataclasses.field(repr=False)  # KEY_BYTES random bytes


@dataclass(frozen=True, slots=True)
class Scope:
    """The request that a ticket is for. Equal ones have the same tenant, id, parameters, seed, prompt and model."""

    digest: bytes  # 32 bytes over everything but the model
    model: bytes  # 8 bytes


def scope(tenant: str, request_id: str, asked: Any, prompt: Sequence[int], model_digest: str) -> Scope:
    """What `asked`, a GenerateSpec, and its prompt's tokens come down to.

    A field that is empty, zero or false, or a sampling parameter that has its default, is left out: a field that a
    later version adds does not void the tickets of those who never use it.
    """
    params = {
        field.name: getattr(asked, field.name)
        for field in dataclasses.fields(asked)
        if field.name not in _NOT_OF_THE_REQUEST and getattr(asked, field.name)
    }
    for field in dataclasses.fields(SamplingParams):
        if (value := getattr(asked.sampling, field.name)) != field.default:
            params[f"sampling.{field.name}"] = value
    hashed = hashlib.blake2b(digest_size=32, person=_PERSON)
    for part in (tenant.encode(), request_id.encode(), json.dumps(params, sort_keys=True).encode(), _column(prompt)):
        hashed.update(struct.pack("<Q", len(part)))
        hashed.update(part)
    return Scope(hashed.digest(), hashlib.blake2b(model_digest.encode(), digest_size=8).digest())


class TicketWriter:
    """Writes the tickets of one choice. Costs a microsecond or two a ticket, whatever came before."""

    def __init__(self, key: TicketKey, scope: Scope, choice: int, tokens: Sequence[int]) -> None:
        self._mac = hashlib.blake2b(scope.digest, key=key.secret, digest_size=_MAC_BYTES, person=_PERSON)
        self._key_id = key.id.encode()
        self._choice = choice
        self._model = scope.model
        self._index = 0
        self.add(tokens)

    def add(self, tokens: Sequence[int]) -> None:
        """The choice goes on with these."""
        if tokens:
            if not self._index:  # before its first token every choice is the same, and so is its ticket
                self._mac.update(struct.pack("<I", self._choice))
            self._mac.update(_column(tokens))
            self._index += len(tokens)

    def ticket(self, expires_s: int, determinism: str) -> bytes:
        """The ticket for what was added so far. `determinism`: the class that computed it, 16 hex digits, or empty."""
        computed_by = bytes.fromhex(determinism) if determinism else _NO_CLASS
        head = _HEAD.pack(_VERSION, self._key_id, expires_s, self._index, self._model, computed_by)
        return head + self.mac(head)

    def mac(self, head: bytes) -> bytes:
        """The proof that `head` is ours and speaks of what was added so far."""
        mac = self._mac.copy()
        mac.update(head)
        return mac.digest()


class Tickets:
    """Signs with the first key, accepts all of them."""

    def __init__(self, keys: Sequence[TicketKey], *, lifetime_s: int) -> None:
        assert keys, "no key to sign with"
        self._keys = {key.id.encode().ljust(MAX_KEY_ID_BYTES, b"\0"): key for key in reversed(keys)}
        self._newest = keys[0]
        self._lifetime_s = lifetime_s

    def writer(self, scope: Scope, choice: int, tokens: Sequence[int] = ()) -> TicketWriter:
        """For a choice that begins, or goes on behind `tokens`."""
        return TicketWriter(self._newest, scope, choice, tokens)

    def expiry(self, now_s: float) -> int:
        """When a ticket of now ends, in Unix seconds."""
        return int(now_s) + self._lifetime_s

    def check(self, ticket: bytes, scope: Scope, choice: int, tokens: Sequence[int], now_s: float) -> str:
        """The determinism class that computed `tokens`; empty when it was none, or several.

        Raises TicketRefused or TicketStale. Neither tells which part of the request does not fit.
        """
        if len(ticket) != TICKET_BYTES or ticket[0] != _VERSION:
            raise TicketRefused("the ticket is not one of this server's")
        head, mac = ticket[: _HEAD.size], ticket[_HEAD.size :]
        _, key_id, expires_s, index, model, computed_by = _HEAD.unpack(head)
        key = self._keys.get(key_id)
        if key is None:
            raise TicketRefused("the ticket was made with a key that this server does not have")
        if model != scope.model:
            raise TicketStale("the ticket is for another model than the one that is served here now")
        if index != len(tokens):
            raise TicketRefused(f"the ticket is for {index} tokens, {len(tokens)} came with it")
        if not hmac.compare_digest(mac, TicketWriter(key, scope, choice, tokens).mac(head)):
            raise TicketRefused("the ticket does not belong to this request, choice and tokens")
        if now_s >= expires_s:
            raise TicketStale("the ticket has expired")
        return "" if computed_by == _NO_CLASS else computed_by.hex()


def _column(tokens: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}I", *tokens)
