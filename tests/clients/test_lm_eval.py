"""EleutherAI's lm-evaluation-harness scores the default model over HTTP as it does with Transformers in its process.

Over HTTP it sends the tokens of each prompt and its continuation with `echo` and `logprobs`, several at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.needed import needs
from tests.e2e.cluster import Cluster
from tests.e2e.gateways import Gateway

needs("lm_eval")

CHOICES: list[dict[str, Any]] = [
    {"text": "The capital of France is", "choices": ["Paris", "Rome", "a fish"], "gold": 0},
    {"text": "Two and two make", "choices": ["five", "four", "many blue horses"], "gold": 1},
    {"text": "Water freezes at zero degrees", "choices": ["Celsius", "Kelvin", "in the morning of the day"], "gold": 0},
    {"text": "Größe und Gewicht: 日本", "choices": ["は", "語です。", "!"], "gold": 1},
]
WORDS: list[dict[str, Any]] = [
    {"text": "Q: What is the capital of Italy?\nA:", "gold": "Rome"},
    {"text": "Count: one, two, three,", "gold": "four"},
]
SHARED: dict[str, Any] = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{text}}", "num_fewshot": 0}
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "choose": (
        CHOICES,
        {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    ),
    "go_on": (
        WORDS,
        {
            "output_type": "generate_until",
            "doc_to_target": "gold",
            "generation_kwargs": {"until": ["\n\n", "Q:"], "do_sample": False, "max_gen_toks": 24},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
    "read": (
        WORDS,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    ),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks whose documents lie beside them: nothing is fetched."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (documents, task) in TASKS.items():
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, documents)))
        files = {"data_files": {"test": str(folder / f"{name}.json")}}
        told = {"task": name, **SHARED, **task, "dataset_kwargs": files}
        (folder / f"{name}.yaml").write_text(json.dumps(told))  # JSON is YAML
    return folder


def evaluate(tasks: Path, model: str, *arguments: str, out: Path) -> dict[str, list[Any]]:
    """What a model answered to each document of each task, and what that was worth."""
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", model, "--model_args", ",".join(arguments)),
        *("--tasks", ",".join(TASKS), "--include_path", str(tasks), "--device=cpu", "--batch_size=2"),
        *("--output_path", str(out), "--log_samples"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out.parent / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, list[Any]] = {}
    for name in TASKS:
        (file,) = out.rglob(f"samples_{name}_*.jsonl")
        found[name] = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return found


def test_scores_over_http_are_those_of_transformers(
    tasks: Path, smollm: Cluster, gateway: Gateway, tmp_path: Path
) -> None:
    folder = smollm.model
    ours = evaluate(
        tasks,
        "local-completions",
        *(f"model={smollm.model.name}", f"base_url=http://{gateway.http}/v1/completions"),
        *("tokenizer_backend=huggingface", f"tokenizer={folder}", "max_length=2048", "num_concurrent=2"),
        out=tmp_path / "ours",
    )
    theirs = evaluate(tasks, "hf", f"pretrained={folder}", "dtype=float32", out=tmp_path / "theirs")

    for sample, other in zip(ours["choose"], theirs["choose"], strict=True):
        for [score], [expected] in zip(sample["resps"], other["resps"], strict=True):
            assert float(score[0]) == pytest.approx(float(expected[0]), abs=1e-3)
            assert score[1] == expected[1]
        assert (sample["acc"], sample["acc_norm"]) == (other["acc"], other["acc_norm"])
    assert [sample["resps"] for sample in ours["go_on"]] == [sample["resps"] for sample in theirs["go_on"]]
    for sample, other in zip(ours["read"], theirs["read"], strict=True):
        assert float(sample["resps"][0][0]) == pytest.approx(float(other["resps"][0][0]), abs=1e-3)
