"""A GenerateRequest of vllm.grpc.engine → one of ours. What it cannot say there is refused by the name it has there.

Where a message of theirs has no presence, zero means "not set", as their own servers read it: `top_p` 0 is 1. Their
requests bring token ids and get token ids, so nothing of how text is put together matters here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from google.protobuf.message import Message

from common.errors import InvalidRequest
from common.sampling import MAX_SEED
from protos import inference_pb2 as pb
from services.vllm_api.stubs import vllm_pb2 as vllm

_SERVED: Final = frozenset({"request_id", "tokenized", "text", "sampling_params", "stream", "data_parallel_rank"})
_EMBED_SERVED: Final = frozenset({"request_id", "tokenized"})
_SAMPLING_SERVED: Final = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
        *("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "n", "seed", "logit_bias"),
        *("logprobs", "prompt_logprobs", "include_stop_str_in_output"),
        *("json_schema", "regex", "grammar", "json_object", "choice"),
        *("skip_special_tokens", "spaces_between_special_tokens"),  # of text; the first decides where a stop string is
        "grammar_from_first_token",  # as it is here in any case
    }
)
_UNSET_AT_ZERO: Final = ("top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "n")
_INSTEAD: Final = {
    "structural_tag": "json_schema, regex, grammar, json_object and choice are",
    "truncate_prompt_tokens": "send the tokens that are to count",
}
_THEIRS: Final = {
    "token_ids": "tokenized.input_ids",
    "input": "tokenized",
    "choices": "choice",
    "include_stop": "include_stop_str_in_output",
}
"""What fields of ours are called there, where it is something else."""


def request_from_vllm(message: vllm.GenerateRequest) -> pb.GenerateRequest:
    """The same request in our words, as far as it was checked here: not its ranges. Raises InvalidRequest."""
    _refuse_unserved(message, _SERVED)
    if message.data_parallel_rank:
        raise InvalidRequest("data_parallel_rank", f"must be 0: there is one rank, got {message.data_parallel_rank}")
    asked = message.sampling_params
    _refuse_unserved(asked, _SAMPLING_SERVED)
    if asked.HasField("prompt_logprobs") and asked.n > 1:  # each choice would bring a copy of all of them
        raise InvalidRequest("prompt_logprobs", f"needs an n of 1, got {asked.n}: ask for them in a request of its own")
    request = pb.GenerateRequest(
        request_id=message.request_id,
        sampling=_sampling(asked),
        stopping=_stopping(asked),
        skip_special_tokens=asked.skip_special_tokens,
    )
    match message.WhichOneof("input"):
        case "tokenized":
            request.token_ids.CopyFrom(pb.TokenIds(ids=message.tokenized.input_ids))
        case "text":
            request.text = message.text
    return request


def embed_from_vllm(message: vllm.EmbedRequest) -> pb.EmbedRequest:
    """The same request in our words. Raises InvalidRequest for what cannot be said in them."""
    _refuse_unserved(message, _EMBED_SERVED)
    ids = pb.TokenIds(ids=message.tokenized.input_ids)
    return pb.EmbedRequest(request_id=message.request_id, inputs=[pb.EmbedInput(token_ids=ids)])


@contextmanager
def embed_in_their_words() -> Iterator[None]:
    """What is wrong with the one input is told by the name that it has in theirs."""
    try:
        yield
    except InvalidRequest as error:
        field = "tokenized.input_ids" if error.field.startswith("inputs") else error.field
        raise InvalidRequest(field, error.problem) from error


@contextmanager
def in_their_words(message: vllm.GenerateRequest) -> Iterator[None]:
    """What is wrong with a request of ours is told by the name that it has in theirs."""
    try:
        yield
    except InvalidRequest as error:
        field, problem = _THEIRS.get(error.field, error.field), error.problem
        if field == "grammar" and "::=" in message.sampling_params.grammar:
            problem += "; write it in Lark's syntax: `start: item+`, not `root ::= item+`"
        raise InvalidRequest(field, problem) from error


def _refuse_unserved(message: Message, served: frozenset[str]) -> None:
    for field, _ in message.ListFields():
        if field.name not in served:
            instead = f"; {_INSTEAD[field.name]}" if field.name in _INSTEAD else ""
            raise InvalidRequest(field.name, f"is not served here{instead}")


def _sampling(asked: vllm.SamplingParams) -> pb.SamplingParams:
    given: dict[str, Any] = {name: value for name in _UNSET_AT_ZERO if (value := getattr(asked, name))}
    if asked.HasField("temperature"):
        given["temperature"] = asked.temperature
    if asked.HasField("seed"):
        given["seed"] = asked.seed & MAX_SEED  # theirs may be negative
    for name in ("logprobs", "prompt_logprobs"):
        if asked.HasField(name):
            given[name] = _natural(name, getattr(asked, name))
    return pb.SamplingParams(
        **given,
        logit_bias={_natural("logit_bias", token): bias for token, bias in asked.logit_bias.items()},
        structured=_structured(asked),
    )


def _structured(asked: vllm.SamplingParams) -> pb.StructuredOutput | None:
    match asked.WhichOneof("constraint"):
        case "choice":
            return pb.StructuredOutput(choices=pb.StringList(values=asked.choice.choices))
        case "json_schema" | "regex" | "grammar" | "json_object" as kind:
            return pb.StructuredOutput(**{kind: getattr(asked, kind)})
    return None


def _stopping(asked: vllm.SamplingParams) -> pb.StopConditions:
    return pb.StopConditions(
        max_tokens=asked.max_tokens if asked.HasField("max_tokens") else None,
        stop=asked.stop,
        stop_token_ids=asked.stop_token_ids,
        ignore_eos=asked.ignore_eos,
        min_tokens=asked.min_tokens,
        include_stop=asked.include_stop_str_in_output,
    )


def _natural(field: str, number: int) -> int:
    """Their numbers have signs; -1 asks for the whole vocabulary. Raises InvalidRequest for those below 0."""
    if number < 0:
        raise InvalidRequest(field, f"must not be negative, got {number}")
    return number
