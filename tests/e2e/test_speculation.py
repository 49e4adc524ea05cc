"""Speculation over real processes: every control and every grammar give what they give without, in fewer steps."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from common.errors import InvalidRequest
from pagewire import Answer, Client
from protos import inference_pb2 as pb
from tests.e2e.cluster import Cluster
from tests.e2e.programs import PAGEWIRE, run
from tests.e2e.survivors import start_pair, through_a_kill
from tests.e2e.test_controls import DEFAULTS, MIXED, PROMPT
from tests.e2e.test_structured import KINDS

FLAGS = (
    "--speculate=ngram",
    "--max-drafts=4",
    "--step-overhead-tokens=64",
    "--num-blocks=24",
)
LOOPING: dict[str, Any] = {"allowed_token_ids": [64, 65, 66], "max_tokens": 60}  # so short of words it repeats itself

ASKED: dict[str, dict[str, Any]] = {
    **{name: {**DEFAULTS, **settings} for name, settings in MIXED.items()},
    **{name: {"token_ids": PROMPT, "seed": 11, "max_tokens": 120, **kind} for name, (kind, _) in KINDS.items()},
    "looping": {**DEFAULTS, **LOOPING, "logprobs": 2},
    "choices": {**DEFAULTS, **LOOPING, "temperature": 0.3, "n": 3},
    "stopped": {**DEFAULTS, **LOOPING, "stop": ["aba", "bcb", "cac", "bbb"], "min_tokens": 9},
}


@pytest.fixture(scope="module")
def speculating(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two executors that guess, with little room. The last test kills one of them."""
    running = Cluster(tiny, tmp_path_factory.mktemp("speculating"), flags=["--log-format=json"])
    try:
        start_pair(running, *FLAGS)
        yield running
    finally:
        running.close()


def ask(running: Cluster, settings: dict[str, Any]) -> Answer:
    with Client(running.address) as client:
        return client.generate(**settings)


def all_at_once(running: Cluster) -> dict[str, Answer]:
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(ASKED, pool.map(lambda settings: ask(running, settings), ASKED.values()), strict=True))


def heard(answer: Answer) -> list[tuple[Any, ...]]:
    return [(c.token_ids, c.text, c.logprobs, c.finish.reason, c.finish.exact) for c in answer.choices]


def test_every_answer_is_what_it_is_without(server: Cluster, speculating: Cluster) -> None:
    without, found = all_at_once(server), all_at_once(speculating)

    for name in ASKED:
        assert heard(found[name]) == heard(without[name]), name
    usage = found["looping"].finish.usage
    assert usage.accepted_tokens > 0
    assert usage.drafted_tokens >= usage.accepted_tokens
    assert without["looping"].finish.usage.drafted_tokens == 0


def test_a_request_may_do_without(speculating: Cluster) -> None:
    settings = {**DEFAULTS, **LOOPING}
    guessing, plain = ask(speculating, settings), ask(speculating, {**settings, "max_drafts": 0})

    assert plain.token_ids == guessing.token_ids
    assert plain.finish.usage.drafted_tokens == 0
    with pytest.raises(InvalidRequest, match=r"max_drafts: must be in \[0, 32\], got 33"):
        ask(speculating, {**settings, "max_drafts": 33})


def test_a_stream_that_was_cut_among_guesses_goes_on_with_and_without_them(speculating: Cluster) -> None:
    asked = pb.GenerateStreamRequest(
        request_id="guessed",
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.SamplingParams(temperature=0.3, seed=4, allowed_token_ids=[64, 65, 66], frequency_penalty=0.01),
        stopping=pb.StopConditions(max_tokens=60, ignore_eos=True),
    )
    _, *deltas, end = speculating.stub.GenerateStream(asked)
    whole = [token for message in deltas for token in message.delta.token_ids]
    assert end.finish.usage.accepted_tokens > 0

    for number in range(0, len(deltas), 4):
        asked.max_drafts = number % 8
        sent = [token for message in deltas[: number + 1] for token in message.delta.token_ids]
        point = pb.ResumePoint(choice=0, ticket=deltas[number].delta.ticket, token_ids=sent)
        _, *rest = speculating.stub.Resume(pb.ResumeRequest(request=asked, choices=[point]))
        assert sent + [token for message in rest[:-1] for token in message.delta.token_ids] == whole


def test_the_command_line_has_it(speculating: Cluster) -> None:
    asked = ["generate", "--address", speculating.address, "--raw", "--no-stats", "--max-drafts=33", "hi"]

    ended = run(*PAGEWIRE, *asked)

    assert ended.code == 1
    assert "max_drafts: must be in [0, 32], got 33" in ended.err


def test_answers_are_whole_when_blocks_run_out_and_an_executor_is_killed(server: Cluster, speculating: Cluster) -> None:
    names = ["frequency", "everything", "looping", "schema", "penalised"]
    asked = [{**ASKED[name], "max_tokens": 300} for name in names]
    without = [heard(ask(server, settings)) for settings in asked]

    answers = through_a_kill(speculating, asked)
    counted = speculating.counters()

    assert [heard(answer) for answer in answers] == without
    assert counted["moved"] > 0
    assert counted["preemptions"] > 0
    assert counted["accepted_tokens"] > 0
