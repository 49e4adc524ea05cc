"""`scheduler --vllm-api` in processes of its own, with the stubs that SMG's people publish."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from tests.e2e.cluster import ROOT, Cluster, cluster
from tests.e2e.programs import run

SERVICE = "vllm.grpc.engine.VllmEngine"


@pytest.fixture(scope="module")
def running(fake_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(fake_folder, tmp_path_factory.mktemp("vllm"), executors=0, flags=["--vllm-api"]) as running:
        running.start_executor("--fake-tokens=hash")
        yield running


@pytest.fixture(scope="module")
def stub(running: Cluster) -> Any:
    return vllm_engine_pb2_grpc.VllmEngineStub(running.channel)


def asked(prompt: list[int], **sampling: Any) -> vllm.GenerateRequest:
    return vllm.GenerateRequest(
        tokenized=vllm.TokenizedInput(input_ids=prompt),
        sampling_params=vllm.SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **sampling}),
    )


def test_an_answer_has_the_tokens_of_our_own_api(running: Cluster, stub: Any) -> None:
    (greedy,) = stub.Generate(asked([1, 2, 3], max_tokens=20))
    (sampled,) = stub.Generate(asked([1, 2, 3], max_tokens=20, temperature=1.0, seed=7))

    assert list(greedy.complete.output_ids) == running.tokens([1, 2, 3], 20)
    assert list(sampled.complete.output_ids) == running.tokens([1, 2, 3], 20, temperature=1.0, seed=7)


def test_its_health_is_the_scheduler_s_and_reflection_tells_of_it(running: Cluster) -> None:
    asked = health_pb2.HealthCheckRequest(service=SERVICE)
    health: Any = health_pb2_grpc.HealthStub(running.channel)
    assert health.Check(asked).status == health_pb2.HealthCheckResponse.SERVING

    buf = str(Path(sys.executable).with_name("buf"))
    curl = (buf, "curl", "--http2-prior-knowledge", "--protocol", "grpc")
    told = run(*curl, "-d", "{}", f"http://{running.address}/{SERVICE}/GetModelInfo")
    assert '"isGeneration":true' in told.out.replace(" ", ""), told.err


def stored(batch: common.KvEventBatch) -> set[int]:
    return {block.block_hash for event in batch.events for block in event.stored.blocks}


def test_a_router_hears_of_blocks_and_that_they_died_with_their_executor(running: Cluster, stub: Any) -> None:
    events = stub.SubscribeKvEvents(common.SubscribeKvEventsRequest())
    first = next(events)
    assert first.events[0].HasField("cleared")
    known = stored(first)
    for number in range(100, 108):
        list(stub.Generate(asked([number] * 33, max_tokens=1)))
    while len(known) < 16 + len(stored(first)):
        known |= stored(next(events))
    running.executors[-1].popen.kill()
    gone = next(each for batch in events for each in batch.events if each.HasField("removed"))
    assert set(gone.removed.block_hashes) == known
    events.cancel()
    running.start_executor("--fake-tokens=hash")  # for the tests behind this one


def test_without_the_package_it_says_what_to_type(fake_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "smg_grpc_proto").mkdir()
    (tmp_path / "smg_grpc_proto" / "__init__.py").write_text("raise ModuleNotFoundError('smg_grpc_proto')")
    start = (
        "import sys, runpy; sys.path.insert(0, sys.argv.pop(1)); sys.argv[0] = 'services';"
        " runpy.run_module('services', run_name='__main__')"
    )
    scheduler = ("scheduler", "--model", str(fake_folder), "--vllm-api", "--listen=127.0.0.1:0")
    sockets = (f"--link-listen=unix:{tmp_path}/link", "--admin-listen=none", f"--ticket-keys={tmp_path}/keys")
    ended = run(sys.executable, "-c", start, str(tmp_path), *scheduler, *sockets, folder=ROOT)

    assert ended.code != 0 and "Traceback" not in ended.err
    assert "pip install 'smg-grpc-proto" in ended.err
