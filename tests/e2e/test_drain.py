"""SIGTERM: what runs may finish, what cannot is told where it stands, and the process ends well."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from protos import inference_pb2 as pb
from services import lifecycle
from services.failpoints import VARIABLE
from tests.e2e.cluster import Cluster, Process, until_error, until_logged
from tests.e2e.health_watch import NOT_SERVING, SERVING, HealthWatch

FAR_OFF_S = 3600  # a grace that nobody waits for
SLOW = "--fake-step-s=0.02"
PROMPT = [1, 2, 3]


def running(model: Path, folder: Path, *flags: str) -> Cluster:
    folder.mkdir(exist_ok=True)
    return Cluster(model, folder, flags=["--log-format=json", *flags])


@pytest.fixture
def patient(fake_folder: Path, tmp_path: Path) -> Iterator[Cluster]:
    """A scheduler that would wait for ever, two sequences at a time."""
    cluster = running(fake_folder, tmp_path, f"--drain-s={FAR_OFF_S}", "--max-running=2")
    try:
        yield cluster
    finally:
        cluster.close()


def request(max_tokens: int) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.SamplingParams(temperature=0, seed=1),
        stopping=pb.StopConditions(max_tokens=max_tokens, ignore_eos=True),
        request_id="asked-once",
    )


Messages = Iterator[pb.GenerateStreamResponse]


def stream(cluster: Cluster, max_tokens: int) -> Messages:
    return iter(cluster.stub.GenerateStream(request(max_tokens), timeout=120))


def begun(cluster: Cluster, max_tokens: int) -> Messages:
    """A stream that has its first token."""
    messages = stream(cluster, max_tokens)
    next(messages)
    next(messages)
    return messages


def reason(messages: Messages) -> str:
    """How the stream ends well."""
    *_, last = messages
    return pb.FinishReason.Name(last.finish.reason)


def moved(messages: Messages) -> tuple[list[pb.Delta], float]:
    """What is still told of a stream that must go elsewhere, and the seconds after which it may."""
    heard, error = until_error(messages)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert not any(message.HasField("finish") for message in heard)
    trailers = dict(cast("list[tuple[str, bytes]]", error.trailing_metadata()))
    told = error_details_pb2.RetryInfo()
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert any(detail.Unpack(told) for detail in status.details)
    after_ms = int(trailers["grpc-retry-pushback-ms"])
    assert told.retry_delay.ToMilliseconds() == after_ms > 0
    return [message.delta for message in heard if message.HasField("delta")], after_ms / 1000


# ---- a scheduler


def test_what_runs_and_what_waits_finishes_while_health_says_no_and_nothing_new_is_taken(patient: Cluster) -> None:
    patient.start_executor(SLOW)
    with HealthWatch(patient.address, once=SERVING) as health:
        assert health.heard == [SERVING]
        last = patient.stub.GenerateStream(request(500), timeout=120)  # until it is left, the drain cannot be over
        assert next(last).HasField("prompt")
        running, waiting = begun(patient, 60), stream(patient, 5)
        assert next(waiting).HasField("prompt"), "it waits: there is room for two"
        patient.scheduler.signal(signal.SIGTERM)
        health.wait_for(NOT_SERVING)
        assert patient.scheduler.popen.poll() is None
        moved(stream(patient, 3))
        assert (reason(running), reason(waiting)) == ("FINISH_REASON_LENGTH", "FINISH_REASON_LENGTH")
        last.cancel()
        assert patient.scheduler.wait() == 0
        assert health.to_the_end() == [SERVING, NOT_SERVING]


def test_a_stream_that_is_longer_than_the_grace_is_told_so_and_goes_on_with_its_ticket(
    fake_folder: Path, tmp_path: Path
) -> None:
    first = running(fake_folder, tmp_path, "--drain-s=1.5")
    keys = f"--ticket-keys={tmp_path / 'ticket-keys'}"
    second = running(fake_folder, tmp_path / "second", keys)
    try:
        first.start_executor("--fake-step-s=0.05")
        messages = stream(first, 200)
        next(messages)
        told = [next(messages).delta]
        first.scheduler.signal(signal.SIGTERM)
        deltas, after_s = moved(messages)
        assert 0 < after_s <= 5
        assert first.scheduler.wait() == 0
        last = (told + deltas)[-1]
        num_told = last.index + len(last.token_ids)
        assert deltas and num_told < 200, "it got its grace, and no more"

        second.start_executor()
        tokens = list(range(3, 3 + num_told))  # the fake model counts
        point = pb.ResumePoint(choice=0, ticket=last.ticket, token_ids=tokens)
        rest = second.stub.Resume(pb.ResumeRequest(request=request(200), choices=[point]), timeout=60)
        for message in rest:
            tokens += message.delta.token_ids
        assert tokens == list(range(3, 203))
    finally:
        first.close()
        second.close()


def test_without_an_executor_there_is_nothing_to_wait_for(patient: Cluster) -> None:
    patient.scheduler.signal(signal.SIGTERM)
    assert patient.scheduler.wait() == 0


def test_what_no_executor_can_run_goes_elsewhere_and_holds_nobody_up(patient: Cluster) -> None:
    waiting = stream(patient, 5)
    assert next(waiting).HasField("prompt")
    patient.scheduler.signal(signal.SIGTERM)
    deltas, _ = moved(waiting)
    assert not deltas
    assert patient.scheduler.wait() == 0


def test_a_second_signal_ends_it_at_once_but_an_echo_does_not(patient: Cluster) -> None:
    patient.start_executor(SLOW)
    with HealthWatch(patient.address, once=SERVING) as health:
        messages = begun(patient, 500)
        patient.scheduler.signal(signal.SIGTERM)
        patient.scheduler.signal(signal.SIGTERM)  # as one who stops a whole service sends it
        health.wait_for(NOT_SERVING)
        for _ in range(10):
            assert next(messages).HasField("delta")
        until_s = time.monotonic() + lifecycle._ECHO_S
        while time.monotonic() < until_s:
            assert next(messages).HasField("delta")
        patient.scheduler.signal(signal.SIGTERM)
        assert patient.scheduler.wait() == 128 + signal.SIGTERM


def test_a_second_ctrl_c_is_never_an_echo(patient: Cluster) -> None:
    patient.start_executor(SLOW)
    with HealthWatch(patient.address, once=SERVING) as health:
        begun(patient, 500)
        patient.scheduler.signal(signal.SIGINT)
        health.wait_for(NOT_SERVING)
        patient.scheduler.signal(signal.SIGINT)
        assert patient.scheduler.wait() == 128 + signal.SIGINT


def test_a_scheduler_that_starts_ends_of_a_signal_whenever_it_comes(fake_folder: Path, tmp_path: Path) -> None:
    flags = ["--model", str(fake_folder), "--listen=127.0.0.1:0", f"--link-listen=unix:{tmp_path}/link"]
    process = Process(["scheduler", *flags, f"--admin-listen=unix:{tmp_path}/admin"], tmp_path / "log")
    try:
        process.signal(signal.SIGTERM)
        # of the signal itself, before it listens for any, and in good order from then on
        assert process.wait() in (-signal.SIGTERM, 0)
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        process.close()


# ---- an executor


def test_an_executor_finishes_what_it_has_and_health_says_that_nobody_is_left(
    fake_folder: Path, tmp_path: Path
) -> None:
    cluster = running(fake_folder, tmp_path)
    try:
        executor = cluster.start_executor(SLOW, f"--drain-s={FAR_OFF_S}")
        with HealthWatch(cluster.address, once=SERVING) as health:
            messages = begun(cluster, 60)
            executor.signal(signal.SIGTERM)
            health.wait_for(NOT_SERVING)
            waiting = stream(cluster, 5)
            assert next(waiting).HasField("prompt")
            assert reason(messages) == "FINISH_REASON_LENGTH"
            assert executor.wait() == 0
            cluster.start_executor()
            health.wait_for(SERVING)
            assert reason(waiting) == "FINISH_REASON_LENGTH"
        counters = cluster.counters()
        assert (counters["moved"], counters["unclean_ends"]) == (0, 0)
    finally:
        cluster.close()


def test_what_an_executor_cannot_finish_in_its_grace_moves_and_is_not_suspected(
    fake_folder: Path, tmp_path: Path
) -> None:
    cluster = running(fake_folder, tmp_path)
    try:
        executor = cluster.start_executor("--fake-step-s=0.25", "--drain-s=0.3")  # alone it would take 100 s
        with HealthWatch(cluster.address, once=SERVING) as health:
            messages = begun(cluster, 400)
            cluster.start_executor()
            executor.signal(signal.SIGTERM)
            assert reason(messages) == "FINISH_REASON_LENGTH"
            assert executor.wait() == 0
            assert health.heard == [SERVING], "the other one was there all the time"
        counters = cluster.counters()
        assert (counters["moved"], counters["unclean_ends"], counters["suspected"]) == (1, 0, 0)
    finally:
        cluster.close()


def test_an_executor_that_loads_ends_at_once(fake_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = {VARIABLE: f"mid_load=sleep:{FAR_OFF_S}"}
    flags = ["--model", str(fake_folder), "--scheduler", f"unix:{tmp_path}/nobody", "--fake"]
    process = Process(["executor", *flags], log, environment)
    try:
        until_logged(log, "failpoint mid_load: sleep", process)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
    finally:
        process.close()


def test_an_executor_that_dials_nobody_ends_at_once(fake_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    flags = ["--model", str(fake_folder), "--scheduler", f"unix:{tmp_path}/nobody", "--fake"]
    process = Process(["executor", *flags], log)
    try:
        until_logged(log, "no link to unix:", process)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
    finally:
        process.close()
