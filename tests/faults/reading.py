"""A client that may be killed: `python -m tests.faults.reading ADDRESS FILE` reads an answer and keeps it in FILE.

The first line of the file is the request, each further one a message that told something new, all in base64. Whoever
starts this program again with the same file goes on behind what is in it. Ends with 0 when the answer is complete.
"""

from __future__ import annotations

import base64
import os
import sys
import time
from pathlib import Path
from typing import Final

import grpc

from pagewire.calls import GENERATE, RESUME
from pagewire.continuation import Continuation
from protos import inference_pb2 as pb
from services import failpoints
from services.grpc_options import client_options

_PATIENCE_S: Final = 60.0
_AGAIN_S: Final = 0.1


def keep(file: Path, request: pb.GenerateStreamRequest) -> None:
    """Begin a file. The request must have an id and a seed: it is asked by more than one process."""
    assert request.request_id and request.sampling.HasField("seed"), "drawn by each process, they would differ"
    file.write_bytes(_line(request.SerializeToString()))


def kept(file: Path) -> tuple[pb.GenerateStreamRequest, list[pb.GenerateStreamResponse]]:
    """What is in a file. A last line that was torn by the death of its writer is not."""
    lines = [base64.b64decode(line) for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    request = pb.GenerateStreamRequest.FromString(lines[0])
    return request, [pb.GenerateStreamResponse.FromString(line) for line in lines[1:]]


def num_words(file: Path) -> int:
    """How often the reader was told something, after the beginning."""
    return max(0, file.read_bytes().count(b"\n") - 2)


def read(address: str, file: Path) -> None:
    """Read to the end. Raises grpc.RpcError when nobody answers for a minute."""
    request, told = kept(file)
    continuation = Continuation(request)
    for message in told:
        continuation.hear(message)
    give_up_s = time.monotonic() + _PATIENCE_S
    out = os.open(file, os.O_WRONLY | os.O_APPEND)
    _forget_torn_line(file)
    with grpc.insecure_channel(address, options=client_options()) as channel:
        while not continuation.is_done:
            call = continuation.next_call()
            method: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(
                GENERATE if isinstance(call, pb.GenerateStreamRequest) else RESUME
            )
            try:
                for data in method(call.SerializeToString(), timeout=_PATIENCE_S):
                    message = pb.GenerateStreamResponse.FromString(data)
                    begins = message.HasField("prompt") and not told
                    if continuation.hear(message) is not None or begins:
                        told.append(message)
                        os.write(out, _line(data))
            except grpc.RpcError:
                if time.monotonic() > give_up_s:
                    raise
                time.sleep(_AGAIN_S)


def _forget_torn_line(file: Path) -> None:
    """Cut off what was written of a line whose end is missing."""
    whole = file.read_bytes()
    if not whole.endswith(b"\n"):
        os.truncate(file, whole.rfind(b"\n") + 1)


def _line(data: bytes) -> bytes:
    return base64.b64encode(data) + b"\n"


if __name__ == "__main__":
    failpoints.arm()
    read(sys.argv[1], Path(sys.argv[2]))
