"""What a supervisor's probes are told: by a scheduler on a port of their own, by an executor with a file."""

from __future__ import annotations

import signal
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2 as pb

from services.health import LIVENESS
from services.lifecycle import ReadyFile
from tests.certificates import Authority
from tests.e2e.cluster import Cluster
from tests.e2e.gateways import Gateway
from tests.e2e.health_watch import NOT_SERVING, SERVING, HealthWatch
from tests.e2e.programs import PAGEWIRE, run


def probe(address: str, service: str = "") -> str:
    """As a kubelet's gRPC probe asks: without TLS."""
    with grpc.insecure_channel(address) as channel:
        check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
        answer = check(pb.HealthCheckRequest(service=service).SerializeToString(), timeout=120)
    return pb.HealthCheckResponse.ServingStatus.Name(pb.HealthCheckResponse.FromString(answer).status)


def test_a_scheduler_with_tls_answers_probes_that_speak_none_and_nobody_else_there(
    fake_folder: Path, tmp_path: Path, authority: Authority
) -> None:
    pair = authority.issue("probed")
    flags = [f"--tls-cert={pair.cert}", f"--tls-key={pair.key}", "--health-listen=127.0.0.1:0"]
    running = Cluster(fake_folder, tmp_path, flags=flags)
    try:
        assert running.health != running.address
        assert (probe(running.health), probe(running.health, LIVENESS)) == (NOT_SERVING, SERVING)
        joined = tmp_path / "joined"
        executor = running.start_executor(f"--ready-file={joined}", "--fake-step-s=0.02")
        with HealthWatch(running.health) as health:
            health.wait_for(SERVING)
            assert joined.exists()
            executor.signal(signal.SIGTERM)
            assert executor.wait() == 0
            assert not joined.exists()
            health.wait_for(NOT_SERVING)
        assert probe(running.health, LIVENESS) == SERVING

        with grpc.insecure_channel(running.health) as channel:
            method = "/pagewire.v1.InferenceService/GetModel"
            ask: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
            with pytest.raises(grpc.RpcError) as refused:
                ask(b"", timeout=120)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        running.close()


def test_what_a_killed_process_left_behind_speaks_for_no_other(tmp_path: Path) -> None:
    path = tmp_path / "ready"
    path.touch()

    file = ReadyFile(str(path))
    assert not path.exists()
    file.make()
    assert path.exists()
    file.remove()
    file.remove()
    assert not path.exists()


def test_it_is_gone_before_anything_that_takes_long(tmp_path: Path) -> None:
    path = tmp_path / "ready"
    path.touch()
    ended = run(*PAGEWIRE, "executor", "--model", str(tmp_path / "none"), f"--ready-file={path}")

    assert ended.code == 78 and not path.exists()


def test_a_file_that_cannot_be_made_is_told_at_the_start(fake_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "missing" / "joined"
    ended = run(*PAGEWIRE, "executor", "--fake", "--model", str(fake_folder), f"--ready-file={file}")

    assert ended.code == 1 and f"--ready-file {file}: its folder must be there, and writable" in ended.err


def test_a_gateway_is_alive_while_no_scheduler_is_there(tmp_path: Path) -> None:
    with Gateway("127.0.0.1:1", tmp_path / "log") as gateway:
        assert [gateway.get(path).status for path in ("/live", "/ready", "/health")] == [200, 200, 503]
