"""What Triton's own client sees of a scheduler: told in JSON, one line for each thing that was tried.

A program of its own, because Triton's stubs and ours are for the same messages, and a process can have them once.
`python triton_program.py HOST:PORT MODEL PROMPT`.
"""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton  # pyright: ignore[reportMissingImports] - in .venv-triton alone
from tritonclient.utils import InferenceServerException  # pyright: ignore[reportMissingImports]


def text(prompt: str, shape: list[int] | None = None) -> Any:
    """The tensor of a prompt."""
    tensor = triton.InferInput("text_input", shape or [1], "BYTES")
    tensor.set_data_from_numpy(np.array([prompt.encode()], dtype=np.object_).reshape(shape or [1]))
    return tensor


def scalar(name: str, value: float, kind: Any, datatype: str) -> Any:
    """The tensor of a number."""
    tensor = triton.InferInput(name, [1], datatype)
    tensor.set_data_from_numpy(np.array([value], dtype=kind))
    return tensor


def told(result: Any) -> str:
    """The text of a response."""
    return "".join(part.decode() for part in result.as_numpy("text_output").flatten())


def tell(what: str, value: Any) -> None:
    """One line."""
    print(json.dumps({what: value}), flush=True)


def main(address: str, model: str, prompt: str) -> None:
    """Try all of it."""
    greedy = {"temperature": 0.0, "max_tokens": 8}
    with triton.InferenceServerClient(address) as client:
        ready = [client.is_server_live(), client.is_server_ready(), client.is_model_ready(model)]
        tell("ready", ready)
        metadata = client.get_model_metadata(model, as_json=True)
        tell("inputs", [each["name"] for each in metadata["inputs"]])
        config = client.get_model_config(model, as_json=True)["config"]
        tell("decoupled", config["model_transaction_policy"]["decoupled"])
        tell("server", client.get_server_metadata(as_json=True)["name"])

        answer = client.infer(model, [text(prompt)], request_id="whole", parameters=greedy)
        tell("whole", told(answer))
        outputs = [triton.InferRequestedOutput(name) for name in ("text_output", "finish_reason", "num_output_tokens")]
        tensors = [
            text(prompt, [1, 1]),
            scalar("max_tokens", 8, np.int32, "INT32"),
            scalar("temperature", 0, np.float32, "FP32"),
        ]
        answer = client.infer(model, tensors, outputs=outputs)
        tell("tensors", [told(answer), answer.as_numpy("finish_reason").item().decode()])
        tell("counted", answer.as_numpy("num_output_tokens").item())
        seeded = [
            told(client.infer(model, [text(prompt)], parameters={"seed": 7, "max_tokens": 8, "temperature": 1.0}))
            for _ in range(2)
        ]
        tell("seeded", seeded[0] == seeded[1])
        try:
            client.infer(model, [text(prompt)], parameters={"temperature": -1.0})
        except InferenceServerException as error:
            tell("refused", [error.status(), error.message()])

        heard: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: heard.put((result, error)))
        client.async_stream_infer(
            model,
            [text(prompt), scalar("stream", True, np.bool_, "BOOL")],
            request_id="stream",
            enable_empty_final_response=True,
            parameters=greedy,
        )
        parts: list[str] = []
        while True:
            result, failure = heard.get(timeout=60)
            assert failure is None, failure
            parts.append(told(result))
            if result.get_response().parameters["triton_final_response"].bool_param:
                break
        tell("stream", "".join(parts))
        tell("many", len(parts) > 1)
        client.async_stream_infer(model, [text(prompt)], parameters={"top_p": 7.0})
        tell("refused in the stream", heard.get(timeout=60)[1].message())
        client.async_stream_infer(model, [text(prompt)], parameters=greedy)  # the stream goes on
        tell("after it", told(heard.get(timeout=60)[0]))
        client.stop_stream()

        client.start_stream(lambda result, error: heard.put((result, error)))
        long = {"temperature": 0.0, "max_tokens": 400, "ignore_eos": True, "stream": True}
        client.async_stream_infer(model, [text("x")], parameters=long)
        assert heard.get(timeout=60)[1] is None
        client.stop_stream(cancel_requests=True)
        tell("cancelled", True)


if __name__ == "__main__":
    main(*sys.argv[1:4])
