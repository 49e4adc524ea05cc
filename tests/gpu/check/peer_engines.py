"""One other engine on the same workload and folder, in a process of its own: python -m tests.gpu.check.peer_engines.

Offline, by the engine's own Python API, with the settings of its own benchmark. Prints a line of JSON for each run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.workloads import Workload
from tests.gpu.check.offline import MAX_MODEL_LEN, NUM_REQUESTS, TEMPERATURE, offline

_until_the_end: Final[list[Any]] = []  # what must not be collected

Play = Callable[[Workload], int]
"""Answer all requests; return how many tokens came."""

_WARM_UP: Final = 3  # the run whose words warm it up


def nanovllm(folder: Path) -> Play:
    """https://github.com/GeeeekExplorer/nano-vllm, as in its bench.py."""
    from nanovllm import LLM, SamplingParams  # type: ignore[import-not-found]  # noqa: PLC0415

    engine: Any = LLM(str(folder), enforce_eager=False, max_model_len=MAX_MODEL_LEN)

    def play(workload: Workload) -> int:
        how = [
            SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=request.max_tokens)
            for request in workload.requests
        ]
        told = engine.generate([list(request.prompt) for request in workload.requests], how, use_tqdm=False)
        return sum(len(each["token_ids"]) for each in told)

    return play


def minisgl(folder: Path) -> Play:
    """https://github.com/sgl-project/mini-sglang, as in its benchmark/offline/bench.py."""
    from minisgl.core import SamplingParams  # type: ignore[import-not-found]  # noqa: PLC0415
    from minisgl.llm import LLM  # type: ignore[import-not-found]  # noqa: PLC0415

    engine: Any = LLM(
        str(folder),
        max_seq_len_override=MAX_MODEL_LEN,
        max_extend_tokens=16_384,
        cuda_graph_max_bs=NUM_REQUESTS,
        attention_backend="fi",
    )

    def play(workload: Workload) -> int:
        how = [
            SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=request.max_tokens)
            for request in workload.requests
        ]
        told = engine.generate([list(request.prompt) for request in workload.requests], how)
        return sum(len(each["token_ids"]) + 1 for each in told)  # the last token of each is not in its list

    return play


def transformers(folder: Path) -> Play:
    """Transformers' continuous batching. Its generate_batch has one length for all, so requests are added by hand."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415
    from transformers import GenerationConfig as Config  # noqa: PLC0415

    auto: Any = AutoModelForCausalLM
    how = {"attn_implementation": "flash_attention_2"} if find_spec("flash_attn") else {}
    _tell({"attention": how.get("attn_implementation", "its default: flash_attn is not installed")})
    model = auto.from_pretrained(folder, dtype=torch.bfloat16, **how).to("cuda").eval()
    config_type: Any = Config
    config = config_type(
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        eos_token_id=-1,
        pad_token_id=0,
        max_new_tokens=1024,
    )

    hints: dict[str, Any] = {}
    with contextlib.suppress(ImportError):  # what generate_batch finds out for itself
        from transformers.generation.continuous_batching.utils import WorkloadHints  # noqa: PLC0415

        lengths = {"max_prompt_length": 1024, "max_generated_length": 1024, "num_requests": NUM_REQUESTS}
        hints["workload_hints"] = WorkloadHints(**lengths)
    running = model.continuous_batching_context_manager(generation_config=config, **hints)
    manager = running.__enter__()
    _until_the_end.append(running)

    def play(workload: Workload) -> int:
        count, left = 0, len(workload.requests)
        for request in workload.requests:
            manager.add_request(list(request.prompt), max_new_tokens=request.max_tokens)
        while left:
            told = manager.get_result(timeout=1)
            if told is None:
                if not manager.is_running():
                    raise RuntimeError("its thread ended")
            elif told.is_finished():
                left -= 1
                count += len(told.generated_tokens)
        return count

    return play


def pretended(folder: Path) -> Play:
    """No engine at all: for a check without a GPU."""
    assert (folder / "config.json").exists()

    def play(workload: Workload) -> int:
        return sum(request.max_tokens for request in workload.requests)

    return play


ENGINES: Final[dict[str, Callable[[Path], Play]]] = {
    "nanovllm": nanovllm,
    "minisgl": minisgl,
    "transformers": transformers,
    "pretended": pretended,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, warm up, run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", choices=sorted(ENGINES), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--until", type=float, required=True, help="time.monotonic() after which no run is begun")
    parser.add_argument("--tiny", action="store_true")
    parsed = parser.parse_args(arguments)
    began_s = time.monotonic()
    play = ENGINES[parsed.engine](parsed.model)
    play(offline(_WARM_UP, tiny=parsed.tiny, short=True))
    _tell({"ready_s": round(time.monotonic() - began_s, 2)})
    for run in range(parsed.runs):
        if run and time.monotonic() > parsed.until:
            break
        workload = offline(run, tiny=parsed.tiny)
        began_s = time.perf_counter()
        tokens = play(workload)
        seconds = time.perf_counter() - began_s
        wanted = sum(request.max_tokens for request in workload.requests)
        _tell({"seconds": round(seconds, 3), "tokens": tokens, "wanted": wanted, "per_s": round(wanted / seconds, 1)})


def _tell(line: dict[str, Any]) -> None:
    print("told " + json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # an engine may have threads that never end
