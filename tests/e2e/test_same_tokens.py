"""Served tokens are Transformers' tokens: SmolLM2-135M in float32, however the work is cut, shared or moved."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from common.model_folder import read_model_folder
from protos import inference_pb2 as pb
from protos import monitoring_pb2, monitoring_pb2_grpc
from services.text import Tokenizer
from tests.e2e import reference
from tests.e2e.cluster import Cluster

NUM_NEW = 64
ONE_THREAD = ["--threads=1"]  # where two executors share the machine
LENGTHS = [5, 6, 7, 9, 12, 15, 16, 17, 24, 31, 32, 33, 40, 48, 56, 64, 72, 90, 100, 128, 180, 256, 400, 1500]
TEXT = """
The harbour master kept two ledgers. In the first he wrote every ship that came in, its flag, its cargo and the hour;
in the second he wrote what the captains told him, and he never let anybody read it. When the great storm of that autumn
closed the bay for nine days, no ship came in at all, and so the second ledger began to fill with other things: the
price of bread, the height of the water on the third step of the quay, the names of the children who carried messages
between the warehouses. A list of what a small town needs is longer than it looks: salt, lamp oil, rope, nails, flour,
paper, medicine, wool, glass, tar, seed and patience. def ledger(entries): return {hour: ship for hour, ship in entries}
On the tenth morning the wind turned. 1, 2, 3, 5, 8, 13, 21, 34 fishing boats left before noon, and the harbour master
opened the first ledger again. "What did you write while we were gone?" asked the youngest of the captains. He said that
he had written nothing that could be sold, and nothing that he would want to forget.
"""


@pytest.fixture(scope="module")
def prompts(default_model: Path) -> list[list[int]]:
    """24 prompts of 5 to 1,500 tokens; the odd ones share beginnings, the even ones do not."""
    ids = Tokenizer(default_model / "tokenizer.json").encode(TEXT * 10)
    return [ids[:n] if i % 2 else ids[37 * i : 37 * i + n] for i, n in enumerate(LENGTHS)]


@contextmanager
def serving(
    model: Path, folder: Path, *, scheduler: Sequence[str] = (), executor: Sequence[str] = (), executors: int = 1
) -> Iterator[Cluster]:
    running = Cluster(model, folder, flags=["--log-format=json", *scheduler])
    try:
        for _ in range(executors):
            running.start_executor("--dtype=float32", "--max-sequences=32", *executor, fake=False)
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def server(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One that has no flags of a test's own."""
    with serving(default_model, tmp_path_factory.mktemp("server")) as running:
        yield running


def cached_tokens(running: Cluster) -> int:
    with grpc.insecure_channel(running.admin) as channel:
        status = monitoring_pb2_grpc.MonitoringServiceStub(channel).GetStatus(monitoring_pb2.GetStatusRequest())
    return status.scheduler.cached_prompt_tokens


def all_at_once(running: Cluster, prompts: list[list[int]], **sampling: float) -> list[list[int]]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda p: running.tokens(p, NUM_NEW, **sampling), prompts))


@pytest.fixture(scope="module")
def expected(
    default_model: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> list[list[int]]:
    """What is served one at a time, by two servers: half the minutes. The first test asks whether that is right."""

    def serve(share: int) -> list[list[int]]:
        with serving(default_model, tmp_path_factory.mktemp("alone"), executor=ONE_THREAD) as running:
            return [running.tokens(prompt, NUM_NEW) for prompt in prompts[share::2]]

    with ThreadPoolExecutor(2) as pool:
        shares = list(pool.map(serve, range(2)))
    return [shares[i % 2][i // 2] for i in range(len(prompts))]


def test_one_at_a_time_they_are_what_transformers_says(
    default_model: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    assert all(len(tokens) == NUM_NEW for tokens in expected)
    said = reference.says(default_model, prompts, expected)
    assert said.in_one_pass == expected
    assert said.by_its_own_loop == expected[0]


def test_all_at_once(server: Cluster, prompts: list[list[int]], expected: list[list[int]]) -> None:
    before = cached_tokens(server)
    assert all_at_once(server, prompts) == expected
    assert all_at_once(server, prompts) == expected, "again, with every prompt cached"
    assert cached_tokens(server) - before > sum(LENGTHS) * 0.9


def test_without_prefix_caching(
    default_model: Path, tmp_path: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with serving(default_model, tmp_path, scheduler=["--no-prefix-caching"]) as running:
        assert all_at_once(running, prompts) == expected
        assert running.counters()["cached_prompt_tokens"] == 0


def test_with_a_pool_so_small_that_sequences_are_preempted(
    default_model: Path, tmp_path: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    blocks = (max(LENGTHS) + NUM_NEW) // 16 + 3
    flags = ["--watermark=0"]
    with serving(default_model, tmp_path, scheduler=flags, executor=[f"--num-blocks={blocks}"]) as running:
        assert all_at_once(running, prompts) == expected
        assert running.counters()["preemptions"] > 0


def test_with_a_token_budget_of_sixteen(
    default_model: Path, tmp_path: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with serving(default_model, tmp_path, scheduler=["--token-budget=16"]) as running:
        assert all_at_once(running, prompts) == expected


def test_over_two_executors_of_which_one_is_killed(
    default_model: Path, tmp_path: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with (
        serving(default_model, tmp_path, executors=2, executor=ONE_THREAD) as running,
        ThreadPoolExecutor(len(prompts)) as pool,
    ):
        futures = [pool.submit(running.tokens, prompt, NUM_NEW) for prompt in prompts]
        futures[0].result()
        running.executors[0].signal(signal.SIGKILL)
        assert [future.result() for future in futures] == expected


def test_seeded_sampling_is_the_same_alone_in_a_crowd_preempted_and_elsewhere(
    default_model: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    some = prompts[:18:3]
    sampling = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "seed": 1234}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with serving(default_model, tmp_path / "one", executor=["--num-blocks=30"]) as running:
        alone = [running.tokens(prompt, NUM_NEW, **sampling) for prompt in some]
        assert all_at_once(running, some, **sampling) == alone
        assert running.counters()["preemptions"] > 0
    with serving(default_model, tmp_path / "two", executors=2, executor=ONE_THREAD) as running:
        assert all_at_once(running, some, **sampling) == alone


def test_the_choices_of_one_request_differ_and_each_is_reproducible(server: Cluster) -> None:
    request = pb.GenerateRequest(
        text="Once upon a time",
        sampling=pb.SamplingParams(temperature=1.0, seed=5, n=4),
        stopping=pb.StopConditions(max_tokens=20, ignore_eos=True),
    )
    first = [list(choice.token_ids) for choice in server.stub.Generate(request).choices]
    again = [list(choice.token_ids) for choice in server.stub.Generate(request).choices]
    assert first == again
    assert len({tuple(choice) for choice in first}) == 4


def test_the_context_that_the_server_states_is_the_models(default_model: Path, server: Cluster) -> None:
    model = server.stub.GetModel(pb.GetModelRequest())
    assert model.max_model_len == read_model_folder(default_model).max_model_len
    assert model.chat
