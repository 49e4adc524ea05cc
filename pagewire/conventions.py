"""OpenTelemetry's names for what was asked and what was answered: its conventions for generative AI.

Numbers, names and ids alone: no word of a prompt, an answer or a stop string, and no key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import Message

from pagewire.answers import FinishReason
from pagewire.borrowed import borrow
from pagewire.continuation import Continuation

if TYPE_CHECKING:
    from common import addresses
    from protos import inference_pb2 as pb
else:
    addresses = borrow("common.addresses")
    pb = borrow("protos.inference_pb2")

Attributes = Mapping[str, str | int | float | bool | Sequence[str]]

_MAX_INT: Final = (1 << 63) - 1  # that can be sent to a collector
_OPERATIONS: Final[Mapping[type[Message], str]] = {
    pb.EmbedRequest: "embeddings",
    pb.TokenizeRequest: "tokenize",
    pb.DetokenizeRequest: "detokenize",
    pb.GetModelRequest: "get_model",
}
_NUMBERS: Final = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
_STOPS: Final = frozenset({FinishReason.EOS, FinishReason.STOP_TOKEN, FinishReason.STOP_STRING})


def name_of(told: Attributes) -> str:
    """Of a span with these attributes. A model that was not asked for by its name is known when it has answered."""
    model = told.get("gen_ai.request.model") or told.get("gen_ai.response.model")
    operation = told["gen_ai.operation.name"]
    return f"{operation} {model}" if model else f"{operation}"


def asked(request: Any, address: str) -> Attributes:
    """What is known when it is asked for, which is what a sampler may go by."""
    found = {"gen_ai.operation.name": _operation(request), "gen_ai.provider.name": "pagewire"}
    if request.model:
        found["gen_ai.request.model"] = request.model
    return {**found, **server(address)}


def server(address: str) -> Attributes:
    """Who is asked."""
    try:
        host, port = addresses.split_address(address)
    except ValueError:  # a socket's path, or a name of gRPC's own kind
        return {"server.address": address}
    return {"server.address": host, "server.port": port}


def streamed(continuation: Continuation) -> Attributes:
    """How an answer was to be made, as far as that is known here, and what came of it."""
    request, finishes = continuation.request, dict(continuation.finishes)
    sampling = request.sampling
    n = sampling.n if sampling.HasField("n") else 1
    found: dict[str, str | int | float | bool | Sequence[str]] = {
        "gen_ai.request.choice.count": n,
        "gen_ai.request.stream": True,
        "gen_ai.response.id": continuation.request_id,
    }
    if continuation.max_tokens:
        found["gen_ai.request.max_tokens"] = continuation.max_tokens
    if sampling.top_k:
        found["gen_ai.request.top_k"] = sampling.top_k
    if sampling.seed <= _MAX_INT:
        found["gen_ai.request.seed"] = sampling.seed
    for name in _NUMBERS:
        if sampling.HasField(name):
            found[f"gen_ai.request.{name}"] = float(f"{getattr(sampling, name):.7g}")  # 0.1, not 0.10000000149
    if continuation.model:  # a server has begun with it
        found["gen_ai.response.model"] = continuation.model
        found["gen_ai.usage.input_tokens"] = continuation.num_prompt
        not_told = sum(finish.usage.discarded_tokens for finish in finishes.values())
        found["gen_ai.usage.output_tokens"] = continuation.num_heard + not_told
    if finishes:
        found["gen_ai.response.finish_reasons"] = [_reason(finishes[i].reason) for i in sorted(finishes)]
        found["gen_ai.usage.cache_read.input_tokens"] = max(f.usage.cached_prompt_tokens for f in finishes.values())
    return found


def answered(message: Message) -> Attributes:
    """What came of a request that one message answers."""
    match message:
        case pb.EmbedResponse():
            return {
                "gen_ai.response.model": message.model,
                "gen_ai.response.id": message.request_id,
                "gen_ai.embeddings.dimension.count": message.dimensions,
                "gen_ai.usage.input_tokens": sum(each.prompt_tokens for each in message.embeddings),
                "gen_ai.usage.cache_read.input_tokens": sum(each.cached_prompt_tokens for each in message.embeddings),
            }
        case pb.GetModelResponse():
            return {"gen_ai.response.model": message.model}
        case _:
            return {}


def _operation(request: Message) -> str:
    if isinstance(request, pb.GenerateStreamRequest):
        return "chat" if request.HasField("chat") else "text_completion"
    return _OPERATIONS[type(request)]


def _reason(reason: FinishReason) -> str:
    """In the words that OpenAI has, where it has one."""
    return "stop" if reason in _STOPS else reason.value
