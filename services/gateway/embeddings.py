"""/v1/embeddings: texts or tokens in, a vector for each out. Nothing is streamed, and nothing is resumed."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from protos import inference_pb2 as pb
from services.gateway.completions import prompts_form, read_prompts
from services.gateway.fields import Fields
from services.gateway.options import WITHOUT_EFFECT, read_plain

_MAX_INPUTS: Final = 4096  # the scheduler has a limit of its own, and room is made here before it is asked


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedEmbeddings:
    """What is asked for, and how the vectors are written."""

    request: pb.EmbedRequest
    names: Mapping[str, str]  # what the caller calls the scheduler's fields
    is_base64: bool = False  # of float32, little-endian; else numbers


def read(body: Fields) -> AskedEmbeddings:
    """What a request for embeddings asks for. Raises InvalidRequest. Whoever calls refuses what is left over."""
    request = pb.EmbedRequest()
    read_plain(body, request)
    read_plain(body, request.cache)
    given = body.take("input", prompts_form(_MAX_INPUTS))
    has_one = isinstance(given, str) or (
        isinstance(given, list) and not isinstance(next(iter(given), None), str | list)
    )
    for prompt in read_prompts(given, _MAX_INPUTS, "input"):
        if isinstance(prompt, str):
            request.inputs.add(text=prompt)
        else:
            request.inputs.add().token_ids.ids.extend(prompt)
    is_base64 = body.word("encoding_format", ("float", "base64")) == "base64"
    body.ignore(*WITHOUT_EFFECT)
    return AskedEmbeddings(
        request=request,
        names={"inputs[0]" if has_one else "inputs": "input"},
        is_base64=is_base64,
    )


async def told(answer: pb.EmbedResponse, asked: AskedEmbeddings) -> bytes:
    """The answer's body. It may be long: others have their turn between two vectors."""
    data: list[str] = []
    for index, embedding in enumerate(answer.embeddings):
        if asked.is_base64:
            vector = f'"{base64.b64encode(embedding.values).decode()}"'
        else:  # nine digits are a float32
            vector = f"[{', '.join(map('{:.9g}'.format, struct.unpack(f'<{answer.dimensions}f', embedding.values)))}]"
        data.append(f'{{"object": "embedding", "index": {index}, "embedding": {vector}}}')
        await asyncio.sleep(0)
    num_tokens = sum(embedding.prompt_tokens for embedding in answer.embeddings)
    usage = json.dumps({"prompt_tokens": num_tokens, "total_tokens": num_tokens})
    head = f'{{"object": "list", "model": {json.dumps(answer.model)}, "usage": {usage}, "data": ['
    return f"{head}{', '.join(data)}]}}".encode()
