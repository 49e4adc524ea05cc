"""/metrics, read as Prometheus reads it, and served without a gateway."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from common.config import SchedulerConfig
from protos import inference_pb2
from protos import monitoring_pb2 as pb
from scheduler.timeline import Timeline
from services import metrics_server
from services.histogram import FIRST_TOKEN_S, TOKEN_S, Histogram
from services.latencies import Latencies
from services.lifecycle import StartupError, check_binds
from services.metrics_server import MetricsServer
from services.prometheus import of_status
from tests.services.served import HANG_S

VLLM = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:lora_requests_info",
}


def ended(*, first_token_s: float, token_s: float, tokens: int) -> Timeline:
    """A request that waited for no time at all."""
    timeline = Timeline("x", 10**9)
    timeline.num_choices, timeline.num_output, timeline.admitted_ns = 1, tokens, 10**9
    timeline.first_token_ns = 10**9 + round(first_token_s * 1e9)
    timeline.last_token_ns = timeline.first_token_ns + round(token_s * 1e9) * (tokens - 1)
    timeline.ended_ns = timeline.last_token_ns
    return timeline


def status() -> pb.GetStatusResponse:
    latencies = Latencies()
    latencies.add(ended(first_token_s=0.03, token_s=0.02, tokens=11))
    latencies.add(ended(first_token_s=20.0, token_s=0.02, tokens=1))
    length = inference_pb2.FinishReason.Name(inference_pb2.FINISH_REASON_LENGTH)
    return pb.GetStatusResponse(
        scheduler=pb.SchedulerStatus(
            cpu_ns=123_456_789_012_345,
            num_waiting=3,
            output_tokens=12,
            finished_sequences={length: 2},
            refused_requests={"calls": 5},
            latencies=latencies.to_pb(),
        ),
        executors=[
            pb.ExecutorStatus(name='a"\\\n', num_blocks=64, num_free_blocks=16, block_size=16, compute_ns=1),
            pb.ExecutorStatus(name="b", num_blocks=64, num_free_blocks=64, block_size=16),
        ],
    )


def families(told: pb.GetStatusResponse | None) -> Mapping[str, Metric]:
    found = list(text_string_to_metric_families("\n".join(of_status(told)) + "\n"))
    assert len({metric.name for metric in found}) == len(found), "each is described once"
    return {metric.name: metric for metric in found}


def value(metrics: Mapping[str, Metric], name: str, **labels: str) -> float:
    (found,) = [s.value for m in metrics.values() for s in m.samples if s.name == name and s.labels == labels]
    return float(found)


def test_prometheus_own_parser_reads_every_metric_with_its_type_and_its_words() -> None:
    metrics = families(status())

    assert all(metric.documentation and metric.type in {"counter", "gauge", "histogram"} for metric in metrics.values())
    assert metrics.keys() >= VLLM
    assert {name for name in metrics if not name.startswith(("pagewire_", "vllm:"))} == set()
    assert value(metrics, "pagewire_waiting_sequences") == value(metrics, "vllm:num_requests_waiting") == 3
    assert value(metrics, "pagewire_refused_requests_total", limit="calls") == 5
    assert value(metrics, "pagewire_executor_free_blocks", executor="a") == 16
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.375
    assert value(metrics, "vllm:cache_config_info", block_size="16", num_gpu_blocks="128") == 1
    assert metrics["pagewire_output_tokens"].type == "counter"


def test_a_number_loses_no_digit() -> None:
    assert value(families(status()), "pagewire_cpu_seconds_total") == 123_456.789012345


def test_times_to_a_token_have_the_buckets_of_opentelemetry() -> None:
    metrics = families(status())

    for name, bounds in (("time_to_first_token_seconds", FIRST_TOKEN_S), ("time_per_output_token_seconds", TOKEN_S)):
        buckets = [s for s in metrics[f"pagewire_{name}"].samples if s.name.endswith("_bucket")]
        assert [float(s.labels["le"]) for s in buckets] == [*bounds, float("inf")]
    first = "pagewire_time_to_first_token_seconds"
    assert value(metrics, f"{first}_bucket", le="0.02") == 0
    assert value(metrics, f"{first}_bucket", le="0.04") == 1
    assert value(metrics, f"{first}_bucket", le="10.0") == 1
    assert value(metrics, f"{first}_bucket", le="+Inf") == value(metrics, f"{first}_count") == 2
    assert value(metrics, f"{first}_sum") == pytest.approx(20.03)
    assert value(metrics, "pagewire_time_per_output_token_seconds_bucket", le="0.025") == 1
    assert value(metrics, "pagewire_time_per_output_token_seconds_count") == 1, "one token alone says nothing"


def test_a_value_that_is_a_bound_is_in_the_bucket_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for seconds in (1.0, 1.5, 2.0, 2.1):
        histogram.add(seconds)

    assert histogram.counts == [1, 2, 1]


def test_of_a_scheduler_that_does_not_answer_that_is_told() -> None:
    assert value(families(None), "pagewire_up") == 0


# ---- without a gateway


def exchange(*requests: bytes, text: str = "pagewire_up 1\n") -> list[bytes]:
    """What the server answers to each, on connections of their own."""

    async def main() -> list[bytes]:
        async def told() -> str:
            return text

        server = MetricsServer(told)
        host, _, port = (await server.listen("127.0.0.1:0")).rpartition(":")
        answers = []
        for request in requests:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(request)
            if not request.endswith(b"\r\n\r\n"):
                writer.write_eof()
            answers.append(await reader.read())
            writer.close()
            await writer.wait_closed()
        await server.close()
        return answers

    return asyncio.run(main())


def test_a_scheduler_serves_its_metrics_and_nothing_else() -> None:
    answers = exchange(
        b"GET /metrics HTTP/1.1\r\nhost: localhost:9100\r\n\r\n",
        b"HEAD /metrics?name=a HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics",
        b"GET /" + b"x" * 9_000 + b" HTTP/1.1\r\n\r\n",
    )

    assert [answer.split()[1] for answer in answers] == [b"200", b"200", b"404", b"405", b"400", b"400"]
    head, _, body = answers[0].partition(b"\r\n\r\n")
    assert body == b"pagewire_up 1\n" and b"content-length: 14" in head and b"version=0.0.4" in head
    assert answers[1].endswith(b"\r\n\r\n")


@pytest.mark.parametrize("host", [b"127.0.0.1:9100", b"[::1]:9100", b"LOCALHOST.", b"pagewire.localhost"])
def test_it_is_called_by_names_that_mean_this_machine_for_everybody(host: bytes) -> None:
    (answer,) = exchange(b"GET /metrics HTTP/1.1\r\nuser-agent: p\r\nHost:\t" + host + b" \r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("host", [b"rebind.example:9100", b"", b"localhost\r\nhost: rebind.example", b"10.0.0.1"])
def test_a_page_whose_name_was_made_to_mean_this_machine_reads_nothing(host: bytes) -> None:
    (answer,) = exchange(b"GET /metrics HTTP/1.1\r\nhost: " + host + b"\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 403 ") and b"pagewire_up" not in answer


def test_a_reader_who_takes_nothing_keeps_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "_PATIENCE_S", 0.05)

    async def main() -> None:
        async def told() -> str:
            return "x" * 20_000_000

        server = MetricsServer(told)
        host, _, port = (await server.listen("127.0.0.1:0")).rpartition(":")
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            async with asyncio.timeout(HANG_S):
                while len(asyncio.all_tasks()) < 2:
                    await asyncio.sleep(0)
                while len(asyncio.all_tasks()) > 1:
                    await asyncio.sleep(0.001)
        await server.close()

    asyncio.run(main())


@pytest.mark.parametrize("address", ["0.0.0.0:9100", "[::]:9100", "10.0.0.1:9100"])
def test_metrics_that_other_machines_could_read_are_refused_unless_they_are_trusted(address: str) -> None:
    with pytest.raises(StartupError, match="--metrics-listen"):
        check_binds(SchedulerConfig(metrics_listen=address))
    check_binds(SchedulerConfig(metrics_listen=address, insecure=True))
    check_binds(SchedulerConfig(metrics_listen="127.0.0.1:9100"))
