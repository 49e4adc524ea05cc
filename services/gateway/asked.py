"""One HTTP request as it was understood: what the scheduler is asked, and how its answer is told."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from common.errors import InvalidRequest, TicketRefused
from protos import inference_pb2 as pb
from services.gateway.fields import TOKEN_IDS, Fields, array, integers
from services.gateway.positions import MAX_CHOICES, Position

_MAX_REQUEST_ID: Final = 100  # with the number of its prompt behind it, it is one for the scheduler

_SEEDS: Final = 1 << 64
_TOKEN_LISTS: Final = {"type": "array", "items": TOKEN_IDS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How the answer is told."""

    stream: bool = False
    include_usage: bool = False  # in an event of its own behind the last one
    return_token_ids: bool = False
    resumable: bool | None = None  # True: waits for a reader who is lost; False: no ids; None: see app.py
    resume_token_ids: Sequence[Sequence[int]] = ()  # what the caller of a stream that broke has


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request for each prompt; they differ in nothing else."""

    requests: Sequence[pb.GenerateStreamRequest]
    manner: Manner
    names: Mapping[str, str] = field(default_factory=dict[str, str])  # what the caller calls the scheduler's fields

    @property
    def request_id(self) -> str:
        """Of the first prompt, and of the answer."""
        return self.requests[0].request_id

    @property
    def n(self) -> int:
        """Choices of each prompt."""
        sampling = self.requests[0].sampling
        return sampling.n if sampling.HasField("n") else 1

    def begin(self, position: Position | None, name: str = "") -> None:
        """Give the requests ids and seeds: new ones, or those of the stream that goes on.

        `name` is the id where neither the body nor a stream that goes on says one; it must be of this request alone.

        Raises InvalidRequest and TicketRefused.
        """
        first = self.requests[0]
        given = first.sampling.seed if first.sampling.HasField("seed") else None
        request_id = first.request_id or (position.request_id if position else name or secrets.token_hex(12))
        check_request_id(request_id)
        seed = secrets.randbits(62) if given is None else given
        if position is not None:
            if request_id != position.request_id or (given is not None and given != position.seed):
                raise TicketRefused("the id belongs to another request than the one that was sent with it")
            if len(position.choices) != len(self.requests) or len(position.choices[0]) != self.n:
                raise TicketRefused("the id belongs to a request with another number of choices")
            seed = position.seed
            if given is None and seed + len(self.requests) > _SEEDS:  # each prompt has the next one
                raise TicketRefused("the id belongs to a request that chose its seed")
        for i, request in enumerate(self.requests):
            request.request_id = f"{request_id}-{i}" if i else request_id
            # the same prompt twice is asked for two answers, unless the caller says how the dice fall
            request.sampling.seed = seed if given is not None else seed + i
            if position is not None and position.max_tokens[i] and not request.stopping.HasField("max_tokens"):
                request.stopping.max_tokens = position.max_tokens[i]


def check_request_id(request_id: str) -> None:
    """Raise InvalidRequest for one that no header and no log line should have."""
    if len(request_id) > _MAX_REQUEST_ID:
        raise InvalidRequest("request_id", f"at most {_MAX_REQUEST_ID} characters, got {len(request_id)}")
    if not all("!" <= character <= "~" for character in request_id):
        raise InvalidRequest("request_id", "must be printable ASCII without spaces")


def read_manner(fields: Fields) -> Manner:
    """How the answer is to be told. Raises InvalidRequest."""
    stream = fields.boolean("stream") or False
    options = fields.fields("stream_options")
    include_usage = False
    if options is not None:
        if not stream:
            raise InvalidRequest("stream_options", "is for a stream: say stream, too")
        include_usage = options.boolean("include_usage") or False
        options.ignore("include_obfuscation")
        options.refuse_unknown()
    tokens = [
        integers(each, f"resume_token_ids[{i}]")
        for i, each in enumerate(array(fields.take("resume_token_ids", _TOKEN_LISTS), "resume_token_ids", MAX_CHOICES))
    ]
    return Manner(
        stream=stream,
        include_usage=include_usage,
        return_token_ids=fields.boolean("return_token_ids") or False,
        resumable=fields.boolean("resumable"),
        resume_token_ids=tokens,
    )
