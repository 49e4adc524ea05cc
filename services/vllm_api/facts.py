"""What this server is and how busy it is, in the words of vllm.grpc.engine.

A tenant hears of its own requests; how full the executors are with those of others is no tenant's to know. Where no
keys are asked for there is one tenant, which hears of everything: that is what a router in front of schedulers needs.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime

from common.model_folder import ModelFolder
from common.types import Priority
from scheduler.scheduler import Scheduler
from services.vllm_api.stubs import vllm_pb2 as vllm


def model_info(model: ModelFolder, max_length: int) -> vllm.GetModelInfoResponse:
    """What is served. Reads a file. Where it lies here is nobody's to know: paths are the model's name."""
    config = json.loads((model.path / "config.json").read_bytes())
    return vllm.GetModelInfoResponse(
        model_path=model.name,
        is_generation=model.makes_text,
        max_context_length=max_length,
        vocab_size=model.vocab_size,
        served_model_name=model.name,
        tokenizer_path=model.name,
        model_type=str(config.get("model_type", "")),
        architectures=[model.architecture],
        eos_token_ids=model.eos_token_ids,
        bos_token_id=model.bos_token_id or 0,
        max_req_input_len=max_length - 1,
    )


class Loads:
    """Counts from the core, and rates since the last look at them."""

    def __init__(self, scheduler: Scheduler, *, clock_s: Callable[[], float] = time.time) -> None:
        self._scheduler = scheduler
        self._clock_s = clock_s
        self._began_s = clock_s()
        self._looked_s = self._began_s
        self._tokens_then = scheduler.counters.output_tokens
        self._tokens_per_s = 0.0

    def server_info(self, tenant: str) -> vllm.GetServerInfoResponse:
        """What does not change soon."""
        session = next(iter(self._scheduler.sessions), None)
        return vllm.GetServerInfoResponse(
            active_requests=self._num_running(tenant) + self._num_waiting(tenant),
            uptime_seconds=self._clock_s() - self._began_s,
            last_receive_timestamp=self._clock_s(),
            server_type="pagewire",
            data_parallel_size=1,
            block_size=session.block_size if session else 0,
            model_dtype=session.facts.dtype if session else "",
            max_num_seqs=sum(s.facts.max_sequences for s in self._scheduler.sessions),
        )

    def loads(self, tenant: str) -> vllm.GetLoadsResponse:
        """How busy it is."""
        running, waiting = self._num_running(tenant), self._num_waiting(tenant)
        load = vllm.SchedulerLoad(
            num_running_reqs=running, num_waiting_reqs=waiting, num_total_reqs=running + waiting
        )  # fmt: skip
        if not tenant:
            self._fill(load, running)
        return vllm.GetLoadsResponse(
            timestamp=datetime.fromtimestamp(self._clock_s(), UTC).isoformat(),
            version=_version(),
            dp_rank_count=1,
            loads=[load],
        )

    def _fill(self, load: vllm.SchedulerLoad, num_running: int) -> None:
        counters, sessions = self._scheduler.counters, self._scheduler.sessions
        load.max_total_num_tokens = sum(s.facts.num_blocks * s.block_size for s in sessions)
        load.num_used_tokens = sum((s.facts.num_blocks - s.pool.num_free) * s.block_size for s in sessions)
        load.num_waiting_uncached_tokens = self._scheduler.waiting.num_tokens
        load.max_running_requests = sum(s.facts.max_sequences for s in sessions)
        load.token_usage = load.num_used_tokens / load.max_total_num_tokens if load.max_total_num_tokens else 0.0
        load.utilization = num_running / load.max_running_requests if load.max_running_requests else 0.0
        load.cache_hit_rate = counters.cached_prompt_tokens / counters.prompt_tokens if counters.prompt_tokens else 0.0
        load.gen_throughput = self._throughput()

    def _throughput(self) -> float:
        """Tokens a second since the last look; two looks in one second are one."""
        now_s, tokens = self._clock_s(), self._scheduler.counters.output_tokens
        if now_s - self._looked_s >= 1.0:
            self._tokens_per_s = (tokens - self._tokens_then) / (now_s - self._looked_s)
            self._looked_s, self._tokens_then = now_s, tokens
        return self._tokens_per_s

    def _num_running(self, tenant: str) -> int:
        return sum(session.tenants[tenant] for session in self._scheduler.sessions)

    def _num_waiting(self, tenant: str) -> int:
        standing = self._scheduler.waiting.standing(tenant, Priority.NORMAL)
        return standing.own_waiting + standing.own_resumed


def _version() -> str:
    try:
        return importlib.metadata.version("pagewire")
    except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
        return ""
