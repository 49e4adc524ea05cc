"""What an operator sees of real processes: one request explained, its line in the log, metrics without a gateway."""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos import inference_pb2 as pb
from tests.e2e.cluster import Cluster
from tests.e2e.gateways import Gateway
from tests.e2e.programs import PAGEWIRE, run

TRACE = "3" * 32


@pytest.fixture
def watched(fake_folder: Path, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of its own that logs in JSON, and has /metrics."""
    cluster = Cluster(
        fake_folder, tmp_path, flags=["--log-format=json", "--metrics-listen=127.0.0.1:0", "--max-timelines=5"]
    )
    try:
        cluster.start_executor("--log-format=json")
        yield cluster
    finally:
        cluster.close()


def test_one_request_is_explained_logged_and_counted(watched: Cluster) -> None:
    request = pb.GenerateRequest(
        text="x" * 40, request_id="mine", stopping=pb.StopConditions(max_tokens=6, ignore_eos=True)
    )
    watched.stub.Generate(request, metadata=(("traceparent", f"00-{TRACE}-{'4' * 16}-01"),))
    with Gateway(watched.address, watched.folder / "gateway.log", "--log-format=json") as gateway:
        body = {"prompt": "x" * 40, "max_tokens": 2, "request_id": "by-http"}
        assert gateway.post("/v1/completions", body, {"traceparent": f"00-{'5' * 32}-{'6' * 16}-00"}).status == 200

    told = run(*PAGEWIRE, "explain", watched.admin, "mine")
    assert (told.code, told.err) == (0, "")
    head, *lines = told.out.splitlines()
    assert head.startswith("mine: received ") and head.endswith(f", trace {TRACE}")
    assert [line.split(" ms  ")[1].partition(" in step")[0] for line in lines] == [
        "received: 40 tokens of prompt",
        "admitted by executor-0",
        "computes 40 tokens from position 0 on,",
        "first token",
        "finished: length, 6 tokens",
    ]
    unknown = run(*PAGEWIRE, "explain", watched.admin, "nobody")
    assert unknown.code == 1 and "the last 5 that ended" in unknown.err and "--max-timelines" in unknown.err

    connection = http.client.HTTPConnection(watched.announced["metrics"], timeout=120)
    connection.request("GET", "/metrics")
    with connection.getresponse() as response:
        found = {m.name: m for m in text_string_to_metric_families(response.read().decode())}
    connection.close()
    assert found["pagewire_output_tokens"].samples[0].value == 8
    assert next(s.value for s in found["pagewire_request_duration_seconds"].samples if s.name.endswith("_count")) == 2

    watched.scheduler.signal(signal.SIGTERM)
    assert watched.scheduler.wait() == 0
    logged = [json.loads(line) for line in watched.scheduler.log.read_text().splitlines()]
    ends = [line for line in logged if "total_ms" in line]
    assert [(line["request_id"], line["trace_id"], line["output_tokens"]) for line in ends] == [
        ("mine", TRACE, 6),
        ("by-http", "5" * 32, 2),
    ]
    assert all(line["queue_ms"] + line["prefill_ms"] + line["decode_ms"] <= line["total_ms"] + 0.01 for line in ends)
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in logged)
