"""The public API of real processes, with a model whose tokens can be computed by hand."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from common.errors import Overloaded, Unavailable
from protos import inference_pb2 as pb
from protos import monitoring_pb2, monitoring_pb2_grpc
from services.status import from_rpc_error
from tests.e2e import fake_model
from tests.e2e.cluster import Cluster, Process, cluster, until_logged


def request(prompt: list[int], max_tokens: int, *, n: int = 1) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParams(temperature=0.0, n=n),
        stopping=pb.StopConditions(max_tokens=max_tokens),
    )


def test_a_stream_is_prompt_info_then_deltas_then_finish(shared: Cluster) -> None:
    messages = list(shared.stub.GenerateStream(request([7] * 50, 5)))

    assert messages[0].prompt.prompt_tokens == 50
    assert messages[0].prompt.request_id
    deltas = [m.delta for m in messages[1:-1]]
    assert [t for d in deltas for t in d.token_ids] == [50, 51, 52, 53, 54]
    assert [d.index for d in deltas] == [sum(len(e.token_ids) for e in deltas[:i]) for i in range(len(deltas))]
    assert messages[-1].finish.reason == pb.FINISH_REASON_LENGTH
    usage = messages[-1].finish.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (50, 5)
    assert usage.prefill_ns > 0 and usage.decode_ns > 0


def test_the_unary_call_gives_what_the_stream_gives(shared: Cluster) -> None:
    answer = shared.stub.Generate(
        pb.GenerateRequest(
            text="hello",
            sampling=pb.SamplingParams(temperature=0, n=2),
            stopping=pb.StopConditions(max_tokens=40),
        )
    )
    assert len(answer.choices) == 2
    assert list(answer.choices[0].token_ids) == list(range(5, 45))
    whole = shared.stub.Detokenize(pb.DetokenizeRequest(token_ids=answer.choices[0].token_ids))
    assert answer.choices[0].text == whole.text


def test_every_choice_of_a_stream_finishes_once(shared: Cluster) -> None:
    messages = list(shared.stub.GenerateStream(request([7] * 9, 6, n=4)))
    finished = [m.finish.choice for m in messages if m.WhichOneof("event") == "finish"]
    assert sorted(finished) == [0, 1, 2, 3]


def test_eos_ends_the_text_and_is_named(shared: Cluster) -> None:
    messages = list(shared.stub.GenerateStream(request([1] * 315, 50)))
    finish = messages[-1].finish
    assert (finish.reason, finish.matched_token_id) == (pb.FINISH_REASON_EOS, 319)
    assert finish.usage.completion_tokens == 5


def test_a_stop_string_ends_the_text_before_it(shared: Cluster) -> None:
    asked = pb.GenerateRequest(
        text="A" * 60, sampling=pb.SamplingParams(temperature=0), stopping=pb.StopConditions(max_tokens=60)
    )
    whole = shared.stub.Generate(asked).choices[0]
    stop = whole.text[10:12]
    asked.stopping.stop.append(stop)
    choice = shared.stub.Generate(asked).choices[0]

    assert choice.text == whole.text[: whole.text.index(stop)]
    assert (choice.reason, choice.matched_stop) == (pb.FINISH_REASON_STOP_STRING, stop)


def test_tokenize_and_detokenize_are_each_others_inverse(shared: Cluster) -> None:
    text = "Zwölf Boxkämpfer 🥊 jagen\x00Viktor"
    ids = shared.stub.Tokenize(pb.TokenizeRequest(text=text)).token_ids
    assert shared.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids)).text == text


def test_a_chat_is_what_the_template_makes_of_it(shared: Cluster) -> None:
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
    ids = shared.stub.Tokenize(pb.TokenizeRequest(chat=chat)).token_ids
    assert shared.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids)).text == "<|user|>hi\n<|assistant|>"


def test_the_server_says_what_it_serves(shared: Cluster) -> None:
    model = shared.stub.GetModel(pb.GetModelRequest())
    assert (model.model, model.vocab_size, model.max_model_len, model.num_executors) == ("fake", 320, 512, 1)
    assert model.chat


def test_the_server_counts_what_it_does_and_how_long_its_executors_wait(shared: Cluster) -> None:
    with grpc.insecure_channel(shared.admin) as channel:
        monitoring = monitoring_pb2_grpc.MonitoringServiceStub(channel)
        before = monitoring.GetStatus(monitoring_pb2.GetStatusRequest())
        shared.tokens([1, 2, 3], 5)
        after = monitoring.GetStatus(monitoring_pb2.GetStatusRequest())

    assert after.scheduler.prompt_tokens - before.scheduler.prompt_tokens == 3
    assert after.scheduler.output_tokens - before.scheduler.output_tokens == 5
    assert after.scheduler.finished_sequences["FINISH_REASON_LENGTH"] > 0
    assert after.scheduler.cpu_ns > before.scheduler.cpu_ns
    assert after.scheduler.cpu_us_per_output_token > 0
    (was,), (executor,) = before.executors, after.executors
    assert (executor.name, executor.num_blocks, executor.num_running) == ("executor-0", 4096, 0)
    assert executor.steps - was.steps >= 5
    assert executor.compute_ns > was.compute_ns
    assert executor.idle_ns > was.idle_ns
    assert 0 < executor.idle_ratio < 1


def test_the_server_counts_what_waits_and_what_it_refused(fake_folder: Path, tmp_path: Path) -> None:
    flags = ["--max-waiting-tokens=100", "--max-running=1"]
    with cluster(fake_folder, tmp_path, executors=0, flags=flags) as running:
        running.start_executor("--fake-step-s=0.05")
        runs = running.stub.GenerateStream(request([1] * 30, 400))
        while next(runs).WhichOneof("event") != "delta":
            pass
        waits = running.stub.GenerateStream(request([1] * 30, 60))
        next(waits)
        with pytest.raises(grpc.RpcError) as failure:
            running.tokens([2] * 30, 60)
        with grpc.insecure_channel(running.admin) as channel:
            monitoring = monitoring_pb2_grpc.MonitoringServiceStub(channel)
            status = monitoring.GetStatus(monitoring_pb2.GetStatusRequest()).scheduler
        runs.cancel()
        waits.cancel()

        error = from_rpc_error(failure.value)
        assert isinstance(error, Overloaded) and "100 may wait in all (--max-waiting-tokens)" in str(error)
        assert 0 < error.retry_after_s <= 72
        assert (status.num_running, status.num_waiting, status.waiting_tokens) == (1, 1, 90)
        assert status.refused_requests == {"waiting_tokens": 1}


def test_health_is_serving_while_an_executor_is_connected(shared: Cluster) -> None:
    check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = shared.channel.unary_unary("/grpc.health.v1.Health/Check")
    for service in ("", "pagewire.v1.InferenceService"):
        answer = check(health_pb2.HealthCheckRequest(service=service).SerializeToString())
        assert health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.SERVING


def test_a_deadline_ends_the_call(fake_folder: Path, tmp_path: Path) -> None:
    with cluster(fake_folder, tmp_path, executors=0) as running:
        running.start_executor("--fake-step-s=0.05")
        with pytest.raises(grpc.RpcError) as failure:
            list(running.stub.GenerateStream(request([1], 300), timeout=0.3))
        assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert running.tokens([1, 2], 2) == [2, 3], "others are served"


def test_a_cancelled_call_gives_its_memory_back(fake_folder: Path, tmp_path: Path) -> None:
    with cluster(fake_folder, tmp_path, executors=0) as running:
        running.start_executor("--fake-step-s=0.01", "--num-blocks=8")
        call = running.stub.GenerateStream(request([1] * 100, 20))
        next(call)
        call.cancel()
        assert running.tokens([2] * 100, 2) == [100, 101], "needs the blocks that the cancelled call had"


def test_a_killed_executor_is_a_pause_and_not_a_gap(fake_folder: Path, tmp_path: Path) -> None:
    with cluster(fake_folder, tmp_path, executors=0) as running:
        first = running.start_executor("--fake-step-s=0.02")
        call = running.stub.GenerateStream(request([1] * 20, 60))
        tokens: list[int] = []
        killed = False
        for message in call:
            tokens.extend(message.delta.token_ids)
            if len(tokens) >= 10 and not killed:
                killed = True
                first.signal(signal.SIGKILL)
                running.start_executor()
        assert killed
        assert tokens == list(range(20, 80))


def test_a_frozen_executor_is_a_pause_and_what_it_says_when_it_thaws_is_not_heard(
    fake_folder: Path, tmp_path: Path
) -> None:
    with cluster(fake_folder, tmp_path, executors=0) as running:
        frozen = running.start_executor("--fake-step-s=0.02")
        call = running.stub.GenerateStream(request([1] * 20, 60))
        tokens: list[int] = []
        for message in call:
            tokens.extend(message.delta.token_ids)
            if len(tokens) >= 10 and len(running.executors) == 1:
                frozen.signal(signal.SIGSTOP)
                running.start_executor()
        assert tokens == list(range(20, 80))
        frozen.signal(signal.SIGCONT)
        with grpc.insecure_channel(running.admin) as operator:
            monitoring = monitoring_pb2_grpc.MonitoringServiceStub(operator)
            while len((status := monitoring.GetStatus(monitoring_pb2.GetStatusRequest())).executors) < 2:
                assert frozen.popen.poll() is None
                time.sleep(0.01)
        assert status.scheduler.executor_losses.unclean_ends == 1
        assert running.tokens([1, 2, 3], 4) == [3, 4, 5, 6]


def test_a_second_executor_of_the_same_name_takes_over_when_the_first_is_gone(
    fake_folder: Path, tmp_path: Path
) -> None:
    with cluster(fake_folder, tmp_path, executors=1) as running:
        second = Process(
            [
                *("executor", "--model", str(fake_folder), "--scheduler", running.link, "--name", "executor-0"),
                "--fake",
            ],
            tmp_path / "second.log",
        )
        running.executors.append(second)
        until_logged(second.log, "ALREADY_EXISTS", second)
        running.executors[0].signal(signal.SIGKILL)
        second.wait_ready()
        assert running.tokens([1, 2, 3], 4) == [3, 4, 5, 6]


def test_both_executors_of_a_pair_serve_and_either_may_leave(fake_folder: Path, tmp_path: Path) -> None:
    with cluster(fake_folder, tmp_path, executors=2) as running:
        results: list[list[int]] = []

        def ask(length: int) -> None:
            results.append(running.tokens([length] * length, 30))

        threads = [threading.Thread(target=ask, args=(10 + i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        running.executors[0].signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert sorted(results) == [list(range(10 + i, 40 + i)) for i in range(16)]
        assert running.executors[0].wait() == 0


def test_without_an_executor_the_call_fails_after_its_wait_and_says_when_to_come_back(
    fake_folder: Path, tmp_path: Path
) -> None:
    with cluster(fake_folder, tmp_path, executors=0, flags=["--executor-wait-s=0.1"]) as running:
        with pytest.raises(grpc.RpcError) as failure:
            running.tokens([1, 2], 2)
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        error = from_rpc_error(failure.value)
        assert isinstance(error, Unavailable)
        assert "no executor is connected" in str(error)
        assert error.retry_after_s == 1.0


def test_sigterm_lets_a_running_stream_end_and_takes_no_new_one(fake_folder: Path, tmp_path: Path) -> None:
    with cluster(fake_folder, tmp_path, executors=0) as running:
        running.start_executor("--fake-step-s=0.02")
        call = running.stub.GenerateStream(request([1] * 20, 40))
        next(call)
        running.scheduler.signal(signal.SIGTERM)
        tokens = [t for m in call for t in m.delta.token_ids]
        assert tokens == list(range(20, 60))
        assert running.scheduler.wait() == 0


def test_a_scheduler_that_comes_back_finds_its_executor_again(fake_folder: Path, tmp_path: Path) -> None:
    with cluster(fake_folder, tmp_path, executors=1) as running:
        running.scheduler.signal(signal.SIGKILL)
        running.scheduler.wait()
        again = Cluster(fake_folder, tmp_path)
        try:
            assert again.tokens([1, 2, 3], 4) == [3, 4, 5, 6]
        finally:
            again.close()


def test_a_scheduler_with_another_model_turns_the_executor_away(fake_folder: Path, tmp_path: Path) -> None:
    other = fake_model.write(tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text().replace("512", "256"))
    with cluster(fake_folder, tmp_path, executors=0) as running:
        running.model = other
        with pytest.raises(AssertionError, match="start both with the same model folder"):
            running.start_executor()
        assert running.executors[0].wait() == 78


def test_a_second_scheduler_on_the_same_port_is_refused(shared: Cluster, fake_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="port is taken"):
        Cluster(fake_folder, tmp_path, flags=["--listen", shared.address])


def test_an_open_address_is_refused_unless_insecure_is_typed(fake_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="--insecure"):
        Cluster(fake_folder, tmp_path, flags=["--listen", "0.0.0.0:0"])


def test_the_scheduler_process_never_loads_torch(shared: Cluster) -> None:
    shared.tokens([1, 2, 3], 3)
    maps = Path(f"/proc/{shared.scheduler.popen.pid}/maps").read_text()
    assert "grpc" in maps, "the test looks at the right thing"
    assert "torch" not in maps and "transformers" not in maps
