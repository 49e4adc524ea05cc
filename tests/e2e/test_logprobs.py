"""Log-probabilities over real processes: Transformers' own, whatever is asked beside them and whatever happens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pagewire import Answer, Client
from pagewire.answers import TokenLogprobs
from protos import inference_pb2 as pb
from tests.e2e.cluster import Cluster
from tests.e2e.programs import PAGEWIRE, run
from tests.executor.tiny_models import load_plain

PROMPT = [70, 71, 72, 5, 9, 64, 3, 300, 11, 12, 13]


def ask(running: Cluster, **settings: Any) -> Answer:
    defaults = {"token_ids": PROMPT, "temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "seed": 11}
    with Client(running.address) as client:
        return client.generate(**{**defaults, **settings})


def transformers_logprobs(folder: Path, tokens: Sequence[int]) -> torch.Tensor:
    """(tokens, vocabulary): of what comes behind each token."""
    with torch.inference_mode():
        logits: torch.Tensor = load_plain(folder)(torch.tensor([[*tokens]])).logits[0]
    return logits.log_softmax(-1)


def check(told: Sequence[TokenLogprobs], tokens: Sequence[int], expected: torch.Tensor, num_top: int) -> None:
    """Each is what Transformers says of the token, by the row before it."""
    assert [each.token.token_id for each in told] == list(tokens)
    for each, row in zip(told, expected, strict=True):
        assert each.token.logprob == pytest.approx(float(row[each.token.token_id]), abs=1e-4)
        top = row.topk(num_top)
        assert [other.token_id for other in each.top] == top.indices.tolist()
        assert [other.logprob for other in each.top] == pytest.approx(top.values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.5, "logit_bias": {9: 5.0}}],
    ids=["greedy", "with controls"],
)
def test_prompt_and_answer_are_as_likely_as_transformers_says(
    server: Cluster, tiny: Path, settings: dict[str, Any]
) -> None:
    answer = ask(server, logprobs=5, prompt_logprobs=3, **settings)

    expected = transformers_logprobs(tiny, [*PROMPT, *answer.token_ids])
    assert answer.prompt_logprobs[0].token.logprob is None
    check(answer.prompt_logprobs[1:], PROMPT[1:], expected[: len(PROMPT) - 1], 3)
    check(answer.logprobs, answer.token_ids, expected[len(PROMPT) - 1 : -1], 5)
    assert answer.token_ids == ask(server, **settings).token_ids


def test_the_texts_of_the_tokens_are_the_text(server: Cluster) -> None:
    answer = ask(server, logprobs=0)

    assert b"".join(each.token.text for each in answer.logprobs).decode(errors="replace").startswith(answer.text)
    assert all(not each.top for each in answer.logprobs)


def test_a_text_is_scored_as_evaluations_do_also_behind_a_prompt_that_is_cached(server: Cluster, tiny: Path) -> None:
    context, continuation = [71] * 40, [5, 6, 7]
    ask(server, token_ids=[*context, *continuation], max_tokens=1)  # all of it is cached now

    answer = ask(server, token_ids=[*context, *continuation], prompt_logprobs=0, max_tokens=1)

    rows = transformers_logprobs(tiny, [*context, *continuation])
    expected = sum(float(rows[len(context) - 1 + n][token]) for n, token in enumerate(continuation))
    told = [each.token.logprob for each in answer.prompt_logprobs[len(context) :]]
    assert math.fsum(value for value in told if value is not None) == pytest.approx(expected, abs=1e-3)
    assert answer.usage.cached_prompt_tokens == 0
    assert ask(server, token_ids=[*context, 9], max_tokens=1).usage.cached_prompt_tokens == 40


def test_every_choice_is_told_its_own(server: Cluster) -> None:
    answer = ask(server, n=3, temperature=1.0, logprobs=1, prompt_logprobs=0)

    assert len(answer.prompt_logprobs) == len(PROMPT)
    for choice in answer.choices:
        assert tuple(each.token.token_id for each in choice.logprobs) == choice.token_ids


def test_log_probabilities_hold_when_blocks_run_out(server: Cluster, tiny: Path, tmp_path: Path) -> None:
    prompts = [[n, *PROMPT, n] for n in range(8)]

    def all_at_once(running: Cluster) -> list[Answer]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(
                pool.map(lambda p: ask(running, token_ids=p, max_tokens=40, logprobs=2, prompt_logprobs=2), prompts)
            )

    undisturbed = all_at_once(server)
    running = Cluster(tiny, tmp_path, flags=["--log-format=json", "--token-budget=24"])
    try:
        crowded = running.crowded(len(prompts), lambda: all_at_once(running), "--num-blocks=12")
        preemptions = running.counters()["preemptions"]
    finally:
        running.close()

    assert preemptions > 0
    for before, after in zip(undisturbed, crowded, strict=True):
        assert (before.prompt_logprobs, before.logprobs) == (after.prompt_logprobs, after.logprobs)


def test_a_fake_executor_tells_them_too(fake_folder: Path, tmp_path: Path) -> None:
    running = Cluster(fake_folder, tmp_path)
    try:
        running.start_executor()
        answer = ask(running, token_ids=[1, 2, 3], max_tokens=2, logprobs=1)
    finally:
        running.close()

    assert [(each.token.token_id, each.token.logprob) for each in answer.logprobs] == [(3, -3.0), (4, -4.0)]
    assert [[other.token_id for other in each.top] for each in answer.logprobs] == [[0], [0]]


def test_the_command_line_shows_a_line_for_each_token(server: Cluster) -> None:
    asked = ["generate", "--address", server.address, "--raw", "--no-stats", "--temperature=0", "--max-tokens=2"]

    ended = run(*PAGEWIRE, *asked, "--allowed-token-ids=64", "--logprobs=2", "--prompt-logprobs=0", "hi")

    text, *lines = ended.out.splitlines()
    assert (ended.code, text) == (0, "aa"), ended.err
    assert [line.split()[-1] for line in lines[:2]] == ["'h'", "'i'"]
    assert all(" 'a'  [" in line for line in lines[2:]) and len(lines) == 4


def test_the_unary_call_tells_what_the_stream_does(server: Cluster) -> None:
    answer = ask(server, logprobs=2, prompt_logprobs=1)
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1),
        stopping=pb.StopConditions(max_tokens=12, ignore_eos=True),
    )
    unary = server.stub.Generate(request)

    assert [each.token.logprob for each in unary.choices[0].logprobs] == [
        each.token.logprob for each in answer.logprobs
    ]
    assert len(unary.prompt_logprobs) == len(PROMPT)
