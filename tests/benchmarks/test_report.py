"""What a table says of results."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tests.benchmarks.metrics import summarize
from tests.benchmarks.playing import Answer
from tests.benchmarks.report import markdown
from tests.benchmarks.results import Results
from tests.benchmarks.workloads import Request, Workload


def run(engine: str, tpot_s: float, *, foreign: float = 0.0, failed: bool = False) -> dict[str, Any]:
    request = Request(prompt=[1] * 128, max_tokens=101)
    answers = [Answer(request=request, arrivals_s=[0.1 + i * tpot_s for i in range(101)], num_tokens=101)]
    if failed:
        answers.append(Answer(request=request, error="gone"))
    return {
        "engine": engine,
        "workload": "w2",
        "run": 0,
        "disturbed": foreign > 0.05,
        "account": {"server_s": {engine: 0.101}, "client_s": 0.0202, "foreign": foreign},
        "summary": asdict(summarize(Workload(name="w2", requests=[request] * len(answers)), answers)),
    }


def results(*runs: dict[str, Any]) -> Results:
    about = {
        "date": "2000-01-01",
        "command": "bench",
        "model": "tiny",
        "machine": {"cpu": "abacus", "cores": 2, "memory_gib": 1, "kernel": "0"},
        "versions": {},
    }
    made = Results(about=about, runs=list(runs))
    for name in dict.fromkeys(r["engine"] for r in runs):
        made.engines[name] = {
            "dialect": "pagewire" if name == "ours" else "vllm",
            "precision": "bf16",
            "version": "",
            "note": "",
            "weight_bits": 16,
            "kv_bits": 16,
        }
    return made


def test_the_best_peer_is_the_one_to_beat() -> None:
    table = markdown(results(run("ours", 0.010), run("slow", 0.020), run("fast", 0.012)))

    assert "| W2 | ms a token | 10.0 | 12.0 (fast) | 1.20 | 1.3 | no |" in table
    assert "| W2 | first token ms | 100 | 100 (slow) | 1.00 | 1 | yes |" in table


def test_a_cell_is_the_median_of_the_runs_that_nobody_disturbed() -> None:
    alone = [run("ours", seconds) for seconds in (0.010, 0.013, 0.011)]
    table = markdown(results(*alone, run("ours", 0.5, foreign=0.4), run("ours", 0.5, failed=True)))

    assert "| ours | 11.0 [10.0-13.0] |" in table
    assert "| 5 | 1 failed |" in table
    assert "1 of 5 runs were disturbed" in table


def test_where_every_run_was_disturbed_the_least_disturbed_are_shown_and_marked() -> None:
    foreign = [run("ours", 0.010 * n, foreign=0.1 * n) for n in range(1, 6)]

    assert "| ours | 20.0 [10.0-30.0]* |" in markdown(results(*foreign))


def test_the_share_of_the_floor_is_of_the_fastest_that_memory_was_read() -> None:
    made = results(run("ours", 0.010))
    made.shape = {
        "layers": 2, "hidden": 4, "intermediate": 8, "heads": 2, "kv_heads": 1, "head_dim": 2, "vocabulary": 10,
    }  # fmt: skip
    made.limits = [
        [{"threads": 1, "read_gb_s": 9.0, "matrix_gflop_s": {"512": 1.0}},
         {"threads": 2, "read_gb_s": speed, "matrix_gflop_s": {"512": 1.0}}] for speed in (1e-6, 1e-3)
    ]  # fmt: skip
    # 656 bytes of weights, and 16 for each of 256 tokens on average, at 1e-3 GB/s
    assert "| ours | a token of W2 over memory | 4.75 | 10.0 | 48% |" in markdown(made)


def test_processor_time_is_told_for_each_token_and_process() -> None:
    table = markdown(results(run("ours", 0.010)))

    assert "| ours | ours | 1,000 |" in table
    assert "| ours | client | 200 |" in table


def test_results_come_back_from_their_file_as_they_were(tmp_path: Any) -> None:
    made = results(run("ours", 0.010))
    made.save(tmp_path / "results.json")

    assert markdown(Results.load(tmp_path / "results.json")) == markdown(made)
