"""What cannot be served is refused by name, and nobody else notices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from protos import inference_pb2 as pb
from services.status import from_rpc_error
from tests.e2e.cluster import Cluster, cluster

METHOD = "/pagewire.v1.InferenceService/Generate"
LINK = "/pagewire.executor.v1.ExecutorLink/Link"
Change = Callable[[pb.GenerateRequest], object]


def fields(**values: object) -> Change:
    """Set sampling, stopping or cache fields by name."""

    def change(request: pb.GenerateRequest) -> None:
        for name, value in values.items():
            parts = (request.sampling, request.stopping, request.cache)
            part = next(part for part in parts if name in part.DESCRIPTOR.fields_by_name)
            if isinstance(value, dict):
                getattr(part, name).update(value)
            elif isinstance(value, list):
                getattr(part, name).extend(value)
            else:
                setattr(part, name, value)

    return change


CASES: dict[str, tuple[Change, str, str]] = {
    "no input": (lambda r: r.ClearField("text"), "input", "text"),
    "empty prompt": (lambda r: setattr(r, "text", ""), "text", "empty"),
    "empty ids": (lambda r: r.token_ids.SetInParent(), "token_ids", "empty"),
    "empty chat": (lambda r: r.chat.SetInParent(), "chat", "empty"),
    "id outside the vocabulary": (lambda r: r.token_ids.ids.append(320), "token_ids", "320"),
    "prompt longer than the model": (lambda r: r.token_ids.ids.extend([1] * 512), "token_ids", "512"),
    "text far longer than the model": (lambda r: setattr(r, "text", "x" * (3 << 20)), "text", "512"),
    "too many messages": (
        lambda r: r.chat.messages.extend([pb.ChatMessage(role="user")] * 4097),
        "chat",
        "at most 4096",
    ),
    "no choices": (fields(n=0), "n", "1"),
    "too many choices": (fields(n=9), "n", "8"),
    "no tokens": (fields(max_tokens=0), "max_tokens", "1"),
    "more tokens than room": (fields(max_tokens=600), "max_tokens", "507"),
    "temperature is not a number": (fields(temperature=float("nan")), "temperature", "nan"),
    "temperature is infinite": (fields(temperature=float("inf")), "temperature", "inf"),
    "temperature below zero": (fields(temperature=-0.1), "temperature", "-0.1"),
    "top_p is zero": (fields(top_p=0.0), "top_p", "(0, 1]"),
    "top_p above one": (fields(top_p=1.5), "top_p", "1.5"),
    "min_p above one": (fields(min_p=1.5), "min_p", "1.5"),
    "too many stop strings": (fields(stop=["x"] * 9), "stop", "8"),
    "empty stop string": (fields(stop=[""]), "stop", "1"),
    "long stop string": (fields(stop=["x" * 257]), "stop", "256"),
    "stop id outside the vocabulary": (fields(stop_token_ids=[320]), "stop_token_ids", "320"),
    "typical_p is zero": (fields(typical_p=0.0), "typical_p", "(0, 1]"),
    "repetition_penalty is zero": (fields(repetition_penalty=0.0), "repetition_penalty", "[0.01, 100]"),
    "repetition_penalty is not a number": (fields(repetition_penalty=float("nan")), "repetition_penalty", "nan"),
    "presence_penalty is infinite": (fields(presence_penalty=float("-inf")), "presence_penalty", "[-2, 2]"),
    "frequency_penalty is too large": (fields(frequency_penalty=2.1), "frequency_penalty", "[-2, 2]"),
    "a bias is infinite": (fields(logit_bias={1: float("inf")}), "logit_bias", "[-100, 100]"),
    "biased id outside the vocabulary": (fields(logit_bias={320: 1.0}), "logit_bias", "320"),
    "too many biases": (fields(logit_bias=dict.fromkeys(range(301), 1.0)), "logit_bias", "300"),
    "too many allowed ids": (fields(allowed_token_ids=[1] * 1025), "allowed_token_ids", "1024"),
    "allowed id outside the vocabulary": (fields(allowed_token_ids=[320]), "allowed_token_ids", "320"),
    "banned id outside the vocabulary": (fields(banned_token_ids=[1 << 31]), "banned_token_ids", "320"),
    "allowed and banned": (fields(allowed_token_ids=[1], banned_token_ids=[1]), "banned_token_ids", "1"),
    "all banned": (fields(banned_token_ids=list(range(320))), "banned_token_ids", "320"),
    "all but the end banned, before min_tokens": (
        fields(banned_token_ids=list(range(319)), min_tokens=1),
        "banned_token_ids",
        "320",
    ),
    "only the end allowed, before min_tokens": (
        fields(allowed_token_ids=[319], min_tokens=2),
        "allowed_token_ids",
        "2",
    ),
    "too many bad words": (fields(bad_words=["x"] * 65), "bad_words", "64"),
    "long bad word": (fields(bad_words=["x" * 257]), "bad_words", "256"),
    "bad word of spaces": (fields(bad_words=["x", "  "]), "bad_words", "1"),
    "more min_tokens than max_tokens": (fields(min_tokens=6, max_tokens=5), "min_tokens", "5"),
    "more min_tokens than room": (fields(min_tokens=508), "min_tokens", "507"),
    "long salt": (fields(cache_salt="é" * 129), "cache_salt", "256"),
    "pinned for no time": (fields(pin_seconds=0), "pin_seconds", "1"),
    "pinned for too long": (fields(pin_seconds=3601), "pin_seconds", "3600"),
    "no token pinned": (fields(pin_seconds=1, pin_tokens=0), "pin_tokens", "1"),
    "more pinned than the prompt": (fields(pin_seconds=1, pin_tokens=6), "pin_tokens", "5"),
    "pinned without an end": (fields(pin_tokens=5), "pin_tokens", "pin_seconds"),
    "pinned without the cache": (fields(pin_seconds=1, no_cache=True), "pin_seconds", "no_cache"),
    "best of fewer than n": (fields(n=3, best_of=2), "best_of", "[3, 8]"),
    "best of none": (fields(best_of=0), "best_of", "[1, 8]"),
    "best of too many": (fields(best_of=9), "best_of", "[1, 8]"),
    "too many stop ids": (fields(stop_token_ids=[1] * 65), "stop_token_ids", "64"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_field_is_named_with_its_limit(shared: Cluster, case: str) -> None:
    change, field, limit = CASES[case]
    request = pb.GenerateRequest(text="hello")
    change(request)
    with pytest.raises(grpc.RpcError) as failure:
        shared.stub.Generate(request)

    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    error = from_rpc_error(failure.value)
    assert getattr(error, "field", "").startswith(field), error
    assert limit in str(error)
    assert shared.tokens([1, 2], 2) == [2, 3], "others are served"


def test_more_ids_than_a_sequence_can_have_are_not_decoded(shared: Cluster) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        shared.stub.Detokenize(pb.DetokenizeRequest(token_ids=[1] * 513))
    assert "token_ids: at most 512" in str(failure.value.details())


def test_one_call_too_many_is_refused_with_a_time_to_come_back(fake_folder: Path, tmp_path: Path) -> None:
    with cluster(fake_folder, tmp_path, executors=0, flags=["--max-streams=1"]) as running:
        asked = {"token_ids": {"ids": [1, 2]}, "stopping": {"max_tokens": 300}}
        first = running.stub.GenerateStream(pb.GenerateStreamRequest(**asked))  # type: ignore[arg-type]
        next(first)  # and waits for an executor
        with pytest.raises(grpc.RpcError) as failure:
            running.tokens([1, 2], 2)
        assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()


def test_an_unknown_model_is_not_found(shared: Cluster) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        shared.stub.Generate(pb.GenerateRequest(text="x", model="gpt-9"))
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    problem = str(failure.value.details())
    assert "gpt-9" in problem and "fake" in problem


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x1a\x02\xc3\x28"], ids=["garbage", "invalid UTF-8"])
def test_bytes_that_are_no_message_are_an_invalid_argument(shared: Cluster, data: bytes) -> None:
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = shared.channel.unary_unary(METHOD)
    with pytest.raises(grpc.RpcError) as failure:
        call(data)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "pagewire.v1.GenerateRequest" in str(failure.value.details())


def test_a_message_too_large_is_refused(shared: Cluster) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        shared.stub.Generate(pb.GenerateRequest(text="x" * (5 << 20)))
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert shared.tokens([1, 2], 2) == [2, 3]


def test_a_client_cannot_dial_in_as_an_executor(shared: Cluster) -> None:
    call: grpc.StreamStreamMultiCallable[bytes, bytes] = shared.channel.stream_stream(LINK)
    with pytest.raises(grpc.RpcError) as failure:
        list(call(iter([b""])))
    assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED
