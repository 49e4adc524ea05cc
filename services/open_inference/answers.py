"""An answer in the protocol's words: pieces of text, and the responses that tell them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Final

from common.errors import InvalidRequest, Overloaded, RequestFailed, Unavailable
from common.types import FinishReason
from protos import open_inference_pb2 as pb
from services.answer import Answer, Delta, Finish
from services.open_inference.asked import Asked
from services.open_inference.tensors import Element, add_output
from services.open_inference.words import OUTPUTS, VERSION
from services.status import RpcStatus

FINAL: Final = "triton_final_response"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of an answer; the last one says why it is."""

    text: str
    num_tokens: int
    finish_reason: str = ""  # "stop", "length"


async def pieces(answer: Answer, *, at_once: bool) -> AsyncGenerator[Piece, None]:
    """The answer as it is made, or `at_once`. Raises RequestFailed or Unavailable where it has no end."""
    text: list[str] = []
    num_tokens = 0
    while answer.is_open:
        for event in await answer.next():
            if isinstance(event, Delta):
                text.append(event.text)
                num_tokens += len(event.token_ids)
            elif isinstance(event, Finish):
                yield Piece(text="".join(text), num_tokens=num_tokens, finish_reason=_finish_reason(event.reason))
                return
        if not at_once and any(text):  # tokens of half a character wait for the rest of it
            yield Piece(text="".join(text), num_tokens=num_tokens)
            text, num_tokens = [], 0


def _finish_reason(reason: FinishReason) -> str:
    match reason:
        case FinishReason.ERROR:
            raise RequestFailed("the answer failed; do not send the request again")
        case FinishReason.ABORTED:
            raise Unavailable("the answer was ended before it was complete")
        case FinishReason.LENGTH:
            return "length"
        case _:
            return "stop"


def response_of(asked: Asked, piece: Piece, model: str, *, num_prompt_tokens: int) -> pb.ModelInferResponse:
    """The response that tells a piece: the outputs that were asked for."""
    response = _headed(model, asked.request.request_id)
    told: dict[str, Element] = {
        "text_output": (asked.before + piece.text).encode(),
        "finish_reason": piece.finish_reason.encode(),
        "num_input_tokens": num_prompt_tokens,
        "num_output_tokens": piece.num_tokens,
    }
    for name in asked.outputs:
        add_output(response, name, OUTPUTS[name], told[name], shape=asked.shape, raw=asked.raw)
    return response


def failure_of(
    request: pb.ModelInferRequest, model: str, status: RpcStatus, error: Exception
) -> pb.ModelStreamInferResponse:
    """The response that tells of a request's failure, beside others of its call: what a status would, in parameters."""
    response = pb.ModelStreamInferResponse(
        error_message=status.message or status.code.name, infer_response=_headed(model, request.id)
    )
    parameters = response.infer_response.parameters
    parameters[FINAL].bool_param = True
    parameters["grpc_status"].string_param = status.code.name
    if isinstance(error, InvalidRequest):
        parameters["field"].string_param = error.field
    if isinstance(error, Overloaded | Unavailable):
        parameters["retry_after_ms"].int64_param = max(0, round(error.retry_after_s * 1000))
    return response


def _headed(model: str, id: str) -> pb.ModelInferResponse:
    return pb.ModelInferResponse(model_name=model, model_version=VERSION, id=id)
