"""Beam search over real processes with a tiny model: through the loss of an executor, of a grammar, typed by hand."""

from __future__ import annotations

import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from pagewire import Answer, Client, FinishReason
from tests.e2e.cluster import Cluster
from tests.e2e.programs import PAGEWIRE, run
from tests.executor.tiny_models import load_plain

SEARCH: dict[str, Any] = {
    "token_ids": [70, 71, 72, 5, 9],
    "beams": {"width": 4, "length_penalty": 0.5, "early_stopping": "never"},
    "n": 3,
    "max_tokens": 200,
    "ignore_eos": True,
    "repetition_penalty": 1.2,
    "seed": 1,
}
NO_TOKEN = 1 << 30
STREAM: dict[str, Any] = {"token_ids": [70, 71, 72], "max_tokens": 400, "ignore_eos": True, "seed": 11}


def search(running: Cluster, **changes: Any) -> Answer:
    with Client(running.address) as client:
        return client.generate(**{**SEARCH, **changes})


def found(answer: Answer) -> list[tuple[tuple[int, ...], float | None]]:
    return [(choice.token_ids, choice.finish.score) for choice in answer.choices]


def test_a_search_finds_the_same_when_its_executor_is_killed(server: Cluster, tiny: Path, tmp_path: Path) -> None:
    undisturbed = [search(server, seed=1), search(server, token_ids=[1, 2, 3])]
    running = Cluster(tiny, tmp_path, flags=["--log-format=json"])
    try:
        for _ in range(2):
            running.start_executor("--dtype=float32", "--threads=1", fake=False)
        with Client(running.address) as client, client.stream(**STREAM) as stream, ThreadPoolExecutor(2) as pool:
            next(stream)
            searches = [pool.submit(search, running), pool.submit(search, running, token_ids=[1, 2, 3])]
            next(stream)
            running.executors[0].signal(signal.SIGKILL)
            for _ in stream:
                pass
            answers = [each.result() for each in searches]
    finally:
        running.close()

    assert [found(answer) for answer in answers] == [found(answer) for answer in undisturbed]
    assert all(choice.finish.exact for answer in answers for choice in answer.choices)
    scores = [score for _, score in found(undisturbed[0])]
    assert scores == sorted(scores, key=lambda score: -(score or 0.0))


def test_a_stop_string_ends_beams_as_it_does_in_transformers(server: Cluster, tiny: Path) -> None:
    asked: dict[str, Any] = {"max_tokens": 24, "n": 4}
    free = search(server, **asked).text
    stop = next(letter for letter in free[4:] if "!" <= letter <= "~")

    ours = search(server, **asked, stop=stop)

    fast: Any = PreTrainedTokenizerFast
    made = load_plain(tiny).generate(
        torch.tensor([SEARCH["token_ids"]]),
        attention_mask=torch.ones(1, len(SEARCH["token_ids"]), dtype=torch.long),
        num_beams=4,
        num_return_sequences=4,
        length_penalty=0.5,
        early_stopping="never",
        repetition_penalty=1.2,
        eos_token_id=[NO_TOKEN],
        pad_token_id=0,
        do_sample=False,
        max_new_tokens=24,
        stop_strings=[stop],
        tokenizer=fast(tokenizer_file=str(tiny / "tokenizer.json")),
    )
    expected = [
        tuple(token for token in sequence[len(SEARCH["token_ids"]) :] if token != NO_TOKEN)
        for sequence in made.tolist()
    ]
    assert [choice.token_ids for choice in ours.choices] == expected
    assert any(choice.finish.reason is FinishReason.STOP_STRING for choice in ours.choices)
    assert all(stop not in choice.text for choice in ours.choices)


def test_every_answer_of_a_search_is_of_its_grammar(server: Cluster) -> None:
    answer = search(server, ignore_eos=False, regex="(ab|cd|ef){3}[0-9]{2}")

    assert all(re.fullmatch("(ab|cd|ef){3}[0-9]{2}", choice.text) for choice in answer.choices)
    assert len({choice.text for choice in answer.choices}) == 3


def test_the_command_line_searches(server: Cluster) -> None:
    asked: dict[str, Any] = {"allowed_token_ids": [64, 65, 66], "max_tokens": 6}
    with Client(server.address) as client:
        text = client.generate("hi", beams={"width": 3, "length_penalty": 2, "early_stopping": True}, **asked).text

    ended = run(
        *PAGEWIRE, "generate", "--address", server.address, "--raw", "--no-stats", "--max-tokens=6",
        "--allowed-token-ids=64,65,66", "--beams=3", "--length-penalty=2", "--early-stopping=full", "hi",
    )  # fmt: skip

    assert (ended.code, ended.out.strip()) == (0, text), ended.err
