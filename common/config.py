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
    """How a process logs, and where its traces go."""

    log_level: Literal["debug", "info", "warning", "error"] = option("info", "least severity that is logged")
    log_format: Literal["text", "json"] = option("text", "text for people, json for machines")
    otlp_endpoint: str = option(
        "",
        "where traces go, HOST:PORT of an OTLP collector (gRPC, with TLS unless it is on this machine), or "
        "http://HOST:PORT for a collector without TLS; empty: OTEL_EXPORTER_OTLP_ENDPOINT, or nowhere",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The scheduler process."""

    model: str = option(DEFAULT_MODEL, "model: smollm2, a folder, a .gguf file or a Hugging Face repository id")
    listen: str = option("127.0.0.1:50051", "HOST:PORT for clients; port 0 takes a free one")
    local_listen: str = option(
        "", "unix:PATH where gateways of this machine are served, without TLS; empty: nowhere but on --listen"
    )
    link_listen: str = option("127.0.0.1:50052", "HOST:PORT or unix:PATH for executors")
    admin_listen: str = option(
        "", "unix:PATH for `pagewire status`; empty: in the user's runtime folder; none: nowhere"
    )
    health_listen: str = option(
        "",
        "HOST:PORT where grpc.health.v1 alone is served, without TLS, for probes that speak none; empty: nowhere but "
        "on --listen",
    )
    metrics_listen: str = option(
        "", "HOST:PORT of /metrics for Prometheus, of this scheduler alone; a gateway on this machine has them, too"
    )
    tls_cert: str = option("", "certificate that clients are shown, PEM; empty: no TLS")
    tls_key: str = option("", "its private key, PEM")
    tls_client_ca: str = option("", "authorities, PEM: clients must show a certificate from one of them")
    link_tls_cert: str = option("", "certificate that executors are shown, PEM; empty: no TLS")
    link_tls_key: str = option("", "its private key, PEM")
    link_tls_ca: str = option("", "authorities, PEM: executors must show a certificate from one of them")
    api_keys: str = option("", "file of API keys, as `pagewire api-key` makes them; empty asks nobody for one")
    insecure: bool = option(False, "allow addresses that other machines can reach, without TLS and keys")
    open_inference: bool = option(
        False,
        "serve KServe's Open Inference Protocol, too, for Triton's clients: on --listen, with the same keys and limits",
    )
    open_inference_idle_s: float = option(
        300.0, "seconds that a stream of it may be open while nothing is asked and nothing is answered", least=0.1
    )
    token_budget: int = option(2048, "tokens per step over all sequences", least=1)
    max_running: int = option(256, "sequences resident on one executor", least=1)
    watermark: float = option(0.01, "share of the KV blocks that admissions leave to running sequences", most=1)
    reserve: float = option(
        0.0625,
        "share of an executor that is kept for tenants that run less there, or were served less than their share",
        most=0.5,
    )
    prefix_caching: bool = option(True, "share the blocks of equal prefixes")
    max_pinned_tokens_per_tenant: int = option(16_384, "tokens of prompts that one tenant may have pinned", least=1)
    max_pinned_share: float = option(
        0.25, "share of the smallest executor's KV blocks that all tenants together may have pinned", most=1
    )
    max_pin_seconds: int = option(3600, "seconds that a prompt may be pinned at a time", least=1)
    max_waiting: int = option(2048, "sequences that may wait; one more is refused with RESOURCE_EXHAUSTED", least=1)
    max_waiting_tokens: int = option(
        1_000_000,
        "tokens that may wait, prompts and expected answers; more are refused with RESOURCE_EXHAUSTED",
        least=1,
    )
    max_ttft_s: float = option(
        0.0, "seconds until a first token; who would wait longer is refused at once. 0: the caller's deadline alone"
    )
    max_request_s: float = option(3600.0, "seconds that one request may take from its arrival to its end", least=0.1)
    tenant_tokens_per_s: float = option(
        0.0, "tokens a second, prompts and answers, that one tenant may ask for on average; 0: no limit"
    )
    tenant_burst_tokens: float = option(0.0, "of these, tokens that it may ask for at once; 0: ten seconds of them")
    executor_wait_s: float = option(30.0, "seconds a request waits while no executor could run it")
    vllm_api: bool = option(
        False, "serve vllm.grpc.engine.VllmEngine, too, for gateways as SMG; needs the package smg-grpc-proto"
    )
    max_kv_streams: int = option(
        16,
        "streams of its cache events that may be open at once; of one tenant, as many as are still free. Without "
        "--api-keys they tell whoever reaches the port the tokens of everybody's cached prompts: 0 has none",
    )
    tool_format: Literal["auto", "hermes", "llama3", "mistral"] = option(
        "auto", "how the model writes calls of tools; auto: as its chat template does, else hermes"
    )
    default_max_tokens: int = option(0, "max_tokens where a request gives none; 0 is the room the context has left")
    max_choices: int = option(8, "largest n of a request", least=1)
    max_embedding_inputs: int = option(2048, "texts of one request for embeddings", least=1, most=4096)
    max_embedding_bytes: int = option(
        16 << 20,
        "largest answer of vectors, 4 bytes a number; as JSON it is four times that",
        least=1024,
        most=48 << 20,
    )
    max_grammar_bytes: int = option(
        65_536, "largest schema, pattern or grammar that an answer may have to be of", least=1
    )
    grammar_cpu_s: float = option(0.25, "seconds of a processor that its compilation may take", least=0.01)
    grammar_memory_mib: int = option(512, "MiB of memory that its compilation may take", least=16)
    max_message_bytes: int = option(4 << 20, "largest message from a client", least=1024)
    max_streams: int = option(4096, "calls that may be open at once", least=1)
    handshake_s: float = option(5.0, "seconds that a connection may take to begin to speak HTTP/2", least=0.1)
    first_message_s: float = option(
        30.0, "seconds that a call may take to send its message, and an executor its hello", least=0.1
    )
    suspect_s: float = option(1.0, "seconds without a word after which an executor gets nothing new", least=0.3)
    silence_s: float = option(2.0, "seconds without a word after which an executor is given up", least=0.5)
    lease_s: float = option(5.0, "seconds without a word after which executors give this scheduler up", least=0.5)
    step_timeout_s: float = option(120.0, "seconds any step may take before its executor is given up", least=1)
    step_patience_s: float = option(
        2.0, "seconds any step may take, also where eight times what such steps took lately is less", least=0.1
    )
    quarantine_s: float = option(60.0, "seconds without new sequences for executors that send unusable rows")
    max_executor_hold_s: float = option(10.0, "seconds at most without work for executors that die young")
    reader_timeout_s: float = option(
        60.0,
        "seconds that a message may wait for its reader before the call ends with a ticket; 0: as long as it likes",
    )
    max_chunk_tokens: int = option(
        256, "tokens of one choice in one message, for readers that fell behind; more come in the next one", least=1
    )
    max_health_watches: int = option(256, "Watch calls for health that may be open at once; Check is always answered")
    max_timelines: int = option(
        512, "requests that have ended and can still be explained (`pagewire explain`); 0: none can", most=1_000_000
    )
    max_timeline_events: int = option(64, "events of each that are kept; 0: none can be explained", most=100_000)
    drain_s: float = option(30.0, "seconds that running requests get after SIGTERM")
    ticket_keys: str = option(
        "", "file of the keys that sign tickets, made where it is missing; PAGEWIRE_HOME/ticket-keys when empty"
    )
    ticket_lifetime_s: int = option(86_400, "seconds that a stream can be resumed after its last message", least=1)
    linger_s: float = option(5.0, "seconds that a resumable request goes on after its connection broke")
    max_lingering: int = option(256, "resumable requests that may go on without a connection at once", least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorConfig:
    """An executor process."""

    model: str = option(DEFAULT_MODEL, "model: smollm2, a folder, a .gguf file or a Hugging Face repository id")
    scheduler: str = option("127.0.0.1:50052", "HOST:PORT or unix:PATH of the scheduler's link address")
    link_tls_ca: str = option("", "authorities, PEM, for the scheduler's certificate; empty: no TLS")
    link_tls_cert: str = option("", "certificate that the scheduler is shown, PEM")
    link_tls_key: str = option("", "its private key, PEM")
    name: str = option("", "how logs call this executor; made from host and pid when empty")
    ready_file: str = option(
        "", "file that is there from this executor's first welcome to its end, for probes; empty: none"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "precision of weights and KV cache")
    weights: Literal["auto", "int8", "int4"] = option(
        "auto", "weights of the linear layers: as they are, or quantised on load"
    )
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = option(
        "auto", "K and V: in the activations' precision, or in 8 bits: int8 on a CPU, fp8 (e4m3) on a GPU"
    )
    device: str = option("auto", "cpu, cuda, cuda:1, …; auto takes a GPU where there is one")
    attention: str = option(
        "auto", "attention backend; auto takes the first that works, and never flashinfer, which is taken by name"
    )
    cuda_graphs: Literal["auto", "off"] = option(
        "auto", "on a GPU, launch decode steps as CUDA graphs where the model allows it; off: kernel by kernel"
    )
    num_blocks: int = option(0, "KV blocks; 0 finds out from --kv-cache-bytes or free memory")
    kv_cache_bytes: int = option(0, "bytes of the KV cache; 0 takes a share of free memory")
    block_size: int = option(16, "tokens of a KV block", least=1)
    max_sequences: int = option(256, "sequences resident at once", least=1)
    max_step_tokens: int = option(
        0, "tokens of one step; 0 is 256 on a CPU, so that no stream waits long, and 8192 on a GPU"
    )
    max_model_len: int = option(0, "tokens of one sequence; 0 is what the model was made for")
    speculate: Literal["none", "ngram", "draft"] = option(
        "none",
        "guess tokens ahead, on a CPU: ngram looks the newest ones up in prompt and answer, draft asks a smaller model",
    )
    draft_model: str = option("", "that smaller model, of the same vocabulary: as --model")
    max_drafts: int = option(8, "tokens that may be guessed ahead for one sequence in a step", least=1, most=32)
    step_overhead_tokens: int = option(
        12,
        "tokens that take as long to compute as a step takes in any case, to read the weights: what guesses may cost",
    )
    threads: int = option(0, "threads of the forward; 0 is one for each physical core this process may use")
    drain_s: float = option(30.0, "seconds that running sequences get after SIGTERM")
    watchdog_s: float = option(
        300.0, "seconds the compute thread may stand still before the process ends itself; 0 is for ever"
    )
    fake: bool = option(False, "no model: tokens that can be computed by hand, for tests and demonstrations")
    fake_tokens: Literal["position", "hash"] = option(
        "position", "tokens of the fake model: how many there are before, or a hash of all that is before"
    )
    fake_step_s: float = option(0.0, "seconds that a step of the fake model takes")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """The gateway: OpenAI's API over HTTP."""

    http: str = option(
        "", "HOST:PORT for OpenAI's clients; empty: `serve` starts no gateway, `gateway` takes 127.0.0.1:8000"
    )
    http_tls_cert: str = option("", "certificate that they are shown, PEM; empty: no TLS")
    http_tls_key: str = option("", "its private key, PEM")
    http_tls_client_ca: str = option("", "authorities, PEM: they must show a certificate from one of them")
    http_hosts: str = option(
        "",
        "names that the gateway may be called by, as the Host of a request: NAME,NAME besides those of loopback, or * "
        "for any; empty: none besides where --http is on loopback, else any. For a proxy that keeps the public name",
    )
    http_admin: str = option(
        "",
        "unix:PATH of the scheduler's --admin-listen, for /metrics; empty: where it is by default; none: not asked",
    )
    live_view: str = option(
        "",
        "file with a key (16 to 128 characters) for the live view at /, which then names tenants and is shown to other "
        "machines, too; empty: shown to this machine alone, without names; none: to nobody. Behind a proxy say one",
    )
    http_unknown_fields: Literal["refuse", "ignore"] = option(
        "refuse", "what becomes of a request with a field that is not known here"
    )
    http_max_connections: int = option(1024, "connections that may be open at once", least=1)
    http_max_requests: int = option(1024, "requests that may be open at once", least=1)
    http_max_prompts: int = option(128, "prompts of one request for completions", least=1)
    http_max_head_bytes: int = option(65_536, "largest head of a request", least=1024)
    http_max_body_bytes: int = option(4_000_000, "largest body of a request; the scheduler takes 4 MiB", least=1024)
    http_max_bodies_bytes: int = option(64 << 20, "bytes of all bodies that are being read", least=1024)
    http_max_scores_bytes: int = option(
        128 << 20,
        "bytes of all log-probabilities that are held until they are told; one answer's take half of that at most",
        least=1024,
    )
    http_head_s: float = option(10.0, "seconds that a connection may take to send the head of a request", least=0.1)
    http_body_s: float = option(30.0, "seconds that the body of a request may take", least=0.1)
    http_idle_s: float = option(75.0, "seconds between two requests of a connection", least=1)
    http_comment_s: float = option(15.0, "seconds of silence after which a stream says that it is alive", least=0.1)
    http_reader_timeout_s: float = option(60.0, "seconds that a reader of a stream may take nothing", least=0.1)
    http_patience_s: float = option(
        30.0, "seconds that a stream which has begun waits for a scheduler to go on with it"
    )
    http_begin_patience_s: float = option(2.0, "seconds that a scheduler is looked for before a request is refused")
    http_drain_s: float = option(30.0, "seconds that open requests get after SIGTERM")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How the command line's own clients reach a scheduler."""

    api_key_file: str = option(
        "", "file that holds the API key and nothing else; empty: PAGEWIRE_API_KEY is the key, if it is set"
    )
    tls_ca: str = option("", "authorities, PEM, for the server's certificate, or `system`; empty: no TLS")
    client_cert: str = option("", "certificate that the server is shown, PEM")
    client_key: str = option("", "its private key, PEM")
