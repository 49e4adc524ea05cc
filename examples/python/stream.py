"""Stream a chat answer with nothing but grpcio, the generated stubs, and what gRPC's errors say in detail.

    python examples/python/stream.py 127.0.0.1:50051 "Why is the sky blue?"

Ctrl-C cancels the call, and the server frees its memory within a step. A project of its own makes its stubs with
`python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. protos/inference.proto`, and has
grpcio-status among its dependencies.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where the stubs lie: protos/
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc


def main(address: str = "127.0.0.1:50051", prompt: str = "Why is the sky blue?") -> int:
    """Print the answer as it comes, then what it cost. The exit code: 0 done, 1 failed, 130 Ctrl-C."""
    request = pb.GenerateStreamRequest(
        chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=prompt)]),
        sampling=pb.SamplingParams(temperature=0.7, top_p=0.95),
        stopping=pb.StopConditions(max_tokens=256),
    )
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.GenerateStream(request, timeout=120)  # seconds for the whole answer
        try:
            for message in call:
                if message.HasField("delta"):
                    print(message.delta.text, end="", flush=True)
                elif message.HasField("finish"):
                    finish = message.finish
                    reason = pb.FinishReason.Name(finish.reason)
                    print(f"\n[{reason}: {finish.usage.prompt_tokens} + {finish.usage.completion_tokens} tokens]")
        except KeyboardInterrupt:
            call.cancel()
            print("\n[cancelled]")
            return 130
        except grpc.RpcError:
            print(f"{call.code().name}: {call.details()}", file=sys.stderr)
            tell_details(call)
            return 1
    return 0


def tell_details(call: grpc.Call) -> None:
    """What a refusal says beside its text: which field is wrong, or when there may be room."""
    status = rpc_status.from_call(call)
    for detail in status.details if status else ():
        bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(bad):
            for violation in bad.field_violations:
                print(f"  in {violation.field}", file=sys.stderr)
        elif detail.Unpack(retry):
            print(f"  try again in {retry.retry_delay.ToMilliseconds()} ms", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
