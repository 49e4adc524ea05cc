"""Vectors in the client for Python: what is sent, what comes, and what becomes of it when a server dies meanwhile."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from typing import Any, cast

import grpc
import pytest

from common.errors import DeadlineExceeded, InvalidRequest, Overloaded, PagewireError, Unavailable
from pagewire import AsyncClient, Client, Embedding
from pagewire.access import access
from pagewire.calls import EMBED, AskedOnce, Manner
from pagewire.embeddings import EmbedSettings, embed_request
from pagewire.retrying import RetryBudget
from protos import inference_pb2 as pb
from services.status import to_rpc_status
from tests.services.scripted import GONE, played

both = pytest.mark.parametrize("kind", [Client, AsyncClient])


def answer(*vectors: Sequence[float]) -> pb.EmbedResponse:
    """Of so many texts; the first has one token, and each other one more than the one before."""
    return pb.EmbedResponse(
        embeddings=[
            pb.Embedding(values=struct.pack(f"<{len(vector)}f", *vector), prompt_tokens=n, cached_prompt_tokens=n - 1)
            for n, vector in enumerate(vectors, 1)
        ]
    )


async def embed(
    kind: type[Client | AsyncClient], address: str, inputs: Any, *, timeout_s: float | None = None, **settings: Any
) -> tuple[Embedding, ...]:
    """By either client."""
    if issubclass(kind, AsyncClient):
        async with kind(address, patience_s=0.1) as client:
            return await client.embed(inputs, timeout_s=timeout_s, **settings)

    def ask() -> tuple[Embedding, ...]:
        with kind(address, patience_s=0.1) as client:
            return client.embed(inputs, timeout_s=timeout_s, **settings)

    return await asyncio.to_thread(ask)


def test_texts_and_tokens_are_sent_in_their_order_and_what_is_not_given_is_not_sent() -> None:
    request = embed_request(["a", [1, 2], ""], {})
    assert [given.WhichOneof("input") for given in request.inputs] == ["text", "token_ids", "text"]
    assert (request.inputs[0].text, list(request.inputs[1].token_ids.ids)) == ("a", [1, 2])
    assert [text.text for text in embed_request("one", {}).inputs] == ["one"]
    assert embed_request([[]], {}).inputs[0].HasField("token_ids"), "for the server to refuse by its name"
    name = request.request_id
    assert name and name != embed_request(["a"], {}).request_id
    request.ClearField("inputs")
    assert request == pb.EmbedRequest(request_id=name)


def test_settings_of_vectors_reach_the_request() -> None:
    asked = embed_request("a", {"dimensions": 8, "cache_salt": "s", "no_cache": False, "model": "m", "request_id": "r"})
    del asked.inputs[:]
    assert asked == pb.EmbedRequest(
        request_id="r", model="m", dimensions=8, cache=pb.CacheControl(cache_salt="s", no_cache=False)
    )


@pytest.mark.parametrize(
    ("inputs", "settings", "error", "says"),
    [
        (["a", "\ud800"], {}, InvalidRequest, r"inputs\[1\]: cannot be a str like this"),
        ([1, 2], {}, InvalidRequest, r"inputs\[0\]: cannot be 1"),
        ([[1, -2]], {}, InvalidRequest, r"inputs\[0\]: cannot be a list like this"),
        ("a", {"dimensions": -1}, InvalidRequest, "dimensions: cannot be -1"),
        ("a", {"max_tokens": 1}, TypeError, "there is no setting 'max_tokens'; there are: dimensions"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_its_name(
    inputs: Any, settings: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        embed_request(inputs, cast("EmbedSettings", settings))


@both
def test_vectors_come_as_numbers_one_for_each_text(kind: type[Client | AsyncClient]) -> None:
    with played(vectors=[answer([0.5, -0.25], [1.0, 0.0])]) as (server, run):
        vectors = run(lambda address: embed(kind, address, ["a", [7]], dimensions=2))

    assert [list(vector.values) for vector in vectors] == [[0.5, -0.25], [1.0, 0.0]]
    assert [(vector.prompt_tokens, vector.cached_prompt_tokens) for vector in vectors] == [(1, 0), (2, 1)]
    assert [asked.dimensions for asked in server.asked] == [2]


@both
def test_a_server_that_goes_in_the_middle_is_asked_again_for_the_same(kind: type[Client | AsyncClient]) -> None:
    with played(vectors=[GONE, answer([1.0])]) as (server, run):
        assert len(run(lambda address: embed(kind, address, "a"))) == 1
    assert server.asked[0] == server.asked[1]


@both
def test_the_next_address_makes_the_vectors_where_the_first_does_not(kind: type[Client | AsyncClient]) -> None:
    with played(vectors=[answer([1.0])]) as (_, run):
        assert len(run(lambda address: embed(kind, f"127.0.0.1:1,{address}", "a"))) == 1


@both
@pytest.mark.parametrize(
    ("refusal", "error"),
    [(InvalidRequest("inputs", "too many"), InvalidRequest), (Overloaded("full", 9.0), Overloaded)],
)
def test_a_refusal_of_vectors_is_raised_as_what_it_is(
    kind: type[Client | AsyncClient], refusal: PagewireError, error: type[PagewireError]
) -> None:
    with played(vectors=[refusal]) as (server, run), pytest.raises(error, match=str(refusal)):
        run(lambda address: embed(kind, address, "a"))
    assert len(server.asked) == 1


@both
def test_vectors_that_do_not_come_are_waited_for_until_the_deadline(kind: type[Client | AsyncClient]) -> None:
    with played(vectors=[None]) as (_, run), pytest.raises(DeadlineExceeded):
        run(lambda address: embed(kind, address, "a", timeout_s=0.3))


def asked_once(now_s: list[float]) -> AskedOnce[pb.EmbedResponse]:
    manner = Manner(addresses=("a:1",), timeout_s=600.0, patience_s=5.0, access=access(["a:1"], api_key=""))
    request = embed_request("a", {})
    return AskedOnce(EMBED, request, manner, RetryBudget(), first="a:1", timeout_s=None, clock_s=lambda: now_s[0])


def test_while_vectors_are_computed_no_patience_is_used_up() -> None:
    gone = to_rpc_status(GONE)
    now_s = [0.0]
    asked = asked_once(now_s)
    for lasts_s in (0.0, 40.0, 40.0):  # the server is killed with a request that is long, again and again
        asked.next_call()
        now_s[0] += lasts_s
        asked.failed(gone.code, gone.message, gone.trailing_metadata)
    asked.next_call()
    now_s[0] += 40.0
    asked.failed(grpc.StatusCode.UNAVAILABLE, "Connection reset", ())


def test_where_no_connection_is_made_patience_for_vectors_is_used_up() -> None:
    now_s = [0.0]
    asked = asked_once(now_s)
    for _ in range(5):
        asked.next_call()
        now_s[0] += 1.0
        asked.failed(grpc.StatusCode.UNAVAILABLE, "no route", ())
    now_s[0] += 1.0
    with pytest.raises(Unavailable):
        asked.failed(grpc.StatusCode.UNAVAILABLE, "no route", ())


@both
def test_vectors_are_an_error_once_nobody_was_there_for_long(kind: type[Client | AsyncClient]) -> None:
    with pytest.raises(Unavailable, match=r"no connection to 127\.0\.0\.1:1: "):
        asyncio.run(embed(kind, "127.0.0.1:1", "a"))
