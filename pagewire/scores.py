"""Log-probabilities as they are kept until an answer is whole: as bytes, a tenth of what the objects take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, overload

from pagewire.answers import TokenLogprob, TokenLogprobs
from pagewire.borrowed import borrow

if TYPE_CHECKING:
    from protos import inference_pb2 as pb
else:
    pb = borrow("protos.inference_pb2")

_OF_AN_ENTRY: Final = 48  # bytes that Python takes beside each token's


class Scores(Sequence[TokenLogprobs]):
    """Of tokens in their order. Each is made an object of when it is looked at, and is not kept as one."""

    __slots__ = ("_packed",)

    def __init__(self, packed: Iterable[bytes] = ()) -> None:
        """`packed` are messages, TokenLogprobs of the API."""
        self._packed = list(packed)

    def __len__(self) -> int:
        return len(self._packed)

    @overload
    def __getitem__(self, at: int) -> TokenLogprobs: ...
    @overload
    def __getitem__(self, at: slice) -> Scores: ...
    def __getitem__(self, at: int | slice) -> TokenLogprobs | Scores:
        if isinstance(at, slice):
            return Scores(self._packed[at])
        return of_message(pb.TokenLogprobs.FromString(self._packed[at]))

    def __add__(self, others: Scores) -> Scores:
        return Scores((*self._packed, *others._packed))

    def __iter__(self) -> Iterator[TokenLogprobs]:
        for packed in self._packed:
            yield of_message(pb.TokenLogprobs.FromString(packed))

    def tokens(self) -> Iterator[TokenLogprob]:
        """The tokens, without the likeliest in their places."""
        for packed in self._packed:
            yield _one(pb.TokenLogprobs.FromString(packed).token)

    def put(self, index: int, told: Iterable[pb.TokenLogprobs]) -> int:
        """These come from `index` on, in place of all that were there. Returns how many bytes more that takes."""
        before, new = self._packed[index:], [each.SerializeToString() for each in told]
        self._packed[index:] = new
        return _size(new) - _size(before)

    def clear(self) -> int:
        """Keep none. Returns how many bytes that gives back."""
        given = _size(self._packed)
        self._packed.clear()
        return given


def of_message(told: pb.TokenLogprobs) -> TokenLogprobs:
    """What a message says."""
    return TokenLogprobs(token=_one(told.token), top=tuple(map(_one, told.top)))


def _one(told: pb.TokenLogprob) -> TokenLogprob:
    logprob = told.logprob if told.HasField("logprob") else None
    return TokenLogprob(token_id=told.token_id, logprob=logprob, text=told.text)


def _size(packed: Sequence[bytes]) -> int:
    return sum(map(len, packed)) + _OF_AN_ENTRY * len(packed)
