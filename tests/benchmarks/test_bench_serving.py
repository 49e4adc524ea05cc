"""The whole benchmark, against servers that make up their tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import bench_serving, engines
from tests.benchmarks.engines import EngineMissing
from tests.e2e import fake_model

TABLE = """
[ours]
dialect = "pagewire"
precision = "none"
command = ["${PYTHON}", "-m", "services", "serve", "--model", "${MODEL}", "--listen", "127.0.0.1:${PORT}", "--fake"]

[other]
dialect = "vllm"
precision = "none"
note = "makes up its tokens"
command = ["${PYTHON}", "-m", "tests.benchmarks.fake_openai", "${PORT}", "vllm"]
version = ["${PYTHON}", "-c", "print('Fake 7')"]

[failing]
like = "other"
dialect = "llama"
command = ["${PYTHON}", "-m", "tests.benchmarks.fake_openai", "${PORT}", "llama", "4"]

[nowhere]
like = "other"
command = ["${FOLDER_OF_NOWHERE}/server"]

[broken]
like = "other"
command = ["${PYTHON}", "-c", "import sys; sys.exit('I am broken')"]
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "engines.toml"
    path.write_text(TABLE)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The fake model, with words in its vocabulary and room for a prompt of W4."""
    folder = fake_model.write(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    spelled = {token: "Ġ" + token.translate(str.maketrans("0123456789", "abcdefghij")) for token in vocabulary}
    tokenizer["model"]["vocab"] = {
        spelled[token] if token.startswith("filler") else token: id for token, id in vocabulary.items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def bench(model: Path, table: Path, out: Path, *arguments: str) -> dict[str, Any]:
    """Run it, and read what it has written."""
    shared = ["--model", str(model), "--table", str(table), "--out", str(out), "--quiet-wait-s", "0", "--no-limits"]
    assert bench_serving.main([*shared, "--repeats", "0", *arguments]) == 0
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def test_engines_take_turns_on_the_same_work(
    model: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench(
        model, table, tmp_path / "out", "--engines", "ours", "--peers", "other,failing,nowhere,broken",
        "--workloads", "w2,w4", "--runs", "2",
    )  # fmt: skip
    played = [(run["engine"], run["workload"], run["run"]) for run in found["runs"]]
    assert played == [(e, w, r) for r in range(2) for e in ("ours", "other", "failing") for w in ("w2", "w4")]
    for run in found["runs"]:
        asked = {"w2": 1, "w4": 32}[run["workload"]]
        lost = 8 if (run["engine"], run["workload"]) == ("failing", "w4") else 0  # each fourth
        summary = run["summary"]
        assert (summary["requests"], summary["failed"], summary["short_of_asked"]) == (asked, lost, 0)
        assert summary["output_tokens"] == (asked - lost) * {"w2": 256, "w4": 32}[run["workload"]]
    assert all(start["ready_s"] > 0 and start["after"]["pss_mib"] > 0 for start in found["starts"])
    assert found["runs"][0]["account"]["server_s"].keys() == {
        "services serve",
        "services scheduler",
        "services executor",
    }
    assert found["left_out"] == {
        "nowhere": "nowhere: FOLDER_OF_NOWHERE is not set",
        "broken": "broken: ended with exit code 1; its log ends 'I am broken'",
    }

    said = capsys.readouterr().out
    assert "ours · w4 · run 2: first token " in said
    assert "8 of 32 failed: RequestFailed: HTTP 503: no room" in said
    report = (tmp_path / "out" / "RESULTS.md").read_text()
    assert "**other** (none); Fake 7; makes up its tokens" in report
    assert "Left out: nowhere: FOLDER_OF_NOWHERE is not set" in report
    assert "## none: against the best peer" in report
    assert str(model) not in json.dumps(found["engines"])
    assert (tmp_path / "out" / "results.svg").read_text().startswith("<?xml")


def test_an_engine_is_like_another_with_more_arguments(table: Path) -> None:
    with table.open("a") as file:
        file.write('[more]\nlike = "failing"\narguments = ["--x"]\nenvironment = { A = "1" }\n')
    (engine,) = engines.read(["more"], table)

    assert (engine.dialect, engine.note) == ("llama", "makes up its tokens")
    assert (engine.command[-1], engine.arguments, engine.environment) == ("4", ["--x"], {"A": "1"})


def test_a_name_that_is_not_in_the_table_is_refused_with_those_that_are(table: Path) -> None:
    with pytest.raises(EngineMissing, match="mine: not in the table of engines, which has ours, other, failing"):
        engines.read(["mine"], table)


def test_the_table_of_engines_can_be_read() -> None:
    names = ["pagewire-bf16", "pagewire-int8", "pagewire-int4", "llama-bf16", "llama-q8_0", "vllm-bf16"]

    assert [engine.name for engine in engines.read(names)] == names
