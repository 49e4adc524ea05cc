"""Where a stream is, as the id of its events: who comes back with the last one (`Last-Event-ID`) gets the rest.

An id holds what Resume needs beside the request, which is sent again: request id, seed, max_tokens, and of each choice
how much was told and its ticket. It does not hold the tokens, which would make a stream of n events n²/2 tokens long.
So there are two ways to go on:

- with the id alone: the request is asked again under its id and seed, which while it still runs costs nothing, and what
  was told is left out. A digest in the id makes sure that it is the same.
- with the id and the token ids that the caller kept (`return_token_ids`, `resume_token_ids`): Resume, with the ticket.
"""

from __future__ import annotations

import binascii
import hashlib
import struct
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from common.errors import TicketRefused

MAX_CHOICES: Final = 16
"""Of all prompts together: with more of them an id would be longer than what it stands at, and there is none."""

DIGEST_BYTES: Final = 8

_VERSION: Final = 1
_HEAD: Final = struct.Struct("<BBBBQQ")  # version, prompts, choices of each, length of the request id, seed, created
_STATE: Final = struct.Struct("<I?")  # number of the event, whether it was the last one
_PROMPT: Final = struct.Struct("<I")  # max_tokens
_CHOICE: Final = struct.Struct("<IIBB8s")  # tokens, characters, flags, length of the ticket, digest
_ENDED: Final = 1
_CALLED: Final = 2  # _CALLS comes behind the ticket
_TOKEN: Final = struct.Struct("<I")
_MOST_KEPT: Final = 256  # tokens that wait to be hashed
_CALLS: Final = struct.Struct("<II")  # calls of tools that have begun, characters of the arguments of all

_MOST: Final = 2**32 - 2**24
"""No stream counts up to this, and one that goes on below it never meets the end of what an id can hold."""

_NOT_OURS: Final = TicketRefused("the id is not one of this server's events")


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What a caller has of one choice."""

    tokens: int = 0
    characters: int = 0
    calls: int = 0  # of tools, that have begun
    arguments: int = 0  # characters of the arguments of all of them
    ended: bool = False
    digest: bytes = b""  # of the tokens; see `Digest`
    ticket: bytes = b""

    def packed(self) -> bytes:
        """As it stands in an id."""
        return pack_heard(
            self.tokens,
            self.characters,
            self.ended,
            self.digest,
            self.ticket,
            calls=self.calls,
            arguments=self.arguments,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far a caller was told an answer."""

    request_id: str  # of the first prompt; those of the others are derived
    seed: int  # of the first prompt
    created: int  # Unix seconds
    event: int  # how many events were told before this one
    done: bool  # nothing follows
    max_tokens: tuple[int, ...]  # of each prompt
    choices: tuple[tuple[Heard, ...], ...]  # of each prompt


class Digest:
    """Tells whether two runs of tokens are the same. No proof of anything to anybody: the ticket is that.

    Tokens are hashed when somebody asks, or many wait.
    """

    __slots__ = ("_hash", "_new")

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self._new: list[int] = []

    def add(self, tokens: Sequence[int]) -> None:
        """These come next."""
        self._new += tokens
        if len(self._new) >= _MOST_KEPT:
            self._fold()

    def value(self) -> bytes:
        """Of all so far."""
        self._fold()
        return self._hash.digest()

    def _fold(self) -> None:
        self._hash.update(b"".join(map(_TOKEN.pack, self._new)))
        self._new.clear()


class Writer:
    """Writes the ids of one stream."""

    def __init__(self, request_id: str, seed: int, created: int, *, prompts: int, choices: int) -> None:
        name = request_id.encode()
        self._head = _HEAD.pack(_VERSION, prompts, choices, len(name), seed, created) + name

    def id(self, event: int, prompts: bytes, *, done: bool = False) -> str:
        """The id of an event. `prompts`: for each, `pack_prompt`, and `Heard.packed` of its choices."""
        return urlsafe_b64encode(self._head + _STATE.pack(event, done) + prompts).decode()


def pack_heard(
    tokens: int, characters: int, ended: bool, digest: bytes, ticket: bytes, *, calls: int = 0, arguments: int = 0
) -> bytes:
    """What an id says of a choice, without making a Heard of it: that is done for every event."""
    if not calls:
        return _CHOICE.pack(tokens, characters, ended, len(ticket), digest) + ticket
    head = _CHOICE.pack(tokens, characters, ended | _CALLED, len(ticket), digest)
    return head + ticket + _CALLS.pack(calls, arguments)


def pack_prompt(max_tokens: int) -> bytes:
    """What an id says of a prompt, before what it says of its choices."""
    return _PROMPT.pack(max_tokens)


def read(id: str) -> Position:
    """The position in an id. Raises TicketRefused for one that was not written here."""
    try:
        data = b64decode(id, altchars=b"-_", validate=True)
        version, prompts, choices, length, seed, created = _HEAD.unpack_from(data)
        if version != _VERSION or not prompts * choices:
            raise _NOT_OURS
        at = _HEAD.size + length
        request_id = data[_HEAD.size : at].decode("ascii")
        event, done = _STATE.unpack_from(data, at)
        at += _STATE.size
        if event >= _MOST:
            raise _NOT_OURS
        most: list[int] = []
        heard: list[tuple[Heard, ...]] = []
        for _ in range(prompts):
            most.append(_PROMPT.unpack_from(data, at)[0])
            at += _PROMPT.size
            of_prompt: list[Heard] = []
            for _ in range(choices):
                tokens, characters, flags, length, digest = _CHOICE.unpack_from(data, at)
                at += _CHOICE.size
                ticket = data[at : at + length]
                at += length
                calls = arguments = 0
                if flags & _CALLED:
                    calls, arguments = _CALLS.unpack_from(data, at)
                    at += _CALLS.size
                if max(tokens, characters, calls, arguments) >= _MOST:
                    raise _NOT_OURS
                of_prompt.append(
                    Heard(
                        tokens=tokens,
                        characters=characters,
                        calls=calls,
                        arguments=arguments,
                        ended=bool(flags & _ENDED),
                        digest=digest,
                        ticket=ticket,
                    )
                )
            heard.append(tuple(of_prompt))
    except (binascii.Error, ValueError, struct.error):
        raise _NOT_OURS from None
    if at != len(data):
        raise _NOT_OURS
    return Position(
        request_id=request_id,
        seed=seed,
        created=created,
        event=event,
        done=done,
        max_tokens=tuple(most),
        choices=tuple(heard),
    )
