"""The executor process: one runner, one link. Everything that needs torch is imported on the compute thread."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from pathlib import Path
from typing import Any

from common.config import ExecutorConfig
from common.errors import ModelFolderError
from common.model_folder import ModelFolder, read_model_folder
from executor.runner import Runner
from services import lifecycle, tls
from services.cores import usable_cores
from services.executor_service import ExecutorService
from services.grpc_options import link_options
from services.step_spans import StepSpans
from services.tracing import open_tracer

log = logging.getLogger(__name__)


async def run(
    config: ExecutorConfig,
    model_path: Path,
    ready_fd: int | None = None,
    *,
    draft_model: Path | None = None,
    otlp_endpoint: str = "",
) -> None:
    """Serve until SIGTERM or SIGINT. Announces itself when the first scheduler has welcomed it.

    Raises StartupError, ModelFolderError and ExecutorRejected.
    """
    lifecycle.keep_secrets()
    stop = lifecycle.stop_event()
    files = tls.channel_files(
        *(config.link_tls_cert, config.link_tls_key, config.link_tls_ca), flags="--link-tls", ca_flag="--link-tls-ca"
    )
    dial = tls.Dialer(config.scheduler, link_options(), files)
    model = read_model_folder(model_path)
    tracer = open_tracer("executor", otlp_endpoint, model=model.name)
    name = config.name or f"{socket.gethostname()}-{os.getpid()}"
    announced = asyncio.Event()
    ready_file = lifecycle.ReadyFile(config.ready_file)

    def on_joined(_: object) -> None:
        if not announced.is_set():
            announced.set()
            ready_file.make()
            lifecycle.announce(ready_fd, name)

    service = ExecutorService(
        lambda: make_runner(config, model, name, draft_model),
        config.scheduler,
        dial=dial,
        on_joined=on_joined,
        drain_s=config.drain_s,
        watchdog_s=config.watchdog_s,
        spans=StepSpans(tracer) if tracer is not None else None,
    )
    try:
        has_ended = await service.run(stop)
    finally:
        ready_file.remove()
    if tracer is not None:
        tracer.close()
    log.info("stopped")
    if not has_ended:  # no interpreter ends well under a thread that is inside of torch
        logging.shutdown()
        os._exit(0)


def make_runner(config: ExecutorConfig, model: ModelFolder, name: str, draft_model: Path | None = None) -> Runner:
    """The runner that the configuration asks for. Called on the compute thread."""
    if config.fake:
        from executor.fake_runner import FakeRunner, position_token, prefix_hash_token

        return FakeRunner(
            name=name,
            model=model.name,
            model_digest=model.digest,
            vocab_size=model.vocab_size,
            max_model_len=config.max_model_len or model.max_model_len,
            num_blocks=config.num_blocks or 4096,
            block_size=config.block_size,
            max_sequences=config.max_sequences,
            max_step_tokens=config.max_step_tokens or 8192,
            step_time_s=config.fake_step_s,
            next_token=prefix_hash_token if config.fake_tokens == "hash" else position_token,
        )
    # Read when torch is loaded. Threads that wait spin for a third of a millisecond, not for five: the scheduler and
    # gRPC share the cores with them. And torch's own memory lies in huge pages.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from executor.devices import device_of
    from executor.gpu.triton_case import why_not

    device = device_of(config.device)
    settings: dict[str, Any] = {
        "model_folder": model.path,
        "name": name,
        "dtype": config.dtype,
        "device": str(device),
        "attention_backend": config.attention,
        "weights": config.weights,
        "kv_cache_dtype": config.kv_cache_dtype,
        "num_blocks": config.num_blocks or None,
        "kv_cache_bytes": config.kv_cache_bytes or None,
        "block_size": config.block_size,
        "max_sequences": config.max_sequences,
        "max_step_tokens": config.max_step_tokens or None,
        "max_model_len": config.max_model_len or None,
    }
    if device.type != "cpu" and config.speculate != "none":
        raise ModelFolderError(f"speculation is for CPUs so far, not for {device.type}. Type: --speculate none")
    if device.type == "cuda":
        reason = why_not(device)
        if reason is None:
            from executor.gpu.runner import GpuRunner

            return GpuRunner(**settings, cuda_graphs=config.cuda_graphs)
        log.warning("the GPU is used by plain torch, one step at a time: %s", reason)
    from executor.model_runner import ModelRunner

    return ModelRunner(
        **settings,
        num_threads=config.threads or usable_cores(),
        speculate=config.speculate,
        draft_model=draft_model,
        max_drafts=config.max_drafts,
        step_overhead_tokens=config.step_overhead_tokens,
    )
