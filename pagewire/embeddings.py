"""Vectors of texts: what `embed` sends, and what comes back."""

from __future__ import annotations

import secrets
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from pagewire.asking import check_names, set_field, set_priority, set_tokens
from pagewire.borrowed import borrow

if TYPE_CHECKING:
    from protos import inference_pb2 as pb
else:
    pb = borrow("protos.inference_pb2")


class EmbedSettings(TypedDict, total=False):
    """Everything but the texts. What is not given takes the server's default, which protos/ tells."""

    dimensions: int  # the first so many numbers of each vector
    cache_salt: str  # as in Settings
    no_cache: bool
    priority: str
    model: str
    request_id: str  # by default a random one


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """The vector of one text."""

    values: array[float]  # of float32: numpy.frombuffer(values, "float32") copies nothing
    prompt_tokens: int
    cached_prompt_tokens: int


def embed_request(inputs: str | Sequence[str | Sequence[int]], settings: EmbedSettings) -> pb.EmbedRequest:
    """The request. Raises TypeError for a setting that there is not, InvalidRequest for what cannot be sent."""
    check_names(settings, EmbedSettings)
    request = pb.EmbedRequest(request_id=secrets.token_hex(16))
    for number, given in enumerate([inputs] if isinstance(inputs, str) else inputs):
        added = request.inputs.add()
        if isinstance(given, str):
            set_field(added, "text", given, f"inputs[{number}]")
        else:
            set_tokens(added.token_ids, f"inputs[{number}]", given)
    values: dict[str, Any] = dict(settings)
    for name, value in values.items():
        if value is None:
            continue
        if name == "priority":
            set_priority(request, value)
        else:
            set_field(request.cache if name in _CACHE else request, name, value)
    return request


def embeddings_of(answer: pb.EmbedResponse) -> tuple[Embedding, ...]:
    """What the answer to it says."""
    return tuple(
        Embedding(
            values=_numbers(told.values),
            prompt_tokens=told.prompt_tokens,
            cached_prompt_tokens=told.cached_prompt_tokens,
        )
        for told in answer.embeddings
    )


_CACHE = frozenset(pb.CacheControl.DESCRIPTOR.fields_by_name)


def _numbers(data: bytes) -> array[float]:
    numbers = array("f", data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
