"""The live view over real processes: the stream, the gateway's events, and `pagewire top`."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import grpc
import pytest

from protos import monitoring_pb2 as pb
from protos import monitoring_pb2_grpc
from tests.e2e.cluster import Cluster
from tests.e2e.gateways import Gateway
from tests.e2e.programs import PAGEWIRE, Terminal, run


@pytest.fixture(scope="module")
def gateway(shared: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Gateway(shared.address, tmp_path_factory.mktemp("gateway") / "log", f"--http-admin={shared.admin}") as running:
        yield running


def test_the_operators_socket_streams_whole_pictures_and_refuses_a_bad_interval(shared: Cluster) -> None:
    with grpc.insecure_channel(shared.admin) as channel:
        stub = monitoring_pb2_grpc.MonitoringServiceStub(channel)
        states = stub.WatchState(pb.WatchStateRequest(interval_ms=100), timeout=60)
        for _ in range(3):
            (executor,) = next(states).executors
            assert executor.status.name == "executor-0"
            assert len(executor.cells) == min(executor.status.num_blocks, 4096)
        states.cancel()

        with pytest.raises(grpc.RpcError) as refused:
            next(stub.WatchState(pb.WatchStateRequest(interval_ms=99), timeout=60))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "interval_ms" in (refused.value.details() or "")


def test_the_gateway_tells_the_same_as_events(gateway: Gateway, shared: Cluster) -> None:
    shared.tokens([1, 2, 3], 4)
    with gateway.get("/live/state?interval_ms=100") as reply:
        assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        states = reply.events()
        first, second = next(states).data, next(states).data

    assert first["output_tokens"] == second["output_tokens"] >= 4
    assert first["uptime_s"] < second["uptime_s"]
    (executor,) = second["executors"]
    assert len(base64.b64decode(executor["cells"])) * executor["blocks_per_cell"] >= executor["blocks"]


def test_a_bad_interval_is_refused_at_the_gateway_too(gateway: Gateway) -> None:
    assert gateway.get("/live/state?interval_ms=7").error()["param"] == "interval_ms"


def test_top_prints_a_line_in_each_interval_where_it_has_no_terminal(shared: Cluster) -> None:
    ended = run(*PAGEWIRE, "top", shared.admin, "--interval-s=0.1", "--pictures=2")

    assert (ended.code, ended.err) == (0, "")
    first, second = ended.out.splitlines()
    for line in (first, second):
        assert "tokens/s, first token" in line and "blocks free" in line


def test_q_ends_top(shared: Cluster) -> None:
    with Terminal(*PAGEWIRE, "top", shared.admin, "--interval-s=0.1") as terminal:
        terminal.read_until("blocks free")
        terminal.type("q")
        ended = terminal.end()

    assert ended.code == 0
    assert "Traceback" not in ended.out


def test_top_draws_on_a_terminal_that_can_and_leaves_it_as_it_was(shared: Cluster) -> None:
    able = ("env", "TERM=xterm-256color", "COLUMNS=100", "LINES=30")
    with Terminal(*able, *PAGEWIRE, "top", shared.admin, "--interval-s=0.1") as terminal:
        terminal.read_until("\x1b[?1049h")  # another screen than the one before
        terminal.read_until("executor-0")
        terminal.read_until("nobody waits")
        terminal.type("\x1b[A")  # an arrow ends nothing
        terminal.read_until("nobody waits")
        terminal.type("q")
        ended = terminal.end()

    assert ended.code == 0
    assert "\x1b[?1049l" in ended.out


def test_top_says_what_is_wrong_in_one_line() -> None:
    ended = run(*PAGEWIRE, "top", "unix:/nowhere/admin")
    assert ended.code == 1
    assert ended.err.startswith("error: no connection to unix:/nowhere/admin: ") and ended.err.count("\n") == 1

    ended = run(*PAGEWIRE, "top", "unix:/nowhere/admin", "--interval-s=0")
    assert (ended.code, ended.err) == (1, "error: --interval-s: must be in [0.1, 10], got 0\n")
