"""Prometheus' text format: what a scheduler tells its operator, under our names.

Five values also have the names that the Kubernetes gateway for inference reads of vLLM (Gateway API Inference
Extension: its endpoint picker routes by them). No label can hold a caller's words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Final

from protos import monitoring_pb2 as pb

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def of_status(status: pb.GetStatusResponse | None) -> list[str]:
    """All lines that tell of a scheduler; of one that does not answer, that."""
    up = metric("pagewire_up", "gauge", "whether the scheduler answers", {"": int(status is not None)})
    if status is None:
        return list(up)
    return [*up, *of_scheduler(status.scheduler), *of_executors(status.executors), *as_vllm(status)]


def of_scheduler(s: pb.SchedulerStatus) -> list[str]:
    """What the scheduler did and holds."""
    losses = s.executor_losses
    finished = {f'{{reason="{word(reason)}"}}': count for reason, count in s.finished_sequences.items()}
    refused = {f'{{limit="{word(limit)}"}}': count for limit, count in s.refused_requests.items()}
    values: Sequence[tuple[str, str, str, Mapping[str, float]]] = (
        ("uptime_seconds", "gauge", "since it became ready", {"": s.uptime_ns / 1e9}),
        ("cpu_seconds_total", "counter", "CPU time of the scheduler's process", {"": s.cpu_ns / 1e9}),
        ("running_sequences", "gauge", "sequences that an executor holds", {"": s.num_running}),
        ("waiting_sequences", "gauge", "sequences that none holds", {"": s.num_waiting}),
        ("waiting_tokens", "gauge", "what those that wait are expected to take", {"": s.waiting_tokens}),
        ("steps_total", "counter", "plans made", {"": s.steps}),
        ("prompt_tokens_total", "counter", "tokens of prompts", {"": s.prompt_tokens}),
        ("cached_prompt_tokens_total", "counter", "of those, found in a prefix cache", {"": s.cached_prompt_tokens}),
        ("output_tokens_total", "counter", "tokens of answers", {"": s.output_tokens}),
        ("drafted_tokens_total", "counter", "tokens that were guessed ahead", {"": s.drafted_tokens}),
        ("accepted_tokens_total", "counter", "of those, the ones that were right", {"": s.accepted_tokens}),
        ("pinned_tokens", "gauge", "tokens of prompts that stay in the prefix cache", {"": s.pins.tokens}),
        ("preemptions_total", "counter", "sequences that gave their memory back", {"": s.preemptions}),
        ("moved_sequences_total", "counter", "sequences that lost their executor", {"": s.moved_sequences}),
        ("dropped_rows_total", "counter", "rows of results that came too late", {"": s.dropped_rows}),
        ("finished_sequences_total", "counter", "by why they ended", finished),
        ("refused_requests_total", "counter", "by the limit that they met", refused),
        ("line_tokens_per_second", "gauge", "how fast the line moves; 0 while unknown", {"": s.line_tokens_per_s}),
        ("unclean_session_ends_total", "counter", "executors that were lost", {"": losses.unclean_ends}),
        ("suspected_requests_total", "counter", "in a step that one may have died of", {"": losses.suspected_requests}),
        ("trials_total", "counter", "of such requests alone on an executor", {"": losses.trials}),
        ("given_up_requests_total", "counter", "executors died of them", {"": losses.given_up_requests}),
        ("unusable_rows_total", "counter", "rows of results that are impossible", {"": losses.unusable_rows}),
        ("quarantines_total", "counter", "executors that were kept from new work for that", {"": losses.quarantines}),
        ("fenced_results_total", "counter", "results of sessions that were over", {"": losses.fenced_results}),
        ("suspects", "gauge", "requests under suspicion", {"": losses.num_suspects}),
        ("quarantined_executors", "gauge", "executors in quarantine", {"": losses.num_quarantined}),
    )
    lines = [line for name, kind, text, found in values for line in metric(f"pagewire_{name}", kind, text, found)]
    return [*lines, *of_latencies(s.latencies)] if s.HasField("latencies") else lines


def of_executors(executors: Sequence[pb.ExecutorStatus]) -> list[str]:
    """What each executor did and holds."""

    def of_each(read: Callable[[pb.ExecutorStatus], float]) -> Mapping[str, float]:
        return {f'{{executor="{word(e.name)}"}}': read(e) for e in executors}

    values: Sequence[tuple[str, str, str, Callable[[pb.ExecutorStatus], float]]] = (
        ("running_sequences", "gauge", "sequences it holds", lambda e: e.num_running),
        ("steps_in_flight", "gauge", "plans that are not answered yet", lambda e: e.steps_in_flight),
        ("blocks", "gauge", "blocks of its KV cache", lambda e: e.num_blocks),
        ("free_blocks", "gauge", "of those, free; what they hold may still be found", lambda e: e.num_free_blocks),
        ("steps_total", "counter", "plans answered", lambda e: e.steps),
        ("compute_seconds_total", "counter", "in these steps, by its own clock", lambda e: e.compute_ns / 1e9),
        ("idle_seconds_total", "counter", "between these steps, while it had work", lambda e: e.idle_ns / 1e9),
        ("leaving", "gauge", "takes nothing new", lambda e: e.leaving),
        ("silent", "gauge", "nothing was heard of it for a while", lambda e: e.silent),
        ("quarantined", "gauge", "sent too many unusable rows", lambda e: e.quarantined),
        ("held_back", "gauge", "died young too often", lambda e: e.held_back),
    )
    return [
        *metric("pagewire_executors", "gauge", "executors that are joined", {"": len(executors)}),
        *(
            line
            for name, kind, text, read in values
            for line in metric(f"pagewire_executor_{name}", kind, text, of_each(read))
        ),
    ]


def as_vllm(status: pb.GetStatusResponse) -> list[str]:
    """What the Kubernetes gateway for inference reads. Adapters are not served, so there is no information on them."""
    blocks = sum(e.num_blocks for e in status.executors)
    free = sum(e.num_free_blocks for e in status.executors)
    usage = 1 - free / blocks if blocks else 0.0
    size = status.executors[0].block_size if status.executors else 0
    config = f'{{block_size="{size}",num_gpu_blocks="{blocks}"}}'
    adapters = '{max_lora="0",running_lora_adapters="",waiting_lora_adapters=""}'
    return [
        *metric("vllm:num_requests_running", "gauge", "pagewire_running_sequences", {"": status.scheduler.num_running}),
        *metric("vllm:num_requests_waiting", "gauge", "pagewire_waiting_sequences", {"": status.scheduler.num_waiting}),
        *metric("vllm:kv_cache_usage_perc", "gauge", "share of the KV blocks that are held", {"": usage}),
        *metric("vllm:cache_config_info", "gauge", "the KV cache of all executors", {config: 1}),
        *metric("vllm:lora_requests_info", "gauge", "adapters, of which there are none", {adapters: 0}),
    ]


def of_latencies(latencies: pb.Latencies) -> list[str]:
    """How long the requests took that have ended."""
    values = (
        ("queue_seconds", "from a request's arrival until an executor took it", latencies.queue),
        ("time_to_first_token_seconds", "from a request's arrival", latencies.time_to_first_token),
        ("time_per_output_token_seconds", "behind the first, the mean of a request", latencies.time_per_output_token),
        ("request_duration_seconds", "from a request's arrival to its end", latencies.request_duration),
    )
    return [line for name, text, each in values for line in histogram(f"pagewire_{name}", text, each)]


def histogram(name: str, text: str, told: pb.Histogram) -> Iterator[str]:
    """The lines of a histogram."""
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} histogram"
    counts = list(accumulate(told.counts))
    for bound, count in zip((*map(str, told.bounds_s), "+Inf"), counts, strict=True):
        yield f'{name}_bucket{{le="{bound}"}} {count}'
    yield f"{name}_sum {told.sum_s!r}"
    yield f"{name}_count {counts[-1]}"


def metric(name: str, kind: str, text: str, values: Mapping[str, float]) -> Iterator[str]:
    """The lines of one metric; `values` by their labels."""
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values.items():
        yield f"{name}{labels} {int(value) if isinstance(value, int) else float(value)!r}"


def word(text: str) -> str:
    """A label's value: what a label cannot hold is left out."""
    return "".join(character for character in text if character.isprintable() and character not in '"\\')
