"""What is asked is the same work for everyone, and new to every cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks.workloads import Workload, build, spelled_out, words

POOL = range(1000, 9000)


def shape(workload: Workload) -> list[tuple[int, int, float]]:
    return [(len(request.prompt), request.max_tokens, request.at_s) for request in workload.requests]


@pytest.mark.parametrize("name", ["w1", "w2", "w3@2", "w4", "w5", "prefill@512", "warmup"])
def test_the_same_run_is_the_same_work_again(name: str) -> None:
    assert build(name, POOL, run=3) == build(name, POOL, run=3)


@pytest.mark.parametrize("name", ["w1", "w2", "w4", "w5", "prefill@512"])
def test_another_run_has_the_same_shape_and_other_words(name: str) -> None:
    first, second = build(name, POOL, run=0), build(name, POOL, run=1)

    assert shape(first) == shape(second)
    assert not {tuple(r.prompt[:16]) for r in first.requests} & {tuple(r.prompt[:16]) for r in second.requests}


def test_another_seed_is_another_shape() -> None:
    assert shape(build("w1", POOL, seed=0)) != shape(build("w1", POOL, seed=1))


def test_w3_offers_the_rate_it_is_named_for_and_each_run_another_schedule() -> None:
    times = [request.at_s for request in build("w3@4", POOL).requests]

    assert len(times) == 120 and times == sorted(times)
    assert 20 < times[-1] < 40
    assert times != [request.at_s for request in build("w3@4", POOL, run=1).requests]


def test_w4_shares_its_prefix_and_nothing_else() -> None:
    prompts = [tuple(request.prompt) for request in build("w4", POOL).requests]

    assert len({prompt[:1024] for prompt in prompts}) == 1
    assert len({prompt[1024:] for prompt in prompts}) == len(prompts) == 32


def test_w5_mixes_short_streams_with_long_prompts_that_come_later() -> None:
    long = [request for request in build("w5", POOL).requests if request.kind == "long"]

    assert [(len(request.prompt), request.at_s) for request in long] == [(4096, 1.5), (4096, 2.5), (4096, 3.5)]


def test_names_are_spelled_out_and_others_refused() -> None:
    assert spelled_out("w1,w3") == ["w1", "w3@0.5", "w3@1", "w3@2", "w3@4"]
    with pytest.raises(ValueError, match="no workload 'w9'"):
        build("w9", POOL)


def test_prompts_are_made_of_whole_words(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    vocabulary = {"Ġhouse": 7, "house": 1, "Ġto": 2, "ĠHouse": 3, "Ġtree": 5, "Ġx1y": 6}
    tokenizer.write_text(json.dumps({"model": {"vocab": vocabulary}}))

    assert words(tokenizer) == [5, 7]

    tokenizer.write_text(json.dumps({"model": {"vocab": {"house": 1}}}))
    with pytest.raises(ValueError, match="no token is a space and a word"):
        words(tokenizer)


def test_prefills_go_one_at_a_time_and_the_rest_as_they_are_scheduled() -> None:
    assert build("prefill@512", POOL).one_at_a_time
    assert replace(build("w1", POOL), one_at_a_time=False) == build("w1", POOL)
