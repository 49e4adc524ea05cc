"""What an operator may set. Each field is a command-line flag and an environment variable, made in services/flags.py.

Read once, in services/__main__.py, and unpacked there: nobody else is handed a whole configuration.
"""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, field
from typing import Any, Literal

DEFAULT_MODEL = "smollm2"


def option(default: Any, text: str, *, least: float = 0, most: float = math.inf) -> Any:
    """A dataclass field with a help text, and for numbers the range it may be in."""
    return field(default=default, metadata={"help": text, "least": least, "most": most})


def range_of(setting: Field[Any]) -> tuple[float, float]:
    """Least and most of a number made by `option`."""
    return setting.metadata["least"], setting.metadata["most"]


def help_of(setting: Field[Any]) -> str:
    """The help text of a field made by `option`."""
    text = setting.metadata["help"]
    assert isinstance(text, str)
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """How a process logs."""

    log_level: Literal["debug", "info", "warning", "error"] = option("info", "least severity that is logged")
    log_format: Literal["text", "json"] = option("text", "text for people, json for machines")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The scheduler process."""

    model: str = option(DEFAULT_MODEL, "model: smollm2, a folder, a .gguf file or a Hugging Face repository id")
    listen: str = option("127.0.0.1:50051", "HOST:PORT for clients; port 0 takes a free one")
    link_listen: str = option("127.0.0.1:50052", "HOST:PORT or unix:PATH for executors")
    insecure: bool = option(False, "allow addresses that other machines can reach, without TLS and keys")
    token_budget: int = option(2048, "tokens per step over all sequences", least=1)
    max_running: int = option(256, "sequences resident on one executor", least=1)
    watermark: float = option(0.01, "share of the KV blocks that admissions leave to running sequences", most=1)
    prefix_caching: bool = option(True, "share the blocks of equal prefixes")
    max_waiting: int = option(2048, "sequences that may wait; one more is refused with RESOURCE_EXHAUSTED", least=1)
    executor_wait_s: float = option(30.0, "seconds a request waits while no executor could run it")
    default_max_tokens: int = option(0, "max_tokens where a request gives none; 0 is the room the context has left")
    max_choices: int = option(8, "largest n of a request", least=1)
    max_message_bytes: int = option(4 << 20, "largest message from a client", least=1024)
    max_streams: int = option(4096, "calls that may be open at once", least=1)
    silence_s: float = option(5.0, "seconds without a word after which an executor is given up", least=0.5)
    step_timeout_s: float = option(120.0, "seconds one step may take before its executor is given up", least=1)
    drain_s: float = option(30.0, "seconds that running requests get after SIGTERM")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorConfig:
    """An executor process."""

    model: str = option(DEFAULT_MODEL, "model: smollm2, a folder, a .gguf file or a Hugging Face repository id")
    scheduler: str = option("127.0.0.1:50052", "HOST:PORT or unix:PATH of the scheduler's link address")
    name: str = option("", "how logs call this executor; made from host and pid when empty")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "precision of weights and KV cache")
    weights: Literal["auto", "int8", "int4"] = option(
        "auto", "weights of the linear layers: as they are, or quantised on load"
    )
    kv_cache_dtype: Literal["auto", "int8"] = option("auto", "K and V: in the activations' precision, or 8 bit")
    device: str = option("auto", "cpu, cuda, cuda:1, …; auto takes a GPU where there is one")
    attention: str = option("auto", "attention backend; auto takes the first that works")
    num_blocks: int = option(0, "KV blocks; 0 finds out from --kv-cache-bytes or free memory")
    kv_cache_bytes: int = option(0, "bytes of the KV cache; 0 takes a share of free memory")
    block_size: int = option(16, "tokens of a KV block", least=1)
    max_sequences: int = option(256, "sequences resident at once", least=1)
    max_step_tokens: int = option(
        0, "tokens of one step; 0 is 256 on a CPU, so that no stream waits long, and 8192 on a GPU"
    )
    max_model_len: int = option(0, "tokens of one sequence; 0 is what the model was made for")
    threads: int = option(0, "threads of the forward; 0 is one for each physical core this process may use")
    drain_s: float = option(30.0, "seconds that running sequences get after SIGTERM")
    fake: bool = option(False, "no model: tokens that can be computed by hand, for tests and demonstrations")
    fake_step_s: float = option(0.0, "seconds that a step of the fake model takes")
    fake_tokens: Literal["position", "hash"] = option(
        "position", "what the fake model says: how many tokens stand before, or a hash of them"
    )
