"""Stream a chat answer with nothing but grpcio and the generated stubs.

    python examples/python/stream.py 127.0.0.1:50051 "Why is the sky blue?"

Ctrl-C cancels the call, and the server frees its memory within a step. A project of its own makes its stubs with
`python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. protos/inference.proto`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grpc

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
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
